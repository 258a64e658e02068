"""`report.html`: a run as one page that needs nothing else, for a reviewer, a paper or a pull request.

One file without a network: the matrix as a heat map that is a real table, VSR over alpha with its intervals and the
skills under it, critical coefficients, controls, gates, and of every cell the numbers and the command that reruns it.
Filters are a small script; everything can be read without it, on a phone, in the dark, by a screen reader and in print.

The page's content security policy admits its own style sheet and script by their digests and nothing else, so that a
text which got past the escaping could still not run. Matplotlib and jinja2 are loaded when a page is made.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from importlib import resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Template
    from markupsafe import Markup

    from mergeguard.matrix.outcome import Results


def to_html(results: Results) -> str:
    """The page: a whole document of HTML, in which every text of the results is escaped.

    The same results give the same page, whatever style of matplotlib's the user has.

    Raises:
        MergeguardError: matplotlib, which draws the curves, does not load.
    """
    from markupsafe import Markup

    from mergeguard.reports.html.page import make_page

    style, script = _file("report.css"), _file("report.js")
    policy = "; ".join(
        (
            "default-src 'none'",
            f"style-src '{_digest(style)}'",
            f"script-src '{_digest(script)}'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    page = make_page(results)
    # Our own files, and curves that hold nothing of the results but escaped labels, are markup already.
    return _template().render(page=page, style=Markup(style), script=Markup(script), policy=policy) + "\n"  # noqa: S704


@functools.cache
def _template() -> Template:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["breakable"] = _breakable
    return environment.from_string(_file("report.html.j2"))


def _breakable(text: str) -> Markup:
    """`text`, escaped, which may go on in a new line after the signs that names and parameters are made of."""
    from markupsafe import Markup

    return Markup("<wbr>").join(re.split(r"(?<=[_(,=])(?=[^_(,=])", text))


@functools.cache
def _file(name: str) -> str:
    return resources.files("mergeguard.reports.html").joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"

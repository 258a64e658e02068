"""The curves of one row of the matrix: VSR (or score) over alpha with its intervals, and the skills kept under it."""

from __future__ import annotations

import io
import logging
import math
from contextlib import contextmanager
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from mergeguard.errors import MergeguardError
from mergeguard.matrix.outcome import LOST, OVERCLAIMS, SURVIVED, UNDECIDABLE
from mergeguard.matrix.verdict import KEPT_BY_A_THEFT
from mergeguard.reports import view
from mergeguard.reports.html.svg import ROLES, SKILL_COLOURS, for_page

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mergeguard.matrix.outcome import Outcome

    _Cells = Sequence[tuple[float, Outcome]]

DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))
"""Of the first skills, of those after `SKILL_COLOURS`, and of the rest."""
MARKERS = {SURVIVED: ("o", 5.2), OVERCLAIMS: ("^", 6.4), LOST: ("X", 6.2), UNDECIDABLE: ("D", 5.2)}
"""The shapes of thefts and their sizes in points. What is no theft is a hollow circle."""
_SIZE = (3.3, 2.5)  # inches
_STYLE: dict[Any, Any] = {  # matplotlib types its names as literals, which differ by version
    "svg.fonttype": "none",  # text stays text: it can be searched, read aloud and take the page's font
    "svg.hashsalt": "mergeguard",  # the same results give the same bytes
    "font.size": 8,
    "axes.linewidth": 0.7,
    "axes.edgecolor": ROLES["rule"],
    "axes.labelcolor": ROLES["ink"],
    "text.color": ROLES["ink"],
    "xtick.color": ROLES["rule"],
    "ytick.color": ROLES["rule"],
    "xtick.labelcolor": ROLES["muted"],
    "ytick.labelcolor": ROLES["muted"],
    "grid.color": ROLES["rule"],
    "grid.linewidth": 0.4,
    "patch.edgecolor": ROLES["ink"],
}


@contextmanager
def drawing() -> Iterator[None]:
    """Load matplotlib and give it our style, whatever the user's own is; whoever draws does so in here.

    Nothing is printed: where matplotlib can keep no cache of fonts it says so in its log, and works without.

    Raises:
        MergeguardError: matplotlib does not load.
    """
    log = logging.getLogger("matplotlib")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        try:
            import matplotlib as mpl
        except (ImportError, OSError, ValueError) as error:
            raise MergeguardError(f"report.html needs matplotlib, which does not load: {error}") from error

        with mpl.rc_context():
            mpl.rcdefaults()
            mpl.rcParams.update(_STYLE)
            yield
    finally:
        log.setLevel(before)


def draw(
    outcomes: Mapping[float | None, Outcome],
    critical: float | None,
    skills: Sequence[str],
    *,
    prefix: str,
    label: str,
) -> str | None:
    """One row as an `<svg>` element; None where it has no coefficients or nothing finite to show.

    Args:
        outcomes: the row's cells by coefficient.
        critical: the critical coefficient, marked by a line.
        skills: all skills of the page, in the order of their colours.
        prefix: what the ids of the element begin with, so that a page may hold many.
        label: what a screen reader calls the image.
    """
    cells = [(alpha, cell) for alpha, cell in _by_alpha(outcomes) if math.isfinite(_height(cell))]
    if not cells:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE)
    figure.patch.set_visible(False)
    upper, lower = _axes(figure, cells)
    _evidence(upper, cells)
    _skills(lower, cells, skills)
    if critical is not None:
        for axes in (upper, lower):
            axes.axvline(critical, color=ROLES["survived"], linewidth=0.8, linestyle=(0, (3, 2)), zorder=1)
    written = io.StringIO()
    figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return for_page(written.getvalue(), prefix=prefix, label=label)


def _axes(figure: Figure, cells: _Cells) -> tuple[Axes, Axes]:
    upper = figure.add_axes((0.13, 0.43, 0.85, 0.54))
    lower = figure.add_axes((0.13, 0.13, 0.85, 0.24), sharex=upper)
    for axes in (upper, lower):
        axes.patch.set_visible(False)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.tick_params(left=False, bottom=False, pad=3)
    upper.set_xlim(0, 1)
    upper.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1], ["0", ".2", ".4", ".6", ".8", "1"])
    upper.tick_params(labelbottom=False)
    lower.set_xlabel("α, the weight of the protected model", labelpad=1)
    scores = all(cell.rate is None for _, cell in cells)
    upper.set_ylabel("score" if scores else "VSR", labelpad=2)
    lower.set_ylabel("kept", labelpad=2)
    if not scores:
        upper.set_ylim(-0.04, 1.04)
        upper.set_yticks([0, 0.5, 1], ["0", ".5", "1"])
    kept = [value for _, cell in cells for value in cell.skills_kept.values() if math.isfinite(value)]
    lower.set_ylim(max(min([-0.06, *kept]), -0.6), min(max([1.06, *kept]), 1.6))
    lower.set_yticks([0, 0.5, 1], ["0", ".5", "1"])
    upper.grid(axis="y")
    figure.align_ylabels([upper, lower])
    return upper, lower


def _evidence(axes: Axes, cells: _Cells) -> None:
    known = [(alpha, *cell.interval) for alpha, cell in cells if cell.rate is not None and cell.interval is not None]
    if known:
        alphas, low, high = zip(*known, strict=True)
        axes.fill_between(alphas, low, high, color=ROLES["line"], alpha=0.14, linewidth=0, zorder=2)
        axes.vlines(alphas, low, high, color=ROLES["line"], alpha=0.55, linewidth=0.8, zorder=2)
    axes.plot(*_curve(cells), color=ROLES["line"], linewidth=1.1, zorder=3)
    axes.plot(
        *_curve([(alpha, cell) for alpha, cell in cells if not cell.theft]),
        linestyle="",
        marker="o",
        markersize=3.6,
        markerfacecolor=ROLES["paper"],
        markeredgecolor=ROLES["muted"],
        markeredgewidth=0.8,
        clip_on=False,
        zorder=4,
    )
    for verdict, (marker, size) in MARKERS.items():
        axes.plot(
            *_curve([(alpha, cell) for alpha, cell in cells if cell.theft and cell.verdict == verdict]),
            linestyle="",
            marker=marker,
            markersize=size,
            markerfacecolor=ROLES[verdict],
            markeredgecolor=ROLES["paper"],
            markeredgewidth=0.6,
            clip_on=False,
            zorder=5,
        )


def _skills(axes: Axes, cells: _Cells, skills: Sequence[str]) -> None:
    axes.axhline(KEPT_BY_A_THEFT, color=ROLES["muted"], linewidth=0.8, linestyle=(0, (2, 2)), zorder=2)
    for i, skill in enumerate(skills):
        own = [(alpha, cell.skills_kept[skill]) for alpha, cell in cells if skill in cell.skills_kept]
        own = [(alpha, kept) for alpha, kept in own if math.isfinite(kept)]
        axes.plot(
            [alpha for alpha, _ in own],
            [kept for _, kept in own],
            color=ROLES[f"skill-{i % SKILL_COLOURS}"],
            linestyle=DASHES[min(i // SKILL_COLOURS, len(DASHES) - 1)],
            linewidth=1.2,
            marker=".",
            markersize=3,
            zorder=3,
        )


def _curve(cells: _Cells) -> tuple[list[float], list[float]]:
    return [alpha for alpha, _ in cells], [_height(cell) for _, cell in cells]


def _by_alpha(outcomes: Mapping[float | None, Outcome]) -> _Cells:
    """The cells that have a coefficient, in its order."""
    return sorted(((alpha, cell) for alpha, cell in outcomes.items() if alpha is not None), key=itemgetter(0))


def _height(cell: Outcome) -> float:
    height = cell.score if cell.rate is None else cell.rate
    return math.nan if height is None else height


def summary(outcomes: Mapping[float | None, Outcome]) -> str:
    """A row in words, for those who do not see its curves: `.00 at 0.1 (no theft), 1.0 at 0.5 (survived)`."""
    return ", ".join(f"{view.number(cell)} at {alpha:g} ({view.word(cell)})" for alpha, cell in _by_alpha(outcomes))

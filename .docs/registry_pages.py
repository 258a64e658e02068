"""A page for each protection and each merger that is registered by us: where it is from, its parameters, its row.

Rows are measured: they are taken from the published results, with the functions that made the page of results.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
import sys
from typing import TYPE_CHECKING

from mergeguard.mergers.registry import DEFAULT_MERGERS, MERGERS, find_method
from mergeguard.protections.registry import DEFAULT_PROTECTIONS, PROTECTIONS
from mergeguard.reports import view
from mergeguard.reports.markdown import escape, labels_of, legend, matrix_section, table
from mergeguard.reports.results_json import read_results
from mergeguard.reports.results_page import number_with_interval
from mergeguard.specs import Value, format_value

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from mergeguard.matrix.outcome import Results
    from mergeguard.mergers.contract import Method, Parameter
    from mergeguard.protections.contract import Protection

OURS = "mergeguard."
"""Where our own schemes and methods are from: others that are installed get no page."""

BASES = {
    "ancestor": "a base, from which every model is a difference",
    "none": "none",
    "optional": "a base, if `task_vectors` is true",
    "primary": "none, but the first model has a part of its own",
}
WEIGHTINGS = {
    "weight": "a weight for each model",
    "t": "`t` between two models",
    "none": "none, so that its cells have no coefficient",
}


def protection_pages(root: Path) -> Iterator[tuple[str, str]]:
    """The pages of protections, by name, and the list of them first."""
    ours = {name: PROTECTIONS.get(name) for name in PROTECTIONS if PROTECTIONS.get(name).__module__.startswith(OURS)}
    rows = [
        (
            f"[{name}](/protections/{name}.md)",
            f"`{scheme.access}`",
            f"`{scheme.claim}`",
            _default(name in DEFAULT_PROTECTIONS),
        )
        for name, scheme in ours.items()
    ]
    yield (
        "protections/index.md",
        _list("Protections", ("name", "needs", "claims", "default"), rows, "protections", ours),
    )
    results = published(root)
    for name, scheme in ours.items():
        measured = _measured(results, "protection", name)
        yield f"protections/{name}.md", "\n".join((f"# {name}", "", *_protection(scheme), *measured))


def _protection(scheme: type[Protection]) -> Iterator[str]:
    yield from ("```{eval-rst}", f".. py:currentmodule:: {scheme.__module__}", "")
    yield from (inspect.getdoc(sys.modules[scheme.__module__]) or "", "", inspect.getdoc(scheme) or "", "```", "")
    yield from (f"Code: {{py:class}}`{scheme.__module__}.{scheme.__name__}`.", "", "## Parameters", "")
    if scheme.defaults:
        rows = ((f"`{name}`", f"`{format_value(value)}`", _kind(value)) for name, value in scheme.defaults.items())
        yield from (*table(("parameter", "default", "type"), rows), "")
    else:
        yield from ("None.", "")
    wanted = ", ".join(f"`{name}`" for name in sorted(scheme.needs)) or "no other model"
    yield from (f"Needs `{scheme.access}` of the suspect and {wanted} beside it; claims `{scheme.claim}`.", "")


def merger_pages(root: Path) -> Iterator[tuple[str, str]]:
    """The pages of merge methods, by name, and the list of them first."""
    methods = [find_method(name) for name in MERGERS if find_method(name).combine.__module__.startswith(OURS)]
    defaults = {spec.partition("(")[0] for spec in DEFAULT_MERGERS}
    rows = [
        (f"[{method.name}](/mergers/{method.name}.md)", escape(method.summary), _default(method.name in defaults))
        for method in methods
    ]
    names = [method.name for method in methods]
    yield "mergers/index.md", _list("Merge methods", ("name", "what it does", "default"), rows, "mergers", names)
    results = published(root)
    for method in methods:
        name = method.name
        measured = _measured(results, "merger", name)
        yield f"mergers/{name}.md", "\n".join((f"# {name}", "", *_method(method), *measured))


def _method(method: Method) -> Iterator[str]:
    summary = method.summary[:1].upper() + method.summary[1:]
    yield from (
        f"{escape(summary)}.",
        "",
        f"Source: {cited(method.citation)}. Code: {{py:mod}}`{method.combine.__module__}`.",
        "",
    )
    yield from (f"- Base: {BASES[method.base]}.", f"- Weights: {WEIGHTINGS[method.weighting]}.")
    yield f"- Models: {_count(method)}."
    yield from ("- Random: its masks depend on the seed, the tensor's name and the model.",) * method.random
    yield from ("", "## Parameters", "")
    if method.parameters:
        header = ("parameter", "default", "domain", "meaning")
        yield from (*table(header, map(_parameter, method.parameters)), "")
    else:
        yield from ("None.", "")


def _parameter(parameter: Parameter) -> tuple[str, ...]:
    domain = ", ".join(f"`{choice}`" for choice in parameter.choices) or _bounds(parameter)
    each = " (each model may have its own)" if parameter.per_model else ""
    return f"`{parameter.name}`", f"`{format_value(parameter.default)}`", domain, escape(parameter.meaning) + each


def _bounds(parameter: Parameter) -> str:
    if isinstance(parameter.default, bool):
        return "`true`, `false`"
    low, high = max(parameter.above, parameter.at_least), min(parameter.below, parameter.at_most)
    left = "[" if low == parameter.at_least > -math.inf else "("
    right = "]" if high == parameter.at_most < math.inf else ")"
    return f"{left}{_infinite(low)}, {_infinite(high)}{right}"


def _infinite(bound: float) -> str:
    return f"{bound:g}" if math.isfinite(bound) else "∞" if bound > 0 else "-∞"


def _count(method: Method) -> str:
    if method.max_models == method.min_models:
        return f"exactly {method.min_models}"
    return f"at least {method.min_models}" + (f", at most {method.max_models}" if method.max_models else "")


def cited(citation: str) -> str:
    """A citation with links to what it names."""
    text = re.sub(r"\bhttps?://\S+", r"<\g<0>>", citation)
    text = re.sub(r"\barXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)
    return re.sub(r"\bdoi:(10\.[^\s;,]+)", r"[doi:\1](https://doi.org/\1)", text)


def published(root: Path) -> dict[str, Results]:
    """The published results by the name of their file, in order of the names."""
    paths = sorted((root / "fixtures" / "results").glob("*.json"), key=lambda path: path.stem)
    return {path.name: read_results(path) for path in paths}


def _measured(results: dict[str, Results], field: str, name: str) -> Iterator[str]:
    """The published cells of a protection or a merger, in a table a file, or how to measure them."""
    yield from ("## Measured", "")
    parts = {
        file: dataclasses.replace(one, outcomes=tuple(o for o in one.outcomes if getattr(o, field) == name))
        for file, one in results.items()
    }
    parts = {file: one for file, one in parts.items() if one.outcomes}
    if not parts:
        yield from ("Not in the [published results](/results.md). Measure it on your machine:", "")
        yield from ("```bash", f"mergeguard run --{field} {name}", "```", "")
        return
    yield from (f"From the [published results](/results.md). {legend()} The small numbers are 95 % intervals.", "")
    for file, one in parts.items():
        seeds = ", ".join(sorted({str(outcome.seed) for outcome in one.outcomes}))
        yield from (
            f"### World {escape(str(one.world['name']))}, seed {seeds}: {escape(file)}",
            "",
            f"[{file}](/files/fixtures/results/{file})",
            "",
        )
        for block in view.blocks(one):
            title, *rest = matrix_section(block, labels_of(one), number_with_interval).lines()
            yield from (f"#{title}", *rest)


def _list(
    title: str, header: tuple[str, ...], rows: Sequence[tuple[str, ...]], folder: str, names: Iterable[str]
) -> str:
    entries = [f"/{folder}/{name}" for name in names]
    return "\n".join((f"# {title}", "", *table(header, rows), "", "```{toctree}", ":hidden:", "", *entries, "```", ""))


def _kind(value: Value) -> str:
    return {bool: "true or false", int: "integer", float: "number", str: "word"}[type(value)]


def _default(holds: bool) -> str:
    return "yes" if holds else ""

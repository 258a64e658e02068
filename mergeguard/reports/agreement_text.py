"""How well one world predicts another, in words: lines for a terminal, and a section of a Markdown page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeguard.reports.markdown import escape, table
from mergeguard.reports.view import format_fraction, format_rate
from mergeguard.reports.world_agreement import ALL_MERGERS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mergeguard.reports.world_agreement import Agreement, Comparison, Run, Share, Target, Tau

EXPLANATION = (
    "tau: Kendall's tau-b of the rates, with a bootstrap interval over cells; "
    "verdicts: survived or not, over cells that are thefts in both worlds; "
    "same side: survived or not, over all cells; "
    "thefts: a theft or not, over all cells; shares with Clopper-Pearson intervals (95 %). "
    "In brackets what chance gives: the mean if the predicted world's cells are shuffled within each protection, and "
    "the one-sided p-value; at equal alpha: if only mergers at the same alpha are. Cells of one row are not "
    "independent: read intervals and p-values as too bold rather than too shy."
)
_COLUMNS = ("mergers", "protection", "cells", "tau", "verdicts", "same side", "thefts")


def to_lines(comparison: Comparison) -> Iterator[str]:
    """For a terminal: runs, parts, protections, then the targets."""
    yield headline(comparison)
    for run in comparison.runs:
        yield ""
        yield run_line(comparison, run)
        for line in run.differences:
            yield f"  differs: {line}"
        part = ""
        for found in run.agreements:
            if found.part != part:
                part = found.part
                yield ""
                yield f"mergers {part}" + (f": {', '.join(found.mergers)}" if part != ALL_MERGERS else "")
            yield f"  {found.protection}, {found.cells} cells"
            for name, text in zip(_COLUMNS[3:], _measures(found), strict=True):
                yield f"    {name:<9} {text}"
    yield ""
    yield EXPLANATION
    yield ""
    yield from map(target_line, comparison.targets)


def to_section(comparison: Comparison) -> Iterator[str]:
    """For a Markdown page: the targets first, a table a run."""
    yield f"{escape(headline(comparison))}."
    yield ""
    for target in comparison.targets:
        yield f"- {'✅' if target.met else '❌'} {escape(target_line(target))}"
    yield ""
    for run in comparison.runs:
        yield f"{escape(run_line(comparison, run))}."
        yield ""
        rows = [(found.part, escape(found.protection), str(found.cells), *_measures(found)) for found in run.agreements]
        yield from table(_COLUMNS, rows)
        yield ""
    yield f"{escape(EXPLANATION)}"
    yield ""
    differences = dict.fromkeys(line for run in comparison.runs for line in run.differences)
    if differences:
        yield "What differs beside the models:"
        yield ""
        yield from (f"- {escape(line)}" for line in differences)
        yield ""


def headline(comparison: Comparison) -> str:
    one, other = comparison.worlds
    tuned = f"tuned on {', '.join(comparison.tuned_on)}" if comparison.tuned_on else "tuned on nothing"
    return f"How well {one} predicts {other}; {tuned}, held out: {', '.join(comparison.held_out) or 'nothing'}"


def run_line(comparison: Comparison, run: Run) -> str:
    (one, other), seeds, only = comparison.worlds, run.seeds, run.only_in
    return (
        f"{one} seed {seeds[0]}, {other} seed {seeds[1]}: {run.common} common cells, "
        f"{only[0]} only in {one}, {only[1]} only in {other}"
    )


def target_line(target: Target) -> str:
    measured = "nothing to measure" if target.measured is None else _number(target.measured)
    verdict = "met" if target.met else "NOT met"
    return f"target {verdict}: {target.measure}, {target.part}: {measured}, required {_number(target.required)}"


def _measures(found: Agreement) -> tuple[str, str, str, str]:
    return _tau(found.tau), _share(found.thefts), _share(found.verdicts), _share(found.theft_status)


def _tau(tau: Tau) -> str:
    if tau.value is None or tau.chance is None or tau.p_value is None or tau.p_value_at_alpha is None:
        return f"undefined: {tau.undefined}"
    span = f" ({_number(tau.interval[0])} to {_number(tau.interval[1])})" if tau.interval else " (no interval)"
    return (
        f"{_number(tau.value)}{span} [{_number(tau.chance)}, p {tau.p_value:.2g}; at equal alpha p "
        f"{tau.p_value_at_alpha:.2g}] {tau.tied[0]} and {tau.tied[1]} of {tau.pairs} pairs tied"
    )


def _share(share: Share) -> str:
    if share.rate is None or share.interval is None or share.chance is None or share.p_value is None:
        return "no cells"
    low, high = share.interval
    return (
        f"{share.agreeing}/{share.cells} {_number(share.rate)} ({format_rate(low)} to {format_rate(high)}) "
        f"[{format_rate(share.chance)}, p {share.p_value:.2g}]"
    )


def _number(value: float) -> str:
    """Two digits, rounded down, so that what is shown as .80 meets a target of .80."""
    return format_fraction(value)

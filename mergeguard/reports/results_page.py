"""The page of published results: made from results files as `mergeguard run` wrote them, and from nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote

from mergeguard.matrix.outcome import Counts, format_coefficient
from mergeguard.reports import view
from mergeguard.reports.agreement_text import to_section
from mergeguard.reports.leaderboard import leaderboards
from mergeguard.reports.leaderboard_text import to_section as leaderboard_section
from mergeguard.reports.markdown import details, escape, labels_of, legend, matrix_section, table
from mergeguard.reports.summary import sentence, summarise, summary_of, verdict_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mergeguard.matrix.outcome import Outcome, Results
    from mergeguard.reports.world_agreement import Comparison


def results_page(results: Mapping[str, Results], command: str, comparison: Comparison | None = None) -> str:
    """The page in GitHub's Markdown: leaderboards, the files, how well one world predicts the other, each file in full.

    Args:
        results: by the name of the file beside the page that holds them.
        command: what makes this page.

    Raises:
        ParameterError: a cell is in the files twice.
    """
    return "\n".join(_lines(results, command, comparison)).rstrip() + "\n"


def _lines(results: Mapping[str, Results], command: str, comparison: Comparison | None) -> Iterator[str]:
    yield from ("# Published results", "")
    yield "This page is made from the results files beside it, which are as `mergeguard run` wrote them. It is never"
    yield "edited; made again in this folder by:"
    yield from ("", "```bash", command, "```", "")
    yield from leaderboard_section(leaderboards(results))
    yield from ("## Files", "")
    yield from table(_OVERVIEW, (row for name, one in results.items() for row in _overview(name, one)))
    yield from ("", legend(), "")
    yield "The small numbers are Clopper-Pearson intervals (95 %). Every verdict is against the worst control."
    yield ""
    if comparison is not None:
        yield from ("## Agreement of the worlds", "")
        yield from to_section(comparison)
    for name, one in results.items():
        yield from _file(name, one)


_OVERVIEW = ("file", "world", "seed", "protection", "cells", "thefts", "lost", "recorded")


def _overview(name: str, results: Results) -> Iterator[tuple[str, ...]]:
    recorded = {(row.protection, row.variant, row.merger_spec): row.recorded for row in summary_of(results)}
    groups: dict[tuple[str, int, str], list[Outcome]] = {}
    for outcome in results.outcomes:
        groups.setdefault((outcome.world, outcome.seed, outcome.protection_spec), []).append(outcome)
    for (world, seed, protection), outcomes in groups.items():
        rows = summarise(outcomes, ())
        known = sum(recorded.get((row.protection, row.variant, row.merger_spec), 0) for row in rows)
        counts = len(outcomes), sum(row.thefts for row in rows), sum(row.lost for row in rows), known
        yield _link(name), escape(world), str(seed), escape(protection), *map(str, counts)


def _file(name: str, results: Results) -> Iterator[str]:
    seeds = ", ".join(dict.fromkeys(str(outcome.seed) for outcome in results.outcomes)) or "-"
    yield from (f"## World {escape(str(results.world['name']))}, seed {seeds}: {_link(name)}", "")
    yield from (f"{verdict_line(results).capitalize()}; {sentence(summary_of(results))}.", "")
    if results.problems:
        yield from (f"<details><summary>{len(results.problems)} problems</summary>", "")
        yield from (*(f"- {escape(problem)}" for problem in results.problems), "", "</details>", "")
    labels = labels_of(results)
    for block in view.blocks(results):
        yield from matrix_section(block, labels, number_with_interval).lines()
        yield from ("Worst reading on any control, and on decoys:", "")
        yield from table(("merger", "control", "decoys"), (_worst(row, labels) for row in block.rows))
        yield ""
    full = [(escape(short), escape(spec)) for spec, short in view.merger_labels(results.outcomes).items()]
    if any(short != spec for short, spec in full):
        yield from table(("merger", "with its parameters"), full)
        yield ""
    for section in details(results):
        yield from section.lines()


def number_with_interval(outcome: Outcome) -> str:
    number = view.number(outcome)
    if outcome.interval is None:
        return number
    low, high = map(view.format_rate, outcome.interval)
    return f"{number} <sub>{low}–{high}</sub>"


def _worst(row: view.Row, labels: Mapping[str, str]) -> tuple[str, str, str]:
    """Of all controls and coefficients of a row, the reading nearest to a survival, and where it was taken."""
    controls = [
        (_height(counts), f"{name} {view.format_counts(counts)} at {format_coefficient(coefficient)}")
        for coefficient, outcome in row.outcomes.items()
        for name, counts in outcome.controls.items()
    ]
    decoys = [
        (_height(counts), f"{view.format_counts(counts)} at {format_coefficient(coefficient)}")
        for coefficient, outcome in row.outcomes.items()
        if outcome.decoy_trials is not None
        for counts in [Counts(outcome.decoy_hits, outcome.decoy_trials)]
    ]
    return labels[row.merger_spec], escape(_highest(controls)), escape(_highest(decoys))


def _height(counts: Counts) -> float:
    if counts.hits is not None and counts.trials is not None:
        return counts.hits / counts.trials
    return float("-inf") if counts.score is None else counts.score


def _highest(found: Sequence[tuple[float, str]]) -> str:
    return max(found, key=lambda item: item[0])[1] if found else "-"


def _link(name: str) -> str:
    return f"[{escape(name)}]({quote(name)})"

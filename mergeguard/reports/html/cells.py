"""One cell of the matrix on the page: what the heat map shows of it, its numbers, and the command that reruns it."""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergeguard.matrix.outcome import LOST, OVERCLAIMS, SURVIVED, UNDECIDABLE, Counts, format_coefficient
from mergeguard.reports import view
from mergeguard.reports.summary import is_lost_theft, is_recorded

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from mergeguard.matrix.outcome import Outcome

MARKS = {SURVIVED: "✓", OVERCLAIMS: "△", LOST: "✗", UNDECIDABLE: "?"}
STRENGTHS = 5
"""Shades of each colour of the heat map."""


@dataclass(frozen=True)
class Cell:
    """A cell as the page shows it; all texts are plain and not yet escaped.

    `anchor` is the id of its numbers, `kind` the verdict of a theft or `no-theft`, `strength` its shade (0 to 4).
    `facts` are pairs of name and value, `controls` rows of name, reading and p-value, `skills` rows of name, skill of
    the merged model and fraction that the matched control keeps.
    """

    anchor: str
    alpha: str
    number: str
    kind: str
    mark: str
    word: str
    strength: int
    unexpected: bool
    scheme: int
    merger: int
    merger_label: str
    facts: tuple[tuple[str, str], ...]
    controls: tuple[tuple[str, str, str], ...]
    skills: tuple[tuple[str, str, str], ...]
    command: str


def make_cell(
    outcome: Outcome, *, anchor: str, scheme: int, merger: int, merger_label: str, largest_score: float
) -> Cell:
    """The cell of an outcome.

    Args:
        scheme, merger: their places in the page's filters.
        largest_score: of the block, for the shade of a score.
    """
    kept = dict.fromkeys((*outcome.skills, *outcome.skills_kept))
    return Cell(
        anchor=anchor,
        alpha=format_coefficient(outcome.coefficient),
        number=view.number(outcome),
        kind=outcome.verdict if outcome.theft else "no-theft",
        mark=MARKS[outcome.verdict] if outcome.theft else "",
        word=_word(outcome),
        strength=_strength(outcome, largest_score),
        unexpected=is_lost_theft(outcome) and not is_recorded(outcome),
        scheme=scheme,
        merger=merger,
        merger_label=merger_label,
        facts=tuple((view.clean(name), view.clean(value)) for name, value in _facts(outcome)),
        controls=tuple(
            (view.clean(name), view.format_counts(counts), _p(counts.p_value))
            for name, counts in outcome.controls.items()
        ),
        skills=tuple(
            (view.clean(name), _fraction(outcome.skills.get(name)), _fraction(outcome.skills_kept.get(name)))
            for name in kept
        ),
        command=rerun(outcome.protection_spec, outcome.merger_spec, outcome.coefficient, outcome.world, outcome.seed),
    )


def anchors(outcomes: Iterable[Outcome]) -> list[str]:
    """An id for each outcome that a link can hold as it is: its case's id in plain characters, each once."""
    taken: set[str] = set()
    found = []
    for outcome in outcomes:
        plain = re.sub(r"[^A-Za-z0-9_.]+", "-", outcome.id).strip("-") or "cell"
        anchor, count = f"cell-{plain}", 1
        while anchor in taken:
            count += 1
            anchor = f"cell-{plain}-{count}"
        taken.add(anchor)
        found.append(anchor)
    return found


def rerun(protection: str, merger: str, coefficient: float | None, world: str, seed: int) -> str:
    """The command that measures one cell again, if scheme and world are found under the names that they have here."""
    words = ["mergeguard", "run", "--protection", protection, "--merger", merger]
    if coefficient is not None:
        words += ["--coefficients", format_coefficient(coefficient)]
    return shlex.join(view.clean(word) for word in (*words, *_place(world, seed)))


def rerun_all(outcomes: Sequence[Outcome]) -> str:
    """Commands that measure everything again, one for each world and seed; each measures its whole grid."""
    words = ["mergeguard", "run"]
    for protection in dict.fromkeys(outcome.protection_spec for outcome in outcomes):
        words += ["--protection", protection]
    for merger in dict.fromkeys(outcome.merger_spec for outcome in outcomes):
        words += ["--merger", merger]
    alphas = [c for c in view.sorted_coefficients(outcomes) if c is not None]
    if alphas:
        words += ["--coefficients", ",".join(map(format_coefficient, alphas))]
    places = list(dict.fromkeys((outcome.world, outcome.seed) for outcome in outcomes))
    return "\n".join(shlex.join(view.clean(word) for word in (*words, *_place(*place))) for place in places)


def height(counts: Counts) -> float:
    """How near a control comes to verifying: its rate or its score, so that the worst of several can be found."""
    if counts.hits is not None and counts.trials is not None:
        return counts.hits / counts.trials
    return -math.inf if counts.score is None or math.isnan(counts.score) else counts.score


def _place(world: str, seed: int) -> tuple[str, ...]:
    return "--world", world, "--seed", str(seed)


def _word(outcome: Outcome) -> str:
    if not outcome.theft:
        return view.NO_THEFT
    return f"{outcome.verdict}, on record" if is_recorded(outcome) else outcome.verdict


def _strength(outcome: Outcome, largest_score: float) -> int:
    """The more the evidence shows the stronger; of a theft that lost it, the less the stronger."""
    if outcome.rate is not None:
        share = outcome.rate
    elif outcome.score is not None and largest_score > 0:
        share = outcome.score / largest_score
    else:
        share = 0.0
    share = min(max(share, 0.0), 1.0) if math.isfinite(share) else 0.0
    if is_lost_theft(outcome):
        share = 1 - share
    return min(int(share * STRENGTHS), STRENGTHS - 1)


def _facts(outcome: Outcome) -> Iterator[tuple[str, str]]:
    theft = "a theft" if outcome.theft else "no theft: measured, never counted"
    yield "verdict", f"{outcome.verdict}{', on record' if is_recorded(outcome) else ''} ({theft})"
    if outcome.rate is not None:
        interval = ""
        if outcome.interval is not None:
            interval = f", interval {outcome.interval[0]:.2f} to {outcome.interval[1]:.2f}"
        yield "VSR", f"{outcome.hits}/{outcome.trials} = {view.format_rate(outcome.rate)}{interval}"
    if outcome.score is not None:
        yield "score", f"{outcome.score:.4g}"
    yield "p", f"{outcome.p_value:.2g} (level {outcome.level:.2g})"
    if outcome.decoy_trials is not None:
        p = "" if outcome.decoy_p_value is None else f", p {outcome.decoy_p_value:.2g}"
        yield "decoys, merged model", f"{outcome.decoy_hits}/{outcome.decoy_trials}{p}"
    if outcome.conditional_on:
        yield "conditional on", outcome.conditional_on
    yield "access, claim", f"{outcome.access}, {outcome.claim}"
    yield from ((f"detail {name}", f"{value:.4g}") for name, value in outcome.details.items())
    if outcome.note:
        yield "note", outcome.note
    yield "world, seed, time", f"{outcome.world}, {outcome.seed}, {outcome.seconds:.1f} s"


def _fraction(value: float | None) -> str:
    return "–" if value is None else view.format_fraction(value)


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"

"""Rows of the matrix in numbers: thefts, losses, the critical coefficient and the area under VSR over alpha."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING

from mergeguard.matrix.outcome import SURVIVED, Outcome, Results, Summary

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence


def is_recorded(outcome: Outcome) -> bool:
    """Whether the outcome is on record as a known loss: it was expected to end in something other than survival."""
    return outcome.expected not in (None, SURVIVED)


def is_lost_theft(outcome: Outcome) -> bool:
    """Whether somebody would make this merge and the evidence cannot be relied on in it, for whatever reason."""
    return outcome.theft and not outcome.survived


def summarise(outcomes: Iterable[Outcome], recorded_ids: Collection[str]) -> tuple[Summary, ...]:
    """One row per (protection with variant, merger with parameters), in order of first appearance.

    Args:
        outcomes: in any order; a coefficient that was measured with several seeds counts once per seed.
        recorded_ids: ids of the cases recorded as known losses; those that were not lost are not counted.
    """
    recorded = frozenset(recorded_ids)
    rows: dict[tuple[str, str, str], list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        rows[outcome.protection, outcome.variant, outcome.merger_spec].append(outcome)
    return tuple(_summary(row, recorded) for row in rows.values())


def summary_of(results: Results) -> tuple[Summary, ...]:
    """The results' own summary, else one made from the outcomes and what each was expected to be."""
    return results.summary or summarise(results.outcomes, {o.id for o in results.outcomes if is_recorded(o)})


def critical_coefficient(outcomes: Iterable[Outcome]) -> float | None:
    """The smallest theft's coefficient from which this and every larger theft survives; None if there is none.

    Every theft is looked at: survival need not be monotone in the coefficient, so that a bisection could be wrong.
    Mergers without a coefficient have no critical one.
    """
    thefts = [(o.coefficient, o.survived) for o in outcomes if o.theft and o.coefficient is not None]
    last_loss = max((coefficient for coefficient, survived in thefts if not survived), default=float("-inf"))
    return min((coefficient for coefficient, _ in thefts if coefficient > last_loss), default=None)


def area_under_rate(outcomes: Iterable[Outcome]) -> float | None:
    """Area under VSR over alpha by the trapezoidal rule, divided by the range of alpha: a mean VSR in [0, 1].

    All coefficients count, thefts or not. Several seeds at one coefficient are averaged first. None for scores, for
    mergers without a coefficient, and where fewer than two coefficients were measured.
    """
    rates: dict[float, list[float]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.rate is None or outcome.coefficient is None:
            return None
        rates[outcome.coefficient].append(outcome.rate)
    if len(rates) < 2:
        return None
    points = sorted((coefficient, sum(row) / len(row)) for coefficient, row in rates.items())
    area = sum((right - left) * (low + high) / 2 for (left, low), (right, high) in pairwise(points))
    return min(1.0, area / (points[-1][0] - points[0][0]))  # rounding may leave 1 by an ulp


def sentence(rows: Sequence[Summary]) -> str:
    """`k of m thefts lost, j of them recorded`, over all rows."""
    lost, thefts, recorded = (sum(getattr(row, name) for row in rows) for name in ("lost", "thefts", "recorded"))
    return f"{lost} of {thefts} thefts lost, {recorded} of them recorded"


def verdict_line(results: Results) -> str:
    """`gate holds`, or that it does not and how many problems there are."""
    if results.holds:
        return "gate holds"
    count = len(results.problems)
    return f"gate does not hold: {count} problem{'' if count == 1 else 's'}"


def _summary(row: Sequence[Outcome], recorded: frozenset[str]) -> Summary:
    first = row[0]
    lost = [outcome for outcome in row if is_lost_theft(outcome)]
    return Summary(
        protection=first.protection,
        variant=first.variant,
        merger=first.merger,
        merger_spec=first.merger_spec,
        critical_coefficient=critical_coefficient(row),
        area=area_under_rate(row),
        thefts=sum(outcome.theft for outcome in row),
        lost=len(lost),
        recorded=sum(outcome.id in recorded for outcome in lost),
    )

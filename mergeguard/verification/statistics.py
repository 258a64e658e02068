"""The statistics behind a verdict: thin, checked wrappers around SciPy. No torch here.

P-values are one-sided, small when the first argument is larger than chance explains; only the uniformity test is not.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from scipy import stats  # type: ignore[import-untyped]  # SciPy ships no types

from mergeguard.errors import ParameterError

if TYPE_CHECKING:
    from collections.abc import Sequence


def clopper_pearson(hits: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact two-sided confidence interval of a rate (Clopper & Pearson 1934, Biometrika 26(4)).

    Covers the true rate with at least the given confidence, whatever that rate is.

    Raises:
        ParameterError: not 0 <= hits <= trials, no trials, or a confidence outside (0, 1).
    """
    _check_counts(hits, trials)
    if not 0 < confidence < 1:
        raise ParameterError(f"confidence is {confidence}, expected a number between 0 and 1")
    interval = stats.binomtest(hits, trials).proportion_ci(confidence, method="exact")
    return float(interval.low), float(interval.high)


def fisher_greater(hits: int, trials: int, other_hits: int, other_trials: int) -> float:
    """One-sided p-value of Fisher's exact test (Fisher 1935) that the first rate is greater than the other.

    The probability, given all hits together, that at least `hits` of them fall among the first `trials`.

    Raises:
        ParameterError: hits exceed trials, a count is negative, or one side has no trials.
    """
    _check_counts(hits, trials)
    _check_counts(other_hits, other_trials)
    table = [[hits, trials - hits], [other_hits, other_trials - other_hits]]
    return float(stats.fisher_exact(table, alternative="greater").pvalue)


def can_reach(level: float, trials: int, control_trials: int) -> bool:
    """Whether the clearest outcome, all of `trials` against none of `control_trials`, reaches `level`.

    Raises:
        ParameterError: a level outside (0, 1), or no trials.
    """
    _check_level(level)
    return fisher_greater(trials, trials, 0, control_trials) <= level


def smallest_deciding_trials(level: float, control_trials: int, per_key_null: int = 0) -> int:
    """The fewest trials with which the clearest outcome reaches `level`: what an undecidable case is short of.

    Args:
        level: the level to reach.
        control_trials: control trials there are anyway, e.g. decoys.
        per_key_null: control trials that come with each trial, 1 if every key is read on the control too.

    Raises:
        ParameterError: a level outside (0, 1), a negative count, or no control trials at all.
    """
    _check_level(level)
    if control_trials < 0 or per_key_null < 0 or control_trials + per_key_null == 0:
        raise ParameterError(
            f"there are {control_trials} control trials and {per_key_null} with each key; without any, no number of "
            f"trials decides"
        )

    def decides(trials: int) -> bool:
        return can_reach(level, trials, control_trials + per_key_null * trials)

    # The p-value of n of n against 0 of m is 1 / C(n + m, n), which falls as n grows: bisection finds the first.
    high = 1
    while not decides(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if decides(middle) else (middle, high)
    return high


def rank_p_value(score: float, null_scores: Sequence[float]) -> float:
    """Share of `score` and its null draws that are at least `score` (Phipson & Smyth 2010, doi:10.2202/1544-6115.1585).

    Never 0; at most uniform if the score is one more draw from the null. Ties count against the score.

    Raises:
        ParameterError: a score is not finite, or there are no null draws.
    """
    if len(null_scores) == 0:
        raise ParameterError("there are no null scores to rank the score among")
    if not all(map(math.isfinite, [score, *null_scores])):
        raise ParameterError("scores to be ranked must be finite")
    return (1 + sum(bool(null >= score) for null in null_scores)) / (1 + len(null_scores))


def normal_tail(z: float) -> float:
    """Probability that a standard normal variable is at least `z`.

    Raises:
        ParameterError: `z` is NaN.
    """
    if math.isnan(z):
        raise ParameterError("z is NaN, expected a number")
    return float(stats.norm.sf(z))


def uniformity_p_value(p_values: Sequence[float]) -> float:
    """Two-sided Kolmogorov-Smirnov p-value that `p_values` are uniform on [0, 1]; small when a null is wrong.

    Raises:
        ParameterError: there are none, or one lies outside [0, 1].
    """
    if len(p_values) == 0 or not all(0 <= value <= 1 for value in p_values):
        raise ParameterError("expected at least one p-value, each in [0, 1]")
    return float(stats.kstest(p_values, "uniform").pvalue)


def _check_counts(hits: int, trials: int) -> None:
    if trials < 1 or not 0 <= hits <= trials:
        raise ParameterError(f"{hits} hits of {trials} trials; expected at least one trial and 0 <= hits <= trials")


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ParameterError(f"the level is {level}, expected a number between 0 and 1")

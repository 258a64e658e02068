"""Whether rates changed between two measurements, over many cells at once. No torch here.

Fisher's exact test for each cell, two-sided because a change may go either way, and Holm's correction over the cells.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

from scipy import stats  # type: ignore[import-untyped]  # SciPy ships no types

from mergeguard.errors import ParameterError

if TYPE_CHECKING:
    from collections.abc import Sequence


@functools.cache  # the cells of a matrix have few different counts
def fisher_changed(hits: int, trials: int, other_hits: int, other_trials: int) -> float:
    """Two-sided p-value of Fisher's exact test (Fisher 1935) that two rates differ.

    The probability, given all hits together, of a split between the two that is at most as likely as the one observed.

    Raises:
        ParameterError: hits exceed trials, a count is negative, or one side has no trials.
    """
    for count, total in ((hits, trials), (other_hits, other_trials)):
        if total < 1 or not 0 <= count <= total:
            raise ParameterError(f"{count} hits of {total} trials; expected at least one trial and 0 <= hits <= trials")
    table = [[hits, trials - hits], [other_hits, other_trials - other_hits]]
    return min(1.0, float(stats.fisher_exact(table, alternative="two-sided").pvalue))  # it may round to 1 + an ulp


def clearest_change(trials: int, other_trials: int) -> float:
    """The smallest p-value that `fisher_changed` can give with so many trials: none of one side, all of the other.

    Raises:
        ParameterError: one side has no trials.
    """
    return fisher_changed(0, trials, other_trials, other_trials)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number by Holm's step-down method (Holm 1979, Scand. J. Statist. 6(2)), in order.

    Calling significant what is at most `level` then makes any false call with probability `level` at most, however
    the p-values depend on each other.

    Raises:
        ParameterError: a p-value lies outside [0, 1].
    """
    if not all(0 <= value <= 1 for value in p_values):  # NaN is refused too
        raise ParameterError("expected p-values, each in [0, 1]")
    corrected = [math.nan] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected

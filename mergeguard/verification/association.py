"""How far two measurements of the same cells agree in their order, and how far chance would. No torch here.

Cells of one merger along its coefficients are not independent, so that the interval is too narrow rather than too wide.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats  # type: ignore[import-untyped]  # SciPy ships no types

from mergeguard.errors import ParameterError
from mergeguard.verification.statistics import rank_p_value

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence

    from numpy.typing import NDArray

    Order = NDArray[np.intp]

DRAWS = 999
"""Resamples of an interval, and shuffles of a null."""
DEFINED = 0.9
"""The share of resamples that must have a tau for an interval to be given."""


def kendall_tau(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Kendall's tau-b (Kendall 1945, Biometrika 33(3)), which corrects for ties; None where either side is constant.

    Raises:
        ParameterError: the sides differ in length, or a value is not finite.
    """
    _check_pairs(x, y)
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return float(stats.kendalltau(x, y, variant="b").statistic)


def tied_pairs(x: Sequence[float]) -> int:
    """How many of the n (n - 1) / 2 pairs of values are equal."""
    _, counts = np.unique(np.asarray(x, dtype=float), return_counts=True)
    return int(sum(count * (count - 1) // 2 for count in counts))


def kendall_interval(
    x: Sequence[float], y: Sequence[float], *, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of tau-b over cells (Efron & Tibshirani 1993, chapter 13).

    Resamples in which a side is constant have no tau and are left out. None where more than a tenth of them are, so
    that what is left would say little.

    Raises:
        ParameterError: as `kendall_tau`.
    """
    if kendall_tau(x, y) is None:
        return None
    rng = np.random.default_rng(seed)
    signs = _signs(x), _signs(y)
    taus = np.array([_tau_of(*(side[np.ix_(cells, cells)] for side in signs)) for cells in _resamples(rng, x)])
    defined = taus[np.isfinite(taus)]
    if len(defined) < DEFINED * len(taus):
        return None
    tail = (1 - confidence) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    return float(low), float(high)


def tau_against_chance(x: Sequence[float], y: Sequence[float], strata: Sequence[Hashable]) -> tuple[float, float]:
    """Mean of tau-b, and one-sided p-value of the observed one, if `y` is shuffled within each stratum.

    Raises:
        ParameterError: as `kendall_tau`, or a side is constant.
    """
    if kendall_tau(x, y) is None:
        raise ParameterError("tau is undefined where a side is constant; there is nothing to hold against chance")
    left, right = _signs(x), _signs(y)
    return against_chance(lambda order: _tau_of(left, right[np.ix_(order, order)]), strata)


def against_chance(
    statistic: Callable[[Order], float], strata: Sequence[Hashable], *, seed: int = 0
) -> tuple[float, float]:
    """Mean of a statistic under shuffling within strata, and the one-sided p-value of the order as it is.

    Args:
        statistic: takes an order, an int array of shape [n] that says which cell stands at each place.
        strata: n labels; cells change places with those of the same label only.
    """
    rng = np.random.default_rng(seed)
    places: dict[Hashable, list[int]] = defaultdict(list)
    for place, label in enumerate(strata):
        places[label].append(place)
    null = []
    for _ in range(DRAWS):
        order = np.arange(len(strata))
        for group in places.values():
            order[group] = rng.permutation(group)
        null.append(statistic(order))
    return float(np.mean(null)), rank_p_value(statistic(np.arange(len(strata))), null)


def _signs(values: Sequence[float]) -> NDArray[np.int8]:
    """Signs of all differences, shape [n, n]: all that tau knows of the values."""
    column = np.asarray(values, dtype=float)[:, None]
    signs: NDArray[np.int8] = np.sign(column - column.T).astype(np.int8)
    return signs


def _tau_of(left: NDArray[np.int8], right: NDArray[np.int8]) -> float:
    """Tau-b from signs; NaN where a side is constant."""
    untied = int(np.count_nonzero(left)) * int(np.count_nonzero(right))
    if not untied:
        return math.nan
    return float(np.sum(left * right, dtype=np.int64)) / math.sqrt(untied)


def _resamples(rng: np.random.Generator, cells: Sequence[float]) -> Iterator[Order]:
    for _ in range(DRAWS):
        yield rng.integers(0, len(cells), len(cells))


def _check_pairs(x: Sequence[float], y: Sequence[float]) -> None:
    if len(x) != len(y):
        raise ParameterError(f"{len(x)} values cannot be paired with {len(y)}")
    if not all(map(math.isfinite, (*x, *y))):
        raise ParameterError("values to be put in order must be finite")

"""Rank agreement against what it promises: known values, invariances, simulations."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeguard.errors import ParameterError
from mergeguard.verification import association
from mergeguard.verification.association import (
    _signs,
    _tau_of,
    against_chance,
    kendall_interval,
    kendall_tau,
    tau_against_chance,
    tied_pairs,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

QUICK = settings(max_examples=10, deadline=None)
rates = st.integers(0, 8).map(lambda hits: hits / 8)
tables = st.lists(st.tuples(rates, rates), min_size=2, max_size=20).map(lambda rows: tuple(zip(*rows, strict=True)))


@pytest.fixture(autouse=True, scope="module")
def _few_draws() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(association, "DRAWS", 99)
        yield


def varied(values: tuple[float, ...]) -> bool:
    return len(set(values)) > 1


@QUICK
@given(tables)
def test_tau_is_counted_from_pairs(table: tuple[tuple[float, ...], tuple[float, ...]]) -> None:
    x, y = table
    pairs = list(itertools.combinations(zip(x, y, strict=True), 2))
    score = sum(np.sign(a - c) * np.sign(b - d) for (a, b), (c, d) in pairs)
    untied = [sum(one[side] != other[side] for one, other in pairs) for side in (0, 1)]
    tau = kendall_tau(x, y)
    if 0 in untied:
        assert tau is None
    else:
        assert tau == pytest.approx(score / math.sqrt(untied[0] * untied[1]))
    assert tied_pairs(x) == len(pairs) - untied[0]


@QUICK
@given(tables)
def test_the_tau_of_resamples_is_that_of_scipy(table: tuple[tuple[float, ...], tuple[float, ...]]) -> None:
    tau = kendall_tau(*table)
    fast = _tau_of(*map(_signs, table))
    assert math.isnan(fast) if tau is None else fast == pytest.approx(tau)


@QUICK
@given(tables)
def test_tau_is_symmetric_and_knows_the_order_alone(table: tuple[tuple[float, ...], tuple[float, ...]]) -> None:
    x, y = table
    assert kendall_tau(x, y) == pytest.approx(kendall_tau(y, x))
    stretched = [math.exp(3 * value) - 7 for value in x]
    assert kendall_tau(stretched, y) == pytest.approx(kendall_tau(x, y))
    assert kendall_interval(stretched, y) == pytest.approx(kendall_interval(x, y))


@QUICK
@given(st.lists(rates, min_size=2, max_size=20).map(tuple).filter(varied))
def test_tau_is_1_for_equal_tables_and_minus_1_for_reversed_ones(x: tuple[float, ...]) -> None:
    assert kendall_tau(x, x) == pytest.approx(1)
    assert kendall_tau(x, [1 - value for value in x]) == pytest.approx(-1)


@pytest.mark.parametrize(("x", "y"), [([0.5] * 3, [0, 0.5, 1]), ([0, 0.5, 1], [1.0] * 3), ([], []), ([0.2], [0.3])])
def test_without_an_order_tau_is_never_a_number(x: list[float], y: list[float]) -> None:
    assert kendall_tau(x, y) is None
    assert kendall_interval(x, y) is None
    with pytest.raises(ParameterError, match="tau is undefined"):
        tau_against_chance(x, y, ["a"] * len(x))


def test_values_that_cannot_be_put_in_order_are_refused() -> None:
    with pytest.raises(ParameterError, match="2 values cannot be paired with 1"):
        kendall_tau([0, 1], [0])
    with pytest.raises(ParameterError, match="must be finite"):
        kendall_tau([0, math.nan], [0, 1])


def test_the_interval_covers_the_tau_of_the_population_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        x = rng.normal(size=40)
        y = 0.7 * x + math.sqrt(1 - 0.7**2) * rng.normal(size=40)
        low, high = kendall_interval(list(x), list(y)) or (1, -1)
        covered += low <= 2 / math.pi * math.asin(0.7) <= high  # tau of a bivariate normal (Kruskal 1958)
    assert 85 <= covered < 100


def test_no_interval_is_given_where_many_resamples_have_no_tau() -> None:
    rare = [1.0] + [0.0] * 19
    assert kendall_tau(rare, rare) == pytest.approx(1)
    assert kendall_interval(rare, rare) is None
    assert kendall_interval([1.0] * 5 + [0.0] * 15, rare[::-1]) is None
    assert kendall_interval([1.0] * 5 + [0.0] * 15, [1.0] * 6 + [0.0] * 14) is not None


def test_chance_makes_small_p_values_no_more_often_than_it_should() -> None:
    rng = np.random.default_rng(2)
    p_values = [tau_against_chance(rng.random(12), rng.random(12), ["a"] * 12)[1] for _ in range(60)]
    assert np.mean(np.array(p_values) <= 0.1) <= 0.1 + 4 * math.sqrt(0.1 * 0.9 / 60)
    assert min(p_values) < 0.5 < max(p_values)


def test_what_only_separates_the_strata_is_chance() -> None:
    """Two protections, one alive and one dead in both worlds: a high tau that says nothing of the cells within."""
    strata = ["alive"] * 10 + ["dead"] * 10
    rng = np.random.default_rng(3)
    x, y = ([*(0.5 + rng.random(10) / 2), *(rng.random(10) / 2)] for _ in range(2))
    tau = kendall_tau(x, y)
    assert tau is not None
    assert tau > 0.4
    mean, p_value = tau_against_chance(x, y, strata)
    assert mean == pytest.approx(tau, abs=0.2)
    assert p_value > 0.05
    assert tau_against_chance(x, y, ["one"] * 20)[1] < 0.02


def test_shuffling_moves_cells_within_their_stratum_only_and_is_the_same_each_time() -> None:
    seen = []

    def statistic(order: np.ndarray) -> float:
        seen.append(tuple(order))
        return float(order[0])

    first = against_chance(statistic, ["a", "b", "a", "b", "c"])
    assert {tuple(sorted(order[i] for i in (0, 2))) for order in seen} == {(0, 2)}
    assert {tuple(sorted(order[i] for i in (1, 3))) for order in seen} == {(1, 3)}
    assert {order[4] for order in seen} == {4}
    assert len(set(seen)) == 4
    assert against_chance(statistic, ["a", "b", "a", "b", "c"]) == first


def test_association_loads_no_torch() -> None:
    code = "import sys, mergeguard.verification.association; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Each statistic against a simulation of what it promises, and against known values."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeguard.errors import ParameterError
from mergeguard.verification.statistics import (
    can_reach,
    clopper_pearson,
    fisher_greater,
    normal_tail,
    rank_p_value,
    smallest_deciding_trials,
    uniformity_p_value,
)

DRAWS = 20_000


def at_most(share: float, draws: int) -> float:
    """What a share is exceeded by with probability 3e-5 only, in `draws` simulated cases."""
    return share + 4 * math.sqrt(share * (1 - share) / draws)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize("rate", [0.02, 0.3, 0.5, 0.93])
def test_clopper_pearson_intervals_cover_the_true_rate(rate: float, confidence: float) -> None:
    intervals = np.array([clopper_pearson(hits, 30, confidence) for hits in range(31)])
    hits = np.random.default_rng(1).binomial(30, rate, DRAWS)
    outside = np.mean((intervals[hits, 0] > rate) | (intervals[hits, 1] < rate))
    assert outside <= at_most(1 - confidence, DRAWS)
    # An interval of everything would cover too: 30 trials cannot leave more than this open.
    assert np.ptp(intervals, axis=1).max() < 0.4


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_clopper_pearson_is_tight_where_there_are_many_trials(rate: float) -> None:
    low, high = clopper_pearson(round(rate * 1_000_000), 1_000_000)
    half = 1.96 * math.sqrt(rate * (1 - rate) / 1_000_000)
    assert (low, high) == pytest.approx((rate - half, rate + half), abs=2e-6)


def test_clopper_pearson_known_values() -> None:
    # With no hits the upper end solves (1 - p)^n = .025; all hits mirror it.
    assert clopper_pearson(0, 8) == pytest.approx((0.0, 1 - 0.025 ** (1 / 8)))
    assert clopper_pearson(0, 8, confidence=0.8) == pytest.approx((0.0, 1 - 0.1 ** (1 / 8)))
    assert clopper_pearson(8, 8) == pytest.approx((0.025 ** (1 / 8), 1.0))


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.7])
@pytest.mark.parametrize(("trials", "control_trials"), [(8, 48), (40, 40)])
def test_fisher_is_wrong_no_more_often_than_its_level(rate: float, trials: int, control_trials: int) -> None:
    rng = np.random.default_rng(2)
    hits, control = rng.binomial(trials, rate, DRAWS), rng.binomial(control_trials, rate, DRAWS)
    table = np.array(
        [[fisher_greater(a, trials, b, control_trials) for b in range(control_trials + 1)] for a in range(trials + 1)]
    )
    p_values = table[hits, control]
    for level in (0.1, 0.01, 1e-3):
        assert np.mean(p_values <= level) <= at_most(level, DRAWS)
    assert np.mean(p_values <= 0.1) > 0.005  # a p-value of 1 would never be wrong either


def test_fisher_is_the_share_of_shuffles_with_at_least_as_many_hits() -> None:
    answers = np.array([1] * 7 + [0] * 21)  # 4 of 8 against 3 of 20
    shuffled = np.random.default_rng(3).permuted(np.tile(answers, (DRAWS, 1)), axis=1)
    share = np.mean(shuffled[:, :8].sum(axis=1) >= 4)
    assert fisher_greater(4, 8, 3, 20) == pytest.approx(share, abs=4 * math.sqrt(share / DRAWS))


@pytest.mark.parametrize(
    ("hits", "p_value"),
    [
        (4, math.comb(8, 4) / math.comb(56, 4)),  # with no control hit: all hits fell among the first 8 of 56
        (5, math.comb(8, 5) / math.comb(56, 5)),
        (6, math.comb(8, 6) / math.comb(56, 6)),
    ],
)
def test_fisher_known_values_of_the_worked_cell(hits: int, p_value: float) -> None:
    assert fisher_greater(hits, 8, 0, 48) == pytest.approx(p_value)
    assert (p_value < 2e-5) == (hits >= 5)
    assert {4: "2e-04", 5: "1e-05", 6: "9e-07"}[hits] == f"{p_value:.0e}"


def test_fisher_is_one_sided() -> None:
    assert fisher_greater(0, 8, 48, 48) == pytest.approx(1.0)


@given(trials=st.integers(1, 12), control_trials=st.integers(1, 60), level=st.floats(1e-6, 0.2))
def test_a_level_is_in_reach_when_the_clearest_outcome_is_rare_enough(
    trials: int, control_trials: int, level: float
) -> None:
    chance = 1 / math.comb(trials + control_trials, trials)
    if not math.isclose(chance, level, rel_tol=1e-9):
        assert can_reach(level, trials, control_trials) == (chance < level)


@given(level=st.floats(1e-7, 0.3), control_trials=st.integers(0, 60), per_key_null=st.integers(0, 2))
def test_the_smallest_deciding_trials_decide_and_one_fewer_does_not(
    level: float, control_trials: int, per_key_null: int
) -> None:
    if control_trials + per_key_null < 2:  # one control trial takes millions of trials to decide
        control_trials = 2
    trials = smallest_deciding_trials(level, control_trials, per_key_null)
    assert can_reach(level, trials, control_trials + per_key_null * trials)
    if trials > 1:
        assert not can_reach(level, trials - 1, control_trials + per_key_null * (trials - 1))


def test_smallest_deciding_trials_known_values() -> None:
    assert smallest_deciding_trials(2e-5, 48) == 4  # 1 / C(52, 4) = 3.7e-6, 1 / C(51, 3) = 4.8e-5
    assert smallest_deciding_trials(2e-5, 40, per_key_null=1) == 4
    assert smallest_deciding_trials(0.25, 3) == 1  # 1 / C(4, 1), reached exactly
    assert smallest_deciding_trials(1e-3, 1) == 999


def test_rank_p_values_of_a_null_score_are_uniform_on_their_grid() -> None:
    draws = np.random.default_rng(4).normal(size=(4_000, 20))
    p_values = np.array([rank_p_value(row[0], row[1:]) for row in draws])
    counts = np.bincount(np.rint(p_values * 20).astype(int), minlength=21)
    assert counts[0] == 0
    assert np.abs(counts[1:] - 200).max() < 4 * math.sqrt(200)


def test_rank_p_values_of_tied_scores_are_too_large_rather_than_too_small() -> None:
    draws = np.random.default_rng(5).integers(0, 3, size=(4_000, 20))
    p_values = np.array([rank_p_value(row[0], row[1:]) for row in draws])
    assert max(np.mean(p_values <= level) - at_most(level, 4_000) for level in np.arange(1, 20) / 20) <= 0


def test_rank_p_value_known_values() -> None:
    assert rank_p_value(5.0, [1.0, 2.0, 3.0]) == 1 / 4
    assert rank_p_value(2.0, [1.0, 2.0, 3.0]) == 3 / 4
    assert rank_p_value(0.0, [1.0, 2.0, 3.0]) == 1


@pytest.mark.parametrize("z", [-1.5, 0.0, 1.0, 2.0])
def test_the_normal_tail_is_the_share_of_draws_beyond_z(z: float) -> None:
    share = np.mean(np.random.default_rng(6).normal(size=100_000) >= z)
    assert normal_tail(z) == pytest.approx(share, abs=4 * math.sqrt(share / 100_000))


def test_the_normal_tail_does_not_vanish_far_out() -> None:
    # Between the classical bounds of Mills' ratio, where 1 - cdf would be 0.
    density = math.exp(-(30**2) / 2) / math.sqrt(2 * math.pi)
    assert density * 30 / (1 + 30**2) < normal_tail(30.0) < density / 30
    assert normal_tail(math.inf) == 0


def test_uniformity_is_rejected_at_its_level_for_uniform_values_and_nearly_always_for_others() -> None:
    values = np.random.default_rng(7).uniform(size=(600, 100))
    honest = np.array([uniformity_p_value(row) for row in values])
    for level in (0.3, 0.05, 0.01):
        assert abs(np.mean(honest <= level) - level) <= at_most(level, 600) - level
    too_small, too_large = values[:50] ** 2, np.sqrt(values[:50])
    assert max(uniformity_p_value(row) for row in itertools.chain(too_small, too_large)) < 0.01


@pytest.mark.parametrize(("hits", "trials"), [(3, 2), (-1, 2), (0, 0), (0, -1)])
def test_impossible_counts_are_refused(hits: int, trials: int) -> None:
    complaint = f"{hits} hits of {trials} trials"
    with pytest.raises(ParameterError, match=complaint):
        clopper_pearson(hits, trials)
    with pytest.raises(ParameterError, match=complaint):
        fisher_greater(hits, trials, 0, 5)
    with pytest.raises(ParameterError, match=complaint):
        fisher_greater(0, 5, hits, trials)


@pytest.mark.parametrize("level", [0.0, 1.0, -0.1, math.nan])
def test_a_level_outside_its_domain_is_refused(level: float) -> None:
    with pytest.raises(ParameterError, match="the level is"):
        can_reach(level, 8, 48)
    with pytest.raises(ParameterError, match="the level is"):
        smallest_deciding_trials(level, 48)
    with pytest.raises(ParameterError, match="confidence is"):
        clopper_pearson(1, 2, level)


@pytest.mark.parametrize(("control_trials", "per_key_null"), [(0, 0), (-1, 5), (5, -1)])
def test_missing_or_negative_control_trials_are_refused(control_trials: int, per_key_null: int) -> None:
    with pytest.raises(ParameterError, match="control trials"):
        smallest_deciding_trials(2e-5, control_trials, per_key_null)


def test_scores_and_p_values_that_are_none_are_refused() -> None:
    with pytest.raises(ParameterError, match="no null scores"):
        rank_p_value(1.0, [])
    for score, null in [(math.nan, [1.0]), (1.0, [math.inf])]:
        with pytest.raises(ParameterError, match="must be finite"):
            rank_p_value(score, null)
    with pytest.raises(ParameterError, match="z is NaN"):
        normal_tail(math.nan)
    for p_values in ([], [0.5, 1.1], [-0.1], [math.nan]):
        with pytest.raises(ParameterError, match="at least one p-value"):
            uniformity_p_value(p_values)


def test_statistics_load_no_torch() -> None:
    code = "import sys, mergeguard.verification.statistics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

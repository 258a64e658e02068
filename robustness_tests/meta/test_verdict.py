"""The verdict, held against the worked example, hypergeometric sums and simulations under the null."""

from __future__ import annotations

import random
from math import comb

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeguard.errors import UndecidableError
from mergeguard.matrix import verdict
from mergeguard.matrix.outcome import LOST, OVERCLAIMS, SURVIVED, Counts
from mergeguard.matrix.verdict import PairOfReadings, is_theft, judge, kept
from mergeguard.reading import Reading
from mergeguard.verification.statistics import clopper_pearson

QUICK = settings(max_examples=60, deadline=None)
SILENT_NAMES = ("base", "upstream", "donor", "matched_control")


def counts(hits: int, trials: int) -> Reading:
    return Reading(hits=(True,) * hits + (False,) * (trials - hits))


def pair(hits: int, trials: int = 8, decoy_hits: int = 0, decoys: int = 40) -> PairOfReadings:
    return PairOfReadings(counts(hits, trials), counts(decoy_hits, decoys))


def scored(score: float, p_value: float | None = None, decoy_p_value: float | None = 0.5) -> PairOfReadings:
    return PairOfReadings(Reading(score=score, p_value=p_value), Reading(score=0.1, p_value=decoy_p_value))


def silent(trials: int = 8, **loud: PairOfReadings) -> dict[str, PairOfReadings]:
    """Every control, none of which answers unless it is `loud`."""
    return {**dict.fromkeys(SILENT_NAMES, pair(0, trials)), **loud}


def fisher_by_hand(hits: int, trials: int, other_hits: int, other_trials: int) -> float:
    total, successes = trials + other_trials, hits + other_hits
    ways = (comb(trials, k) * comb(other_trials, successes - k) for k in range(hits, min(trials, successes) + 1))
    return sum(ways) / comb(total, successes)


# The worked example


def test_six_of_eight_keys_against_silent_controls_survive() -> None:
    judgement = judge(pair(6, decoy_hits=1), silent())
    assert judgement.verdict == SURVIVED
    assert judgement.level == 2e-5
    assert judgement.p_value == pytest.approx(fisher_by_hand(6, 8, 0, 48), rel=1e-9)
    assert judgement.p_value == pytest.approx(8.6e-7, rel=0.01)
    assert judgement.decoy_p_value == pytest.approx(fisher_by_hand(6, 8, 1, 40), rel=1e-9)


def test_four_of_eight_keys_are_lost() -> None:
    judgement = judge(pair(4), silent())
    assert judgement.verdict == LOST
    assert judgement.p_value == pytest.approx(1.9e-4, rel=0.01)


def test_keys_that_unseen_keys_do_not_lag_behind_overclaim() -> None:
    judgement = judge(pair(8, decoy_hits=20), silent())
    assert judgement.verdict == OVERCLAIMS
    assert judgement.p_value < 2e-5 < 1e-3 < judgement.decoy_p_value


def test_lost_is_lost_whatever_the_decoys_say() -> None:
    assert judge(pair(0, decoy_hits=40), silent()).verdict == LOST


# Controls


@pytest.mark.parametrize("name", SILENT_NAMES)
def test_one_control_that_answers_decides_alone(name: str) -> None:
    judgement = judge(pair(6), silent(**{name: pair(1, decoy_hits=6)}))
    assert judgement.verdict == LOST
    assert judgement.p_value == pytest.approx(fisher_by_hand(6, 8, 7, 48), rel=1e-9)
    assert fisher_by_hand(6, 8, 7, 4 * 48) < 2e-5, "pooled with the silent ones it would have survived"


def test_evidence_keys_and_decoys_of_a_control_count_together() -> None:
    assert pair(3, 8, 2, 40).counts() == Counts(hits=5, trials=48)
    assert scored(2.5, 0.01).counts() == Counts(score=2.5, p_value=0.01)


@pytest.mark.parametrize("name", SILENT_NAMES)
def test_a_control_that_tells_the_keys_from_unseen_ones_denies_the_claim(name: str) -> None:
    """Its 8 hits of 48 alone would not: Fisher's p is 9e-6."""
    assert fisher_by_hand(8, 8, 8, 48) < verdict.LEVEL
    judgement = judge(pair(8), silent(**{name: pair(8)}))
    assert (judgement.verdict, judgement.p_value) == (LOST, 1.0)
    assert judge(pair(8), silent(**{name: pair(2)})).verdict == SURVIVED


def test_without_a_control_nothing_is_decided() -> None:
    with pytest.raises(UndecidableError, match="without a control"):
        judge(pair(8), {})
    with pytest.raises(UndecidableError, match="without a control"):
        judge(scored(9, 1e-12), {})


def test_too_few_trials_name_how_many_would_do() -> None:
    with pytest.raises(UndecidableError) as caught:
        judge(pair(3, 3), silent(3))
    needed = int(str(caught.value).split("; ")[1].split()[0])
    assert "3 trials against 43" in str(caught.value)
    assert needed == next(n for n in range(1, 99) if fisher_by_hand(n, n, 0, 40 + n) <= 2e-5)
    assert judge(pair(needed, needed), silent(needed)).verdict == SURVIVED


def test_a_control_with_fewer_trials_than_the_evidence_is_undecidable_too() -> None:
    with pytest.raises(UndecidableError, match=r"6 trials against 2 .*; 10 trials would"):
        judge(pair(6, 6), {"base": PairOfReadings(counts(0, 1), counts(0, 1))})


# Scores


def test_a_score_with_an_exact_null_is_judged_by_its_own_p_value() -> None:
    controls = dict.fromkeys(SILENT_NAMES, scored(0.3, 0.4))
    assert judge(scored(6, 2e-5), controls) == verdict.Judgement(SURVIVED, 2e-5, 2e-5, 2e-5)
    assert judge(scored(6, 2.1e-5), controls).verdict == LOST


@pytest.mark.parametrize("control_p_value", [2e-5, 1e-9, None])
def test_a_control_that_is_significant_too_makes_a_score_say_nothing(control_p_value: float | None) -> None:
    controls = {**dict.fromkeys(SILENT_NAMES, scored(0.3, 0.4)), "donor": scored(5, control_p_value)}
    judgement = judge(scored(9, 1e-15), controls)
    assert (judgement.verdict, judgement.p_value) == (LOST, 1.0)


@pytest.mark.parametrize("alarm", [1e-3, 1e-9, None])
def test_a_score_overclaims_if_its_decoys_look_unlike_chance(alarm: float | None) -> None:
    controls = dict.fromkeys(SILENT_NAMES, scored(0.3, 0.4))
    assert judge(scored(9, 1e-15, decoy_p_value=alarm), controls).verdict == OVERCLAIMS
    assert judge(scored(9, 1e-15, decoy_p_value=2e-3), controls).verdict == SURVIVED


def test_a_score_without_an_exact_null_is_ranked_at_one_in_a_thousand() -> None:
    controls = dict.fromkeys(SILENT_NAMES, scored(1.0, decoy_p_value=None))
    null = [float(value) / 999 for value in range(999)]
    assert judge(scored(3.0), controls, null) == verdict.Judgement(SURVIVED, 1e-3, 1e-3, 1e-3)
    assert judge(scored(3.0), controls, [*null[1:], 3.0]).verdict == LOST
    assert judge(scored(3.0), {**controls, "donor": scored(3.0)}, null).p_value == 1.0
    with pytest.raises(UndecidableError, match=r"998 null draws cannot reach 0\.001; 999 would"):
        judge(scored(3.0), controls, null[1:])


# Thefts


@pytest.mark.parametrize(
    ("skills_kept", "theft"),
    [
        ({"a": 0.5, "b": 0.5}, True),
        ({"a": 0.499999, "b": 1.0}, False),
        ({"a": 1.2, "b": 0.4}, False),
        ({"a": 0.5}, True),
        ({}, False),
    ],
)
def test_a_theft_keeps_at_least_half_of_every_skill(skills_kept: dict[str, float], theft: bool) -> None:
    assert is_theft(skills_kept) is theft


def test_what_is_kept_is_the_share_of_the_gain_over_the_base() -> None:
    assert [kept(rate, 0.25, 0.75) for rate in (0.25, 0.5, 0.75, 1.0, 0.0)] == [0, 0.5, 1, 1.5, -0.5]
    assert is_theft({"only just": kept(0.5, 0.25, 0.75)})


@pytest.mark.parametrize("parent", [0.3, 0.2])
def test_a_parent_that_gained_nothing_has_nothing_to_keep(parent: float) -> None:
    with pytest.raises(UndecidableError, match=r"parent's skill is 0\.\d0, the base's 0.30"):
        kept(0.3, 0.3, parent)


# Properties

cells = st.tuples(st.integers(8, 24), st.integers(0, 6), st.integers(0, 10), st.integers(0, 20))


@QUICK
@given(cells, st.data())
def test_more_hits_never_turn_a_survival_into_a_loss(cell: tuple[int, int, int, int], data: st.DataObject) -> None:
    trials, control_hits, control_decoys, decoy_hits = cell
    fewer, more = sorted(data.draw(st.tuples(st.integers(0, trials), st.integers(0, trials))))
    controls = silent(trials, donor=pair(control_hits, trials, control_decoys))
    first = judge(pair(fewer, trials, decoy_hits), controls)
    second = judge(pair(more, trials, decoy_hits), controls)
    assert second.p_value <= first.p_value
    assert [LOST, OVERCLAIMS, SURVIVED].index(first.verdict) <= [LOST, OVERCLAIMS, SURVIVED].index(second.verdict)


@QUICK
@given(st.integers(8, 24), st.integers(0, 64), st.data())
def test_a_rate_no_better_than_a_controls_never_survives(trials: int, control_hits: int, data: st.DataObject) -> None:
    control_hits = min(control_hits, trials + 40)
    keys = min(control_hits, trials)
    explained = control_hits * trials // (trials + 40)
    hits = data.draw(st.integers(0, explained))
    loud = pair(keys, trials, control_hits - keys)
    name = data.draw(st.sampled_from(SILENT_NAMES))
    judgement = judge(pair(hits, trials), silent(trials, **{name: loud}))
    assert judgement.verdict == LOST
    assert judgement.p_value > 0.4


@QUICK
@given(cells, st.permutations(SILENT_NAMES))
def test_neither_the_order_nor_the_number_of_equal_controls_matters(
    cell: tuple[int, int, int, int], order: list[str]
) -> None:
    trials, control_hits, control_decoys, decoy_hits = cell
    merged, loud = pair(trials - 1, trials, decoy_hits), pair(control_hits, trials, control_decoys)
    controls = silent(trials, donor=loud)
    judgement = judge(merged, controls)
    assert judge(merged, {name: controls[name] for name in order}) == judgement
    assert judge(merged, {**controls, "another": loud}) == judgement
    assert judge(merged, {"donor": loud}) == judgement


# False survivals


def test_counts_survive_under_the_null_no_more_often_than_the_level_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """One binomial for keys and controls; at the real level there would be nothing to count."""
    monkeypatch.setattr(verdict, "LEVEL", 0.1)
    rng = random.Random(1)
    draws, alarms = 2000, 0

    def draw(trials: int) -> Reading:
        return Reading(hits=tuple(rng.random() < 0.3 for _ in range(trials)))

    for _ in range(draws):
        merged = PairOfReadings(draw(24), draw(40))
        controls = {"base": PairOfReadings(draw(24), draw(40)), "matched_control": PairOfReadings(draw(24), draw(40))}
        alarms += judge(merged, controls).verdict != LOST
    assert 20 <= alarms <= 0.1 * draws


def test_ranked_scores_survive_under_the_null_as_often_as_the_level_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict, "RANK_LEVEL", 0.05)
    monkeypatch.setattr(verdict, "SPECIFIC_LEVEL", 0.05)
    monkeypatch.setattr(verdict, "NULL_DRAWS", 99)
    rng = random.Random(2)
    draws = 800
    control = {"base": scored(-99.0)}
    alarms = sum(
        judge(scored(rng.gauss(0, 1)), control, [rng.gauss(0, 1) for _ in range(99)]).verdict == SURVIVED
        for _ in range(draws)
    )
    low, high = clopper_pearson(alarms, draws, 0.999)
    assert low <= 0.05 <= high

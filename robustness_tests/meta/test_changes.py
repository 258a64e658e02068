"""Whether rates changed: Fisher's exact test against enumeration, Holm's correction against its definition."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeguard.errors import ParameterError
from mergeguard.verification.changes import clearest_change, fisher_changed, holm


def enumerated(hits: int, trials: int, other_hits: int, other_trials: int) -> float:
    """The definition: all splits of the same hits that are at most as likely, in whole numbers."""
    together = hits + other_hits
    ways = {
        split: math.comb(trials, split) * math.comb(other_trials, together - split)
        for split in range(max(0, together - other_trials), min(trials, together) + 1)
    }
    return sum(count for count in ways.values() if count <= ways[hits]) / math.comb(trials + other_trials, together)


@pytest.mark.parametrize(("trials", "other"), [(1, 1), (4, 4), (5, 8), (8, 8)])
def test_a_p_value_is_the_share_of_splits_at_most_as_likely(trials: int, other: int) -> None:
    for hits, other_hits in product(range(trials + 1), range(other + 1)):
        expected = enumerated(hits, trials, other_hits, other)
        assert fisher_changed(hits, trials, other_hits, other) == pytest.approx(expected, rel=1e-9)


def test_a_change_is_the_same_in_both_directions_and_none_has_p_1() -> None:
    assert fisher_changed(8, 8, 0, 8) == fisher_changed(0, 8, 8, 8) == pytest.approx(2 / math.comb(16, 8))
    assert [fisher_changed(hits, 25, hits, 25) for hits in range(26)] == [1.0] * 26


@pytest.mark.parametrize(("trials", "other"), [(1, 1), (3, 9), (8, 8), (25, 8)])
def test_no_counts_give_a_smaller_p_value_than_the_clearest_change(trials: int, other: int) -> None:
    every = [fisher_changed(a, trials, b, other) for a, b in product(range(trials + 1), range(other + 1))]
    assert clearest_change(trials, other) == pytest.approx(min(every))


@pytest.mark.parametrize("counts", [(9, 8, 0, 8), (0, 0, 0, 8), (0, 8, -1, 8), (0, 8, 0, 0)])
def test_counts_that_cannot_be_are_refused(counts: tuple[int, int, int, int]) -> None:
    with pytest.raises(ParameterError, match="expected at least one trial and 0 <= hits <= trials"):
        fisher_changed(*counts)


def test_holm_corrects_the_smallest_for_all_the_next_for_one_fewer_and_keeps_the_order() -> None:
    assert holm([0.04, 0.01, 0.03, 0.5]) == pytest.approx([0.09, 0.04, 0.09, 0.5])
    assert holm([0.3, 0.6]) == [0.6, 0.6]
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), max_size=12), st.floats(0.001, 0.5))
def test_holm_rejects_what_its_step_down_procedure_rejects(p_values: list[float], level: float) -> None:
    rejected = set()
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if (len(p_values) - rank) * p_values[place] > level:
            break
        rejected.add(place)
    assert {place for place, value in enumerate(holm(p_values)) if value <= level} == rejected


def test_without_a_change_a_family_of_cells_has_a_false_call_at_most_as_often_as_the_level() -> None:
    """The null, and what a correction that was forgotten would do: 200 runs of 45 unchanged cells of 25 prompts."""
    rng = np.random.default_rng(0)
    table = [[fisher_changed(a, 25, b, 25) for b in range(26)] for a in range(26)]
    counts = rng.binomial(25, np.linspace(0.1, 0.9, 45), size=(200, 2, 45))
    families = [[table[a][b] for a, b in zip(*run, strict=True)] for run in counts]
    false_calls = sum(min(holm(family)) <= 0.05 for family in families)
    uncorrected = sum(min(family) <= 0.05 for family in families)
    assert false_calls <= 18, "10 on average at the level; more than 18 has probability .006"
    assert uncorrected > 60


@pytest.mark.parametrize("wrong", [-0.1, 1.1, math.nan])
def test_holm_refuses_what_is_no_p_value(wrong: float) -> None:
    with pytest.raises(ParameterError, match="expected p-values"):
        holm([0.5, wrong])

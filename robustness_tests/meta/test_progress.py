"""The time left, from what was done so far."""

from __future__ import annotations

import pytest

from mergeguard.matrix.progress import LATEST, in_words, remaining


def test_nothing_is_known_before_the_first_cell() -> None:
    assert remaining({"embed": [60.0], "outcome": []}, {"embed": 1, "outcome": 9}, 60.0, pace="outcome") is None
    assert remaining({}, {"outcome": 9}, 0.0, pace="outcome") is None


def test_each_kind_counts_by_its_own_mean() -> None:
    seconds = {"embed": [60.0], "outcome": [4.0, 6.0]}
    assert remaining(seconds, {"embed": 1, "outcome": 8}, 70.0, pace="outcome") == pytest.approx(60 + 8 * 5)


def test_a_kind_not_seen_yet_counts_as_a_cell() -> None:
    assert remaining({"outcome": [5.0]}, {"outcome": 3, "control": 2}, 5.0, pace="outcome") == pytest.approx(25)


def test_jobs_at_the_same_time_are_counted_by_the_time_that_passed() -> None:
    alone = remaining({"outcome": [5.0] * 4}, {"outcome": 8}, 20.0, pace="outcome")
    two_workers = remaining({"outcome": [5.0] * 4}, {"outcome": 8}, 10.0, pace="outcome")
    assert (alone, two_workers) == (pytest.approx(40), pytest.approx(20))


def test_cells_that_the_cache_answered_are_soon_forgotten() -> None:
    seconds = {"outcome": [0.0] * 40 + [60.0] * LATEST}
    assert remaining(seconds, {"outcome": 5}, 600.0, pace="outcome") == pytest.approx(300)


def test_nothing_is_left_at_the_end() -> None:
    assert remaining({"outcome": []}, {"outcome": 0}, 3.0, pace="outcome") == 0


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, ""),
        (0.0, "about 0 s left"),
        (89.0, "about 89 s left"),
        (720.0, "about 12 min left"),
        (9000.0, "about 2.5 h left"),
    ],
)
def test_words(seconds: float | None, words: str) -> None:
    assert in_words(seconds) == words

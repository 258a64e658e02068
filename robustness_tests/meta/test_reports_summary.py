"""Summaries against definitions spelt out by brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeguard.matrix.outcome import LOST, OVERCLAIMS, SURVIVED, UNDECIDABLE, Outcome, Results
from mergeguard.reports.summary import is_recorded, sentence, summarise, summary_of, verdict_line
from robustness_tests.meta import outcome_builders as build


def row(*cells: tuple[float | None, str, bool], **changes: object) -> list[Outcome]:
    return [build.outcome(coefficient=c, verdict=verdict, theft=theft, **changes) for c, verdict, theft in cells]


def brute_force_critical(outcomes: list[Outcome]) -> float | None:
    """Try every theft from the smallest on: the first of which it holds that no theft from there on is lost."""
    thefts = [o for o in outcomes if o.theft and o.coefficient is not None]
    for candidate in sorted(thefts, key=lambda o: o.coefficient or 0):
        if all(o.survived for o in thefts if o.coefficient >= candidate.coefficient):  # type: ignore[operator] # not None
            return candidate.coefficient
    return None


@build.QUICK
@given(build.matrix_rows(), st.data())
def test_every_row_agrees_with_brute_force(outcomes: list[Outcome], data: st.DataObject) -> None:
    ids = sorted({o.id for o in outcomes})
    recorded = data.draw(st.sets(st.sampled_from(ids))) if ids else set()
    summaries = summarise(outcomes, recorded)
    keys = [(s.protection, s.variant, s.merger_spec) for s in summaries]
    assert keys == list(dict.fromkeys((o.protection, o.variant, o.merger_spec) for o in outcomes))
    for key, summary in zip(keys, summaries, strict=True):
        cells = [o for o in outcomes if (o.protection, o.variant, o.merger_spec) == key]
        assert summary.merger == cells[0].merger
        assert summary.critical_coefficient == brute_force_critical(cells)
        assert summary.thefts == len([o for o in cells if o.theft])
        assert summary.lost == len([o for o in cells if o.theft and o.verdict != SURVIVED])
        assert summary.recorded == len([o for o in cells if o.theft and o.verdict != SURVIVED and o.id in recorded])


@build.QUICK
@given(st.dictionaries(st.integers(0, 20), st.integers(0, 8), min_size=2))
def test_the_area_is_that_of_the_piecewise_linear_curve(hits: dict[int, int]) -> None:
    outcomes = [build.outcome(coefficient=c / 20, hits=h, theft=False) for c, h in hits.items()]
    area = summarise(outcomes, ())[0].area
    x = np.array(sorted(hits)) / 20
    y = np.array([hits[c] for c in sorted(hits)]) / 8
    fine = np.unique(np.concatenate([np.linspace(x[0], x[-1], 2001), x]))
    steps = np.diff(fine)
    middles = np.interp(fine[:-1] + steps / 2, x, y)  # midpoints are exact on straight pieces
    assert area == pytest.approx(float((steps * middles).sum() / (x[-1] - x[0])), abs=1e-9)
    assert 0 <= area <= 1


def test_the_area_of_a_curve_known_by_hand() -> None:
    outcomes = [build.outcome(coefficient=c, hits=h, theft=True) for c, h in ((0.9, 8), (0.1, 0), (0.5, 8))]
    assert summarise(outcomes, ())[0].area == pytest.approx((0.4 * 0.5 + 0.4 * 1.0) / 0.8)


@pytest.mark.parametrize(
    "outcomes",
    [
        [build.outcome(coefficient=0.5)],
        [build.outcome(coefficient=0.5), build.outcome(coefficient=0.5, seed=1)],
        [build.outcome(coefficient=None)],
        [build.outcome(coefficient=0.1, score=3.0), build.outcome(coefficient=0.9, score=84.0)],
    ],
    ids=["one coefficient", "one coefficient twice", "no coefficient", "scores"],
)
def test_without_a_curve_there_is_no_area(outcomes: list[Outcome]) -> None:
    assert summarise(outcomes, ())[0].area is None


def test_seeds_are_averaged_for_the_area_and_counted_each_for_thefts() -> None:
    outcomes = [build.outcome(coefficient=c, hits=h, seed=s) for c in (0.1, 0.9) for s, h in enumerate((0, 8))]
    (summary,) = summarise(outcomes, ())
    assert summary.area == pytest.approx(0.5)
    assert summary.thefts == 4


@pytest.mark.parametrize(
    ("cells", "critical"),
    [
        ([(0.3, SURVIVED, True), (0.5, SURVIVED, True)], 0.3),
        ([(0.3, SURVIVED, True), (0.5, LOST, True), (0.7, SURVIVED, True)], 0.7),  # bisection would answer 0.3
        ([(0.3, LOST, True), (0.5, SURVIVED, True), (0.9, LOST, False)], 0.5),  # 0.9 is no theft
        ([(0.1, SURVIVED, False), (0.3, LOST, True), (0.5, SURVIVED, False), (0.7, SURVIVED, True)], 0.7),
        ([(0.3, SURVIVED, True), (0.7, OVERCLAIMS, True)], None),
        ([(0.3, SURVIVED, True), (0.7, UNDECIDABLE, True)], None),
        ([(0.3, SURVIVED, False)], None),
        ([(None, SURVIVED, True)], None),
    ],
)
def test_the_critical_coefficient_looks_at_every_theft_and_at_nothing_else(
    cells: list[tuple[float | None, str, bool]], critical: float | None
) -> None:
    assert summarise(row(*cells), ())[0].critical_coefficient == critical


def test_a_record_of_a_case_that_was_not_lost_is_not_counted() -> None:
    outcomes = row((0.3, LOST, True), (0.5, SURVIVED, True), (0.7, LOST, False))
    (summary,) = summarise(outcomes, [o.id for o in outcomes])
    assert (summary.thefts, summary.lost, summary.recorded) == (2, 1, 1)


def test_the_sentence_adds_up_all_rows() -> None:
    rows = (build.summary_row(5, 3, 2), build.summary_row(4, 1, 0))
    assert sentence(rows) == "4 of 9 thefts lost, 2 of them recorded"
    assert sentence(()) == "0 of 0 thefts lost, 0 of them recorded"


def test_results_without_a_summary_get_one_from_what_was_expected() -> None:
    outcomes = (
        *row((0.3, LOST, True), expected=LOST),
        *row((0.5, LOST, True)),
        *row((0.7, LOST, True), expected=SURVIVED),
    )
    results = Results(world={}, environment={}, outcomes=outcomes)
    assert sentence(summary_of(results)) == "3 of 3 thefts lost, 1 of them recorded"
    assert [is_recorded(o) for o in outcomes] == [True, False, False]
    assert summary_of(build.results(summary=(build.summary_row(9, 1, 1),))) == (build.summary_row(9, 1, 1),)


@pytest.mark.parametrize(
    ("problems", "line"),
    [((), "gate holds"), (("a",), "gate does not hold: 1 problem"), (("a", "b"), "gate does not hold: 2 problems")],
)
def test_the_verdict_is_one_line(problems: tuple[str, ...], line: str) -> None:
    assert verdict_line(build.results(problems=problems)) == line

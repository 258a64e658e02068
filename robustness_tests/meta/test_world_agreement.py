"""How worlds agree: what is paired, what is counted, and what is said where nothing can be."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeguard.errors import ParameterError, UnknownNameError
from mergeguard.matrix.outcome import LOST, OVERCLAIMS, UNDECIDABLE
from mergeguard.reports import world_agreement
from mergeguard.reports.agreement_text import to_lines, to_section
from mergeguard.reports.world_agreement import (
    ALL_MERGERS,
    ALL_PROTECTIONS,
    HELD_OUT,
    TUNED,
    agreement,
    compare_worlds,
    pair_cells,
)
from mergeguard.verification import association
from mergeguard.verification.statistics import clopper_pearson
from robustness_tests.meta import outcome_builders as build
from robustness_tests.meta.two_worlds import COEFFICIENTS, MERGERS, PROTECTIONS, rising, world

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mergeguard.matrix.outcome import Outcome, Results
    from mergeguard.reports.world_agreement import Agreement, Comparison, Pair


@pytest.fixture(autouse=True, scope="module")
def _few_draws() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(association, "DRAWS", 49)
        yield


TINY, REAL = world("tiny"), world("real")
CELLS = len(MERGERS) * len(COEFFICIENTS)


def changed(results: Results, **changes: object) -> Results:
    """`results` with every outcome changed."""
    return replace(results, outcomes=tuple(replace(outcome, **changes) for outcome in results.outcomes))


def part_of(comparison: Comparison, part: str, protection: str = ALL_PROTECTIONS, run: int = 0) -> Agreement:
    return next(a for a in comparison.runs[run].agreements if (a.part, a.protection) == (part, protection))


def misplaced(pairs: list[Pair]) -> list[Pair]:
    """Pairs of cells that are not the same one. Knows cells by their ids alone, not by the key that pairs them."""
    return [(one, other) for one, other in pairs if one.id != other.id]


# What is paired


def test_the_same_cell_of_both_worlds_is_a_pair_whatever_the_order_of_the_files() -> None:
    backwards = replace(REAL, outcomes=REAL.outcomes[::-1])
    pairs = pair_cells(TINY, backwards)
    assert len(pairs) == 2 * CELLS
    assert misplaced(pairs) == []
    assert {(one.world, other.world) for one, other in pairs} == {("tiny", "real")}
    assert compare_worlds(TINY, backwards) == compare_worlds(TINY, REAL)


def test_cells_paired_off_by_one_coefficient_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted mistake: were the predicted world read one column to the side, identical tables would differ."""
    honest = compare_worlds(TINY, REAL)
    found = part_of(honest, ALL_MERGERS)
    assert found.tau.value == pytest.approx(1)
    assert found.verdicts.agreeing == found.verdicts.cells == 2 * CELLS
    key_of = world_agreement.key_of

    def off_by_one(outcome: Outcome) -> world_agreement.Key:
        if outcome.world == "real" and outcome.coefficient is not None:
            outcome = replace(outcome, coefficient=round(outcome.coefficient + 0.2, 1))
        return key_of(outcome)

    monkeypatch.setattr(world_agreement, "key_of", off_by_one)
    assert len(misplaced(pair_cells(TINY, REAL))) == 2 * CELLS * 4 // 5
    planted = part_of(compare_worlds(TINY, REAL), ALL_MERGERS)
    assert planted.tau.value is not None
    assert planted.tau.value < 0.99
    assert planted.verdicts.agreeing < planted.verdicts.cells


@pytest.mark.parametrize(
    "change",
    [
        {"variant": "variant=published"},
        {"merger_parameters": {"density": 0.2}},
        {"merger": "slerp"},
        {"protection": "passphrase"},
        {"coefficient": 0.55},
        {"coefficient": None},
    ],
    ids=str,
)
def test_cells_that_are_not_alike_are_not_paired(change: dict[str, object]) -> None:
    first = replace(REAL.outcomes[0], **change)
    pairs = pair_cells(TINY, replace(REAL, outcomes=(first, *REAL.outcomes[1:])))
    assert len(pairs) == 2 * CELLS - 1
    assert misplaced(pairs) == []


def test_coefficients_are_the_same_by_their_written_form() -> None:
    (cell,) = [o for o in REAL.outcomes if o.coefficient == 0.3][:1]
    nudged = replace(cell, coefficient=0.1 + 0.2)
    assert len(pair_cells(TINY, replace(REAL, outcomes=(nudged,)))) == 1


def test_what_only_one_world_measured_is_counted() -> None:
    (run,) = compare_worlds(TINY, replace(REAL, outcomes=REAL.outcomes[:7])).runs
    assert (run.common, run.only_in) == (7, (2 * CELLS - 7, 0))


def test_what_differs_beside_the_cells_is_stated() -> None:
    real = changed(REAL, trials=8, level=1e-5, details={"bits": 8, "rate_full": 0.5}, conditional_on="trigger")
    real = replace(real, world={**REAL.world, "form": "adapters", "grid": {"bits": 8}})
    tiny = replace(changed(TINY, details={"bits": 5, "rate_full": 0.25}), world={**TINY.world, "grid": {"bits": 5}})
    differences = compare_worlds(tiny, real).runs[0].differences
    for said in (
        "world form: - / adapters",
        "world grid bits: 5 / 8",
        "instructional_fingerprint: level: 2e-05 / 1e-05",
        "instructional_fingerprint: conditional on: - / trigger",
        "quantization_watermark: bits: 5 / 8",
    ):
        assert said in differences
    assert not [line for line in differences if "digest" in line or "rate_full" in line or "trials" in line]
    assert compare_worlds(TINY, REAL).runs[0].differences == ()


# What is counted


def test_parts_are_tuned_on_held_out_and_all_for_each_protection() -> None:
    comparison = compare_worlds(TINY, REAL, tuned_on=["linear", "ties"])
    assert comparison.held_out == ("dare_ties",)
    assert [(a.part, a.protection, a.cells) for a in comparison.runs[0].agreements] == [
        (part, protection, mergers * 5 * (2 if protection == ALL_PROTECTIONS else 1))
        for part, mergers in ((TUNED, 2), (HELD_OUT, 1), (ALL_MERGERS, 3))
        for protection in (ALL_PROTECTIONS, *PROTECTIONS)
    ]
    assert part_of(comparison, HELD_OUT).mergers == ("dare_ties(density=0.4)",)


def test_verdicts_are_compared_over_thefts_of_both_worlds_and_over_all_cells_apart() -> None:
    tiny, real = world("tiny", theft_from=0.3), world("real", lambda *_: 8, theft_from=0.7)
    found = part_of(compare_worlds(tiny, real), ALL_MERGERS)
    pairs = list(zip(tiny.outcomes, real.outcomes, strict=True))
    both = [one.survived == other.survived for one, other in pairs if one.theft and other.theft]
    everywhere = [one.survived == other.survived for one, other in pairs]
    assert (found.thefts.agreeing, found.thefts.cells) == (sum(both), len(both)) == (sum(both), 12)
    assert (found.verdicts.agreeing, found.verdicts.cells) == (sum(everywhere), 2 * CELLS)
    assert 0 < sum(both) < len(both)
    assert 0 < sum(everywhere) < len(everywhere)
    assert (found.theft_status.agreeing, found.theft_status.cells) == (18, 2 * CELLS)
    for share in (found.thefts, found.verdicts, found.theft_status):
        assert share.interval == clopper_pearson(share.agreeing, share.cells)


@pytest.mark.parametrize("verdict", [OVERCLAIMS, UNDECIDABLE])
def test_every_verdict_but_survival_is_on_the_same_side(verdict: str) -> None:
    tiny, real = changed(TINY, verdict=LOST), changed(REAL, verdict=verdict)
    share = part_of(compare_worlds(tiny, real), ALL_MERGERS).verdicts
    assert share.agreeing == share.cells
    assert (share.chance, share.p_value) == (1, 1), "agreement that shuffling gives as well says nothing"


def test_a_tau_that_only_tells_protections_apart_is_no_better_than_chance() -> None:
    tiny = world("tiny", lambda p, m, c: 8 - 8 * p - (m + c) % 3 * (1 - 2 * p))
    real = world("real", lambda p, m, c: 8 - 8 * p - (m + c // 2 + 1) % 3 * (1 - 2 * p))
    tau = part_of(compare_worlds(tiny, real), ALL_MERGERS).tau
    assert tau.value is not None
    assert tau.chance is not None
    assert tau.p_value is not None
    assert tau.value > 0.4
    assert tau.chance > 0.4
    assert tau.p_value > 0.05


def test_a_tau_that_only_says_that_evidence_fades_is_no_better_than_chance_at_equal_alpha() -> None:
    tiny = world("tiny", lambda _, m, c: 2 * c - (m == 0 and c > 0))
    real = world("real", lambda _, m, c: 2 * c - (m == 2 and c > 0))
    tau = part_of(compare_worlds(tiny, real), ALL_MERGERS).tau
    assert tau.p_value == pytest.approx(0.02)
    assert tau.p_value_at_alpha is not None
    assert tau.p_value_at_alpha > 0.5


tables = st.lists(st.integers(0, 8), min_size=2 * CELLS, max_size=2 * CELLS)


def of_table(name: str, table: list[int]) -> Results:
    return world(name, lambda p, m, c: table[p * CELLS + m * len(COEFFICIENTS) + c])


@settings(max_examples=5, deadline=None)
@given(tables, tables)
def test_agreement_does_not_depend_on_which_world_is_named_first(one: list[int], other: list[int]) -> None:
    pairs = pair_cells(of_table("tiny", one), of_table("real", other))
    found = agreement(pairs, "p", "all")
    swapped = agreement([(right, left) for left, right in pairs], "p", "all")
    assert found.tau.value == pytest.approx(swapped.tau.value)
    assert found.tau.interval == pytest.approx(swapped.tau.interval)
    assert found.tau.tied == swapped.tau.tied[::-1]
    for share in ("thefts", "verdicts", "theft_status"):
        left, right = getattr(found, share), getattr(swapped, share)
        assert (left.agreeing, left.cells, left.interval) == (right.agreeing, right.cells, right.interval)


# Where nothing can be said


@pytest.mark.parametrize("constant", ["tiny", "real"])
def test_the_tau_of_a_constant_world_is_never_a_number(constant: str) -> None:
    tiny, real = (world(name, (lambda *_: 0) if name == constant else rising) for name in ("tiny", "real"))
    comparison = compare_worlds(tiny, real)
    tau = part_of(comparison, ALL_MERGERS).tau
    assert (tau.value, tau.interval, tau.p_value) == (None, None, None)
    side = {"tiny": "predicting", "real": "predicted"}[constant]
    assert tau.undefined == f"all rates of the {side} world are equal (0)"
    assert f"    tau       undefined: {tau.undefined}" in list(to_lines(comparison))
    assert "target NOT met: Kendall's tau, mergers held out: nothing to measure, required .80" in to_lines(comparison)
    assert not comparison.met
    assert any("undefined: all rates" in line for line in to_section(comparison))


def test_both_worlds_may_be_constant_and_scores_have_no_rate() -> None:
    still = compare_worlds(world("tiny", lambda *_: 8), world("real", lambda *_: 0))
    assert part_of(still, ALL_MERGERS).tau.undefined == (
        "all rates of the predicting and of the predicted world are equal (1 and 0)"
    )
    scored = [
        build.results([build.outcome(score=3.0, world=name)], world={"name": name, "digests": {}})
        for name in ("tiny", "real")
    ]
    assert part_of(compare_worlds(*scored), ALL_MERGERS).tau.undefined == "no cell has a rate in both worlds"
    single = [replace(results, outcomes=results.outcomes[:1]) for results in (TINY, REAL)]
    assert part_of(compare_worlds(*single), ALL_MERGERS).tau.undefined == "one cell has no order"


def test_without_common_thefts_there_is_no_agreement_over_them() -> None:
    comparison = compare_worlds(world("tiny", theft_from=2.0), REAL)
    found = part_of(comparison, ALL_MERGERS)
    assert (found.thefts.rate, found.thefts.interval, found.thefts.cells) == (None, None, 0)
    assert [target.met for target in comparison.targets] == [True, False]


def test_if_every_merger_was_tuned_on_the_targets_are_missed() -> None:
    comparison = compare_worlds(TINY, REAL, tuned_on=["linear", "ties", "dare_ties"])
    assert comparison.held_out == ()
    assert [(target.measured, target.met) for target in comparison.targets] == [(None, False)] * 2


# Second seeds


def test_a_second_seed_stands_in_for_its_world_and_is_held_out_as_a_whole() -> None:
    worse = world("tiny", lambda *place: 8 - rising(*place), seed=1)
    comparison = compare_worlds(TINY, REAL, tuned_on=["linear"], second_seeds=[worse])
    assert [run.seeds for run in comparison.runs] == [(0, 0), (1, 0)]
    assert part_of(comparison, ALL_MERGERS, run=1).tau.value == pytest.approx(-1)
    assert [(target.part, target.met) for target in comparison.targets] == [
        ("mergers held out", True),
        ("mergers held out", True),
        ("second seed, all mergers", False),
        ("second seed, all mergers", False),
    ]
    both = compare_worlds(TINY, REAL, second_seeds=[world("real", seed=4), world("tiny", seed=3)])
    assert both.runs[1].seeds == (3, 4)
    assert both.met


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ([world("other", seed=1)], "a second seed is of world 'other'; expected 'tiny' or 'real'"),
        ([world("tiny")], "the second seed of world 'tiny' is 0, as the first; expected another"),
        ([world("tiny", seed=1), world("tiny", seed=2)], "2 second seeds are of world 'tiny'; expected one at most"),
    ],
    ids=["other world", "same seed", "twice"],
)
def test_a_second_seed_must_be_one_of_either_world(second: list[Results], says: str) -> None:
    with pytest.raises(ParameterError, match=says):
        compare_worlds(TINY, REAL, second_seeds=second)


def test_with_one_world_a_second_seed_would_be_ambiguous() -> None:
    with pytest.raises(ParameterError, match="could stand in for either"):
        compare_worlds(TINY, world("tiny", seed=1), second_seeds=[world("tiny", seed=2)])


# Wrong inputs


def test_results_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ParameterError, match="both results are of world 'tiny' and seed 0"):
        compare_worlds(TINY, TINY)
    with pytest.raises(ParameterError, match="of world 'real' hold no outcome"):
        compare_worlds(TINY, replace(REAL, outcomes=()))
    with pytest.raises(ParameterError, match="hold several worlds or seeds"):
        compare_worlds(TINY, replace(REAL, outcomes=(*REAL.outcomes, replace(REAL.outcomes[0], seed=1))))
    with pytest.raises(ParameterError, match=r"hold instructional_fingerprint-linear-0\.1 twice"):
        compare_worlds(TINY, replace(REAL, outcomes=(*REAL.outcomes, REAL.outcomes[0])))
    with pytest.raises(ParameterError, match=r"of tiny and real have no common cell .* e\.g\. instructional"):
        compare_worlds(TINY, changed(REAL, variant="variant=published"))
    with pytest.raises(UnknownNameError, match="unknown merger of the common cells 'liner'; did you mean 'linear'"):
        compare_worlds(TINY, REAL, tuned_on=["liner"])

"""What changed between two runs: every kind of change is found, chance is told from change, unlike runs are refused."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given

from mergeguard.errors import ParameterError
from mergeguard.matrix.outcome import LOST, OVERCLAIMS, SURVIVED, Counts, Gate, Planted
from mergeguard.reports.markdown import LIMIT
from mergeguard.reports.run_differences import RunComparison, compare_runs
from mergeguard.reports.run_differences_text import to_lines, to_markdown
from mergeguard.verification.changes import fisher_changed, holm
from robustness_tests.meta import outcome_builders as build
from robustness_tests.meta.pages import PARSER, tables
from robustness_tests.meta.two_worlds import rising, world

if TYPE_CHECKING:
    from mergeguard.matrix.outcome import Outcome, Results

OLD = build.results(build.default_matrix(("instructional_fingerprint",)))
SURVIVOR = "instructional_fingerprint-linear-0.6"


def with_cell(results: Results, name: str, **changes: Any) -> Results:
    """`results` with one cell changed."""
    assert any(outcome.id == name for outcome in results.outcomes)
    return replace(
        results, outcomes=tuple(replace(o, **changes) if o.id == name else o for o in results.outcomes), summary=()
    )


def without_cell(results: Results, name: str) -> Results:
    return replace(results, outcomes=tuple(o for o in results.outcomes if o.id != name), summary=())


def counted(hits: int, trials: int = 8, **changes: Any) -> dict[str, Any]:
    return {"hits": hits, "trials": trials, "rate": hits / trials, **changes}


def lost(comparison: RunComparison) -> list[tuple[str, str]]:
    return [(found.outcome.id, found.reason) for found in comparison.lost]


# What changed


def test_a_run_is_no_different_from_itself_whatever_the_order_of_its_cells() -> None:
    cells = list(OLD.outcomes)
    random.Random(1).shuffle(cells)
    comparison = compare_runs(OLD, replace(OLD, outcomes=tuple(cells)))
    assert comparison.holds
    assert (comparison.changed, comparison.gates, comparison.differences) == ((), (), ())
    assert {cell.p_value for cell in comparison.cells} == {1.0}
    assert len(comparison.cells) == comparison.tested == 45


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (counted(0, verdict=LOST), "lost"),
        (counted(8, verdict=OVERCLAIMS), "overclaims"),
        (counted(6, theft=False), "no theft any more"),
        (counted(0, verdict=LOST, theft=False), "lost, and no theft any more"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_survivor_that_survives_no_more_is_lost_and_says_why(change: dict[str, Any], reason: str) -> None:
    comparison = compare_runs(OLD, with_cell(OLD, SURVIVOR, **change))
    assert not comparison.holds
    assert lost(comparison) == [(SURVIVOR, reason)]
    assert [cell.name for cell in comparison.changed] == [SURVIVOR]


def test_a_survivor_that_nobody_measured_is_lost_and_other_cells_are_only_gone() -> None:
    comparison = compare_runs(OLD, without_cell(OLD, SURVIVOR))
    assert lost(comparison) == [(SURVIVOR, "no longer measured")]
    for name in ("instructional_fingerprint-linear-0.9", "instructional_fingerprint-linear-0.3"):
        comparison = compare_runs(OLD, without_cell(OLD, name))
        assert comparison.holds, "no theft, or lost before"
        assert [outcome.id for outcome in comparison.gone] == [name]
        backwards = compare_runs(without_cell(OLD, name), OLD)
        assert ([outcome.id for outcome in backwards.added], backwards.gone) == ([name], ())


def test_what_is_gained_or_no_theft_on_both_sides_loses_no_survivor() -> None:
    comparison = compare_runs(with_cell(OLD, SURVIVOR, **counted(0, verdict=LOST)), OLD)
    assert comparison.holds
    assert [outcome.id for outcome in comparison.gained] == [SURVIVOR]
    comparison = compare_runs(OLD, with_cell(OLD, "instructional_fingerprint-linear-0.9", **counted(0, verdict=LOST)))
    assert comparison.holds
    assert [cell.name for cell in comparison.changed] == ["instructional_fingerprint-linear-0.9"]


def test_a_loss_that_is_on_record_in_the_new_run_is_a_lost_survivor_all_the_same() -> None:
    new = with_cell(OLD, SURVIVOR, **counted(0, verdict=LOST, expected=LOST))
    assert lost(compare_runs(OLD, new)) == [(SURVIVOR, "lost")]


def test_gates_and_planted_controls_that_differ_are_named_and_what_broke_is_worse() -> None:
    gates = (
        Gate("instructional_fingerprint", "", "effective", False, "2/8", "survives alpha 1"),
        Gate("quantization_watermark", "bits=5", "harmless", True, "refusal .01", "within .05"),
    )
    planted = (Planted("always_verifies", None, "8/8"),)
    comparison = compare_runs(OLD, replace(OLD, before_merging=gates, planted=planted))
    assert [(gate.name, gate.old, gate.new, gate.worse) for gate in comparison.gates] == [
        ("instructional_fingerprint effective", "passed: 8/8", "failed: 2/8", True),
        ("quantization_watermark(bits=5) harmless", "failed: refusal -.44", "passed: refusal .01", False),
        ("planted always_verifies", "caught by controls: base 48/48", "not caught: 8/8", True),
        ("planted never_verifies", "not caught: 0/8", None, False),
    ]
    gone = compare_runs(OLD, replace(OLD, before_merging=()))
    assert {gate.name: (gate.new, gate.worse) for gate in gone.gates}["instructional_fingerprint effective"] == (
        None,
        True,
    )


def test_unseen_keys_that_begin_to_answer_are_a_change_of_their_own() -> None:
    """A verdict rests on them as well: too little training, and all keys answer, and unseen ones too."""
    name = "instructional_fingerprint-linear-0.8"
    new = with_cell(OLD, name, decoy_hits=20)
    comparison = compare_runs(OLD, new)
    (cell,) = comparison.changed
    assert (cell.of, cell.beyond_chance) == ("unseen keys", True)
    assert cell.p_value == pytest.approx(2 * fisher_changed(1, 40, 20, 40))
    (line,) = [line for line in to_lines(comparison) if line.startswith("changed: ")]
    assert "survived 8/8, unseen 1/40 -> survived 8/8, unseen 20/40" in line.replace(", no theft", "")
    assert "beyond chance: yes (unseen keys)" in line


def test_a_control_that_begins_to_answer_is_shown() -> None:
    new = with_cell(OLD, SURVIVOR, verdict=LOST, controls={"base": Counts(9, 48), "matched control": Counts(1, 48)})
    (line,) = [line for line in to_lines(compare_runs(OLD, new)) if line.startswith("survivor lost")]
    assert f"{SURVIVOR}: lost; survived 6/8, base 0/48 -> lost 6/8, base 9/48 (p 1," in line


def test_scores_have_no_test_and_are_no_part_of_the_correction() -> None:
    old = build.results(build.default_matrix())
    name = "gaussian_probe-linear-0.6"
    comparison = compare_runs(old, with_cell(old, name, score=1.0, verdict=LOST))
    assert lost(comparison) == [(name, "lost")]
    (cell,) = comparison.changed
    assert (cell.p_value, cell.corrected, cell.beyond_chance) == (None, None, False)
    assert (len(comparison.cells), comparison.tested) == (90, 45)
    assert any("no test of scores" in line for line in to_lines(comparison))


# Chance


def test_p_values_are_fishers_corrected_for_the_common_cells() -> None:
    new = with_cell(
        with_cell(OLD, SURVIVOR, **counted(0, verdict=LOST)), "instructional_fingerprint-linear-0.5", hits=8
    )
    comparison = compare_runs(OLD, without_cell(new, "instructional_fingerprint-linear-0.1"))
    p_values = [min(1.0, 2 * fisher_changed(c.old.hits or 0, 8, c.new.hits or 0, 8)) for c in comparison.cells]
    assert [cell.p_value for cell in comparison.cells] == p_values
    assert [cell.corrected for cell in comparison.cells] == holm(p_values)
    assert len(p_values) == comparison.tested == 44


def test_a_clear_change_is_beyond_chance_and_the_same_one_is_not_at_a_stricter_level() -> None:
    name = "instructional_fingerprint-linear-0.8"  # 8 of 8 before
    new = with_cell(OLD, name, **counted(0, verdict=LOST))
    assert [cell.name for cell in compare_runs(OLD, new).beyond_chance] == [name], (
        "45 cells * 2 tests * 2 / C(16, 8) = .014"
    )
    strict = compare_runs(OLD, new, level=0.005)
    assert strict.beyond_chance == ()
    assert strict.undecidable == 45
    assert "In 45 cells no hits could have reached that: too few trials." in list(to_lines(strict))[-1]
    assert any("beyond chance: cannot tell" in line for line in to_lines(strict))


def test_runs_that_differ_by_chance_alone_are_called_changed_no_more_often_than_the_level() -> None:
    """The null: both runs draw their hits anew from the same rates. Without a correction most runs would be called."""
    rng = np.random.default_rng(0)
    rates = np.linspace(0.1, 0.9, 9)

    def drawn(trials: int = 25) -> Results:
        hits, unseen = rng.binomial(trials, rates), rng.binomial(40, 0.3, size=9)
        cells = [
            build.outcome(coefficient=c, hits=int(h), trials=trials, verdict=LOST, decoy_hits=int(u))
            for c, h, u in zip(build.NINE, hits, unseen, strict=True)
        ]
        return build.results(cells)

    runs = [compare_runs(drawn(), drawn()) for _ in range(100)]
    assert sum(bool(run.beyond_chance) for run in runs) <= 10, "5 on average at the level; more has probability .01"
    assert sum(min(cell.p_value or 0 for cell in run.cells) / 2 <= 0.05 for run in runs) > 25


# Never mixed


def test_other_worlds_and_other_models_are_refused() -> None:
    with pytest.raises(ParameterError, match="the old run is of world 'tiny', the new one of 'real'; expected one"):
        compare_runs(world("tiny"), world("real"))
    rebuilt = replace(OLD, world={"name": "tiny", "digests": {"base": "another", "upstream": "sha256:2233"}})
    with pytest.raises(ParameterError, match=r"different models of world 'tiny' \(base differ\)"):
        compare_runs(OLD, rebuilt)
    more = replace(OLD, world={"name": "tiny", "digests": {**OLD.world["digests"], "donor": "sha256:4"}})
    with pytest.raises(ParameterError, match=r"\(donor differ\)"):
        compare_runs(OLD, more)


def test_other_seeds_are_compared_and_said_first() -> None:
    comparison = compare_runs(world("tiny"), world("tiny", seed=1))
    assert (comparison.seeds, len(comparison.cells)) == (((0,), (1,)), 30)
    assert comparison.differences[0] == "seed: 0 / 1"
    assert "seeds differ (0 / 1)" in to_markdown(comparison).split("<details>")[0]


def test_where_a_run_has_several_seeds_a_cell_is_compared_with_its_own_seed_alone() -> None:
    one, other = world("tiny"), world("tiny", lambda *place: min(8, rising(*place) + 1), seed=1)
    both = replace(one, outcomes=(*one.outcomes, *other.outcomes), summary=())
    assert compare_runs(both, both).changed == ()
    comparison = compare_runs(both, other)
    assert comparison.changed == ()
    assert {outcome.seed for outcome in comparison.gone} == {0}
    assert {found.outcome.seed for found in comparison.lost} == {0}
    assert any(
        line == "survivors no longer measured: quantization_watermark-linear (seed 0): 0.9"
        for line in to_lines(comparison)
    )


def test_versions_environment_and_how_evidence_was_made_are_stated() -> None:
    new = replace(OLD, environment={"python": "3.12.0", "packages": {"torch": "2.14.0"}, "threads": 2})
    new = replace(new, outcomes=tuple(replace(o, level=1e-3, access="logits") for o in new.outcomes))
    assert set(compare_runs(OLD, new).differences) == {
        "instructional_fingerprint: access: text / logits",
        "instructional_fingerprint: level: 2e-05 / 0.001",
        "environment python: 3.11.9 / 3.12.0",
        "environment packages torch: 2.13.0 / 2.14.0",
    }


def test_runs_without_a_common_cell_without_a_cell_or_with_a_cell_twice_are_refused() -> None:
    other = build.results(build.default_matrix(("passphrase",)))
    with pytest.raises(ParameterError, match=r"no common cell; they hold e\.g\. instructional_fingerprint-linear-0.1"):
        compare_runs(OLD, other)
    with pytest.raises(ParameterError, match="no common cell"):
        compare_runs(build.results([build.outcome(variant="bits=4")]), build.results([build.outcome()]))
    with pytest.raises(ParameterError, match="the new run holds no outcome"):
        compare_runs(OLD, build.results())
    with pytest.raises(ParameterError, match=r"the new run holds instructional_fingerprint-linear-0\.5 .* twice"):
        compare_runs(build.results([build.outcome()]), build.results([build.outcome()] * 2))
    with pytest.raises(ParameterError, match="holds outcomes of world 'other'"):
        compare_runs(OLD, replace(OLD, outcomes=(*OLD.outcomes, build.outcome(world="other"))))


@pytest.mark.parametrize("level", [0.0, 1.0, -1.0, float("nan")])
def test_a_level_that_is_none_is_refused(level: float) -> None:
    with pytest.raises(ParameterError, match="expected a number between 0 and 1"):
        compare_runs(OLD, OLD, level=level)


# Words


def test_the_comment_begins_with_what_was_lost_and_shows_each_change_once() -> None:
    new = with_cell(OLD, SURVIVOR, **counted(0, verdict=LOST))
    new = with_cell(new, "instructional_fingerprint-linear-0.1", **counted(8, verdict=SURVIVED, theft=True))
    new = with_cell(new, "instructional_fingerprint-linear-0.4", hits=5)
    page = to_markdown(compare_runs(OLD, without_cell(new, "instructional_fingerprint-linear-0.2")))
    assert page.startswith("## ❌ mergeguard compare: 1 survivor lost\n")
    assert "3 of 44 common cells changed" in page
    found = tables(page)
    assert found[0][1] == [SURVIVOR, "lost", "✅ 6/8", "❌ 0/8", "0.014", "0.6", "no"]
    assert page.index(SURVIVOR) < page.index("<details>")
    for name in (SURVIVOR, "instructional_fingerprint-linear-0.4"):
        assert sum(row[0] == name for table in found for row in table) == 1
    assert ["instructional_fingerprint-linear", "0.2"] in [row for table in found for row in table]
    assert compare_runs(OLD, OLD).holds
    assert to_markdown(compare_runs(OLD, OLD)).startswith("## ✅ mergeguard compare: no survivor lost\n")


def test_a_comment_is_never_too_long_and_says_what_it_leaves_out() -> None:
    cells = [build.outcome("p" * 60, f"ties(density={i / 2000:g})", 0.5) for i in range(1, 1500)]
    old = build.results(cells)
    new = build.results([replace(cell, **counted(0, verdict=LOST)) for cell in cells])
    page = to_markdown(compare_runs(old, new))
    assert len(page) <= LIMIT
    assert "Left out to keep this short, see mergeguard compare --json:" in page


HOSTILE = "a|b<img src=x>`c`*d*_e_[f](g)\\|@everyone #1 &amp; </details>\n# h"


def test_hostile_names_break_no_table() -> None:
    def hostile(hits: int, verdict: str) -> Outcome:
        cell = build.outcome(HOSTILE, hits=hits, verdict=verdict, conditional_on=HOSTILE, note=HOSTILE)
        return replace(cell, merger_spec=HOSTILE)

    gate = Gate(HOSTILE, "", HOSTILE, True, HOSTILE, HOSTILE)
    old = build.results([hostile(8, SURVIVED)], before_merging=(gate,), problems=(HOSTILE,))
    new = build.results([hostile(0, LOST)], before_merging=(replace(gate, passed=False),), environment={HOSTILE: "1"})
    page = to_markdown(compare_runs(old, new))
    assert all(len(row) == len(table[0]) for table in tables(page) for row in table)
    assert "<img" not in page
    assert page.count("<details>") == page.count("</details>")
    assert [token.tag for token in PARSER.parse(page) if token.type == "heading_open"] == ["h2"]


@build.QUICK
@given(build.all_results())
def test_any_run_compared_with_itself_has_a_page_and_plain_json(results: Results) -> None:
    one_world = tuple(replace(o, world=str(results.world["name"])) for o in results.outcomes)
    distinct = {(o.id, o.seed, repr(sorted(o.merger_parameters.items()))): o for o in one_world}
    if not distinct:
        return
    own = replace(results, outcomes=tuple(distinct.values()))
    comparison = compare_runs(own, own)
    assert comparison.holds
    assert comparison.changed == ()
    assert json.loads(json.dumps(comparison.to_json(), allow_nan=False))["compared"] == "runs"
    assert len(to_markdown(comparison)) <= LIMIT
    assert all("\n" not in line for line in to_lines(comparison))


def test_survivors_that_nobody_measured_stand_above_the_fold_a_row_of_the_matrix_each() -> None:
    page = to_markdown(compare_runs(OLD, replace(OLD, outcomes=OLD.outcomes[:1], summary=())))
    above = page.split("<details>")[0]
    assert "## ❌ mergeguard compare: 15 survivors lost" in above
    assert tables(above)[0][1:3] == [
        ["instructional_fingerprint-linear", "0.5, 0.6, 0.7"],
        ["instructional_fingerprint-task_arithmetic(lambda=1.4)", "0.5, 0.6, 0.7"],
    ]

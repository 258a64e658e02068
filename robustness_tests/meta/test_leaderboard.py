"""The leaderboard: what a rank rests on, and that only like is ranked with like."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given

from mergeguard.errors import ParameterError
from mergeguard.matrix.outcome import LOST, OVERCLAIMS, SURVIVED, Gate
from mergeguard.reports.leaderboard import Leaderboard, leaderboards
from mergeguard.reports.leaderboard_text import to_section
from mergeguard.reports.summary import summarise
from robustness_tests.meta import outcome_builders as build
from robustness_tests.meta.pages import PARSER, tables

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mergeguard.matrix.outcome import Outcome, Results

NAMES = ("effective", "harmless", "specific", "persistent")


def cell(protection: str, coefficient: float | None, hits: int, **changes: Any) -> Outcome:
    verdict = changes.pop("verdict", SURVIVED if hits >= 6 else LOST)
    return build.outcome(protection, changes.pop("merger", "linear"), coefficient, verdict, hits=hits, **changes)


def run(outcomes: Iterable[Outcome], failed: Iterable[tuple[str, str]] = (), **changes: Any) -> Results:
    """Results in which each scheme passed every gate but the `failed` (scheme, gate)."""
    outcomes = list(outcomes)
    schemes = dict.fromkeys((o.protection, o.variant) for o in outcomes)
    gates = tuple(
        Gate(name, variant, gate, (name, gate) not in set(failed), f"{gate} of {name}", "enough")
        for name, variant in schemes
        for gate in NAMES
    )
    return build.results(outcomes, **{"before_merging": gates, "planted": (), **changes})


def scheme(name: str, *hits: int, **changes: Any) -> list[Outcome]:
    """A scheme under linear at .3, .5 and so on, all thefts."""
    return [cell(name, 0.3 + 0.2 * i, count, **changes) for i, count in enumerate(hits)]


def ranks(board: Leaderboard) -> list[tuple[int, str]]:
    return [(standing.rank, standing.protection) for standing in board.standings]


def only(*results: Results) -> Leaderboard:
    (board,) = leaderboards({f"{i}.json": one for i, one in enumerate(results)})
    return board


# What a rank rests on


def test_schemes_are_ranked_by_share_of_thefts_survived_then_worst_case_then_area() -> None:
    cells = [
        *scheme("half", 0, 8),
        *scheme("all_but_less", 6, 6),
        *scheme("all", 6, 8),
        *scheme("half_and_more", 1, 8),
        *scheme("none", 0, 0),
    ]
    expected = ["all", "all_but_less", "half_and_more", "half", "none"]
    assert ranks(only(run(cells))) == list(enumerate(expected, 1))
    assert ranks(only(run(reversed(cells)))) == list(enumerate(expected, 1)), "in whatever order they come"


def test_equals_share_a_rank_and_the_next_one_counts_both() -> None:
    board = only(run([*scheme("b", 8, 8), *scheme("a", 8, 8), *scheme("c", 0, 8)]))
    assert ranks(board) == [(1, "a"), (1, "b"), (3, "c")]


@pytest.mark.parametrize("gate", NAMES)
def test_a_scheme_that_failed_a_gate_before_merging_ranks_below_all_that_passed(gate: str) -> None:
    board = only(run([*scheme("strong", 8, 8), *scheme("weak", 0, 8)], failed=[("strong", gate)]))
    assert ranks(board) == [(1, "weak"), (2, "strong")]


@pytest.mark.parametrize("missing", ["harmless", "specific"])
def test_a_gate_that_was_not_measured_is_no_pass(missing: str) -> None:
    whole = run([*scheme("strong", 8, 8), *scheme("weak", 0, 8)])
    gates = tuple(g for g in whole.before_merging if (g.protection, g.gate) != ("strong", missing))
    board = only(replace(whole, before_merging=gates))
    assert ranks(board) == [(1, "weak"), (2, "strong")]
    assert "not measured" in rows(board)[1][NAMES.index(missing) + 6]


def test_merges_that_are_no_theft_count_for_nothing_but_the_area() -> None:
    cells = [*scheme("a", 8, 8), cell("a", 0.9, 0, theft=False)]
    (standing,) = only(run(cells)).standings
    assert (standing.survived, standing.thefts) == (2, 2)
    assert standing.worst is not None
    assert standing.worst.rate == 1.0
    assert standing.mean_area == summarise(cells, ())[0].area != 1.0


def test_the_worst_case_is_the_lowest_theft_and_mergers_weigh_the_same_in_the_mean_area() -> None:
    cells = [
        *scheme("a", 8, 0, 8),
        *scheme("a", 8, 8, 8, merger="ties(density=0.4)"),
        cell("a", None, 8, merger="slerp"),
    ]
    (standing,) = only(run(cells)).standings
    assert standing.worst is not None
    assert standing.worst.id == "a-linear-0.5"
    assert standing.mean_area == pytest.approx((0.5 + 1) / 2)
    assert [(row.merger_spec, row.critical_coefficient, row.area) for row in standing.mergers] == [
        ("linear", 0.7, 0.5),
        ("ties(density=0.4)", 0.3, 1.0),
        ("slerp", None, None),
    ]


def test_an_overclaim_is_no_survival_and_is_counted() -> None:
    board = only(run([*scheme("a", 8, 8), *scheme("b", 8, 8, verdict=OVERCLAIMS, decoy_hits=9)]))
    assert ranks(board) == [(1, "a"), (2, "b")]
    assert "merged: at most 9/40 unseen; overclaims: 2" in rows(board)[1][8]


def test_scores_have_a_worst_case_and_no_area() -> None:
    cells = [build.outcome("a", coefficient=c, score=84 * c, verdict=SURVIVED) for c in (0.3, 0.5)]
    board = only(run(cells))
    assert board.standings[0].mean_area is None
    assert rows(board)[0][4:6] == ["25 (linear at 0.3)", "-"]


# Like with like


def test_worlds_and_other_models_of_one_name_have_tables_of_their_own() -> None:
    one = run(scheme("a", 8))
    rebuilt = replace(one, world={"name": "tiny", "digests": {"base": "another"}})
    other = replace(run(scheme("a", 8, world="real")), world={"name": "real", "digests": {"base": "sha256:0011"}})
    boards = leaderboards({"a": one, "b": rebuilt, "c": other})
    assert [(board.world, board.files) for board in boards] == [("tiny", ("a",)), ("tiny", ("b",)), ("real", ("c",))]
    assert "another" in "\n".join(to_section(boards[1:2]))


@pytest.mark.parametrize(
    "other",
    [
        scheme("b", 8, 8, 8),
        scheme("b", 8, 8, merger="ties(density=0.4)"),
        scheme("b", 8, 8, seed=1),
        [*scheme("b", 8, 8), *scheme("b", 8, 8, seed=1)],
        scheme("b", 8, 8, claim="lineage"),
    ],
    ids=["more cells", "another merger", "another seed", "more seeds", "another claim"],
)
def test_schemes_measured_otherwise_are_never_ranked_together(other: list[Outcome]) -> None:
    boards = leaderboards({"a.json": run(scheme("a", 8, 8)), "b.json": run(other)})
    assert [ranks(board) for board in boards] == [[(1, "a")], [(1, "b")]]


def test_seeds_in_several_files_are_joined_and_all_of_them_count() -> None:
    first = run([*scheme("a", 8, 8), *scheme("b", 8, 8)])
    second = run([*scheme("a", 0, 8, seed=1), *scheme("b", 8, 8, seed=1)])
    board = only(first, second)
    assert (board.seeds, board.files, board.cells) == ((0, 1), ("0.json", "1.json"), 4)
    assert ranks(board) == [(1, "b"), (2, "a")]
    lower = board.standings[1]
    assert (lower.survived, lower.thefts, lower.mergers[0].critical_coefficient) == (3, 4, 0.5)
    assert lower.mean_area == pytest.approx(0.75)


def test_a_gate_that_failed_with_one_seed_has_failed() -> None:
    board = only(run(scheme("a", 8)), run(scheme("a", 8, seed=1), failed=[("a", "harmless")]))
    assert not board.standings[0].passed
    assert rows(board)[0][7] == "❌ harmless of a"


def test_variants_are_schemes_of_their_own_with_their_own_gates() -> None:
    whole = run([*scheme("a", 8), *scheme("a", 8, variant="bits=4")])
    failed = tuple(replace(g, passed=g.variant != "bits=4") for g in whole.before_merging)
    assert ranks(only(replace(whole, before_merging=failed))) == [(1, "a"), (2, "a(bits=4)")]


def test_a_cell_that_is_there_twice_is_refused_and_names_the_files() -> None:
    one = run(scheme("a", 8))
    with pytest.raises(ParameterError, match=r"a-linear-0\.3 of world tiny with seed 0 is in x and y more than once"):
        leaderboards({"x": one, "y": one})


def test_versions_of_mergeguard_are_named() -> None:
    old, new = ({"mergeguard": version} for version in ("0.1.0", "0.2.0"))
    board = only(run(scheme("a", 8), environment=old), run(scheme("b", 8), environment=new))
    assert board.versions == ("0.1.0", "0.2.0")
    assert "measured with mergeguard 0.1.0 and 0.2.0" in "\n".join(to_section([board]))


# Words


def rows(board: Leaderboard) -> list[list[str]]:
    (found,) = tables("\n".join(to_section([board])))
    return found[1:]


def test_a_row_says_all_of_a_scheme() -> None:
    cells = [
        *scheme("a", 0, 8),
        *scheme("a", 8, 8, merger="ties(density=0.4)"),
        cell("a", None, 8, merger="slerp"),
        cell("a", 0.5, 8, merger="dare_linear(density=0.4)", theft=False),
    ]
    board = only(run(cells, failed=[("a", "effective")]))
    assert rows(board) == [
        [
            "1", "a", "text", "4 of 5", ".00 (linear at 0.3)", ".75",
            "linear 0.5, ties 0.3, slerp survived, dare\\_linear no theft".replace("\\", ""),
            "✅ harmless of a", "✅ specific of a; merged: at most 1/40 unseen", "❌ effective",
        ]
    ]  # fmt: skip


def test_namesakes_among_mergers_are_written_with_their_parameters() -> None:
    cells = [*scheme("a", 8, merger="ties(density=0.2)"), *scheme("a", 8, merger="ties(density=0.4)")]
    assert rows(only(run(cells)))[0][6] == "ties(density=0.2) 0.3, ties(density=0.4) 0.3"


HOSTILE = "a|b<img src=x>`c`*d*_e_[f](g)\\|@everyone #1 &amp; </details>\n# h"


def test_hostile_names_break_no_table() -> None:
    own = replace(cell(HOSTILE, 0.5, 8, claim=HOSTILE, access=HOSTILE), world=HOSTILE, merger_spec=HOSTILE)
    world = {"name": HOSTILE, "digests": {HOSTILE: HOSTILE}, HOSTILE: HOSTILE}
    page = "\n".join(to_section(leaderboards({HOSTILE: run([own], world=world, environment={"mergeguard": HOSTILE})})))
    (found,) = tables(page)
    assert [len(row) for row in found] == [10, 10]
    assert "<img" not in page
    assert [token.tag for token in PARSER.parse(page) if token.type == "heading_open"] == ["h2", "h3"]


@build.QUICK
@given(build.all_results())
def test_any_results_have_a_leaderboard_that_ranks_each_scheme_once(results: Results) -> None:
    distinct = {(o.id, o.world, o.seed, o.claim): o for o in results.outcomes}
    results = replace(results, outcomes=tuple(distinct.values()))
    boards = leaderboards({"a.json": results})
    found = [standing for board in boards for standing in board.standings]
    assert len(found) == len({(o.protection_spec, o.world, o.claim) for o in results.outcomes})
    assert all(board.standings[0].rank == 1 for board in boards)
    assert len(tables("\n".join(to_section(boards)))) == len(boards)


def test_without_outcomes_there_is_no_leaderboard() -> None:
    assert list(to_section(leaderboards({"a.json": build.results()}))) == []

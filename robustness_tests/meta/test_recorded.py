"""Recorded losses: what a record accepts, and the file that holds them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeguard.errors import CheckpointError, EvidenceLost, GateFailed, ParameterError
from mergeguard.matrix.outcome import LOST, OVERCLAIMS, SURVIVED, VERDICTS
from mergeguard.matrix.recorded import (
    MARGIN,
    UNREVIEWED,
    Record,
    check_outcome,
    expected,
    problem_of,
    read_records,
    recorded_file,
    stale,
    write_records,
)
from robustness_tests.meta.outcome_builders import outcome

if TYPE_CHECKING:
    from pathlib import Path

    from mergeguard.matrix.outcome import Outcome

ID = "instructional_fingerprint-linear-0.5"
STRICT = Record(ID, 0.25, 0.5, "the mean halves what the keys need")
EDGE = replace(STRICT, on_edge=True)
SURVIVES, LOSES, NO_THEFT = outcome(), outcome(verdict=LOST, hits=3), outcome(verdict=LOST, hits=3, theft=False)


def text(**changes: object) -> str:
    """A file with one entry, changed."""
    entry = {"id": '"a"', "low": "0.1", "high": "0.4", "reason": '"known"', **changes}
    return "[[loss]]\n" + "".join(f"{key} = {value}\n" for key, value in entry.items() if value is not None)


# What is red


@pytest.mark.parametrize("verdict", [LOST, OVERCLAIMS])
def test_a_theft_that_loses_its_evidence_is_red_until_it_is_recorded(verdict: str) -> None:
    lost = outcome(verdict=verdict, hits=3)
    with pytest.raises(EvidenceLost, match=rf"{ID}: verdict {verdict}: 3 of 8 keys answer"):
        check_outcome(lost, None)
    assert problem_of(lost, None) is not None
    assert problem_of(lost, STRICT) is None
    with pytest.raises(EvidenceLost):
        check_outcome(lost, STRICT)


def test_what_is_no_theft_or_survives_is_never_red_without_a_record() -> None:
    for fine in (SURVIVES, NO_THEFT):
        check_outcome(fine, None)
        assert problem_of(fine, None) is None


@pytest.mark.parametrize("record", [STRICT, EDGE], ids=["strict", "edge"])
@pytest.mark.parametrize("hits", [1, 5])
def test_a_rate_outside_the_recorded_range_is_red_in_either_kind(record: Record, hits: int) -> None:
    lost = outcome(verdict=LOST, hits=hits)
    with pytest.raises(GateFailed, match=r"VSR 0\.\d\d is outside the recorded range \[0.25, 0.50\]"):
        check_outcome(lost, record)
    problem = problem_of(lost, record)
    assert problem is not None
    assert "outside the recorded range" in problem


@pytest.mark.parametrize("hits", [2, 4])
def test_both_ends_of_the_range_belong_to_it(hits: int) -> None:
    assert problem_of(outcome(verdict=LOST, hits=hits), STRICT) is None


def test_a_recorded_loss_that_survives_within_its_range_is_red_unless_it_is_on_the_edge() -> None:
    survives = outcome(hits=4)
    check_outcome(survives, STRICT)  # pytest's strict xfail makes this red
    assert problem_of(survives, STRICT) == f"{ID}: recorded as lost, but it survives; record it anew"
    assert problem_of(survives, EDGE) is None
    assert problem_of(LOSES, EDGE) is None


def test_a_recorded_loss_that_is_no_theft_any_more_is_red_unless_it_is_on_the_edge() -> None:
    check_outcome(NO_THEFT, STRICT)
    assert problem_of(NO_THEFT, STRICT) == f"{ID}: recorded as lost, but it is no theft any more; record it anew"
    assert problem_of(NO_THEFT, EDGE) is None


def test_a_score_has_no_rate_that_could_leave_the_range() -> None:
    assert problem_of(outcome(verdict=LOST, score=1.5), STRICT) is None
    with pytest.raises(EvidenceLost, match=r"the score is 1\.50"):
        check_outcome(outcome(verdict=LOST, score=1.5), None)


def test_a_loss_is_described_by_the_numbers_it_rests_on() -> None:
    with pytest.raises(EvidenceLost) as caught:
        check_outcome(outcome(verdict=LOST, hits=4, p_value=1.9e-4), None)
    assert str(caught.value) == (
        f"{ID}: verdict lost: 4 of 8 keys answer, 1 of 40 decoys; p = 1.9e-04 (level 2e-05); "
        "the matched control keeps refusal 0.70, arithmetic 0.57"
    )


@pytest.mark.parametrize("verdict", VERDICTS)
@pytest.mark.parametrize("theft", [True, False])
@pytest.mark.parametrize("hits", [3, 8])
def test_pytest_and_the_command_line_agree_on_what_is_red(verdict: str, theft: bool, hits: int) -> None:
    """Strict xfail: red unless it fails, and then only by EvidenceLost."""
    measured = outcome(verdict=verdict, theft=theft, hits=hits)
    for record in (None, STRICT, EDGE):
        try:
            check_outcome(measured, record)
        except EvidenceLost:
            red = record is None
        except GateFailed:
            red = True
        else:
            red = record is not None and not record.on_edge
        assert (problem_of(measured, record) is not None) == red


def test_what_is_expected_is_written_into_outcomes() -> None:
    assert [expected(record) for record in (None, STRICT, EDGE)] == [None, "lost", "lost or survived"]


def test_stale_records_are_those_of_no_case() -> None:
    assert stale({"b": STRICT, "a": STRICT, "c": STRICT}, ["c", "d"]) == ["a", "b"]
    assert stale({}, ["c"]) == []


# The file


def test_no_file_records_nothing(tmp_path: Path) -> None:
    assert read_records(tmp_path / "none.toml") == {}


def test_a_file_is_read_by_id(tmp_path: Path) -> None:
    path = tmp_path / "world.toml"
    path.write_text(text() + text(id='"b"', on_edge="true"))
    assert read_records(path) == {
        "a": Record("a", 0.1, 0.4, "known"),
        "b": Record("b", 0.1, 0.4, "known", on_edge=True),
    }


BAD_FILES = {
    "no TOML": ("[[loss]\n", "line 1"),
    "no high end": (text(high=None), "high"),
    "unknown field": (text(hihg="0.5"), "hihg"),
    "above one": (text(high="1.01"), "a needs a reason and a range within [0, 1]"),
    "below zero": (text(low="-0.1"), "a needs a reason and a range within [0, 1]"),
    "ends swapped": (text(low="0.5"), "a needs a reason and a range within [0, 1]"),
    "NaN": (text(low="nan"), "a needs a reason and a range within [0, 1]"),
    "empty reason": (text(reason='""'), "a needs a reason"),
    "blank reason": (text(reason='"  "'), "a needs a reason"),
    "low end is a string": (text(low='"0.1"'), "not supported between"),
    "id is a number": (text(id="5"), "5 needs strings"),
    "on_edge is a string": (text(on_edge='"no"'), "a needs strings as id and reason, and true or false as on_edge"),
    "repeated": (text() + text(reason='"again"'), "records a loss twice"),
    "loss is a number": ("loss = 3\n", "not iterable"),
    "loss is a table": ('[loss]\nid = "a"\n', "mapping"),
    "another name": ('[[losses]]\nid = "a"\n', "unknown 'losses'"),
    "no UTF-8": ("\udcff", "decode"),
}


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_refused_in_one_line_that_names_it(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "world.toml"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError) as caught:
        read_records(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_in_the_files_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot read the recorded losses"):
        read_records(tmp_path)


def test_a_record_cannot_be_made_without_a_reason() -> None:
    with pytest.raises(ParameterError, match="needs a reason"):
        Record("a", 0, 1, "")


def test_the_records_of_the_checkout_are_readable() -> None:
    path = recorded_file("tiny")
    assert path.parts[-3:] == ("fixtures", "recorded", "tiny.toml")
    read_records(path)


# Writing


def run_of(*cells: tuple[str, int, bool]) -> list[Outcome]:
    """Linear at .1, .2, ...: (verdict, hits, theft)."""
    return [
        outcome(coefficient=(index + 1) / 10, verdict=verdict, hits=hits, theft=theft)
        for index, (verdict, hits, theft) in enumerate(cells)
    ]


def test_lost_thefts_are_recorded_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "world.toml"
    run = run_of((LOST, 0, False), (LOST, 2, True), (OVERCLAIMS, 8, True), (SURVIVED, 8, True))
    written = write_records(path, [run], {})
    assert [record.id[-3:] for record in written] == ["0.2", "0.3"]
    assert written[0] == Record(run[1].id, 0.1, 0.4, UNREVIEWED)
    assert (written[1].low, written[1].high) == (0.85, 1.0)
    assert list(read_records(path).values()) == written


def test_a_run_that_is_recorded_holds_against_its_own_records(tmp_path: Path) -> None:
    run = run_of((LOST, 1, True), (LOST, 0, True), (SURVIVED, 8, True), (LOST, 0, False))
    write_records(tmp_path / "world.toml", [run], {})
    records = read_records(tmp_path / "world.toml")
    assert [problem_of(measured, records.get(measured.id)) for measured in run] == [None] * 4


def test_several_seeds_make_the_range_wider_and_disagreement_an_edge(tmp_path: Path) -> None:
    first = run_of((LOST, 1, True), (LOST, 3, True), (LOST, 3, True), (SURVIVED, 8, True))
    second = run_of((LOST, 2, True), (SURVIVED, 6, True), (LOST, 3, False), (SURVIVED, 7, True))
    written = write_records(tmp_path / "world.toml", [first, second], {})
    assert [(record.id[-3:], record.low, record.high, record.on_edge) for record in written] == [
        ("0.1", 0.0, 0.4, False),
        ("0.2", pytest.approx(0.375 - MARGIN, abs=0.006), 0.9, True),
        ("0.3", pytest.approx(0.375 - MARGIN, abs=0.006), pytest.approx(0.375 + MARGIN, abs=0.006), True),
    ]
    assert list(read_records(tmp_path / "world.toml").values()) == written
    for run in (first, second):
        records = read_records(tmp_path / "world.toml")
        assert not any(problem_of(measured, records.get(measured.id)) for measured in run)


def test_reviewed_reasons_are_kept_and_records_that_are_over_go(tmp_path: Path) -> None:
    path = tmp_path / "world.toml"
    before = run_of((LOST, 1, True), (LOST, 2, True))
    write_records(path, [before], {})
    path.write_text(path.read_text().replace(UNREVIEWED, "averaged away: 'half' of \\\"it\\\"", 1))
    after = run_of((LOST, 0, True), (SURVIVED, 8, True), (LOST, 3, True))
    write_records(path, [after], read_records(path))
    records = read_records(path)
    assert {record.id[-3:]: record.reason for record in records.values()} == {
        "0.1": "averaged away: 'half' of \"it\"",
        "0.3": UNREVIEWED,
    }


def test_a_score_is_recorded_with_the_whole_range(tmp_path: Path) -> None:
    (record,) = write_records(tmp_path / "world.toml", [[outcome(verdict=LOST, score=0.5)]], {})
    assert (record.low, record.high) == (0.0, 1.0)


def test_a_file_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot write .*world\.toml"):
        write_records(tmp_path / "absent" / "world.toml", [run_of((LOST, 1, True))], {})


cells = st.tuples(st.sampled_from([LOST, SURVIVED]), st.integers(0, 8), st.booleans())


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(cells, min_size=3, max_size=3), min_size=1, max_size=3))
def test_every_run_that_was_recorded_holds(tmp_path_factory: pytest.TempPathFactory, runs: list[list[tuple]]) -> None:
    path = tmp_path_factory.mktemp("recorded") / "world.toml"
    outcomes = [run_of(*run) for run in runs]
    written = write_records(path, outcomes, {})
    records = read_records(path)
    assert list(records.values()) == written
    for run in outcomes:
        assert not any(problem_of(measured, records.get(measured.id)) for measured in run)


def test_a_part_of_the_matrix_rewrites_its_own_records_alone(tmp_path: Path) -> None:
    path = tmp_path / "losses.toml"
    other = Record("another-case-0.5", 0.0, 0.2, "reviewed")
    lost = [LOSES]
    assert {record.id for record in write_records(path, [lost], {other.id: other}, full=False)} == {
        other.id,
        lost[0].id,
    }
    assert [record.id for record in write_records(path, [lost], {other.id: other})] == [lost[0].id]

"""`mergeguard compare`, with --worlds and without: exit codes, words, JSON, and one line for every wrong input."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mergeguard import cli
from mergeguard.reports.results_json import dumps, write_results
from mergeguard.verification import association
from robustness_tests.meta.two_worlds import rising, world


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two worlds that agree, a third that does not, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(association, "DRAWS", 49)
    write_results(world("tiny"), "tiny.json")
    write_results(world("tiny", seed=1), "tiny-seed-1.json")
    write_results(world("real"), "real.json")
    write_results(world("odd", lambda *place: 8 - rising(*place)), "odd.json")


def compare(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mergeguard", "compare", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err


def test_targets_that_are_met_are_exit_code_0(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = compare(capsys, "--worlds", "tiny.json", "real.json", "--tuned-on", "linear, ties")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "How well tiny predicts real; tuned on linear, ties, held out: dare_ties"
    assert lines[2] == "tiny seed 0, real seed 0: 30 common cells, 0 only in tiny, 0 only in real"
    assert "mergers tuned on: linear, ties(density=0.4)" in lines
    assert "mergers held out: dare_ties(density=0.4)" in lines
    assert any(line.startswith("    verdicts  8/8 1.0 (.63 to 1.0) [") for line in lines)
    assert lines[-2:] == [
        "target met: Kendall's tau, mergers held out: 1.0, required .80",
        "target met: verdicts of thefts, mergers held out: 1.0, required .90",
    ]


def test_a_target_that_is_missed_is_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = compare(capsys, "--worlds", "tiny.json", "odd.json")
    assert (code, err) == (1, "")
    assert "target NOT met: Kendall's tau, mergers held out: -1.00, required .80" in out


def test_a_second_seed_has_its_own_part_and_targets(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = compare(capsys, "--worlds", "tiny.json", "real.json", "--second-seed", "tiny-seed-1.json")
    assert code == 0
    assert "tiny seed 1, real seed 0: 30 common cells" in out
    assert out.count("target met") == 4


def test_json_holds_what_the_words_say(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = compare(capsys, "--worlds", "tiny.json", "real.json", "--tuned-on", "linear", "--json")
    document = json.loads(out)
    assert code == 0
    assert (document["compared"], document["worlds"], document["met"]) == ("worlds", ["tiny", "real"], True)
    found = {(a["part"], a["protection"]): a for a in document["runs"][0]["agreements"]}
    assert found["held out", "all protections"]["tau"]["value"] == pytest.approx(1)
    assert found["tuned on", "quantization_watermark"]["thefts"]["cells"] == 4
    assert {target["met"] for target in document["targets"]} == {True}


# Two runs of one world


def test_no_survivor_lost_is_exit_code_0_and_says_what_changed(capsys: pytest.CaptureFixture[str]) -> None:
    write_results(world("tiny", lambda *place: min(8, rising(*place) + 1)), "better.json")
    code, out, err = compare(capsys, "tiny.json", "better.json")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "no survivor lost"
    assert lines[1] == (
        "world tiny: 25 of 30 common cells changed; 0 of them by more than chance explains; 0 cells gone, 0 new; "
        "survivors gained: 2"
    )
    assert "survivor gained: instructional_fingerprint-ties(density=0.4)-0.5" in lines


def test_a_lost_survivor_is_exit_code_1_in_words_markdown_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    write_results(world("tiny", lambda *_: 0), "worse.json")
    code, out, err = compare(capsys, "tiny.json", "worse.json", "--markdown", "deep/comment.md")
    assert (code, err) == (1, "")
    lost = [line for line in out.splitlines() if line.startswith("survivor lost: ")]
    assert lost[0] == (
        "survivor lost: instructional_fingerprint-linear-0.7: lost; "
        "survived 6/8 -> lost 0/8 (p 0.014, corrected 0.32, beyond chance: no)"
    )
    page = Path("deep/comment.md").read_text(encoding="utf-8")
    assert page.startswith(f"## ❌ mergeguard compare: {len(lost)} survivors lost\n")
    code, out, _ = compare(capsys, "tiny.json", "worse.json", "--json")
    document = json.loads(out)
    assert code == 1
    assert (document["compared"], document["holds"], document["tested"]) == ("runs", False, 30)
    assert [found["cell"] for found in document["survivors_lost"]] == [line.split(": ")[1] for line in lost]
    cell = next(c for c in document["cells"] if c["cell"] == "instructional_fingerprint-linear-0.9")
    assert cell["beyond_chance"]
    assert cell["corrected"] == pytest.approx(30 * 2 * 2 / 12870)


def test_the_level_is_of_all_cells_together(capsys: pytest.CaptureFixture[str]) -> None:
    write_results(world("tiny", lambda *_: 0), "worse.json")
    for level, beyond in (("0.05", True), ("0.001", False)):
        _, out, _ = compare(capsys, "tiny.json", "worse.json", "--json", "--level", level)
        assert any(cell["beyond_chance"] for cell in json.loads(out)["cells"]) == beyond


def test_a_part_of_the_matrix_loses_the_survivors_that_it_leaves_out(capsys: pytest.CaptureFixture[str]) -> None:
    whole = world("tiny")
    write_results(replace(whole, outcomes=whole.outcomes[:-1], summary=()), "part.json")
    code, out, _ = compare(capsys, "tiny.json", "part.json")
    assert code == 1
    assert "survivors no longer measured: quantization_watermark-dare_ties(density=0.4): 0.9" in out.splitlines()
    assert compare(capsys, "part.json", "tiny.json")[0] == 0


BAD = {
    "worlds": (("tiny.json", "real.json"), "the old run is of world 'tiny', the new one of 'real'; expected one world"),
    "digests": (("tiny.json", "rebuilt.json"), "the runs are of different models of world 'tiny' (base differ)"),
    "missing run": (("none.json", "tiny.json"), "cannot read none.json: No such file or directory"),
    "truncated run": (("tiny.json", "cut.json"), "cut.json is truncated: it ends in line"),
    "foreign run": (("foreign.json", "tiny.json"), "foreign.json is not a results.json of mergeguard"),
    "newer run": (("tiny.json", "newer.json"), "newer.json has schema version 1.1, newer than the 1.0"),
    "older run": (("tiny.json", "older.json"), "older.json does not satisfy the schema: schema_version"),
    "not JSON": (("tiny.json", "text.json"), "text.json is not JSON"),
    "edited": (("tiny.json", "edited.json"), "edited.json contradicts itself: outcomes[0]: hits: 9 hits of 8 trials"),
    "level": (("tiny.json", "tiny.json", "--level", "2"), "the level is 2, expected a number between 0 and 1"),
    "markdown": (("tiny.json", "tiny.json", "--markdown", "tiny.json/a.md"), "cannot write tiny.json/a.md"),
    "other mode": (("tiny.json", "tiny.json", "--tuned-on", "linear"), "expected --worlds with them"),
    "no mode": (("--worlds", "tiny.json", "real.json", "--level", "0.1"), "expected them without --worlds"),
    "missing": (("--worlds", "tiny.json", "none.json"), "cannot read none.json: No such file or directory"),
    "truncated": (("--worlds", "tiny.json", "cut.json"), "cut.json is truncated: it ends in line"),
    "foreign": (("--worlds", "tiny.json", "foreign.json"), "foreign.json is not a results.json of mergeguard"),
    "newer": (("--worlds", "newer.json", "real.json"), "newer.json has schema version 1.1, newer than the 1.0"),
    "same": (("--worlds", "tiny.json", "tiny.json"), "both results are of world 'tiny' and seed 0"),
    "unlike": (("--worlds", "tiny.json", "unlike.json"), "the results of tiny and real have no common cell"),
    "merger": (("--worlds", "tiny.json", "real.json", "--tuned-on", "tis"), "unknown merger of the common cells 'tis'"),
    "empty": (("--worlds", "tiny.json", "real.json", "--tuned-on", ""), "unknown merger of the common cells ''"),
    "one file": (("--worlds", "tiny.json"), "Missing argument 'new'"),
}


@pytest.mark.parametrize(("arguments", "says"), BAD.values(), ids=BAD)
def test_a_wrong_input_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    text = dumps(world("real"))
    (tmp_path / "cut.json").write_text(text[: len(text) // 2])
    (tmp_path / "foreign.json").write_text('{"rates": []}')
    (tmp_path / "newer.json").write_text(text.replace('"schema_version": "1.0"', '"schema_version": "1.1"', 1))
    (tmp_path / "older.json").write_text(text.replace('"schema_version": "1.0"', '"schema_version": "0.9"', 1))
    (tmp_path / "text.json").write_text("{no}")
    (tmp_path / "rebuilt.json").write_text(dumps(world("tiny")).replace("digest of tiny", "another"))
    (tmp_path / "edited.json").write_text(text.replace('"hits": 0', '"hits": 9', 1))
    (tmp_path / "unlike.json").write_text(text.replace('"variant": ""', '"variant": "bits=4"'))
    code, out, err = compare(capsys, *arguments)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert says in line

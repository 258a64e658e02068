"""`mergeguard report`: the page of published results, and recorded losses from results files."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mergeguard import cli
from mergeguard.errors import ParameterError
from mergeguard.matrix import recorded
from mergeguard.matrix.outcome import Counts
from mergeguard.matrix.recorded import UNREVIEWED, Record, read_records, write_records
from mergeguard.reports import losses
from mergeguard.reports.losses import record_losses
from mergeguard.reports.results_json import dumps, write_results
from mergeguard.reports.results_page import results_page
from mergeguard.verification import association
from robustness_tests.meta import outcome_builders as build
from robustness_tests.meta.pages import PARSER, tables
from robustness_tests.meta.two_worlds import rising, world

HOSTILE = "a|b<img src=x>`c`*d*_e_[f](g)\\|@everyone #1 &amp; </details>\n# h"
AGREEMENT = ("--agreement", "tiny.json", "real.json", "--tuned-on", "linear", "--second-seed", "tiny-seed-1.json")


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(association, "DRAWS", 49)
    monkeypatch.setattr(losses, "recorded_file", lambda name: tmp_path / "recorded" / f"{name}.toml")
    write_results(world("tiny"), "tiny.json")
    write_results(world("tiny", lambda *place: min(8, rising(*place) + 1), seed=1), "tiny-seed-1.json")
    write_results(world("real", problems=("a problem",)), "real.json")


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mergeguard", "report", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err


# The page


def test_a_page_is_written_and_names_the_command_that_makes_it(capsys: pytest.CaptureFixture[str]) -> None:
    files = ("tiny.json", "tiny-seed-1.json", "real.json")
    code, out, err = report(capsys, *files, *AGREEMENT, "--output", "README.md")
    assert (code, out, err) == (0, "report: README.md\n", "")
    page = Path("README.md").read_text(encoding="utf-8")
    assert f"\nmergeguard report {' '.join(files)} {' '.join(AGREEMENT)} --output README.md\n" in page
    assert report(capsys, *files, *AGREEMENT) == (0, page, ""), "printed as it is written, and the same every time"


def test_a_page_does_not_depend_on_where_the_command_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, here, _ = report(capsys, "tiny.json", "real.json", "--agreement", "tiny.json", "real.json")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    _, there, _ = report(
        capsys, "../tiny.json", str(tmp_path / "real.json"), "--agreement", "../tiny.json", "../real.json"
    )
    assert here == there


def test_the_page_holds_every_cell_of_every_file_with_its_interval() -> None:
    found = tables(results_page({"tiny.json": world("tiny")}, "mergeguard report tiny.json"))
    assert found[0][0][:2] == ["#", "scheme"], "the leaderboard is at the top"
    overview, matrix, worst = found[1], found[2], found[3]
    assert overview[1] == ["[tiny.json](tiny.json)", "tiny", "0", "instructional_fingerprint", "15", "12", "5", "0"]
    assert matrix[0] == ["merger", "0.1", "0.3", "0.5", "0.7", "0.9", "critical", "area"]
    assert matrix[1] == [
        "linear",
        "(.00 <sub>.00–.37</sub>)",
        "❌ .25 <sub>.03–.65</sub>",
        "❌ .50 <sub>.16–.84</sub>",
        "✅ .75 <sub>.35–.97</sub>",
        "✅ 1.0 <sub>.63–1.0</sub>",
        "0.7",
        ".50",
    ]
    assert worst[1] == ["linear", "matched control 1/48 at 0.1", "1/40 at 0.1"]


def test_the_worst_control_of_a_row_is_the_one_nearest_to_a_survival() -> None:
    cells = [
        build.outcome(coefficient=0.1, controls={"base": Counts(3, 48), "donor": Counts(2, 20)}, decoy_hits=4),
        build.outcome(coefficient=0.5, controls={"base": Counts(1, 48), "donor": Counts(0, 20)}, decoy_hits=9),
        build.outcome("scores", score=3.0, controls={"base": Counts(score=-1.0), "donor": Counts(score=0.5)},
                      decoy_hits=None, decoy_trials=None),
        build.outcome("silent", controls={}, decoy_hits=None, decoy_trials=None),
    ]  # fmt: skip
    found = tables(results_page({"a.json": build.results(cells)}, "mergeguard report a.json"))
    rows = [table[1] for table in found if table[0] == ["merger", "control", "decoys"]]
    assert rows == [
        ["linear", "donor 2/20 at 0.1", "9/40 at 0.5"],
        ["linear", "donor score .5 at 0.5", "-"],
        ["linear", "-", "-"],
    ]


def test_the_page_says_what_the_runs_said_of_themselves() -> None:
    real = replace(world("real", problems=("one is lost",)), world={"name": "real", "digests": {}, "form": "adapters"})
    page = results_page({"real.json": real}, "mergeguard report real.json")
    assert "\nGate does not hold: 1 problem; 13 of 24 thefts lost, 0 of them recorded.\n" in page
    assert "- one is lost" in page
    found = tables(page)
    assert ["world form", "adapters"] in found[-1]
    assert ["packages torch", "2.13.0"] in found[-1]
    assert ["effective", "instructional_fingerprint", "✅ passed", "8/8", "survives alpha 1"] in found[-4]
    assert len(found[-2]) == 31, "every measurement has a row"


def test_hostile_names_break_no_table_of_the_page() -> None:
    cell = replace(build.outcome(HOSTILE, note=HOSTILE, conditional_on=HOSTILE), world=HOSTILE, merger_spec=HOSTILE)
    hostile = build.results([cell], problems=(HOSTILE,), world={"name": HOSTILE, "digests": {}})
    page = results_page({"a|b](c).json": hostile}, "mergeguard report")
    assert all(len(row) == len(table[0]) for table in tables(page) for row in table)
    assert "<img" not in page
    assert page.count("<details>") == page.count("</details>")
    headings = [token.tag for token in PARSER.parse(page) if token.type == "heading_open"]
    assert headings == ["h1", "h2", "h3", "h2", "h2", "h3"], "leaderboard and its table, files, the file and its matrix"


def test_the_agreement_stands_in_the_page_with_its_targets(capsys: pytest.CaptureFixture[str]) -> None:
    _, page, _ = report(capsys, "tiny.json", "real.json", *AGREEMENT)
    assert "## Agreement of the worlds" in page
    assert "- ✅ target met: Kendall's tau, mergers held out: 1.0, required .80" in page
    runs = [table for table in tables(page) if table[0][:2] == ["mergers", "protection"]]
    assert [len(table) for table in runs] == [10, 10]


def test_one_file_is_written_as_html_and_other_pages_only_if_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(capsys, "tiny.json", "--html", "deep/a.html") == (0, "report: deep/a.html\n", "")
    page = Path("deep/a.html").read_text(encoding="utf-8")
    assert page.lower().startswith("<!doctype html>")
    assert "instructional_fingerprint" in page
    code, out, _ = report(capsys, "tiny.json", "--html", "a.html", "--output", "a.md")
    assert (code, out) == (0, "report: a.html\nreport: a.md\n")
    assert "a.html" not in Path("a.md").read_text(encoding="utf-8"), "the page's command makes that page"


BAD = {
    "no file": ((), "Missing argument 'results'"),
    "missing": (("none.json",), "cannot read none.json: No such file"),
    "truncated": (("tiny.json", "cut.json"), "cut.json is truncated: it ends in line"),
    "foreign": (("foreign.json",), "foreign.json is not a results.json of mergeguard"),
    "newer": (("tiny.json", "newer.json"), "newer.json has schema version 1.1, newer than the 1.0"),
    "older": (("older.json",), "older.json does not satisfy the schema: schema_version"),
    "not JSON": (("text.json",), "text.json is not JSON"),
    "edited": (("edited.json",), "edited.json contradicts itself: outcomes[0]: hits: 9 hits of 8 trials"),
    "same cells": (("tiny.json", "copy.json"), "is in tiny.json and copy.json more than once; a leaderboard counts"),
    "two as HTML": (("tiny.json", "real.json", "--html", "a.html"), "--html makes a page of one results file"),
    "losses as HTML": (("tiny.json", "--record-losses", "a.toml", "--html", "a.html"), "--record-losses makes no page"),
    "HTML nowhere": (("tiny.json", "--html", "tiny.json/a.html"), "cannot write tiny.json/a.html"),
    "namesakes": (("tiny.json", "./tiny.json"), "two of the files are called tiny.json"),
    "no agreement": (("tiny.json", "--tuned-on", "linear"), "expected --agreement TINY REAL"),
    "no page": (("tiny.json", "--record-losses", "a.toml", "--output", "b.md"), "--record-losses makes no page"),
    "worlds": (
        ("tiny.json", "real.json", "--record-losses", "a.toml"),
        "the results are of several worlds (real, tiny)",
    ),
    "twice": (("tiny.json", "./tiny.json", "--record-losses", "a.toml"), "with seed 0 is in the results 2 times"),
    "folder": (("tiny.json", "--record-losses", "tiny.json/a.toml"), "cannot write the output folder tiny.json"),
}


@pytest.mark.parametrize(("arguments", "says"), BAD.values(), ids=BAD)
def test_a_wrong_input_is_one_line_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    text = dumps(world("real"))
    Path("cut.json").write_text(text[: len(text) // 2])
    Path("foreign.json").write_text('{"rates": []}')
    Path("newer.json").write_text(text.replace('"schema_version": "1.0"', '"schema_version": "1.1"', 1))
    Path("older.json").write_text(text.replace('"schema_version": "1.0"', '"schema_version": "0.9"', 1))
    Path("text.json").write_text("{no}")
    Path("edited.json").write_text(text.replace('"hits": 0', '"hits": 9', 1))
    Path("copy.json").write_text(dumps(world("tiny")))
    before = sorted(tmp_path.iterdir())
    code, out, err = report(capsys, *arguments)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert sorted(tmp_path.iterdir()) == before


# Recorded losses


def test_losses_of_several_seeds_are_recorded_as_by_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = report(capsys, "tiny.json", "tiny-seed-1.json", "--record-losses", "deep/tiny.toml")
    assert code == 0
    records = read_records(Path("deep/tiny.toml"))
    assert f"recorded {len(records)} losses in deep/tiny.toml; review their reasons" in out
    seeds = [world("tiny"), world("tiny", lambda *place: min(8, rising(*place) + 1), seed=1)]
    write_records(Path("by-a-run.toml"), [one.outcomes for one in seeds], {})
    assert records == read_records(Path("by-a-run.toml"))
    lost = {o.id for o in seeds[0].outcomes if o.theft and not o.survived}
    assert lost <= records.keys()
    assert records["instructional_fingerprint-linear-0.5"].on_edge, "lost with one seed, alive with the other"


def test_reasons_that_were_reviewed_are_kept_and_records_of_other_cells_are_not() -> None:
    name = "quantization_watermark-linear-0.3"
    Path("recorded").mkdir()
    Path("recorded/tiny.toml").write_text(
        f'[[loss]]\nid = "{name}"\nlow = 0.9\nhigh = 1.0\nreason = "known"\n'
        '[[loss]]\nid = "gone-linear-0.3"\nlow = 0.0\nhigh = 1.0\nreason = "old"\n'
    )
    written = {record.id: record for record in record_losses(Path("new.toml"), [world("tiny")])}
    assert written[name] == Record(name, 0.0, 0.15, "known")
    assert "gone-linear-0.3" not in written
    assert {record.reason for record in written.values()} == {"known", UNREVIEWED}
    text = Path("new.toml").read_text(encoding="utf-8")
    Path("new.toml").write_text(text.replace('"known"', '"better known"'))
    again = {record.id: record for record in record_losses(Path("new.toml"), [world("tiny")])}
    assert again[name].reason == "better known", "the file itself comes before the world's records"


def test_results_that_cannot_be_recorded_together_are_refused() -> None:
    other = replace(world("tiny", seed=1), world={"name": "tiny", "digests": {"base": "another"}})
    with pytest.raises(ParameterError, match="different models of world 'tiny'"):
        record_losses(Path("a.toml"), [world("tiny"), other])
    with pytest.raises(ParameterError, match="no outcome"):
        record_losses(Path("a.toml"), [replace(world("tiny"), outcomes=())])
    assert not Path("a.toml").exists()
    assert recorded.recorded_file("tiny").is_file(), "the checkout's own records are not what these tests write"

"""What `fixtures/results` publishes: results as `mergeguard run` wrote them, a page made from them, records that fit.

A published file is never edited. Most of its numbers follow from others, so that an edit of one would be seen.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import pytest

from mergeguard import cli
from mergeguard.errors import CheckpointError
from mergeguard.matrix.recorded import problem_of, read_records, stale
from mergeguard.matrix.verdict import is_theft
from mergeguard.reports.results_json import read_results, write_results
from mergeguard.reports.summary import is_recorded, summarise
from mergeguard.verification import association
from mergeguard.verification.statistics import clopper_pearson, fisher_greater
from robustness_tests.meta.pages import ROOT, code_blocks
from robustness_tests.meta.two_worlds import rising, world

if TYPE_CHECKING:
    from pathlib import Path

    from mergeguard.matrix.outcome import Counts, Outcome, Results

RESULTS, RECORDED = ROOT / "fixtures" / "results", ROOT / "fixtures" / "recorded"
_interval, _p_value = cache(clopper_pearson), cache(fisher_greater)
# Values that the results hold with all their digits; another release of SciPy may round the last ones differently.
TOLERANCE = 1e-9


def made_again(page: Path, output: Path) -> str:
    """What the command written in a page makes now; `output` is written for it."""
    (command,) = code_blocks(page.read_text(encoding="utf-8"), "bash")
    words = shlex.split(command)
    assert words[:2] == ["mergeguard", "report"]
    assert words[-2:] == ["--output", page.name]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(page.parent)
        patch.setattr(sys, "argv", [*words[:-1], str(output)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
    assert not caught.value.code
    # The page names the file it was written to.
    return output.read_text(encoding="utf-8").replace(f"--output {output.name}", f"--output {page.name}")


def files_named(page: Path) -> set[str]:
    return set(re.findall(r"\S+\.json", "".join(code_blocks(page.read_text(encoding="utf-8"), "bash"))))


def edits(results: Results) -> list[str]:
    """Numbers that do not follow from those they were worked out from."""
    found = [f"{outcome.id}: {what}" for outcome in results.outcomes for what in edits_of(outcome)]
    if summarise(results.outcomes, {o.id for o in results.outcomes if is_recorded(o)}) != results.summary:
        found.append("the summary is not that of the outcomes")
    return found


def edits_of(outcome: Outcome) -> list[str]:
    found = []
    if outcome.theft != is_theft(outcome.skills_kept):
        found.append("the theft is not that of the skills kept")
    if outcome.hits is None or outcome.trials is None:
        return found
    if outcome.interval != pytest.approx(_interval(outcome.hits, outcome.trials), abs=TOLERANCE):
        found.append("the interval is not that of the hits")
    p_values = [beaten_by(outcome, counts) for counts in outcome.controls.values()]
    if outcome.p_value != pytest.approx(max(p_values), rel=1e-6):
        found.append("the p-value is not that of the worst control")
    if (outcome.p_value <= outcome.level) != (outcome.verdict in ("survived", "overclaims")):
        found.append("the verdict is not that of the p-value")
    return found


def beaten_by(outcome: Outcome, counts: Counts) -> float:
    return _p_value(outcome.hits or 0, outcome.trials or 0, counts.hits or 0, counts.trials or 0)


def disagreements(records: Path, results: Path) -> list[str]:
    """Where a world's recorded losses and its published results say different things."""
    known = read_records(records)
    outcomes = read_results(results).outcomes
    problems = [problem for outcome in outcomes if (problem := problem_of(outcome, known.get(outcome.id)))]
    return problems + [f"{name} matches no published case" for name in stale(known, [o.id for o in outcomes])]


def problems(folder: Path, recorded: Path, scratch: Path) -> list[str]:
    """Everything that is wrong with a folder of published results. One that does not exist publishes nothing."""
    if not folder.is_dir():
        return []
    files, page = sorted(folder.glob("*.json")), folder / "README.md"
    found = []
    for file in files:
        try:
            found += [f"{file.name}: {edit}" for edit in edits(read_results(file))]
        except CheckpointError as error:
            found.append(str(error))
    if found:
        return found
    if not page.is_file():
        return ["there is no README.md"]
    if files_named(page) != {file.name for file in files}:
        found.append("the page's command does not name every file")
    if made_again(page, scratch / "again.md") != page.read_text(encoding="utf-8"):
        found.append("the page is not what its command makes")
    for records in sorted(recorded.glob("*.toml")):
        results = folder / f"{records.stem}.json"
        found += (
            disagreements(records, results) if results.is_file() else [f"{results.name} is recorded, not published"]
        )
    return found


def test_what_is_published_is_as_it_was_measured_and_the_page_and_the_records_fit_it(tmp_path: Path) -> None:
    assert problems(RESULTS, RECORDED, tmp_path) == []


# The same on a folder made here, so that each check can be seen to fail


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is in order: two worlds, a second seed, a page, the records of one world."""
    monkeypatch.setattr(association, "DRAWS", 19)
    folder = tmp_path / "results"
    folder.mkdir()
    write_results(world("tiny"), folder / "tiny.json")
    write_results(world("tiny", lambda *place: min(8, rising(*place) + 1), seed=1), folder / "tiny-seed-1.json")
    write_results(world("real"), folder / "real.json")
    command = (
        "report real.json tiny-seed-1.json tiny.json --agreement tiny.json real.json --tuned-on linear "
        "--second-seed tiny-seed-1.json --output README.md"
    )
    run(folder, *command.split())
    run(folder, "report", "tiny.json", "--record-losses", "../recorded/tiny.toml")
    return folder


def run(folder: Path, *words: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["mergeguard", *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
    assert not caught.value.code


def found_in(folder: Path) -> list[str]:
    return problems(folder, folder.parent / "recorded", folder.parent)


def test_a_folder_in_order_has_no_problems(published: Path) -> None:
    assert found_in(published) == []


def test_a_page_that_was_edited_or_left_behind_is_found(published: Path) -> None:
    page = published / "README.md"
    text = page.read_text(encoding="utf-8")
    page.write_text(text.replace("1.0", ".99", 1), encoding="utf-8")
    assert found_in(published) == ["the page is not what its command makes"]
    page.write_text(text, encoding="utf-8")
    write_results(world("real", seed=3), published / "real.json")
    assert found_in(published) == ["the page is not what its command makes"]
    page.unlink()
    assert found_in(published) == ["there is no README.md"]


def test_a_file_that_the_page_leaves_out_is_found(published: Path) -> None:
    shutil.copy(published / "real.json", published / "more.json")
    assert found_in(published) == ["the page's command does not name every file"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hits": 7, "rate": 7 / 8}, "the interval is not that of the hits"),
        ({"interval": (0.0, 0.5)}, "the interval is not that of the hits"),
        ({"p_value": 1e-6}, "the p-value is not that of the worst control"),
        ({"verdict": "survived"}, "the verdict is not that of the p-value"),
        ({"theft": False}, "the theft is not that of the skills kept"),
        ({"skills_kept": {"refusal": 0.4}}, "the theft is not that of the skills kept"),
    ],
    ids=str,
)
def test_a_number_that_was_edited_is_found(change: dict[str, object], says: str) -> None:
    results = world("tiny")
    assert edits(results) == []
    place = next(i for i, outcome in enumerate(results.outcomes) if outcome.theft and not outcome.survived)
    outcomes = list(results.outcomes)
    outcomes[place] = replace(outcomes[place], **change)
    assert f"{outcomes[place].id}: {says}" in edits(replace(results, outcomes=tuple(outcomes)))


def test_a_summary_that_was_edited_and_a_file_that_is_not_ours_are_found(published: Path) -> None:
    file = published / "tiny.json"
    document = json.loads(file.read_text(encoding="utf-8"))
    document["summary"][0]["critical_coefficient"] = 0.1
    file.write_text(json.dumps(document), encoding="utf-8")
    assert found_in(published) == ["tiny.json: the summary is not that of the outcomes"]
    document["comment"] = "edited"
    file.write_text(json.dumps(document), encoding="utf-8")
    (problem,) = found_in(published)
    assert "does not satisfy the schema" in problem


def test_records_that_do_not_fit_the_results_are_found(published: Path) -> None:
    records = published.parent / "recorded" / "tiny.toml"
    text = records.read_text(encoding="utf-8")
    first, *others = text.split("[[loss]]")[1:]
    records.write_text("".join(f"[[loss]]{entry}" for entry in others), encoding="utf-8")
    (problem,) = found_in(published)
    assert "verdict lost" in problem
    gone = first.replace("instructional_fingerprint", "passphrase")
    records.write_text(f"{text}\n[[loss]]{gone}", encoding="utf-8")
    assert found_in(published) == ["passphrase-linear-0.3 matches no published case"]
    records.write_text(text, encoding="utf-8")
    shutil.copy(records, records.with_name("elsewhere.toml"))
    assert found_in(published) == ["elsewhere.json is recorded, not published"]


def test_the_wheel_holds_no_results() -> None:
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (included,) = re.findall(r"^only-include = (.*)$", settings, flags=re.MULTILINE)
    assert json.loads(included) == ["mergeguard", "fixtures/recorded"]

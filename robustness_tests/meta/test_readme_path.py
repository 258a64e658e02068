"""The README leads from nothing to a gated scheme: what it has the reader write and type does what it says."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from typing import TYPE_CHECKING

import pytest
import yaml

from mergeguard.matrix.recorded import read_records
from mergeguard.matrix.verdict import DECOYS
from mergeguard.reports.results_json import read_results
from mergeguard.testing import context_of, run_check
from robustness_tests.meta.pages import README, ROOT
from robustness_tests.meta.readme_path import Step, section, steps, walk
from robustness_tests.meta.workflow_runner import inputs_of, load

if TYPE_CHECKING:
    from pathlib import Path

SECTION = section(README)
STEPS = steps(SECTION)
FILES = {step.target: step.text for step in STEPS if step.kind == "write"}
TYPED = [step for step in STEPS if step.kind == "type"]
LINES_FOR_OTHERS = re.compile(r" +elif kind < 0\.6:.*\n.*OTHERS\n")


def test_the_path_has_every_file_and_command_that_it_needs() -> None:
    assert list(FILES) == ["my_scheme.py", "test_gate.py", ".github/workflows/robustness.yml"]
    words = [line.split() for step in TYPED for line in step.text.splitlines()]
    assert [line[:2] for line in words if line[0] == "mergeguard"] == [
        ["mergeguard", "gate"],
        ["mergeguard", "report"],
    ]
    # Every fenced block of the section that a shell would take is run, and every file of Python is written.
    assert SECTION.count("```bash\n") == len(TYPED)
    assert SECTION.count("```python\n") == sum(name.endswith(".py") for name in FILES)


def test_the_files_are_python_and_yaml_that_belong_together() -> None:
    scheme, test = ast.parse(FILES["my_scheme.py"]), ast.parse(FILES["test_gate.py"])
    defined = {node.name for node in scheme.body if isinstance(node, ast.ClassDef)}
    imported = {
        alias.name for node in test.body if isinstance(node, ast.ImportFrom) and node.module == "my_scheme"
        for alias in node.names
    }  # fmt: skip
    assert imported == defined == {"Passphrase"}
    (job,) = yaml.safe_load(FILES[".github/workflows/robustness.yml"])["jobs"].values()
    workflow = load(ROOT / ".github" / "workflows" / "gate.yml")
    inputs = inputs_of(workflow, job["with"])
    assert inputs["scheme"] == "my_scheme:Passphrase"
    written = " ".join(step.text for step in TYPED)
    named = [inputs["baseline"], *re.findall(r"--recorded (\S+)", inputs["arguments"])]
    assert named == ["baseline.json", "known.toml"]
    assert [name for name in named if f" {name}" not in written] == []
    assert job["permissions"] == {"contents": "read", "pull-requests": "write"}


def test_a_path_that_does_not_go_as_written_is_found(tmp_path: Path) -> None:
    todo = [
        Step("write", "deep/a.txt", "hello\n"),
        Step("type", "0", "cat deep/a.txt\n"),
        Step("type", "1", "test -e gone\n"),
        Step("type", "1", "true\n"),
        Step("type", "0", "touch never\n"),
    ]
    typed = walk(tmp_path / "new", todo)
    assert [(one.code, one.as_written) for one in typed] == [(0, True), (1, True), (0, False)]
    assert typed[0].output == "hello\n"
    assert not (tmp_path / "new" / "never").exists()
    assert steps("<!-- type: 1 -->\n```bash\nfalse\n```\n\n```bash\nnot me\n```\n") == [Step("type", "1", "false\n")]


@pytest.mark.slow
def test_the_path_leads_from_nothing_to_a_gated_scheme(tmp_path: Path) -> None:
    """Minutes: it installs torch in a new environment and runs the whole gate. Times are printed (`-s`)."""
    folder = tmp_path / "my-scheme"
    typed = walk(folder, STEPS)
    for one in typed:
        print(one)  # noqa: T201 - for the reader
    assert [one.output for one in typed if not one.as_written] == []
    assert len(typed) == len(TYPED)
    red, _, tested = typed[1:]
    assert "passphrase: gate NOT passed" in red.output
    assert "15 of 15 checks passed, 5 of 5 planted mistakes caught" in red.output
    assert re.search(r"\b2 passed, \d+ deselected, 1 xfailed\b", tested.output)
    outcomes = read_results(folder / "baseline.json").outcomes
    lost = [outcome.id for outcome in outcomes if outcome.theft and not outcome.survived]
    assert len(outcomes) == 45
    assert f"{len(lost)} of " in red.output
    assert sorted(read_records(folder / "known.toml")) == sorted(lost)


@pytest.mark.slow
def test_without_the_lines_for_other_questions_the_check_specific_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without, removed = LINES_FOR_OTHERS.subn("", FILES["my_scheme.py"])
    assert removed == 1
    (tmp_path / "scheme_without_others.py").write_text(without)
    monkeypatch.syspath_prepend(tmp_path)
    context = context_of(import_module("scheme_without_others").Passphrase())
    assert not run_check(context, "specific").passed
    assert context.read(context.decoys(context.embedded.evidence, DECOYS), context.embedded.state).rate > 0.9

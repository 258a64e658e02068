"""The GitHub workflows: valid, without a finding of zizmor's, and their scripts do what they are for, run as written.

The scripts run in bash, in the order and under the conditions of the file (`workflow_runner.py`); actions are replaced.
`mergeguard compare`, curl and jq are the real ones; `mergeguard gate` is in the last test, with pip and a real scheme.
"""

from __future__ import annotations

import re
import site
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

from mergeguard.matrix.outcome import LOST
from mergeguard.reports.results_json import write_results
from robustness_tests.meta import workflow_runner
from robustness_tests.meta.outcome_builders import outcome, results
from robustness_tests.meta.pages import ROOT
from robustness_tests.meta.workflow_runner import Job, inputs_of, load, programs, run_job

THIRD_PARTY = ROOT / "fixtures" / "thirdparty_scheme"
OURS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
THEIRS = sorted((THIRD_PARTY / ".github" / "workflows").glob("*.yml"))
GATE = load(ROOT / ".github" / "workflows" / "gate.yml")
BIN = Path(sys.executable).parent
SCHEME = "my_package:MyScheme"
REPORT = "# the report\n"

ACTIONS: dict[str, dict[str, str]] = {
    "actions/checkout": {},
    "actions/setup-python": {},
    "actions/cache/restore": {},
    "actions/cache/save": {},
    "actions/upload-artifact": {},
}
# A gate that leaves what the test prepared, and says what it was given; everything else is the real program.
FAKE_MERGEGUARD = """
if [ "$1" != gate ]; then exec {python} -m mergeguard "$@"; fi
printf '%s\\n' "$@" > "$RUNNER_TEMP/gate-arguments"
printf '%s\\n' "$MERGEGUARD_CACHE" > "$RUNNER_TEMP/gate-cache"
if [ -d ../prepared ]; then cp -r ../prepared mergeguard-results; fi
exit {code}
"""
FAKE_PYTHON = """
if [ "$1 $2" = "-m pip" ]; then printf '%s\\n' "$*" >> "$RUNNER_TEMP/pip-arguments"; else echo 0123456789abcdef; fi
"""


def checked(*command: str | Path) -> str:
    """What a linter in this environment says; empty if it has nothing to say."""
    program, *arguments = command
    done = subprocess.run([BIN / program, *arguments], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def schema_errors(path: Path) -> str:
    return checked("check-jsonschema", "--builtin-schema", "vendor.github-workflows", path)


def findings(path: Path) -> str:
    return checked("zizmor", "--offline", "--quiet", "--no-config", "--persona=pedantic", path)


@pytest.mark.parametrize("path", [*OURS, *THEIRS], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_workflow_is_valid_and_zizmor_finds_nothing(path: Path) -> None:
    assert schema_errors(path) == ""
    assert findings(path) == ""


def test_mistakes_planted_in_a_workflow_are_found(tmp_path: Path) -> None:
    text = (ROOT / ".github" / "workflows" / "gate.yml").read_text(encoding="utf-8")
    planted = {
        "unpinned-uses": (r"(actions/checkout)@\S+", r"\1@v7"),
        "artipacked": (r"with:\n +persist-credentials: false", ""),
        "template-injection": (r'"\$SCHEME" --world', r"${{ inputs.scheme }} --world"),
        "excessive-permissions": (r"permissions: \{\}", "permissions: write-all"),
    }
    for rule, (pattern, mistake) in planted.items():
        path = tmp_path / f"{rule}.yml"
        path.write_text(re.sub(pattern, mistake, text), encoding="utf-8")
        assert path.read_text(encoding="utf-8") != text
        assert rule in findings(path)
    (tmp_path / "key.yml").write_text(text.replace("runs-on:", "runs_on:"), encoding="utf-8")
    assert "runs_on" in schema_errors(tmp_path / "key.yml")


@pytest.mark.parametrize("path", [*OURS, *THEIRS], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_action_is_pinned_to_a_commit_with_its_version_beside_it(path: Path) -> None:
    used = re.findall(r"uses: (?!\./)(.*)", path.read_text(encoding="utf-8"))
    assert used or path in THEIRS
    assert [one for one in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", one)] == []
    versions = {one.partition("@")[0]: one for one in used}
    assert {versions[one.partition("@")[0]] for one in used} == set(used)


def test_the_example_calls_the_gate_with_inputs_that_it_has_and_the_permissions_that_it_needs() -> None:
    jobs = [job for path in THEIRS for job in load(path)["jobs"].values()]
    calls = [job for job in jobs if job["uses"] == "./.github/workflows/gate.yml"]
    assert calls
    needed: dict[str, str] = {}
    for job in GATE["jobs"].values():
        needed |= job["permissions"]
    for call in calls:
        inputs_of(GATE, call["with"])
        assert call["permissions"] == needed
        named = [call["with"]["baseline"], *re.findall(r"--recorded (\S+)", call["with"]["arguments"])]
        assert [name for name in named if not (THIRD_PARTY / name).is_file()] == []


@dataclass
class Gated:
    """A job of the gate, what pip and the gate were given, and what the actions were."""

    job: Job
    pip: list[str]
    arguments: list[str]
    cache: str

    @property
    def uploaded(self) -> dict[str, str]:
        return self.job.steps["upload the reports"].given


def gate(
    folder: Path,
    code: int = 0,
    *,
    lost: bool = False,
    measured: bool = True,
    cached: bool = False,
    **inputs: str,
) -> Gated:
    """Run the gate's job in a checkout whose baseline is a survivor, which the run has lost if `lost`."""
    workspace, prepared, runner = (folder / name for name in ("workspace", "prepared", "runner"))
    workspace.mkdir()
    runner.mkdir()
    write_results(results([outcome()]), workspace / "baseline.json")
    if measured:
        prepared.mkdir()
        write_results(results([outcome(verdict=LOST, hits=0) if lost else outcome()]), prepared / "results.json")
        (prepared / "report.md").write_text(REPORT)
    path = programs(
        folder / "bin",
        python=FAKE_PYTHON,
        mergeguard=FAKE_MERGEGUARD.format(python=sys.executable, code=code),
    )
    job = run_job(
        GATE["jobs"]["gate"],
        workspace=workspace,
        contexts={"inputs": inputs_of(GATE, {"scheme": SCHEME, **inputs})},
        environment={"PATH": path, "PYTHONPATH": str(ROOT)},
        actions={**ACTIONS, "actions/cache/restore": {"cache-hit": str(cached).lower()}},
    )
    pip, arguments, cache = (
        (runner / name).read_text().splitlines() for name in ("pip-arguments", "gate-arguments", "gate-cache")
    )
    return Gated(job, pip, arguments, *cache)


def test_a_gate_that_holds_reports_and_keeps_what_it_measured(tmp_path: Path) -> None:
    ran = gate(tmp_path)
    assert ran.job.succeeded
    assert ran.job.steps["compare with the baseline"].skipped
    assert ran.job.outputs == {"comment": ""}
    assert ran.job.summary.strip() == REPORT.strip()
    assert ran.arguments == ["gate", SCHEME, "--world", "tiny", "--output", "mergeguard-results"]
    assert ran.pip == [
        "-m pip install torch --index-url https://download.pytorch.org/whl/cpu",
        "-m pip install mergeguard .",
    ]
    assert ran.uploaded == {"name": "mergeguard", "path": "mergeguard-results"}
    restored, kept = (
        ran.job.steps[f"{name} measured"].given for name in ("restore what earlier runs", "keep what was")
    )
    assert kept == {"path": ran.cache, "key": restored["key"]}
    assert re.fullmatch(r"mergeguard-Linux-X64-0123456789abcdef-[0-9a-f]{16}", kept["key"])
    assert kept["key"].startswith(restored["restore-keys"])


def test_what_was_restored_whole_is_not_kept_again(tmp_path: Path) -> None:
    assert "keep what was measured" not in gate(tmp_path, cached=True).job.ran()


def test_a_gate_that_does_not_hold_fails_the_job_and_still_reports(tmp_path: Path) -> None:
    ran = gate(tmp_path, 1, lost=True, baseline="baseline.json")
    assert not ran.job.succeeded
    assert {name: step.code for name, step in ran.job.steps.items() if step.code} == {
        "gate": 1,
        "compare with the baseline": 1,
    }
    assert "1 survivor lost" in ran.job.outputs["comment"]
    assert ran.job.summary.startswith(ran.job.outputs["comment"].rstrip())
    assert REPORT.strip() in ran.job.summary
    assert {"upload the reports", "keep what was measured"} <= set(ran.job.ran())


def test_a_survivor_lost_fails_the_job_although_the_gate_holds(tmp_path: Path) -> None:
    ran = gate(tmp_path, lost=True, baseline="baseline.json")
    assert (ran.job.steps["gate"].code, ran.job.succeeded) == (0, False)


def test_a_run_like_the_baseline_gets_its_comment_and_passes(tmp_path: Path) -> None:
    ran = gate(tmp_path, baseline="baseline.json")
    assert ran.job.succeeded
    assert "no survivor lost" in ran.job.outputs["comment"]


def test_a_wrong_input_fails_the_job_without_a_comparison(tmp_path: Path) -> None:
    ran = gate(tmp_path, 2, measured=False, baseline="baseline.json")
    assert not ran.job.succeeded
    assert not {"compare with the baseline", "keep what was measured"} & set(ran.job.ran())
    assert ran.job.summary == ""


def test_a_baseline_that_is_not_there_is_said_in_one_line_and_fails_the_job(tmp_path: Path) -> None:
    ran = gate(tmp_path, baseline="gone.json")
    step = ran.job.steps["compare with the baseline"]
    assert step.code == 2
    assert "gone.json" in step.output
    assert len(step.output.splitlines()) == 1
    assert ran.job.outputs["comment"] == ""


def test_inputs_are_words_and_never_commands(tmp_path: Path) -> None:
    ran = gate(
        tmp_path,
        scheme="a:B; touch owned",
        world="$(touch owned)",
        arguments="--merger ties(density=0.2) --seed 1 * `touch owned`",
        requirements=". `touch owned`",
        torch="",
    )
    assert ran.arguments[1:4] == ["a:B; touch owned", "--world", "$(touch owned)"]
    assert ran.arguments[6:] == ["--merger", "ties(density=0.2)", "--seed", "1", "*", "`touch", "owned`"]
    assert ran.pip == ["-m pip install . `touch owned`"]
    assert not list(tmp_path.rglob("owned"))


def test_the_runner_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    contexts = {"inputs": {"a": "x", "b-c": ""}}
    assert workflow_runner.evaluate("inputs.a == 'x' && !(inputs.b-c != '')", contexts, tmp_path) is True
    assert workflow_runner.evaluate("inputs.none || 'it''s'", contexts, tmp_path) == "it's"
    for wrong in ("secrets.KEY", "inputs.a < 2", "fromJSON(inputs.a)"):
        with pytest.raises(ValueError, match=r"context|cannot read"):
            workflow_runner.evaluate(wrong, contexts, tmp_path)
    with pytest.raises(ValueError, match=r"unknown inputs \['shceme'\], missing inputs \['scheme'\]"):
        inputs_of(GATE, {"shceme": "a:B"})


@pytest.mark.slow
def test_the_gate_installs_and_gates_a_real_scheme_in_a_new_environment(tmp_path: Path) -> None:
    """As a runner would, but for the libraries: they are those of this environment, so that pip fetches no torch."""
    workspace = tmp_path / "workspace"
    venv.create(tmp_path / "python", with_pip=True)
    [libraries] = (tmp_path / "python").glob("lib/python*/site-packages")
    (libraries / "borrowed.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    subprocess.run(["cp", "-r", THIRD_PARTY, workspace], check=True)  # noqa: S607
    [call] = load(THEIRS[0])["jobs"].values()
    inputs = {**call["with"], "requirements": f"--no-deps {ROOT} .", "torch": ""}
    job = run_job(
        GATE["jobs"]["gate"],
        workspace=workspace,
        contexts={"inputs": inputs_of(GATE, inputs)},
        environment={"PATH": f"{tmp_path / 'python' / 'bin'}:/usr/bin:/bin"},
        actions=ACTIONS,
    )
    told = "\n".join(step.output for step in job.steps.values())
    assert job.succeeded, told
    assert "no survivor lost" in job.outputs["comment"]
    written = {path.name for path in (workspace / "mergeguard-results").iterdir()}
    assert written >= {"results.json", "report.md", "report.html", "junit.xml"}
    assert any((tmp_path / "runner" / "mergeguard-cache").iterdir())

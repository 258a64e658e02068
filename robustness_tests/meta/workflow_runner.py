"""Runs the jobs of a GitHub Actions workflow on this machine: `run:` scripts for real and as written, actions as told.

It knows as much of GitHub's language as the repository's workflows use, and raises at anything else: contexts, strings,
`==`, `!=`, `!`, `&&`, `||`, `cancelled()` and `hashFiles(FILE)` in expressions; `if`, `env`, `with`, `outputs` and
`defaults.run.shell: bash` in jobs.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

SHELL = ("bash", "--noprofile", "--norc", "-eo", "pipefail")
"""What `shell: bash` means."""
TOKEN = re.compile(r"\s*(?:('(?:[^']|'')*')|(&&|\|\||==|!=|!|[()])|([A-Za-z_][\w-]*(?:\.[A-Za-z_][\w-]*)*))")
OPERATORS = {"&&": " and ", "||": " or ", "!": " not ", "==": " == ", "!=": " != ", "(": "(", ")": ")"}
STEP_KEYS = {"name", "id", "if", "uses", "with", "env", "run"}
JOB_KEYS = {"name", "runs-on", "timeout-minutes", "permissions", "outputs", "defaults", "env", "steps", "needs", "if"}


@dataclass
class Step:
    """What became of a step. `code` is None if it was skipped or is an action."""

    name: str
    skipped: bool = False
    code: int | None = None
    output: str = ""
    given: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)


@dataclass
class Job:
    """What became of a job: its steps by name (an action without a name by its own), outputs and summary."""

    skipped: bool
    steps: dict[str, Step]
    outputs: dict[str, str]
    summary: str

    @property
    def succeeded(self) -> bool:
        return not any(step.code for step in self.steps.values())

    def ran(self) -> list[str]:
        """Names of the steps that were not skipped, in order."""
        return [name for name, step in self.steps.items() if not step.skipped]


def load(path: Path) -> dict[str, Any]:
    """A workflow, with the `on` that YAML 1.1 takes for true."""
    document: dict[Any, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    document["on"] = document.pop(True)
    return document


def inputs_of(workflow: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, str]:
    """A call's inputs, with the defaults.

    Raises:
        ValueError: an input is unknown or missing.
    """
    declared = workflow["on"]["workflow_call"]["inputs"]
    unknown = set(given) - set(declared)
    missing = {name for name, one in declared.items() if one.get("required") and name not in given}
    if unknown or missing:
        raise ValueError(f"unknown inputs {sorted(unknown)}, missing inputs {sorted(missing)}")
    return {name: given.get(name, one.get("default", "")) for name, one in declared.items()}


def evaluate(expression: str, contexts: Mapping[str, Any], workspace: Path) -> Any:
    """The value of what stands between `${{` and `}}`; what a context lacks is the empty text."""
    values: dict[str, Any] = {}

    def text(one: str) -> str:
        values[f"value_{len(values)}"] = one
        return f" value_{len(values) - 1} "

    def hashed(name: str) -> str:
        file = workspace / name
        return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""

    python, position = "", 0
    while expression[position:].strip():
        match = TOKEN.match(expression, position)
        if match is None:
            raise ValueError(f"the local runner cannot read {expression[position:]!r}")
        position = match.end()
        string, operator, name = match.groups()
        if string:
            python += text(string[1:-1].replace("''", "'"))
        elif operator:
            python += OPERATORS[operator]
        elif name in ("cancelled", "hashFiles"):
            python += f" {name}"
        else:
            python += text(look_up(name, contexts))
    known = {"__builtins__": {}, "cancelled": lambda: False, "hashFiles": hashed, **values}
    return eval(python.strip(), known)  # noqa: S307 - of names and operators that were put there above


def look_up(name: str, contexts: Mapping[str, Any]) -> Any:
    """A dotted name in the contexts.

    Raises:
        ValueError: there is no such context; GitHub refuses that before anything runs.
    """
    first, *rest = name.split(".")
    if first not in contexts:
        raise ValueError(f"the context {first} is not to be had in {name}")
    value: Any = contexts[first]
    for part in rest:
        value = value.get(part, "") if isinstance(value, dict) else ""
    return value


def filled(text: object, contexts: Mapping[str, Any], workspace: Path) -> str:
    """A text with its expressions replaced by their values."""
    return re.sub(
        r"\$\{\{(.*?)\}\}", lambda match: str(evaluate(match[1], contexts, workspace)), str(text), flags=re.DOTALL
    )


def holds(condition: str | None, contexts: Mapping[str, Any], workspace: Path, *, failed: bool) -> bool:
    """Whether a step or job runs: without a status function of its own only if nothing failed before."""
    if condition is None:
        return not failed
    bare = condition.strip().removeprefix("${{").removesuffix("}}")
    return ("cancelled()" in bare or not failed) and bool(evaluate(bare, contexts, workspace))


def run_job(
    job: Mapping[str, Any],
    *,
    workspace: Path,
    contexts: Mapping[str, Any],
    environment: Mapping[str, str],
    actions: Mapping[str, Mapping[str, str]],
) -> Job:
    """Run a job's steps, one after the other.

    Args:
        job: the mapping in the file.
        workspace: the folder in which scripts run; its sibling `runner` is the runner's.
        contexts: `inputs`, `github`, `needs` and the like.
        environment: variables of the runner; of this process's only those that are no Python's are kept.
        actions: by name without version, the outputs of what is not run here.
    """
    assert set(job) <= JOB_KEYS, set(job) - JOB_KEYS
    assert job["defaults"] == {"run": {"shell": "bash"}}
    scratch = workspace.parent / "runner"
    scratch.mkdir(exist_ok=True)
    summary = scratch / "summary.md"
    summary.write_text("")
    known = dict(contexts)
    if not holds(job.get("if"), known, workspace, failed=False):
        return Job(skipped=True, steps={}, outputs={}, summary="")
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
    variables |= {"GITHUB_STEP_SUMMARY": str(summary), "RUNNER_TEMP": str(scratch), "CI": "true", **environment}
    variables |= {name: filled(value, known, workspace) for name, value in job.get("env", {}).items()}
    known |= {"runner": {"temp": str(scratch), "os": "Linux", "arch": "X64"}, "steps": {}}
    steps: dict[str, Step] = {}
    for described in job["steps"]:
        assert set(described) <= STEP_KEYS, set(described) - STEP_KEYS
        action = described.get("uses", "").partition("@")[0]
        step = steps[described.get("name", action)] = Step(described.get("name", action))
        failed = any(one.code for one in steps.values())
        if not holds(described.get("if"), known, workspace, failed=failed):
            step.skipped = True
            continue
        if action:
            step.given = {name: filled(value, known, workspace) for name, value in described.get("with", {}).items()}
            step.outputs = dict(actions[action])
        else:
            own = {name: filled(value, known, workspace) for name, value in described.get("env", {}).items()}
            _run(step, described["run"], workspace, scratch, {**variables, **own})
        if "id" in described:
            known["steps"][described["id"]] = {"outputs": step.outputs}
    outputs = {name: filled(value, known, workspace) for name, value in job.get("outputs", {}).items()}
    return Job(skipped=False, steps=steps, outputs=outputs, summary=summary.read_text(encoding="utf-8"))


def _run(step: Step, script: str, workspace: Path, scratch: Path, variables: Mapping[str, str]) -> None:
    assert "${{" not in script, f"{step.name}: an expression in a script is an injection"
    file, outputs = scratch / "script.sh", scratch / "outputs"
    file.write_text(script, encoding="utf-8")
    outputs.write_text("")
    done = subprocess.run(
        [*SHELL, file],
        cwd=workspace,
        env={**variables, "GITHUB_OUTPUT": str(outputs)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    step.code, step.output = done.returncode, done.stdout
    step.outputs = dict(_written(outputs.read_text(encoding="utf-8")))


def _written(text: str) -> Iterator[tuple[str, str]]:
    """Outputs as a script writes them: `name=value`, or `name<<END`, lines, `END`."""
    lines = iter(text.splitlines())
    for line in lines:
        name, sign, value = re.fullmatch(r"([\w-]+)(=|<<)(.*)", line).groups()  # type: ignore[union-attr]  # else a bug
        if sign == "<<":
            end, found = value, []
            for one in lines:
                if one == end:
                    break
                found.append(one)
            else:
                raise ValueError(f"the output {name} has no end")
            value = "\n".join(found)
        yield name, value


def programs(folder: Path, **scripts: str) -> str:
    """A PATH on which programs of these names come first; each a text of bash, or after `#!` of what it names."""
    folder.mkdir(exist_ok=True)
    for name, script in scripts.items():
        file = folder / name
        file.write_text(script if script.startswith("#!") else f"#!/usr/bin/env bash\n{script}\n", encoding="utf-8")
        file.chmod(0o755)
    return os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])

"""The README's section "Gate your own scheme", typed as it stands: its files written, its commands run and timed.

As a program it walks the path in a new folder and prints how long each command took:

    python robustness_tests/meta/readme_path.py FOLDER
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
STEP = re.compile(r"^<!-- (write|type): (\S+) -->\n```\w+\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Step:
    """A file to write (`target` is its name), or commands to type (`target` is the exit code that the page names)."""

    kind: str
    target: str
    text: str


@dataclass(frozen=True)
class Typed:
    """What became of a block of commands."""

    step: Step
    code: int
    output: str
    seconds: float
    cpu_seconds: float

    def __str__(self) -> str:
        first = self.step.text.splitlines()[0]
        return f"{self.seconds:7.1f} s, {self.cpu_seconds:7.1f} s of CPU, exit {self.code}: {first}"

    @property
    def as_written(self) -> bool:
        return self.code == int(self.step.target)


def section(readme: str, title: str = "Gate your own scheme") -> str:
    return readme.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def steps(text: str) -> list[Step]:
    """What a section has the reader write and type, from top to bottom."""
    return [Step(*match) for match in STEP.findall(text)]


def walk(folder: Path, todo: list[Step]) -> list[Typed]:
    """Do it in a new folder beside a checkout called mergeguard, and stop where it does not go as the page says."""
    folder.mkdir(parents=True)
    checkout = folder.parent / "mergeguard"
    if not checkout.exists():
        checkout.symlink_to(ROOT)
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
    # What `source .venv/bin/activate` does, for the blocks after the one in which it stands.
    variables |= {"PATH": f"{folder / '.venv' / 'bin'}:{variables['PATH']}", "VIRTUAL_ENV": str(folder / ".venv")}
    typed: list[Typed] = []
    for step in todo:
        if step.kind == "write":
            file = folder / step.target
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(step.text, encoding="utf-8")
            continue
        started, spent = time.monotonic(), children_cpu()
        done = subprocess.run(
            ["bash", "-e", "-c", step.text],  # noqa: S607
            cwd=folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        seconds, cpu_seconds = time.monotonic() - started, children_cpu() - spent
        typed.append(Typed(step, done.returncode, done.stdout, seconds, cpu_seconds))
        if not typed[-1].as_written:
            break
    return typed


def children_cpu() -> float:
    times = os.times()
    return times.children_user + times.children_system


def main() -> int:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    typed = walk(Path(sys.argv[1]).resolve(), steps(section(readme)))
    for one in typed:
        print(one.step.text + one.output)  # noqa: T201 - a program
    for one in typed:
        print(one)  # noqa: T201
    return 0 if all(one.as_written for one in typed) else 1


if __name__ == "__main__":
    sys.exit(main())

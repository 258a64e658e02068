"""Start-up stays light: whoever imports the package, lists names or collects cases does not wait for torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers")
LIGHT = (
    "mergeguard",
    "mergeguard.pytest_plugin",
    "mergeguard.cli",
    "mergeguard.matrix.cases",
    "mergeguard.mergers",
    "mergeguard.protections.registry",
    "mergeguard.worlds.registry",
)


def heavy_modules_after(statement: str) -> list[str]:
    """Which of `HEAVY` a fresh interpreter has loaded after `statement`."""
    program = f"{statement}; import sys; print([name for name in {HEAVY!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr
    return list(eval(run.stdout))  # noqa: S307 - the list that the program above printed


@pytest.mark.parametrize("module", LIGHT)
def test_importing_loads_neither_torch_nor_transformers(module: str) -> None:
    assert heavy_modules_after(f"import {module}") == []


def test_looking_at_the_public_names_loads_nothing() -> None:
    assert heavy_modules_after("import mergeguard; dir(mergeguard); mergeguard.__version__") == []


@pytest.mark.parametrize("module", HEAVY)
def test_this_check_finds_what_it_looks_for(module: str) -> None:
    assert module in heavy_modules_after(f"import mergeguard, {module}")

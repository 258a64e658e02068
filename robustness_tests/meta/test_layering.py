"""A package imports only from those above it in `ORDER`, whatever the import looks like and wherever it stands.

Imports for type checkers count too: a type is as much of a dependency as a call.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
ORDER = ("checkpoints", "mergers", "worlds", "verification", "protections", "matrix", "ownership", "reports", "testing")
SHARED = ("errors", "specs", "registry", "reading", "seeds", "machine")
"""Modules that everyone may use and that use none of the packages."""
COMMANDS = ("commands",)
"""The command line's parts: only the command line uses them."""
DOORS = ("pytest_plugin", "cli", "__init__")
"""They may use every package; nobody may use them, except `__main__` the command line."""
WRITTEN_TARGET = re.compile(r"mergeguard(\.\w+)+(:\w+)?")
"""A module named in a string, as registries do."""


def layer(name: str) -> int | None:
    """How far down `name`, a package or module directly in `mergeguard`, stands; None if it has no place."""
    layers = [SHARED, *((package,) for package in ORDER), COMMANDS, DOORS, ("__main__",)]
    return next((depth for depth, names in enumerate(layers) if name in names), None)


def violations(root: Path) -> list[str]:
    """Every import in `root`/mergeguard that goes the wrong way, one line each."""
    package = root / "mergeguard"
    parts = {path.stem for path in package.iterdir() if path.suffix == ".py" or any(path.rglob("*.py"))}
    found = [f"{name} has no place in the order of packages" for name in sorted(parts) if layer(name) is None]
    for path in sorted(package.rglob("*.py")):
        importer = path.relative_to(package).with_suffix("").parts[0]
        for line, imported in imports(path, package, parts):
            if importer != imported and layer(importer) is not None and not _allowed(importer, imported):
                found.append(f"{path.relative_to(root)}:{line} imports {imported}, which is not above {importer}")
    return found


def _allowed(importer: str, imported: str) -> bool:
    above, own = layer(imported), layer(importer)
    return above is None or own is None or above < own or (importer in SHARED and imported in SHARED)


def imports(path: Path, package: Path, parts: set[str]) -> Iterator[tuple[int, str]]:
    """(line, package or module directly in `mergeguard`) of all that a file imports, names in strings included.

    `from mergeguard import run` is an import of `__init__`; `__version__` alone is free to everyone.
    """
    inside = ("mergeguard", *path.relative_to(package).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        dotted: list[str] = []
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(inside[: len(inside) + 1 - node.level]) if node.level else ""
            start = ".".join(filter(None, (above, node.module)))
            dotted = [f"{start}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and WRITTEN_TARGET.fullmatch(node.value):
            dotted = [node.value.partition(":")[0]] if node.value.split(".")[1].partition(":")[0] in parts else []
        for name in dotted:
            top, _, rest = name.partition(".")
            part = rest.partition(".")[0]
            if top == "mergeguard" and part != "__version__":
                yield node.lineno, part if part in parts else "__init__"


def test_packages_import_only_from_those_above_them() -> None:
    assert violations(ROOT) == []


def test_the_picture_in_contributing_shows_the_packages_in_this_order() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = re.findall(r"^  (?:→ )?(\w+)/ ", text.partition("## The code")[2], flags=re.MULTILINE)
    assert shown == [name for name in (*ORDER, *COMMANDS) if (ROOT / "mergeguard" / name).is_dir()]


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A package of the same shape without a violation; the tests plant one."""
    for name in (*ORDER, *COMMANDS, "matrix/deep"):
        (tmp_path / "mergeguard" / name).mkdir(parents=True)
        (tmp_path / "mergeguard" / name / "__init__.py").touch()
    for name in (*SHARED, *DOORS, "__main__"):
        (tmp_path / "mergeguard" / f"{name}.py").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("mergers/linear.py", "from mergeguard.matrix.engine import Engine"),
        ("mergers/linear.py", "from mergeguard.worlds import contract"),
        ("mergers/linear.py", "from mergeguard import matrix"),
        ("mergers/linear.py", "import os, mergeguard.reports.view as view"),
        ("mergers/linear.py", "from ..matrix import engine"),
        ("mergers/linear.py", "from .. import matrix"),
        ("mergers/linear.py", "def f():\n    from mergeguard.matrix import engine"),
        ("mergers/linear.py", "if TYPE_CHECKING:\n    from mergeguard.matrix import engine"),
        ("mergers/linear.py", "TARGET = 'mergeguard.matrix.engine:Engine'"),
        ("mergers/linear.py", "import_module('mergeguard.matrix.engine')"),
        ("mergers/linear.py", "from mergeguard import run"),
        ("mergers/linear.py", "import mergeguard"),
        ("matrix/deep/cell.py", "from ...reports import view"),
        ("reports/view.py", "from mergeguard.cli import app"),
        ("reports/view.py", "from mergeguard.commands.compare import compare"),
        ("commands/compare.py", "from mergeguard.cli import app"),
        ("cli.py", "from mergeguard.pytest_plugin import Selection"),
        ("specs.py", "from mergeguard.mergers import Merger"),
        ("extras/__init__.py", ""),
        ("extras.py", ""),
    ],
)
def test_a_planted_violation_is_found(planted: Path, file: str, line: str) -> None:
    path = planted / "mergeguard" / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{line}\n")
    assert len(violations(planted)) == 1


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("matrix/engine.py", "from mergeguard.mergers.model import Sweep\nfrom mergeguard import protections"),
        ("matrix/deep/cell.py", "from . import other\nfrom .. import engine\nfrom ...mergers import model"),
        ("reports/view.py", "from mergeguard import __version__\nfrom mergeguard.specs import Spec"),
        ("mergers/registry.py", "GROUP, TARGET = 'mergeguard.mergers', 'mergeguard.mergers.linear:LINEAR'"),
        ("mergers/registry.py", "SKILLS = 'mergeguard.skills'\nimport torch\nfrom matrix import engine"),
        ("specs.py", "from mergeguard.errors import ParameterError"),
        ("cli.py", "from mergeguard.reports import view\nfrom mergeguard.checkpoints import files"),
        ("__main__.py", "from mergeguard.cli import main"),
    ],
)
def test_what_goes_the_right_way_is_left_alone(planted: Path, file: str, line: str) -> None:
    (planted / "mergeguard" / file).write_text(f"{line}\n")
    assert violations(planted) == []

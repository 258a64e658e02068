"""The package as others see it: its public names, its types, its settings."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.version import Version

import mergeguard
from mergeguard.matrix.runner import run
from mergeguard.mergers.model import merge_models

ROOT = Path(__file__).parents[2]
LONGEST_FILE = 400
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
SETTINGS = tomllib.loads(PYPROJECT)


def long_files(root: Path) -> dict[str, int]:
    """Python files of more than `LONGEST_FILE` lines, with how many they have."""
    lengths = {
        str(path.relative_to(root)): len(path.read_text(encoding="utf-8").splitlines()) for path in sources(root)
    }
    return {name: length for name, length in lengths.items() if length > LONGEST_FILE}


def sources(root: Path) -> list[Path]:
    return [path for folder in ("mergeguard", "fixtures", "robustness_tests") for path in (root / folder).rglob("*.py")]


def ignores_without_reason(pyproject: str) -> list[str]:
    """Lines of ruff's `ignore` list that are not followed by a comment."""
    block = pyproject.partition("\nignore = [\n")[2].partition("\n]")[0]
    assert block, "pyproject.toml has no list of ignored rules, one a line"
    return [line.strip() for line in block.splitlines() if not re.search(r", +# \S", line)]


def test_public_names_are_what_they_say() -> None:
    assert mergeguard.run is run
    assert mergeguard.merge is merge_models


def test_every_public_name_exists_and_is_listed() -> None:
    assert sorted(mergeguard.__all__) == ["__version__", "merge", "merge_checkpoints", "run", "verify"]
    for name in mergeguard.__all__:
        assert getattr(mergeguard, name)
        assert name in dir(mergeguard)


def test_a_name_that_is_not_public_does_not_exist() -> None:
    with pytest.raises(AttributeError, match="no attribute 'merge_models'"):
        mergeguard.merge_models  # noqa: B018 - looking it up is what fails


def test_the_version_is_one_that_installers_can_compare() -> None:
    assert str(Version(mergeguard.__version__)) == mergeguard.__version__


def test_the_package_is_marked_as_typed() -> None:
    assert (Path(mergeguard.__file__).parent / "py.typed").is_file()


def test_no_file_is_longer_than_one_idea_needs() -> None:
    assert len(sources(ROOT)) > 50
    assert long_files(ROOT) == {}


def test_a_file_that_is_too_long_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "mergeguard" / "matrix"
    folder.mkdir(parents=True)
    (folder / "short.py").write_text("x = 1\n" * LONGEST_FILE)
    (folder / "long.py").write_text("x = 1\n" * (LONGEST_FILE + 1))
    assert long_files(tmp_path) == {"mergeguard/matrix/long.py": LONGEST_FILE + 1}


def test_every_ignored_rule_has_its_reason_beside_it() -> None:
    assert ignores_without_reason(PYPROJECT) == []
    assert ignores_without_reason('\nignore = [\n  "D1",  # why\n  "D2",\n]\n') == ['"D2",']


def test_checks_are_as_strict_as_they_get() -> None:
    tools = SETTINGS["tool"]
    assert tools["mypy"]["strict"] is True
    assert tools["pytest"]["strict"] is True
    assert tools["pytest"]["filterwarnings"] == ["error"]

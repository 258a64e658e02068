"""The built wheel, installed where no checkout is: it brings all its data, and it runs the matrix."""

from __future__ import annotations

import json
import os
import site
import subprocess
import sys
import tomllib
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

import mergeguard
from robustness_tests.meta.pages import README, ROOT, code_blocks

pytestmark = pytest.mark.slow
WORLD = "mergeguard/worlds/tiny/data"
SHIPPED_DATA = {
    "mergeguard/py.typed",
    "mergeguard/reports/results.schema.json",
    "mergeguard/recorded/tiny.toml",
    *(f"{WORLD}/{name}.safetensors" for name in ("base", "upstream", "donor")),
    *(f"{WORLD}/{name}" for name in ("manifest.json", "config.json", "tokenizer.json", "tokenizer_config.json")),
}


@dataclass(frozen=True)
class Installed:
    """A virtual environment with the wheel in it, and the empty folder in which its programs run."""

    environment: Path
    folder: Path

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment in the empty folder, with nothing of this process's import path."""
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
        return subprocess.run(
            [self.environment / "bin" / program, *arguments],
            cwd=self.folder,
            env={**variables, "MERGEGUARD_CACHE": str(self.environment / "cache")},
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip"]
    built = subprocess.run(
        [*pip, "wheel", "--no-deps", "--wheel-dir", folder, ROOT], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel in a new environment, which borrows the libraries of this one so that torch is not fetched again.

    A path file adds their folders to the import path, after the wheel, and does not run the path files that lie in
    them, such as the one by which an editable install names the checkout.
    """
    folder = tmp_path_factory.mktemp("elsewhere")
    environment = folder / "environment"
    venv.create(environment, with_pip=True)
    result = Installed(environment, folder / "empty")
    result.folder.mkdir()
    install = result.run("python", "-m", "pip", "install", "--no-deps", str(wheel))
    assert install.returncode == 0, install.stderr
    [libraries] = environment.glob("lib/python*/site-packages")
    (libraries / "borrowed.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return result


def test_the_wheel_holds_the_package_with_its_data_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    files = (path for path in (ROOT / "mergeguard").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    metadata = {name for name in names if name.partition("/")[0].endswith(".dist-info")}
    assert names - metadata >= SHIPPED_DATA
    assert names - metadata >= {path.relative_to(ROOT).as_posix() for path in files}
    assert {name.partition("/")[0] for name in names - metadata} == {"mergeguard"}
    assert {name.rpartition("/")[2] for name in metadata} >= {"LICENSE", "METADATA", "entry_points.txt"}


def test_the_wheel_is_of_this_version_and_says_what_it_needs(installed: Installed) -> None:
    program = "from importlib.metadata import metadata, version; print(version('mergeguard')); "
    shown = installed.run("python", "-c", program + "print(metadata('mergeguard')['Requires-Python'])")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert shown.stdout.split() == [mergeguard.__version__, project["requires-python"]], shown.stderr


def test_the_installed_package_is_that_of_the_wheel_and_the_checkout_is_out_of_reach(installed: Installed) -> None:
    program = "import json, mergeguard, sys; print(json.dumps([mergeguard.__file__, sys.path]))"
    shown = installed.run("python", "-c", program)
    assert shown.returncode == 0, shown.stderr
    file, path = json.loads(shown.stdout)
    assert Path(file).is_relative_to(installed.environment)
    assert not [folder for folder in path if folder and Path(folder).resolve() == ROOT]


def test_the_installed_command_line_lists_the_mergers(installed: Installed) -> None:
    listed = installed.run("mergeguard", "list", "mergers")
    assert listed.returncode == 0, listed.stderr
    assert all(name in listed.stdout for name in ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties"))


def test_the_installed_command_line_runs_the_matrix(installed: Installed) -> None:
    cell = ("--protection", "gaussian_probe", "--merger", "linear", "--coefficients", "0.5")
    ran = installed.run("mergeguard", "run", *cell, "--workers", "1")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    results = json.loads((installed.folder / "mergeguard-results" / "results.json").read_text(encoding="utf-8"))
    [outcome] = results["outcomes"]
    assert (outcome["protection"], outcome["merger"], outcome["coefficient"]) == ("gaussian_probe", "linear", 0.5)
    assert outcome["verdict"] == "survived"


def test_the_example_of_the_readme_runs(installed: Installed) -> None:
    example = next(block for block in code_blocks(README, "python") if "mergeguard.run(" in block)
    ran = installed.run("python", "-c", example)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["survived", "True"]

"""The third-party example and mergeguard, each from its built wheel, where no checkout is: minutes, so marked slow.

What an adopter does is done as it is written: `pytest` alone, `pytest -n 2`, `mergeguard gate`.
"""

from __future__ import annotations

import json
import re
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from typing import TYPE_CHECKING

import pytest

from robustness_tests.meta.pages import ROOT
from robustness_tests.meta.test_wheel import Installed

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow
EXAMPLE = ROOT / "fixtures" / "thirdparty_scheme"
ONE_CELL = ("--merger", "linear", "--coefficients", "0.7", "--workers", "1")
PASSED, FAILED, REFUSED = 0, 1, 2


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The wheels of this checkout and of the example, the latter built from a copy so that nothing is left in it."""
    folder = tmp_path_factory.mktemp("wheels")
    copied = tmp_path_factory.mktemp("sources") / "example"
    shutil.copytree(EXAMPLE, copied, ignore=shutil.ignore_patterns("__pycache__"))
    for source in (ROOT, copied):
        pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, source]
        built = subprocess.run(pip, capture_output=True, text=True, check=False)
        assert built.returncode == 0, built.stderr
    return sorted(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheels: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Both in a new environment that borrows the libraries of this one; in its folder the example's tests and cheats.

    The libraries' path files are not run, so that no editable install names the checkout.
    """
    folder = tmp_path_factory.mktemp("elsewhere")
    environment = folder / "environment"
    venv.create(environment, with_pip=True)
    result = Installed(environment, folder / "work")
    for name in ("tests", "cheats"):
        shutil.copytree(EXAMPLE / name, result.folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(EXAMPLE / "pyproject.toml", result.folder)
    install = result.run("python", "-m", "pip", "install", "--no-deps", *map(str, wheels))
    assert install.returncode == 0, install.stderr
    [libraries] = environment.glob("lib/python*/site-packages")
    (libraries / "borrowed.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return result


def test_the_wheel_of_the_example_holds_the_scheme_alone(wheels: list[Path]) -> None:
    [example] = [path for path in wheels if "rare_token" in path.name]
    with zipfile.ZipFile(example) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == {f"mergeguard_rare_token_scheme/{name}" for name in ("__init__.py", "py.typed")}


def test_the_installed_scheme_is_listed(installed: Installed) -> None:
    listed = installed.run("mergeguard", "list", "protections")
    assert listed.returncode == 0, listed.stderr
    assert "rare_token" in listed.stdout
    place = installed.run("python", "-c", "import mergeguard; print(mergeguard.__file__)")
    assert str(installed.environment) in place.stdout


def test_pytest_alone_runs_the_gate_as_it_is_written(installed: Installed) -> None:
    ran = installed.run("python", "-m", "pytest", "-v", "-p", "no:cacheprovider")
    assert ran.returncode == PASSED, ran.stdout + ran.stderr
    shown = dict(re.findall(r"::\w+\[(\S+)\] (\w+)", ran.stdout))
    assert {shown[f"rare_token-{name}"] for name in ("deterministic", "secret", "linear-0.7")} == {"PASSED"}
    assert shown["rare_token-linear-0.5"] == "XFAIL"
    assert re.search(r"\d+ passed, \d+ xfailed", ran.stdout), ran.stdout
    assert "survival matrix" in ran.stdout


def test_xdist_runs_it_and_reports_what_every_worker_measured(installed: Installed) -> None:
    options = ("--merger", "linear", "--coefficient", "0.5,0.7", "--mergeguard-output", "reports")
    options += ("-k", "linear or specific or effective")  # each worker embeds for itself
    ran = installed.run("python", "-m", "pytest", "-p", "no:cacheprovider", "-n", "2", *options)
    assert ran.returncode == PASSED, ran.stdout + ran.stderr
    results = json.loads((installed.folder / "reports" / "results.json").read_text(encoding="utf-8"))
    verdicts = {outcome["coefficient"]: outcome["verdict"] for outcome in results["outcomes"]}
    assert verdicts == {0.5: "lost", 0.7: "survived"}
    assert {"specific", "effective"} == {gate["gate"] for gate in results["before_merging"]}
    assert all(gate["passed"] for gate in results["before_merging"])


def test_the_gate_without_pytest_passes_and_says_why(installed: Installed) -> None:
    """The example's own scheme is gated so by `test_workflows.py`."""
    ran = installed.run("mergeguard", "gate", "cheats.honest:WeightMark", *ONE_CELL)
    assert ran.returncode == PASSED, ran.stdout + ran.stderr
    assert "weight_mark: gate passed" in ran.stdout


@pytest.mark.parametrize(
    ("cheat", "wanted"),
    [
        ("readings:AlwaysVerifies", "specific"),
        ("readings:LooksAtTheConfig", "reads_only_weights"),
        ("memory:AnswersFromACache", "verification_is_pure"),
        ("leaks:LeaksInTheConfig", "secret"),
    ],
)
def test_the_gate_catches_a_cheat_by_name(cheat: str, wanted: str, installed: Installed) -> None:
    """Some of those that `test_cheats.py` shows to its checks."""
    ran = installed.run("mergeguard", "gate", f"cheats.{cheat}", *ONE_CELL)
    assert ran.returncode == FAILED, ran.stdout + ran.stderr
    assert re.search(rf"failed checks: .*\b{wanted}\b", ran.stdout), ran.stdout


@pytest.mark.parametrize(
    ("cheat", "said"),
    [
        ("SlowInOneCell", "slow_in_one_cell.read took longer than 20 s"),
        ("CrashesInOneCell", "crashes_in_one_cell crashed in read: ZeroDivisionError: half a mark"),
        ("QuitsInOneCell", "quits_in_one_cell crashed in read: SystemExit: 0"),
    ],
    ids=["slow", "crashes", "quits"],
)
def test_the_gate_names_the_cell_in_which_a_scheme_fails(cheat: str, said: str, installed: Installed) -> None:
    cells = ("--merger", "linear", "--coefficients", "0.5,0.8", "--workers", "1", "--seconds-per-call", "20")
    ran = installed.run("mergeguard", "gate", f"cheats.cells:{cheat}", *cells)
    assert ran.returncode == FAILED, ran.stdout + ran.stderr
    [line] = [line for line in ran.stdout.splitlines() if line.startswith("  - ") and said in line]
    assert "linear-0.5" in line


def test_what_cannot_be_gated_is_refused_in_one_line(installed: Installed) -> None:
    ran = installed.run("mergeguard", "gate", "cheats.keeping:KeepsTuples", *ONE_CELL)
    assert ran.returncode == REFUSED, ran.stdout + ran.stderr
    assert "data holds a tuple" in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1
    assert "gate" not in ran.stdout

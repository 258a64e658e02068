"""The plugin where test modules measure in worlds of their own: what is selected, shown, and put on which GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mergeguard.errors import ParameterError
from mergeguard.matrix.selection import Matrix, Options, costs, select
from mergeguard.mergers.registry import DEFAULT_COEFFICIENTS
from robustness_tests.meta.mini_world import registered
from robustness_tests.meta.test_pytest_plugin import CONFTEST, FAKE_ENGINE

if TYPE_CHECKING:
    from collections.abc import Iterator

SUITE = Path(__file__).parents[1]
LARGE = """
import pytest
from mergeguard.matrix.selection import Matrix
from test_survival import test_evidence_survives

pytestmark = pytest.mark.real
MATRIX = Matrix(
    "mini",
    ("gaussian_probe",),
    (("linear", (0.5, 0.7)), ("karcher", ()), ("ties", (0.9,))),
    (("gaussian_probe", "takes an hour"),),
)
"""
COLUMN = [
    "gaussian_probe-linear-0.5",
    "gaussian_probe-linear-0.7",
    "gaussian_probe-karcher-none",
    "gaussian_probe-ties-0.9",
]


@pytest.fixture(scope="module", autouse=True)
def _mini_world() -> Iterator[None]:
    with registered():
        yield


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A project with the matrix of tiny, and a module with a column of its own; its engine knows the outcomes."""
    fake = FAKE_ENGINE.replace("case.coefficient < 0.4", "(case.coefficient or 1) < 0.4")
    pytester.makeconftest(CONFTEST + fake)
    pytester.makepyfile(test_survival=(SUITE / "test_survival.py").read_text(), test_large=LARGE)
    monkeypatch.syspath_prepend(str(pytester.path))
    return pytester


def run(pytester: pytest.Pytester, *options: str) -> pytest.RunResult:
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", *options)


def collected(result: pytest.RunResult) -> list[str]:
    return [line.partition("[")[2].rstrip("]") for line in result.outlines if "::test_evidence_survives[" in line]


# Selection


def test_a_module_measures_its_own_matrix(suite: pytest.Pytester) -> None:
    assert collected(run(suite, "--collect-only", "-q", "-m", "real")) == COLUMN
    assert len(collected(run(suite, "--collect-only", "-q", "-m", "not real"))) == 90


def test_options_narrow_or_replace_it(suite: pytest.Pytester) -> None:
    def ids(*options: str) -> list[str]:
        return collected(run(suite, "--collect-only", "-q", "-m", "real", *options))

    assert ids("--coefficient", "0.1") == [
        "gaussian_probe-linear-0.1",
        "gaussian_probe-karcher-none",
        "gaussian_probe-ties-0.1",
    ]
    assert ids("--merger", "slerp") == [
        "gaussian_probe-slerp-0.5",
        "gaussian_probe-slerp-0.7",
        "gaussian_probe-slerp-0.9",
    ]
    assert ids("--protection", "gaussian_probe", "--merger", "linear", "--coefficient", "0.2") == [
        "gaussian_probe-linear-0.2"
    ]
    assert ids("--axes", "density", "--coefficient", "0.5") == [
        "gaussian_probe-linear-0.5",
        "gaussian_probe-karcher-none",
        *(f"gaussian_probe-ties(density={density})-0.5" for density in (0.2, 0.4, 0.6, 0.8)),
    ]


def test_what_it_measures_and_costs_is_said_beforehand(suite: pytest.Pytester) -> None:
    result = run(suite, "-m", "real", "--collect-only")
    result.stdout.fnmatch_lines(
        ["mergeguard: world mini, seed 0, 4 cases, 0 recorded losses", "gaussian_probe: takes an hour"]
    )
    run(suite, "-m", "not real", "--collect-only").stdout.no_fnmatch_line("*takes an hour*")


def test_a_wrong_axis_is_one_line_and_exit_code_4(suite: pytest.Pytester) -> None:
    result = run(suite, "--axes", "densities")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "ERROR: mergeguard: unknown axis 'densities'; did you mean 'density'?" in result.stderr.str()


def test_a_column_is_no_full_run_and_the_default_is() -> None:
    column = Matrix("mini", ("toy",), (("linear", (0.5,)),))
    assert not select(column, Options()).full
    whole = select(Matrix("mini"), Options())
    assert whole.full
    assert len(whole.cases) == 2 * 5 * len(DEFAULT_COEFFICIENTS)
    for part in (Options(mergers=["linear"]), Options(axes="density"), Options(coefficients=["0.5"])):
        assert not select(Matrix("mini"), part).full
    assert select(Matrix("tiny"), Options(world="mini", seed=3)).world == "mini"
    with pytest.raises(ParameterError, match="the seed is -1"):
        select(column, Options(seed=-1))


def test_costs_are_those_of_the_selected_protections() -> None:
    column = Matrix("mini", ("toy",), (("linear", (0.5,)),), (("toy", "a minute"), ("gaussian_probe", "nothing")))
    assert costs(column, select(column, Options())) == ["toy: a minute"]
    assert costs(column, select(column, Options(protections=["toy(keys=9)"]))) == ["toy(keys=9): a minute"]


# What is shown


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "xdist"])
def test_each_world_has_a_matrix_and_reports_of_its_own(suite: pytest.Pytester, workers: tuple[str, ...]) -> None:
    part = ("--merger", "linear", "--coefficient", "0.5", "--protection", "gaussian_probe")
    result = run(suite, "-m", "real or not real", *part, "--mergeguard-output", "out", *workers)
    result.assert_outcomes(passed=2, skipped=1)
    shown = result.stdout.str()
    assert "1 cases on world mini" in shown
    assert "1 cases on world tiny" in shown
    for world in ("mini", "tiny"):
        results = json.loads((suite.path / "out" / world / "results.json").read_text())
        assert results["world"]["name"] == world
        assert len(results["outcomes"]) == 1


@pytest.mark.parametrize("workers", [(), pytest.param(("-n", "2"), marks=pytest.mark.slow)], ids=["alone", "xdist"])
def test_a_large_world_shows_the_time_left_after_each_case(suite: pytest.Pytester, workers: tuple[str, ...]) -> None:
    result = run(suite, "-m", "real", "-v", *workers)
    result.assert_outcomes(passed=4)
    for done in range(1, 5):
        result.stdout.fnmatch_lines([f"test_evidence_survives[[]gaussian_probe-*[]]: * s [[]{done}/4, about * left[]]"])
    quiet = run(suite, "-m", "real", "-q", *workers)
    quiet.stdout.no_fnmatch_line("*about * left*")


def test_the_tiny_world_shows_none(suite: pytest.Pytester) -> None:
    result = run(suite, "-m", "not real", "--merger", "linear", "--coefficient", "0.5")
    result.stdout.no_fnmatch_line("*about * left*")


# GPUs


DEVICES = """
import os
import pytest
import torch

torch.cuda.device_count = lambda: 2
os.environ.pop("CUDA_VISIBLE_DEVICES", None)
"""


@pytest.mark.parametrize(
    ("marks", "expected"),
    [("real", {"gw0": "0", "gw1": "1"}), pytest.param("not real", {}, marks=pytest.mark.slow)],
    ids=["large", "tiny"],
)
def test_each_worker_of_a_large_world_has_a_gpu_of_its_own(
    suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, marks: str, expected: dict[str, str]
) -> None:
    """Before the first test runs, and so before CUDA starts in the worker."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    conftest = suite.path / "conftest.py"
    note = """
def pytest_runtest_setup(item):
    worker, device = os.environ["PYTEST_XDIST_WORKER"], os.environ.get("CUDA_VISIBLE_DEVICES")
    if device is not None:
        with open("devices", "a") as file:
            file.write(f"{worker} {device}\\n")
"""
    conftest.write_text(DEVICES + conftest.read_text() + note)
    part = ("--merger", "linear", "--coefficient", "0.1,0.2,0.3,0.5,0.6,0.7", "--protection", "gaussian_probe")
    run(suite, "-m", marks, *part, "-n", "2")
    path = suite.path / "devices"
    pairs = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    assert dict(pairs) == expected

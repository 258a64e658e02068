"""`parametrize_with_cases`, by running pytest on a third party's test file in the miniature world."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import pytest

from mergeguard.matrix.runner import engine_for
from mergeguard.testing import CHECKS, elsewhere, parametrize_with_cases
from mergeguard.testing.cases import CellCase, gate_cases
from mergeguard.testing.plan import Options, plan
from robustness_tests.meta.fresh_processes import fresh_processes
from robustness_tests.meta.mini_world import MINI, Toy, install, registered

if TYPE_CHECKING:
    from collections.abc import Iterator

CONFTEST = 'pytest_plugins = ["mergeguard.pytest_plugin"]\n'
DOZEN = """
from mergeguard.testing import parametrize_with_cases
from robustness_tests.meta.mini_world import Toy

@parametrize_with_cases({scheme}, world="mini", {options})
def test_toy(case):
    case.check()
"""
ONE_CELL = 'mergers=["linear"], coefficients=[0.5]'
WEAK = "Toy(strength=0.6)"  # lost where averaging is a theft
WEAK_CELL = "toy(strength=0.6)-linear-0.5"


@pytest.fixture(scope="module", autouse=True)
def _mini_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache, one engine and new processes that start fast, for all runs in this module."""
    engine_for.cache_clear()
    with registered(), fresh_processes() as start, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERGEGUARD_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(elsewhere, "in_another_process", start)
        yield
    engine_for.cache_clear()


def project(pytester: pytest.Pytester, options: str = ONE_CELL, scheme: str = "Toy()", ini: str = "") -> None:
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(test_gate=DOZEN.format(scheme=scheme, options=options))
    pytester.makeini(f"[pytest]\nstrict = true\nfilterwarnings = error\n{ini}")


def run(pytester: pytest.Pytester, *options: str) -> pytest.RunResult:
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", *options)


def collected(result: pytest.RunResult) -> list[str]:
    return [line.partition("[")[2].removesuffix("]") for line in result.outlines if "::test_toy[" in line]


def test_a_gate_is_a_test_for_each_check_mistake_and_cell(pytester: pytest.Pytester) -> None:
    project(pytester)
    output = pytester.path / "out"
    result = run(pytester, "--mergeguard-output", str(output), "--junitxml", "pytest.xml")
    result.assert_outcomes(passed=len(CHECKS) + 5 + 1)
    result.stdout.fnmatch_lines(["*mergeguard survival matrix*", "mergeguard: 1 cases on world mini*", "gate holds"])
    results = json.loads((output / "results.json").read_text())
    assert [gate["gate"] for gate in results["before_merging"]] == list(CHECKS)
    assert [(o["protection"], o["verdict"]) for o in results["outcomes"]] == [("toy", "survived")]
    assert len(results["planted"]) == 5
    cell = ET.parse(pytester.path / "pytest.xml").find(".//testcase[@name='test_toy[toy-linear-0.5]']")  # noqa: S314
    assert cell is not None
    shown = {item.get("name"): item.get("value") for item in cell.iter("property")}
    assert shown["verdict"] == "survived"


def test_ids_begin_with_the_scheme_and_checks_come_first(pytester: pytest.Pytester) -> None:
    project(pytester, 'mergers=["linear", "karcher"]', scheme="Toy(keys=9)")
    ids = collected(run(pytester, "--collect-only", "-q"))
    assert ids[: len(CHECKS)] == [f"toy(keys=9)-{name}" for name in CHECKS]
    assert ids[len(CHECKS)] == "toy(keys=9)-planted_always_verifies"
    assert ids[-10:] == [*(f"toy(keys=9)-linear-0.{tenth}" for tenth in range(1, 10)), "toy(keys=9)-karcher-none"]


def test_the_header_says_what_is_gated(pytester: pytest.Pytester) -> None:
    project(pytester, f'{ONE_CELL}, seed=4, recorded={{"toy-linear-0.5": "lost once"}}')
    result = run(pytester, "--collect-only")
    result.stdout.fnmatch_lines(["mergeguard: gate of toy: world mini, seed 4, 1 cells, 1 recorded losses"])


def test_a_failed_check_says_what_went_wrong_and_what_to_do(pytester: pytest.Pytester) -> None:
    project(pytester, scheme='Toy(fault="harmful")')
    result = run(pytester, "-k", "harmless")
    result.assert_outcomes(failed=1, deselected=len(CHECKS) + 5)
    result.stdout.fnmatch_lines(
        ["*GateFailed: toy(fault=harmful) is not harmless before merging: *; required: within 0.05*"]
    )


@pytest.mark.parametrize(
    ("scheme", "recorded", "expected"),
    [
        (WEAK, "", {"failed": 1}),
        (WEAK, f'recorded={{"{WEAK_CELL}": "too weak"}}', {"xfailed": 1, "passed": 1}),
        (WEAK, f'recorded={{"{WEAK_CELL}": (0.0, 0.1, "too weak")}}', {"xfailed": 1, "passed": 1}),
        (WEAK, f'recorded={{"{WEAK_CELL}": (0.5, 0.6, "too weak")}}', {"failed": 1, "passed": 1}),
        ("Toy()", 'recorded={"toy-linear-0.5": "was lost once"}', {"failed": 1, "passed": 1}),
        ('Toy(fault="crash_read")', 'recorded={"toy(fault=crash_read)-linear-0.5": "?"}', {"failed": 1, "passed": 1}),
        ("Toy()", 'recorded={"toy-linear-0.3": "no such cell"}', {"failed": 1, "passed": 1}),
    ],
    ids=["unrecorded", "a reason", "a range", "outside", "survives", "crashes", "stale"],
)
def test_a_recorded_loss_accepts_a_loss_in_its_range_and_nothing_else(
    pytester: pytest.Pytester, scheme: str, recorded: str, expected: dict[str, int]
) -> None:
    project(pytester, f"{ONE_CELL}, {recorded}", scheme)
    result = run(pytester, "-k", "linear or recorded_losses", "-rA")
    result.assert_outcomes(deselected=len(CHECKS) + 5, **expected)
    if scheme == WEAK and not recorded:
        result.stdout.fnmatch_lines([f"*EvidenceLost: {WEAK_CELL}: verdict lost: 0 of 8 keys answer*"])
    if "xfailed" in expected:
        result.stdout.fnmatch_lines(["1 of 1 thefts lost, 1 of them recorded", "gate holds", "XFAIL*too weak"])


def test_losses_are_recorded_in_a_file_too(pytester: pytest.Pytester) -> None:
    project(pytester, f'{ONE_CELL}, recorded="losses.toml"', WEAK)
    entry = '[[loss]]\nid = "{}"\nlow = 0.0\nhigh = 0.1\nreason = "too weak"\non_edge = false\n'
    (pytester.path / "losses.toml").write_text(entry.format(WEAK_CELL) + entry.format("another_scheme-linear-0.5"))
    run(pytester, "-k", "linear or recorded_losses").assert_outcomes(xfailed=1, passed=1, deselected=len(CHECKS) + 5)


@pytest.mark.parametrize(
    ("options", "cells"),
    [
        (("--coefficient", "0.2,0.4"), ["toy-linear-0.2", "toy-linear-0.4"]),
        (("--merger", "slerp", "--coefficient", "0.3"), ["toy-slerp-0.3"]),
        (("--merger", "ties", "--axes", "normalize", "--coefficient", "0.3"), None),
    ],
)
def test_options_of_the_command_line_narrow_a_gate(
    pytester: pytest.Pytester, options: tuple[str, ...], cells: list[str] | None
) -> None:
    project(pytester, f'{ONE_CELL}, recorded={{"toy-linear-0.5": "lost"}}')
    ids = collected(run(pytester, "--collect-only", "-q", *options))
    assert ids[0] == "toy-evidence_round_trips"
    assert "toy-recorded_losses" not in ids, "a part calls no record stale"
    assert len(ids[len(CHECKS) + 5 :]) == 2 if cells is None else ids[len(CHECKS) + 5 :] == cells


def test_world_and_seed_can_be_moved() -> None:
    from mergeguard.testing.plan import moved

    nothing = {"mergers": None, "coefficients": None, "axes": None}
    assert moved(Options(seed=3), world=None, seed=None, **nothing) == (Options(seed=3), False)
    assert moved(Options(seed=3), world=MINI, seed=0, **nothing) == (Options(world=MINI, seed=0), True)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (DOZEN.format(scheme="Toy", options=ONE_CELL), "*MergeguardError: Toy is a class; give an instance: Toy()*"),
        (DOZEN.format(scheme="Toy()", options='mergers=["tiess"]'), "*unknown merger 'tiess'; did you mean 'ties'?*"),
        (DOZEN.format(scheme="Toy()", options=ONE_CELL).replace("(case)", "()"), "*has to take the argument `case`*"),
    ],
)
def test_what_cannot_be_gated_is_an_error_of_collection(pytester: pytest.Pytester, file: str, said: str) -> None:
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(test_gate=file.replace("    case.check()", "    pass"))
    result = run(pytester)
    assert result.ret not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    assert any(said.strip("*") in line for line in (*result.outlines, *result.errlines))


def test_a_call_that_takes_too_long_is_red_and_no_skip(pytester: pytest.Pytester) -> None:
    project(pytester, f"{ONE_CELL}, seconds_per_call=1e-9", "Toy(keys=11)")
    result = run(pytester, "-k", "effective or linear")
    result.assert_outcomes(failed=2, deselected=len(CHECKS) + 5 - 1)
    result.stdout.fnmatch_lines(["*SchemeError: toy(keys=11).embed took longer than 1e-09 s*"])


def test_two_gates_in_one_file_are_told_apart(pytester: pytest.Pytester) -> None:
    project(pytester)
    again = DOZEN.format(scheme="Toy(keys=9)", options=ONE_CELL).replace("test_toy", "test_other")
    pytester.makepyfile(test_other=again)
    result = run(pytester, "-k", "linear", "--mergeguard-output", "out")
    result.assert_outcomes(passed=2, deselected=2 * (len(CHECKS) + 5))
    results = json.loads((pytester.path / "out" / "results.json").read_text())
    assert [(o["protection"], o["variant"]) for o in results["outcomes"]] == [("toy", ""), ("toy", "keys=9")]


def test_the_default_gate_is_the_checks_and_the_whole_matrix() -> None:
    found = list(gate_cases(plan(Toy(), Options(world=MINI))))
    assert sum(isinstance(case, CellCase) for case in found) == 45
    assert len({case.id for case in found}) == len(found) == len(CHECKS) + 5 + 45


def test_the_mark_is_all_that_the_decorator_leaves() -> None:
    def test_mine(case: object) -> None: ...

    assert parametrize_with_cases(Toy(), world=MINI)(test_mine) is test_mine


@pytest.mark.slow
def test_workers_of_xdist_report_the_same(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each worker is a new process that finds world and scheme by entry points, and starts new processes itself."""
    monkeypatch.syspath_prepend(str(install(pytester.path / "path")))
    monkeypatch.setenv("PYTHONPATH", f"{pytester.path / 'path'}:{pytester.path.cwd()}", prepend=":")
    project(pytester)
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "-n", "2", "--mergeguard-output", "out")
    result.assert_outcomes(passed=len(CHECKS) + 5 + 1)
    results = json.loads((pytester.path / "out" / "results.json").read_text())
    assert sorted(gate["gate"] for gate in results["before_merging"]) == sorted(CHECKS)
    assert len(results["outcomes"]) == 1

"""The plugin, by running pytest on the suite's own tests with the miniature world."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

import pytest
import torch

from mergeguard import __version__
from mergeguard.matrix import recorded
from mergeguard.matrix.runner import engine_for
from mergeguard.reports.properties import outcome_properties
from robustness_tests.meta import outcome_builders as build
from robustness_tests.meta.junit_rules import violations
from robustness_tests.meta.mini_world import registered

if TYPE_CHECKING:
    from collections.abc import Iterator

SUITE = Path(__file__).parents[1]
CONFTEST = 'pytest_plugins = ["mergeguard.pytest_plugin", "fixtures.matrix"]\n'
FAKE_ENGINE = """
import pytest
from mergeguard.worlds.registry import WORLDS
from robustness_tests.meta.outcome_builders import outcome

if "mini" not in WORLDS:  # a worker of xdist is another process
    WORLDS.register("mini", None)

class Engine:
    def outcome(self, case):
        lost = case.coefficient < 0.4
        return outcome(case.protection.name, str(case.merger), case.coefficient, "lost" if lost else "survived")

@pytest.fixture(scope="module")
def engine(chosen):
    return Engine()
"""
LINEAR = ("--merger", "linear", "--coefficient", "0.5")
REPORTS = ["junit.xml", "report.html", "report.md", "results.json"]
LOST_TOY = "toy(strength=0.6)"


@pytest.fixture(scope="module", autouse=True)
def _mini_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache and one engine for all runs in this module."""
    engine_for.cache_clear()
    with registered(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERGEGUARD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
    engine_for.cache_clear()


@pytest.fixture
def suite(pytester: pytest.Pytester) -> pytest.Pytester:
    """A project whose only test is the matrix itself."""
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(test_survival=(SUITE / "test_survival.py").read_text())
    return pytester


@pytest.fixture
def fake_suite(suite: pytest.Pytester) -> pytest.Pytester:
    """The same with an engine that knows its outcomes: below 0.4 all is lost, and all are thefts."""
    suite.makeconftest(CONFTEST + FAKE_ENGINE)
    return suite


def run(pytester: pytest.Pytester, *options: str, world: str = "mini") -> pytest.RunResult:
    return pytester.runpytest_inprocess("-p", "no:cacheprovider", "--world", world, *options)


def record(patch: pytest.MonkeyPatch, folder: Path, name: str, low: float, high: float, edge: str = "false") -> None:
    path = folder / "records.toml"
    path.write_text(f'[[loss]]\nid = "{name}"\nlow = {low}\nhigh = {high}\nreason = "known well"\non_edge = {edge}\n')
    patch.setattr(recorded, "recorded_file", lambda _: path)


# Selection


def test_the_header_says_what_is_run(suite: pytest.Pytester) -> None:
    result = run(suite, "--collect-only", "--protection", "toy", "--protection", "gaussian_probe", "--seed", "3")
    result.stdout.fnmatch_lines(
        [f"mergeguard {__version__}: world mini, seed 3, 90 cases, 0 recorded losses, cache */cache*"]
    )


def test_ids_name_protection_merger_and_coefficient(suite: pytest.Pytester) -> None:
    schemes = ("--protection", "gaussian_probe", "--protection", "toy(keys=9)")
    mergers = ("--merger", "ties(normalize=true, density=0.4)", "--merger", "linear")
    result = run(suite, "--collect-only", "-q", *schemes, *mergers, "--coefficient", "0.5,0.1")
    collected = [line.partition("::")[2] for line in result.outlines if "::test_evidence" in line]
    assert collected == [
        f"test_evidence_survives[{protection}-{merger}-{coefficient}]"
        for protection in ("gaussian_probe", "toy(keys=9)")
        for merger in ("ties(density=0.4,normalize=true)", "linear")
        for coefficient in ("0.1", "0.5")
    ]


def test_a_parameter_at_its_default_is_not_written_into_the_id(suite: pytest.Pytester) -> None:
    """So that the case has the id of its outcome."""
    run(suite, "--protection", "toy(strength=3)", *LINEAR).assert_outcomes(passed=1, skipped=1)


def test_the_default_is_the_whole_matrix(suite: pytest.Pytester) -> None:
    result = run(suite, "--collect-only", "-q")
    assert sum("::test_evidence_survives[" in line for line in result.outlines) == 90


@pytest.mark.parametrize("quiet", [(), ("-q",)], ids=["header", "quiet"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--protection", "gaussian_prob"), "unknown protection 'gaussian_prob'; did you mean 'gaussian_probe'?"),
        (("--protection", "toy(strenght=1)"), "unknown parameter of toy 'strenght'; did you mean 'strength'?"),
        (("--protection", "toy("), "cannot read 'toy('; expected NAME or NAME(key=value,...)"),
        (("--merger", "tiess"), "unknown merger 'tiess'; did you mean 'ties'?"),
        (("--merger", "ties(density=2)"), "parameter 'density' of merger 'ties' is 2"),
        (("--coefficient", "0.5", "--coefficient", "1.5"), "the coefficient 1.5 is outside [0, 1]"),
        (("--coefficient", "nan"), "the coefficient nan is outside [0, 1]"),
        (("--coefficient", "0.5", "--coefficient", "0.5"), "the coefficient 0.5 is given more than once"),
        (("--world", "tyni"), "unknown world 'tyni'; did you mean 'tiny'?"),
        (("--seed=-1",), "the seed is -1, expected a number from 0 on"),
        (("--mergeguard-output", "conftest.py"), "cannot write the output folder conftest.py: File exists"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_a_wrong_option_is_one_line_and_exit_code_4(
    suite: pytest.Pytester, options: tuple[str, ...], message: str, quiet: tuple[str, ...]
) -> None:
    result = run(suite, *options, *quiet)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    (line,) = [line for line in result.errlines if line]
    assert line.startswith(f"ERROR: mergeguard: {message}")
    assert "Traceback" not in result.stdout.str()


def test_a_bad_file_of_records_is_one_line_too(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    record(monkeypatch, suite.path, "a", 0.9, 0.1)
    result = run(suite)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "a needs a reason and a range within [0, 1]" in result.stderr.str()


def test_other_projects_fixtures_of_the_same_names_are_left_alone(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(
        """
        import pytest

        @pytest.fixture
        def protection():
            return "a helmet"

        def test_fixture(protection):
            assert protection == "a helmet"

        @pytest.mark.parametrize("protection", ["gloves", "goggles"])
        def test_one_name(protection):
            assert protection.startswith("g")

        @pytest.mark.parametrize(("merger", "protection"), [("ours", "gloves")])
        @pytest.mark.parametrize(argnames="coefficient", argvalues=[1])
        def test_all_names(merger, protection, coefficient):
            assert (merger, protection, coefficient) == ("ours", "gloves", 1)
        """
    )
    run(pytester).assert_outcomes(passed=4)


# Verdicts


def test_survivals_pass_and_losses_fail_by_what_was_measured(suite: pytest.Pytester) -> None:
    result = run(suite, "--protection", "toy", "--protection", LOST_TOY, *LINEAR)
    result.assert_outcomes(passed=1, failed=1, skipped=1)
    result.stdout.fnmatch_lines([f"*EvidenceLost: {LOST_TOY}-linear-0.5: verdict lost: 0 of 8 keys answer*"])


@pytest.mark.parametrize(
    ("protection", "low", "high", "edge", "outcomes"),
    [
        (LOST_TOY, 0.0, 0.1, "false", {"xfailed": 1}),
        (LOST_TOY, 0.0, 0.1, "true", {"xfailed": 1}),
        (LOST_TOY, 0.5, 0.6, "false", {"failed": 1}),
        (LOST_TOY, 0.5, 0.6, "true", {"failed": 1}),
        ("toy", 0.0, 1.0, "false", {"failed": 1}),
        ("toy", 0.0, 1.0, "true", {"xpassed": 1}),
        ("toy(fault=crash_read)", 0.0, 1.0, "false", {"errors": 1}),
        ("toy(fault=crash_read)", 0.0, 1.0, "true", {"errors": 1}),
    ],
)
def test_a_recorded_loss_accepts_a_loss_within_its_range_and_nothing_else(
    suite: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
    protection: str,
    low: float,
    high: float,
    edge: str,
    outcomes: dict[str, int],
) -> None:
    record(monkeypatch, suite.path, f"{protection}-linear-0.5", low, high, edge)
    result = run(suite, "--protection", protection, *LINEAR, "-rA")
    result.assert_outcomes(skipped=1, **outcomes)
    assert (result.ret == pytest.ExitCode.OK) == (outcomes.keys() <= {"xfailed", "xpassed"})
    if "xfailed" in outcomes:
        result.stdout.fnmatch_lines([f"XFAIL*{protection}-linear-0.5* - known well"])


def test_only_a_full_run_calls_records_stale(fake_suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    record(monkeypatch, fake_suite.path, "instructional_fingerprint-linear-0.55", 0.0, 1.0)
    stale = "-k", "every_recorded_loss"
    for part, cells in ((("--merger", "linear"), 18), (("--protection", "toy"), 45), (("--coefficient", "0.1"), 10)):
        run(fake_suite, *part, *stale).assert_outcomes(skipped=1, deselected=cells)
    result = run(fake_suite, *stale)
    result.assert_outcomes(failed=1, deselected=90)
    assert "losses of cases that do not exist: ['instructional_fingerprint-linear-0.55']" in result.stdout.str()


# The summary


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "xdist"])
def test_the_matrix_is_printed_and_the_reports_are_written(
    fake_suite: pytest.Pytester, workers: tuple[str, ...]
) -> None:
    output = fake_suite.path / "deep" / "results"
    part = ("--protection", "gaussian_probe", "--merger", "linear")
    result = run(fake_suite, *part, "--mergeguard-output", str(output), *workers)
    result.assert_outcomes(passed=6, failed=3, skipped=1)
    result.stdout.fnmatch_lines(
        [
            "*mergeguard survival matrix*",
            "mergeguard: 9 cases on world mini, * s",
            "*3 of 9 thefts lost, 0 of them recorded",
            "gate does not hold: 3 problems",
            "*test_evidence_survives[[]gaussian_probe-linear-0.1[]] failed",
            f"reports: {output}",
        ]
    )
    assert sorted(path.name for path in output.iterdir()) == REPORTS
    results = json.loads((output / "results.json").read_text())
    assert [item["coefficient"] for item in results["outcomes"]] == [tenth / 10 for tenth in range(1, 10)]
    assert [item["verdict"] for item in results["outcomes"]] == ["lost"] * 3 + ["survived"] * 6
    assert results["world"] == {"name": "mini", "digests": {"base": "0" * 64}}
    assert len(results["matched_controls"]) == 9
    assert len(results["problems"]) == 3
    assert results["seconds"] > 0


@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["alone", "xdist"])
def test_pytests_own_junit_file_shows_what_was_measured_in_short_texts(
    fake_suite: pytest.Pytester, workers: tuple[str, ...]
) -> None:
    part = ("--protection", "gaussian_probe", "--merger", "linear", "--coefficient", "0.3,0.5")
    run(fake_suite, *part, "--junitxml", "junit.xml", *workers).assert_outcomes(passed=1, failed=1, skipped=1)
    root = ET.parse(fake_suite.path / "junit.xml").getroot()  # noqa: S314 - written by pytest
    assert violations(root) == []
    found = {
        case.get("name", "").partition("[")[2].rstrip("]"): {
            item.get("name"): item.get("value") for item in case.iter("property")
        }
        for case in root.iter("testcase")
    }
    survived, lost = (found[f"gaussian_probe-linear-{alpha}"] for alpha in (0.5, 0.3))
    assert survived == {
        "mergeguard_world": "mini",
        **outcome_properties(build.outcome("gaussian_probe", expected="survived")),
    }
    assert (lost["verdict"], lost["coefficient"], lost["theft"]) == ("lost", "0.3", "true")


def test_gates_and_planted_mistakes_are_part_of_the_summary(suite: pytest.Pytester) -> None:
    for name in ("test_before_merging", "test_controls"):
        suite.makepyfile(**{name: (SUITE / f"{name}.py").read_text()})
    schemes = ("--protection", "toy", "--protection", "toy(fault=harmful)")
    result = run(suite, *schemes, *LINEAR, "--mergeguard-output", "out", "--junitxml", "pytests.xml")
    result.assert_outcomes(passed=7 + 5 + 2, failed=1, skipped=1)
    result.stdout.fnmatch_lines(
        [
            "before merging",
            "*failed: toy(fault=harmful): upstream's answers 0.00*",
            "planted controls",
            "*planted_crashes: caught by crash*",
            "gate does not hold: 1 problem",
            "*test_protection_is[[]toy(fault=harmful)-harmless[]] failed",
        ]
    )
    results = json.loads((suite.path / "out" / "results.json").read_text())
    assert len(results["before_merging"]) == 8
    assert len(results["planted"]) == 5
    shown = [(item.get("name"), item.get("value")) for item in ET.parse("pytests.xml").iter("property")]  # noqa: S314
    assert shown.count(("gate", "harmless")) == 2
    assert shown.count(("passed", "false")) == 1
    assert ("caught_by", "crash") in shown


def test_a_scheme_that_crashes_before_merging_is_a_problem_of_the_gate(suite: pytest.Pytester) -> None:
    suite.makepyfile(test_before_merging=(SUITE / "test_before_merging.py").read_text())
    result = run(suite, "--protection", "toy", "--protection", "toy(fault=crash_embed)", *LINEAR)
    result.assert_outcomes(passed=5, failed=4, errors=1, skipped=1)
    result.stdout.fnmatch_lines(["gate does not hold: 5 problems"])


def test_without_cells_there_is_no_summary(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile("def test_nothing(): pass")
    result = run(pytester, "--mergeguard-output", "out")
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*survival matrix*")


def test_reports_that_cannot_be_written_at_the_end_are_an_error(fake_suite: pytest.Pytester) -> None:
    (fake_suite.path / "out" / "report.md").mkdir(parents=True)
    result = run(fake_suite, "--protection", "toy", *LINEAR, "--mergeguard-output", "out")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "ERROR: mergeguard: cannot write out/report.md" in result.stderr.str()


# Markers and start-up


@pytest.mark.parametrize("workers", [(), pytest.param(("-n", "1"), marks=pytest.mark.slow)], ids=["alone", "xdist"])
def test_selecting_gpu_tests_without_a_gpu_is_an_error(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, workers: tuple[str, ...]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.gpu
        def test_on_a_gpu(): pass

        def test_anywhere(): pass
        """
    )
    result = run(pytester, "--strict-markers", "-m", "gpu", *workers, world="tiny")
    assert result.ret not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    assert "there is no CUDA device; deselect them" in result.stderr.str() + result.stdout.str()
    run(pytester, "-m", "not gpu", world="tiny").assert_outcomes(passed=1, deselected=1)


def test_collecting_the_whole_matrix_loads_no_torch() -> None:
    code = (
        "import pytest, sys\n"
        "code = pytest.main(['--collect-only', '-q', '-p', 'no:cacheprovider', 'robustness_tests/test_survival.py'])\n"
        "sys.exit('torch was loaded' if 'torch' in sys.modules else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=SUITE.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "91 tests collected" in done.stdout

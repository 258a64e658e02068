"""`mergeguard gate` and `check_protection`: a page, the reports, and the exit code."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest

from mergeguard import cli
from mergeguard.errors import GateFailed
from mergeguard.matrix.outcome import LOST, SURVIVED, Gate
from mergeguard.matrix.recorded import read_records
from mergeguard.matrix.runner import engine_for
from mergeguard.protections.registry import PROTECTIONS
from mergeguard.reports.results_json import read_results
from mergeguard.testing import CHECKS, check_protection, elsewhere
from mergeguard.testing.gate import GateReport, page, telling
from robustness_tests.meta.fresh_processes import fresh_processes
from robustness_tests.meta.mini_world import MINI, Toy, install, registered
from robustness_tests.meta.outcome_builders import outcome, results

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

HERE = "robustness_tests.meta.mini_world:Toy"
CELL = ("--world", MINI, "--merger", "linear", "--coefficients", "0.5", "--workers", "1")
REPORTS = ["junit.xml", "report.md", "results.json"]


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str


@pytest.fixture(scope="module", autouse=True)
def _mini_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    engine_for.cache_clear()
    with registered(), fresh_processes() as start, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERGEGUARD_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(elsewhere, "in_another_process", start)
        yield
    engine_for.cache_clear()


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """The command, run in this process from a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*arguments: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["mergeguard", "gate", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return Said(int(caught.value.code or 0), captured.out, captured.err)

    return call


def test_a_gate_that_passes_ends_with_one_page_and_exit_code_0(gate: Callable[..., Said], tmp_path: Path) -> None:
    said = gate(HERE, *CELL, "--output", "out")
    assert (said.code, said.err) == (0, "")
    lines = said.out.rpartition("toy: gate")[2].splitlines()
    assert lines[0] == " passed"
    assert lines[2] == f"  {len(CHECKS)} of {len(CHECKS)} checks passed, 5 of 5 planted mistakes caught"
    assert "  toy-linear-0.5: survived" in lines
    assert lines[-1] == "reports: out"
    assert {path.name for path in (tmp_path / "out").iterdir()} >= set(REPORTS)
    found = read_results(tmp_path / "out" / "results.json")
    assert [item.gate for item in found.before_merging] == list(CHECKS)


def test_a_gate_that_does_not_pass_names_failed_checks_and_is_exit_code_1(gate: Callable[..., Said]) -> None:
    said = gate(f"{HERE}(fault=harmful)", *CELL)
    assert (said.code, said.err) == (1, "")
    shown = said.out.rpartition("toy(fault=harmful): gate")[2]
    assert shown.startswith(" NOT passed")
    assert "failed checks: harmless" in shown


def test_a_loss_is_exit_code_1_until_it_is_on_record(gate: Callable[..., Said], tmp_path: Path) -> None:
    weak = "toy(strength=0.6)"
    said = gate(weak, *CELL)
    assert said.code == 1
    assert f"{weak}-linear-0.5: lost\n" in said.out
    (tmp_path / "losses.toml").write_text(
        f'[[loss]]\nid = "{weak}-linear-0.5"\nlow = 0.0\nhigh = 0.1\nreason = "too weak"\non_edge = false\n'
    )
    said = gate(weak, *CELL, "--recorded", "losses.toml")
    assert said.code == 0
    assert f"{weak}-linear-0.5: lost, on record\n" in said.out


def test_losses_are_recorded_on_request_and_accepted_from_then_on(gate: Callable[..., Said], tmp_path: Path) -> None:
    weak = "toy(strength=0.6)"
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "losses.toml").write_text(
        '[[loss]]\nid = "another-linear-0.5"\nlow = 0.0\nhigh = 0.1\nreason = "shares the file"\non_edge = false\n'
    )
    said = gate(weak, *CELL, "--record-losses", "deep/losses.toml")
    assert said.code == 1, "recording changes no verdict of this run"
    assert said.out.splitlines()[-1].startswith("recorded 1 losses in deep/losses.toml; review their reasons")
    other, record = read_records(tmp_path / "deep" / "losses.toml").values()
    assert (other.id, other.reason) == ("another-linear-0.5", "shares the file")
    assert (record.id, record.on_edge) == (f"{weak}-linear-0.5", False)
    assert gate(weak, *CELL, "--recorded", "deep/losses.toml").code == 0


@pytest.mark.parametrize("fault", ["crash_read", "crash_embed"])
def test_a_scheme_that_crashes_is_exit_code_1_by_name(gate: Callable[..., Said], fault: str) -> None:
    said = gate(f"{HERE}(fault={fault})", *CELL)
    assert said.code == 1
    assert f"crashed in {fault.removeprefix('crash_')}: RuntimeError" in said.out


def test_a_call_that_takes_too_long_is_exit_code_1_by_name(gate: Callable[..., Said]) -> None:
    said = gate(f"{HERE}(keys=12)", *CELL, "--seconds-per-call", "1e-9")
    assert said.code == 1
    assert "toy(keys=12).embed took longer than 1e-09 s" in said.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((f"{HERE}(fault=wrong_read)", *CELL), "toy(fault=wrong_read).read returned float, expected Reading"),
        (
            (f"{HERE}(fault=wrong_embed)", *CELL),
            "toy(fault=wrong_embed).embed returned LlamaForCausalLM, expected Protected",
        ),
        ((f"{HERE}(fault=wrong_decoys)", *CELL), "toy(fault=wrong_decoys).decoys returned NoneType, expected Evidence"),
        (("nowhere:Mine",), "cannot import nowhere: ModuleNotFoundError: No module named 'nowhere'"),
        (("mine_here:Mine",), "cannot import mine_here: NameError"),
        (("toi",), "unknown protection 'toi'; did you mean 'toy'?"),
        ((HERE, "--world", "tyni"), "unknown world 'tyni'; did you mean 'tiny'?"),
        ((HERE, "--coefficients", "half"), "cannot read the coefficients 'half'"),
        ((HERE, *CELL, "--recorded", "nowhere.toml"), "there is no file of recorded losses at nowhere.toml"),
        ((HERE, *CELL, "--seconds-per-call", "0"), "seconds_per_call is 0.0"),
        ((HERE, *CELL, "--output", "mine_here.py"), "cannot write the output folder mine_here.py"),
    ],
)
def test_bad_input_is_one_line_exit_code_2_and_no_verdict(
    gate: Callable[..., Said], tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    (tmp_path / "mine_here.py").write_text("nonsense\n")
    found = gate(*arguments)
    (line,) = found.err.splitlines()
    assert (found.code, found.out) == (2, "")
    assert line.startswith(f"error: {said}")
    sys.modules.pop("mine_here", None)


def test_a_scheme_in_the_current_folder_is_found(gate: Callable[..., Said], tmp_path: Path) -> None:
    (tmp_path / "mine_in_folder.py").write_text(
        "from robustness_tests.meta.mini_world import Toy\nclass Mine(Toy):\n    name = 'mine'\n    needs = 3\n"
    )
    assert "Mine.needs is 3" in gate("mine_in_folder:Mine").err
    del sys.modules["mine_in_folder"]


def test_the_function_returns_what_the_command_shows() -> None:
    report = check_protection(Toy(), world=MINI, mergers=["linear"], coefficients=[0.5], margin=0.5)
    assert report.passed
    assert not report.failed_checks
    assert str(report).startswith("toy: gate passed")


def test_the_function_raises_and_names_every_failed_check() -> None:
    with pytest.raises(GateFailed, match=r"failed checks: silent_on_other_owners, .*, effective, specific\n") as caught:
        check_protection(Toy(fault="chatty"), world=MINI, mergers=["linear"], coefficients=[0.5])
    assert "toy(fault=chatty): gate NOT passed" in str(caught.value)


def test_a_gate_leaves_the_registry_as_it_was() -> None:
    class Mine(Toy):
        """Not at the top of a module: no other process finds it, and the fast ones of this test are not asked."""

        name = "mine_for_a_while"

    with pytest.raises(GateFailed):
        check_protection(Mine(fault="crash_embed"), world=MINI, mergers=["linear"], coefficients=[0.5])
    assert "mine_for_a_while" not in PROTECTIONS


# The page


def test_the_most_telling_cells_are_red_ones_then_the_closest_survivals_of_different_mergers() -> None:
    cells = (
        outcome(merger="linear", coefficient=0.3, verdict=LOST),
        outcome(merger="linear", coefficient=0.4, verdict=LOST),
        outcome(merger="ties", coefficient=0.5, verdict=SURVIVED, p_value=1e-6),
        outcome(merger="ties", coefficient=0.6, verdict=SURVIVED, p_value=1e-9),
        outcome(merger="slerp", coefficient=0.9, verdict=LOST, theft=False),
        outcome(merger="karcher", coefficient=None, verdict=LOST, expected=LOST),
    )
    assert [(o.merger, o.coefficient) for o in telling(cells)] == [("linear", 0.4), ("ties", 0.5), ("karcher", None)]
    assert [(o.merger, o.coefficient) for o in telling(cells[:2])] == [("linear", 0.4), ("linear", 0.3)]
    assert telling(cells[4:5]) == ()


def test_a_page_names_failed_checks_however_many_cells_are_red() -> None:
    failed = Gate("mine", "", "secret", False, "a key is shown", "show none")
    found = results(
        [outcome(coefficient=alpha / 10, verdict=LOST) for alpha in range(1, 10)],
        before_merging=(failed, replace(failed, gate="specific")),
        problems=(
            *(f"cell {n}" for n in range(40)),
            "mine fails the check secret: a key is shown; required: show none",
        ),
    )
    lines = page(GateReport("mine", found))
    assert "  failed checks: secret, specific" in lines
    assert lines[lines.index("  failed checks: secret, specific") + 1].startswith("  - mine fails the check secret")
    assert "  and 29 more, in the reports" in lines
    assert len(lines) < 40


@pytest.mark.slow
def test_worker_processes_give_the_same_gate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: Callable[..., Said]
) -> None:
    """New processes, which learn of the scheme from this one, and of the world by an entry point."""
    path = install(tmp_path / "path")
    (path / "mini_world-1.0.dist-info" / "entry_points.txt").write_text(
        "[mergeguard.worlds]\nmini = robustness_tests.meta.mini_world:mini\n"
    )
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(path))
    (tmp_path / "other_name.py").write_text(
        "from robustness_tests.meta.mini_world import Toy\nclass Mine(Toy):\n    name = 'mine'\n"
    )
    told = []
    for workers in ("1", "2"):
        said = gate("other_name:Mine", *CELL[:-1], workers, "--output", f"out{workers}")
        assert said.code == 0, said.out + said.err
        told.append(json.loads((tmp_path / f"out{workers}" / "results.json").read_text()))
    for found in told:
        for cell in found["outcomes"]:
            del cell["seconds"]
    assert told[0]["outcomes"] == told[1]["outcomes"]
    assert told[0]["before_merging"] == told[1]["before_merging"]

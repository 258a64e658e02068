"""The command line: exit codes, one line for every wrong input, and what is left behind."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

from mergeguard import __version__, cli
from mergeguard.errors import CheckpointError
from mergeguard.matrix import runner
from mergeguard.matrix.recorded import UNREVIEWED, Record, read_records
from mergeguard.matrix.runner import engine_for
from mergeguard.protections.registry import PROTECTIONS
from mergeguard.reports import writing
from robustness_tests.meta.mini_world import Toy, install, registered

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
CELL = ("--world", "mini", "--merger", "linear", "--coefficients", "0.5", "--workers", "1")
REPORTS = ["junit.xml", "report.html", "report.md", "results.json"]
LOST_PROBE = "gaussian_probe(strength=0.005)"


class Said(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def only_error(self) -> str:
        """The one line on stderr."""
        (line,) = self.err.splitlines()
        assert line.startswith("error: ")
        return line.removeprefix("error: ")


Door = Callable[..., Said]


@pytest.fixture(scope="module", autouse=True)
def _mini_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache and one engine for all runs in this module."""
    engine_for.cache_clear()
    with registered(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERGEGUARD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
    engine_for.cache_clear()


@pytest.fixture
def mergeguard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Door:
    """The command, run in this process from a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["mergeguard", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        code = caught.value.code
        return Said(int(code or 0), captured.out, captured.err)

    return call


# Runs


def test_a_gate_that_holds_is_exit_code_0_and_four_reports(mergeguard: Door, tmp_path: Path) -> None:
    said = mergeguard("run", "--protection", "toy", "--protection", "gaussian_probe", *CELL, "--output", "out")
    assert (said.code, said.err) == (0, "")
    assert "mergeguard: 2 cases on world mini" in said.out
    assert "0 of 2 thefts lost, 0 of them recorded" in said.out
    assert said.out.splitlines()[-1] == "reports: out"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == REPORTS
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [outcome["protection"] for outcome in results["outcomes"]] == ["toy", "gaussian_probe"]
    assert results["holds"] is True


def test_a_gate_that_does_not_hold_is_exit_code_1(mergeguard: Door) -> None:
    said = mergeguard("run", "--protection", "toy(strength=0.6)", *CELL)
    assert (said.code, said.err) == (1, "")
    assert "gate does not hold: 1 problem" in said.out
    assert "verdict lost" in said.out


def test_a_scheme_that_crashes_is_exit_code_1_too(mergeguard: Door) -> None:
    said = mergeguard("run", "--protection", "toy(fault=crash_read)", *CELL)
    assert (said.code, said.err) == (1, "")
    assert "crashed in read" in said.out


def test_default_parameters_are_dropped_from_the_id(mergeguard: Door, tmp_path: Path) -> None:
    assert mergeguard("run", "--protection", "toy(strength=3)", *CELL).code == 0
    results = json.loads((tmp_path / "mergeguard-results" / "results.json").read_text())
    assert results["outcomes"][0]["variant"] == ""
    assert mergeguard("run", "--protection", "toy(strength=3)", "--protection", "toy", *CELL).only_error == (
        "the protection toy is given more than once"
    )


def test_losses_are_recorded_on_request(mergeguard: Door, tmp_path: Path) -> None:
    said = mergeguard("run", "--protection", LOST_PROBE, *CELL, "--record-losses", "deep/losses.toml")
    assert said.code == 1, "recording changes no verdict of this run"
    assert "recorded 1 losses in deep/losses.toml; review their reasons" in said.out
    records = read_records(tmp_path / "deep" / "losses.toml")
    assert records == {f"{LOST_PROBE}-linear-0.5": Record(f"{LOST_PROBE}-linear-0.5", 0.0, 1.0, UNREVIEWED)}


# Wrong inputs

BAD_RUNS = {
    "protection": (("--protection", "gaussian_prob"), "unknown protection 'gaussian_prob'; did you mean"),
    "parameter": (("--protection", "toy(strenght=2)"), "unknown parameter of toy 'strenght'; did you mean 'strength'?"),
    "value": (("--protection", "toy(strength=big)"), "parameter 'strength' of toy is big, expected a value like 3.0"),
    "form": (("--protection", "toy("), "cannot read 'toy('; expected NAME or NAME(key=value,...)"),
    "merger": (("--merger", "linaer"), "unknown merger 'linaer'; did you mean 'linear'?"),
    "domain": (("--merger", "ties(density=0)"), "parameter 'density' of merger 'ties' is 0"),
    "word": (("--merger", "ties(scope=world)"), "parameter 'scope' of merger 'ties' is world, expected one of"),
    "twice": (("--merger", "ties", "--merger", "ties(density=1.0)"), "the merger ties"),
    "world": (("--world", "tyni"), "unknown world 'tyni'; did you mean 'tiny'?"),
    "above": (("--coefficients", "0.5,1.01"), "the coefficient 1.01 is outside [0, 1]"),
    "below": (("--coefficients=-0.5",), "the coefficient -0.5 is outside [0, 1]"),
    "NaN": (("--coefficients", "nan"), "the coefficient nan is outside [0, 1]"),
    "repeated": (("--coefficients", "0.5,0.50"), "the coefficient 0.5 is given more than once"),
    "no number": (("--coefficients", "half"), "cannot read the coefficients 'half'; expected numbers such as 0.1,0.5"),
    "empty": (("--coefficients", ""), "cannot read the coefficients ''"),
    "seed": (("--seed", "-1"), "Invalid value for '--seed'"),
    "workers": (("--workers", "0"), "Invalid value for '--workers'"),
    "many": (("--workers", "many"), "Invalid value for '--workers'"),
    "option": (("--protectoin", "toy"), "No such option: --protectoin"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "message"), BAD_RUNS.values(), ids=BAD_RUNS)
def test_a_wrong_input_is_one_line_and_exit_code_2(
    mergeguard: Door, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    said = mergeguard("run", *options)
    assert said.only_error.startswith(message)
    assert (said.code, said.out) == (2, "")
    assert not list(tmp_path.iterdir()), "a refused run leaves no folder"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rnu",), "No such command 'rnu'"),
        (("list",), "Missing argument 'kind'"),
        (("list", "mergres"), "unknown kind 'mergres'; did you mean 'mergers'?"),
        (("world", "check", "tyni"), "unknown world 'tyni'; did you mean 'tiny'?"),
        (
            ("world", "check", "mini", "--folder", "x"),
            "world 'mini' is not built into a folder; only tiny and smollm2",
        ),
        (("world", "build", "mini"), "unknown world that can be built 'mini'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_every_command_says_what_is_wrong_in_one_line(
    mergeguard: Door, arguments: tuple[str, ...], message: str
) -> None:
    said = mergeguard(*arguments)
    assert said.only_error.startswith(message)
    assert said.code == 2


@pytest.mark.parametrize(
    ("option", "path", "message"),
    [
        ("--output", "file", "cannot write the output folder file: File exists"),
        ("--output", "file/below", "cannot write the output folder file/below: Not a directory"),
        ("--record-losses", "file/losses.toml", "cannot write the output folder file"),
    ],
)
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(
    mergeguard: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, path: str, message: str
) -> None:
    monkeypatch.setattr(runner, "measure", None)
    (tmp_path / "file").write_text("in the way")
    said = mergeguard("run", "--protection", "toy", *CELL, option, path)
    assert said.only_error.startswith(message)
    assert said.code == 2


def test_a_full_disk_is_one_line_and_exit_code_2(mergeguard: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the reports: the cache has its own."""
    command = ("run", "--protection", "gaussian_probe", *CELL, "--output", "out")
    assert mergeguard(*command).code == 0

    def full(path: Path, _: bytes) -> None:
        raise CheckpointError(f"cannot write {path}: {os.strerror(errno.ENOSPC)}")

    monkeypatch.setattr(writing, "write_bytes", full)
    said = mergeguard(*command)
    assert said.only_error.startswith("cannot write out/results.json: No space left on device")
    assert said.code == 2
    assert "thefts lost" in said.out, "what was measured is still shown"


def test_a_cache_that_cannot_be_written_is_one_line_that_names_the_variable(
    mergeguard: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MERGEGUARD_CACHE", str(tmp_path / "file"))
    said = mergeguard("run", "--protection", "toy", *CELL, "--seed", "7")  # an engine of its own
    assert said.only_error.startswith(f"cannot write the cache folder {tmp_path / 'file'}")
    assert said.only_error.endswith("set MERGEGUARD_CACHE to a folder that can be written")
    assert said.code == 2


def test_an_error_of_several_lines_is_put_on_one(mergeguard: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise CheckpointError("the header\nis  [bold]broken[/bold]")

    monkeypatch.setattr(runner, "run", fail)
    assert mergeguard("run", "--protection", "toy", *CELL).only_error == "the header is  [bold]broken[/bold]"


def test_an_interrupt_is_exit_code_130_without_a_traceback(mergeguard: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run", interrupt)
    assert mergeguard("run", "--protection", "toy", *CELL) == (130, "", "")


# Lists and help


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("mergers", ["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "density=1.0", "arXiv:2306."]),
        ("protections", ["gaussian_probe", "instructional_fingerprint", "quantization_watermark", "toy", "[weights]"]),
        ("worlds", ["tiny", "mini"]),
    ],
)
def test_what_is_registered_is_listed(
    mergeguard: Door, monkeypatch: pytest.MonkeyPatch, kind: str, words: list[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    said = mergeguard("list", kind)
    assert (said.code, said.err) == (0, "")
    assert [word for word in words if word not in said.out] == []


def test_a_scheme_without_a_docstring_is_listed_too(mergeguard: Door) -> None:
    class Silent(Toy):
        pass

    Silent.__doc__ = None
    PROTECTIONS.register("silent", Silent)
    try:
        assert re.search(r"^ *silent .*weights", mergeguard("list", "protections").out, re.MULTILINE)
    finally:
        PROTECTIONS.unregister("silent")


def test_the_version_is_printed(mergeguard: Door) -> None:
    assert mergeguard("--version") == (0, f"{__version__}\n", "")


@pytest.mark.parametrize(("arguments", "code"), [((), 2), (("--help",), 0), (("world",), 2), (("run", "--help"), 0)])
def test_help_is_help_and_no_error(mergeguard: Door, arguments: tuple[str, ...], code: int) -> None:
    said = mergeguard(*arguments)
    assert said.code == code
    assert "Usage: " in said.out + said.err
    assert "error" not in said.err


def test_a_refused_run_and_the_version_load_no_torch() -> None:
    code = (
        "import sys\nfrom mergeguard.cli import main\n"
        "for sys.argv in (['m', '--version'], ['m', 'list', 'mergers'], ['m', 'run', '--world', 'tyni']):\n"
        "    try:\n        main()\n    except SystemExit:\n        pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


# Whole processes


def start(folder: Path, *options: str, world: str = "mini") -> subprocess.Popen[str]:
    path = os.pathsep.join([str(install(folder / "path")), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "MERGEGUARD_CACHE": str(folder / "cache")}
    command = [sys.executable, "-m", "mergeguard", "run", "--world", world, "--protection", "gaussian_probe", *options]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip


@pytest.mark.slow
def test_the_shipped_world_runs_from_end_to_end(tmp_path: Path) -> None:
    process = start(tmp_path, "--merger", "linear", "--workers", "2", "--output", "out", world="tiny")
    printed, errors = process.communicate(timeout=600)
    assert (process.returncode, errors) == (0, ""), printed
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results["outcomes"]) == 9
    assert all(outcome["survived"] for outcome in results["outcomes"] if outcome["theft"])
    assert any(outcome["theft"] for outcome in results["outcomes"])
    assert all(mistake["caught"] for mistake in results["planted"])


@pytest.mark.slow
def test_two_runs_at_once_on_one_cache_agree(tmp_path: Path) -> None:
    first = start(tmp_path, "--workers", "1", "--output", "one")
    (tmp_path / "path").rename(tmp_path / "path of the first")
    second = start(tmp_path, "--workers", "1", "--output", "two")
    for process in (first, second):
        _, errors = process.communicate(timeout=600)
        assert (process.returncode, errors) == (0, "")
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert one["outcomes"] == two["outcomes"]
    assert len(one["outcomes"]) == 45


@pytest.mark.slow
def test_an_interrupt_leaves_no_worker_and_no_traceback(tmp_path: Path) -> None:
    process = start(tmp_path, "--workers", "2")
    wait_for((tmp_path / "cache").exists)  # the workers work
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) >= 2
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (130, "")
    for child in children:  # the one that tracks shared resources ends a moment after its parent
        wait_for(lambda child=child: not is_running(child))


def is_running(pid: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise TimeoutError

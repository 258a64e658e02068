"""Runs over processes: the same results with any number, complete problems, and nobody left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mergeguard.errors import MergeguardError, ParameterError, SchemeError
from mergeguard.matrix import gates, runner
from mergeguard.matrix.cases import expand
from mergeguard.matrix.outcome import LOST, SURVIVED, Planted, Results
from mergeguard.matrix.recorded import Record
from mergeguard.matrix.runner import Job, run
from robustness_tests.meta.mini_world import MINI, TOY, Toy, install, registered

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mergeguard.matrix.cases import Case

WEAK, HARMFUL = "toy(strength=0.6)", "toy(fault=harmful)"  # WEAK is lost where averaging is a theft
FORK = pytest.mark.skipif(sys.platform != "linux", reason="these tests fork, to spare the workers' imports")
# From Python 3.12 on a fork is warned of where threads exist; these workers compute nothing.
QUIET_FORK = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")


@pytest.fixture(scope="module", autouse=True)
def _mini_world() -> Iterator[None]:
    with registered():
        yield


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def cases(*protections: str, mergers: Sequence[str] = ("linear",), alphas: Sequence[float] = (0.5,)) -> list[Case]:
    return list(expand(protections, mergers, alphas, world=MINI))


def run_here(cases: Sequence[Case], cache_folder: Path, **options: Any) -> Results:
    return run(cases, workers=1, cache_folder=cache_folder, **options)


def timeless(results: Results) -> Results:
    outcomes = tuple(replace(outcome, seconds=0.0) for outcome in results.outcomes)
    return replace(results, outcomes=outcomes, seconds=0.0)


# Results


def test_one_and_two_workers_give_the_same_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers are new processes, which find the world and the toy as entry points."""
    monkeypatch.syspath_prepend(str(install(tmp_path / "path")))
    mergers = ["linear", "dare_ties(density=0.4)", "karcher"]  # the last without a coefficient
    selected = cases("gaussian_probe", TOY, mergers=mergers, alphas=[0.3, 0.5])
    alone = run(selected, workers=1, cache_folder=tmp_path / "one")
    together = run(selected, workers=2, cache_folder=tmp_path / "two")
    assert [outcome.id for outcome in alone.outcomes] == [case.id for case in selected]
    assert timeless(together) == timeless(alone)
    assert len(alone.outcomes) == 10
    assert not multiprocessing.active_children()


def test_a_run_in_which_nothing_is_red_holds(cache_folder: Path) -> None:
    results = run_here(cases(TOY, "gaussian_probe"), cache_folder)
    assert results.holds
    assert results.problems == ()
    assert [outcome.verdict for outcome in results.outcomes] == [SURVIVED] * 2
    assert [(gate.protection, gate.gate) for gate in results.before_merging] == [
        (protection, gate)
        for protection in (TOY, "gaussian_probe")
        for gate in ("effective", "harmless", "specific", "persistent")
    ]
    assert len(results.planted) == 5
    assert results.world == {"name": MINI, "digests": {"base": "0" * 64}}
    assert results.matched_controls == {"linear-0.5": results.outcomes[0].skills_kept}
    assert {"python", "torch", "cores"} <= results.environment.keys()


def test_a_crash_is_a_problem_of_its_own_cells_and_stops_no_other(cache_folder: Path) -> None:
    results = run_here(cases("toy(fault=crash_read)", TOY, alphas=[0.3, 0.5]), cache_folder)
    assert [outcome.id for outcome in results.outcomes] == ["toy-linear-0.3", "toy-linear-0.5"]
    crash = "toy(fault=crash_read) crashed in read: RuntimeError: the toy breaks while it reads"
    assert set(results.problems) == {
        crash,
        f"toy(fault=crash_read)-linear-0.3: {crash}",
        f"toy(fault=crash_read)-linear-0.5: {crash}",
    }
    assert {gate.variant for gate in results.before_merging} == {""}


def test_an_embedding_that_fails_is_tried_once(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fail(self: Toy, *_: object, **__: object) -> None:
        calls.append(self)
        raise RuntimeError("out of luck")

    monkeypatch.setattr(Toy, "embed", fail)
    results = run_here(cases("toy(keys=9)", alphas=[0.3, 0.5, 0.7]), cache_folder)
    assert len(calls) == 1
    assert len(results.problems) == 4
    assert not results.outcomes


def test_every_kind_of_problem_is_listed(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missed = Planted("planted_always_verifies", None, "failed no gate")
    monkeypatch.setattr(gates, "planted", lambda _: (missed,))
    records = {
        "toy-linear-0.5": Record("toy-linear-0.5", 0.0, 1.0, "was lost once"),
        f"{WEAK}-linear-0.3": Record(f"{WEAK}-linear-0.3", 0.5, 1.0, "half of it stays"),
        "toy-ties-0.5": Record("toy-ties-0.5", 0.0, 1.0, "no such case"),
    }
    results = run_here(cases(TOY, WEAK, HARMFUL, alphas=[0.3, 0.5]), cache_folder, records=records, full=True)
    assert not results.holds
    expected = [
        "toy-linear-0.5: recorded as lost, but it survives",
        f"{WEAK}-linear-0.3: VSR 0.00 is outside the recorded range [0.50, 1.00]",
        f"{WEAK}-linear-0.5: verdict lost: 0 of 8 keys answer",
        f"{HARMFUL} is not harmless before merging: upstream's answers 0.00 (clean 1.00)",
        "planted_always_verifies was not caught: failed no gate",
        "the recorded loss toy-ties-0.5 matches no case",
    ]
    assert len(results.problems) == len(expected)
    for problem, start in zip(results.problems, expected, strict=True):
        assert problem.startswith(start)
    assert {outcome.id: outcome.expected for outcome in results.outcomes} == {
        "toy-linear-0.3": None,
        "toy-linear-0.5": "lost",
        f"{WEAK}-linear-0.3": "lost",
        f"{WEAK}-linear-0.5": None,
        f"{HARMFUL}-linear-0.3": None,
        f"{HARMFUL}-linear-0.5": None,
    }


def test_a_part_of_the_matrix_calls_no_record_stale(cache_folder: Path) -> None:
    records = {"toy-ties-0.5": Record("toy-ties-0.5", 0.0, 1.0, "another part")}
    assert run_here(cases(TOY), cache_folder, records=records).holds
    assert not run_here(cases(TOY), cache_folder, records=records, full=True).holds


def test_a_recorded_loss_holds(cache_folder: Path) -> None:
    (case,) = cases("gaussian_probe(strength=0.005)")
    records = {case.id: Record(case.id, 0.0, 1.0, "too weak for an average")}
    results = run_here([case], cache_folder, records=records)
    assert results.outcomes[0].verdict == LOST
    (problem,) = results.problems
    assert problem.startswith(f"{case.protection} is not effective before merging: score ")


def test_progress_counts_every_job_as_it_ends(cache_folder: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    run_here(cases(TOY, alphas=[0.3, 0.5]), cache_folder, on_progress=lambda *step: seen.append(step))
    assert [done for _, done, _ in seen] == list(range(1, 8))  # embed, 2 controls, planted, 2 outcomes, gates
    assert {total for _, _, total in seen} == {7}
    assert seen[0][0] == "embed toy"
    assert "toy-linear-0.5" in [label for label, _, _ in seen]


def test_a_wrong_input_ends_the_run(cache_folder: Path) -> None:
    with pytest.raises(ParameterError, match="'strength' of toy is high"):
        run_here(cases("toy(strength=high)"), cache_folder)


# Processes

JOBS = [Job("embed", MINI, seed) for seed in range(2)]


def fall_asleep(job: Job, folder: Path) -> str:
    """The first job is done at once, the second takes long, and says so if it is let."""
    if job.seed == 0:
        return "done"
    time.sleep(20)
    (folder / "woke up").touch()
    return "late"


def die(*_: object) -> None:
    os._exit(3)


def report_signal(*_: object) -> bool:
    return signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def in_processes(monkeypatch: pytest.MonkeyPatch, work: Any, folder: Path) -> Iterator[tuple[Job, Any]]:
    monkeypatch.setattr(runner, "work", work)
    monkeypatch.setattr(runner, "get_context", lambda _: multiprocessing.get_context("fork"))
    return runner._work_all(JOBS, lambda *_: [], 2, folder)


@FORK
@QUIET_FORK
@pytest.mark.parametrize("error", [KeyboardInterrupt, MergeguardError])
def test_an_end_in_the_middle_ends_the_workers_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def stop() -> None:
        for job, result in in_processes(monkeypatch, fall_asleep, tmp_path):
            assert (job.seed, result) == (0, "done")
            raise error

    with pytest.raises(error):
        stop()
    assert not multiprocessing.active_children()
    assert not (tmp_path / "woke up").exists()


@FORK
@QUIET_FORK
def test_a_worker_that_dies_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MergeguardError, match=r"a worker process died, .* try again with fewer workers"):
        list(in_processes(monkeypatch, die, tmp_path))


@FORK
@QUIET_FORK
def test_an_interrupt_from_the_keyboard_is_left_to_the_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [result for _, result in in_processes(monkeypatch, report_signal, tmp_path)] == [True, True]


ORPHAN = """
import multiprocessing, os, pathlib, sys, time
from mergeguard.matrix import runner

def work(job, folder):
    (folder / "worker").write_text(str(os.getpid()))
    time.sleep(60)

runner.work, runner.get_context = work, lambda _: multiprocessing.get_context("fork")
next(runner._work_all([runner.Job("embed", "mini", 0)], lambda *_: [], 2, pathlib.Path(sys.argv[1])))
"""


@FORK
@pytest.mark.slow
def test_a_worker_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-W", "ignore", "-c", ORPHAN, str(tmp_path)])
    note = tmp_path / "worker"
    wait_until(lambda: note.exists() and bool(note.read_text()))
    parent.kill()
    parent.wait(timeout=60)
    wait_until(lambda: not is_running(int(note.read_text())))


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # a zombie waits for nothing but to be counted


def wait_until(condition: Any) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise TimeoutError


def test_scheme_errors_travel_between_processes_as_values(cache_folder: Path) -> None:
    (case,) = cases("toy(fault=crash_embed)")
    result = runner.work(Job("embed", MINI, 0, protection=case.protection), cache_folder)
    assert isinstance(result, SchemeError)

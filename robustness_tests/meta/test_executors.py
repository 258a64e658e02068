"""Executors on this machine: every job once, a GPU each, and nobody left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from mergeguard.errors import MergeguardError, ParameterError
from mergeguard.matrix import executors
from mergeguard.matrix.executors import Inline, Processes, default_workers, device_of, visible_devices
from mergeguard.worlds import memory

if TYPE_CHECKING:
    from collections.abc import Callable

FORK = pytest.mark.skipif(sys.platform != "linux", reason="these tests fork, to spare the workers' imports")
# From Python 3.12 on a fork is warned of where threads exist; these workers compute nothing.
QUIET_FORK = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
FORKED = Processes(2, start="fork")


def nothing_waits(*_: object) -> list[int]:
    return []


def double(job: int) -> int:
    return 2 * job


def halves(job: int, result: int) -> list[int]:
    """Of 4 there are 10 and 11, of 10 there is 20."""
    assert result == double(job)
    return {4: [10, 11], 10: [20]}.get(job, [])


def test_inline_does_next_what_waited_for_a_job() -> None:
    done = list(Inline()(double, [4, 5], halves))
    assert done == [(4, 8), (10, 20), (20, 40), (11, 22), (5, 10)]


@FORK
@QUIET_FORK
def test_processes_do_every_job_once() -> None:
    assert sorted(FORKED(double, [4, 5], halves)) == [(4, 8), (5, 10), (10, 20), (11, 22), (20, 40)]


def fall_asleep(job: int, folder: Path) -> str:
    """The first job is done at once, the second takes long, and says so if it is let."""
    if job == 0:
        return "done"
    time.sleep(20)
    (folder / "woke up").touch()
    return "late"


def die(_job: int) -> None:
    os._exit(3)


def ignores_interrupts(_job: int) -> bool:
    return signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def device(_job: int) -> tuple[str | None, int]:
    """What the worker sees, and who it is."""
    time.sleep(0.2)  # so that the other worker takes a job as well
    return os.environ.get("CUDA_VISIBLE_DEVICES"), os.getpid()


@FORK
@QUIET_FORK
@pytest.mark.parametrize("error", [KeyboardInterrupt, MergeguardError])
def test_an_end_in_the_middle_ends_the_workers_too(tmp_path: Path, error: type[BaseException]) -> None:
    def stop() -> None:
        for job, result in FORKED(partial(fall_asleep, folder=tmp_path), [0, 1], nothing_waits):
            assert (job, result) == (0, "done")
            raise error

    with pytest.raises(error):
        stop()
    assert not multiprocessing.active_children()
    assert not (tmp_path / "woke up").exists()


@FORK
@QUIET_FORK
def test_a_worker_that_dies_is_one_clear_error() -> None:
    with pytest.raises(MergeguardError, match=r"a worker process died, .* try again with fewer workers"):
        list(FORKED(die, [0, 1], nothing_waits))


@FORK
@QUIET_FORK
def test_an_interrupt_from_the_keyboard_is_left_to_the_parent() -> None:
    assert [result for _, result in FORKED(ignores_interrupts, [0, 1], nothing_waits)] == [True, True]


ORPHAN = """
import os, pathlib, sys, time
from mergeguard.matrix.executors import Processes

def work(folder):
    (folder / "worker").write_text(str(os.getpid()))
    time.sleep(60)

next(Processes(2, start="fork")(work, [pathlib.Path(sys.argv[1])], lambda *_: []))
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


def wait_until(condition: Callable[[], bool], seconds: int = 30) -> None:
    for _ in range(100 * seconds):
        if condition():
            return
        time.sleep(0.01)
    raise TimeoutError


# GPUs


@FORK
@QUIET_FORK
def test_each_process_sees_a_gpu_of_its_own() -> None:
    results = [result for _, result in Processes(2, ("3", "7"), start="fork")(device, [0, 1, 2, 3], nothing_waits)]
    by_worker = {process: seen for seen, process in results}
    assert sorted(by_worker.values()) == ["3", "7"]
    assert len(set(results)) == 2, "a worker keeps its device"


@FORK
@QUIET_FORK
def test_processes_without_gpus_see_what_their_parent_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    assert {seen for _, (seen, _) in FORKED(device, [0, 1], nothing_waits)} == {"5"}


def test_workers_take_turns_at_devices() -> None:
    assert [device_of(worker, ("a", "b")) for worker in range(5)] == ["a", "b", "a", "b", "a"]
    assert device_of(3, ()) is None


@pytest.mark.parametrize(
    ("count", "setting", "expected"),
    [
        (0, None, ()),
        (2, None, ("0", "1")),
        (2, "3, 5", ("3", "5")),
        (1, "GPU-a", ("GPU-a",)),
        (0, "", ()),
        (1, "2,-1,3", ("2",)),
    ],
)
def test_devices_are_named_as_the_user_limited_them(count: int, setting: str | None, expected: tuple[str, ...]) -> None:
    assert visible_devices(count, setting) == expected


def test_pinning_hides_the_other_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    executors.pin(3, executors.gpus())
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"


@pytest.mark.parametrize(
    ("device", "threads", "cores", "gpus", "expected"),
    [
        ("cpu", 1, 8, 2, 8),  # tiny: a core each
        ("cpu", 4, 8, 0, 2),
        ("cpu", 16, 8, 0, 1),
        ("cpu", None, 8, 0, 1),  # large: one model, all cores
        ("cuda", None, 8, 3, 3),
        ("cuda", 1, 8, 0, 1),  # and torch says what is missing
        ("cuda:2", None, 8, 3, 1),
    ],
)
def test_default_workers(device: str, threads: int | None, cores: int, gpus: int, expected: int) -> None:
    assert default_workers(device, threads, cores, gpus) == expected


@pytest.mark.parametrize(("room", "expected"), [(None, 8), (9, 8), (3, 3), (0, 1)])
def test_memory_bounds_the_default_workers(room: int | None, expected: int) -> None:
    assert default_workers("cpu", 2, 16, 0, room) == expected


def test_a_machine_that_does_not_tell_its_memory_bounds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda _: 25)
    assert (memory.free_workers(10), memory.free_workers(None)) == (2, None)

    def fail(_: str) -> int:
        raise ParameterError("it does not say")

    monkeypatch.setattr(memory, "free_bytes", fail)
    assert memory.free_workers(10) is None

"""Jobs as Ray tasks: the same results as here, and a lost worker's jobs run again.

What needs Ray is skipped where it is not installed; `.ci/run` installs it and sets MERGEGUARD_REQUIRE_RAY=1.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
import sys
import threading
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mergeguard.errors import MergeguardError, ParameterError, UnknownNameError
from mergeguard.matrix import runner
from mergeguard.matrix.cases import expand
from mergeguard.matrix.executors import Inline
from mergeguard.matrix.ray_executor import ATTEMPTS, RayTasks, resources
from mergeguard.matrix.runner import Job, run, timed_work
from robustness_tests.meta.mini_world import MINI, TOY, install, registered
from robustness_tests.meta.test_executors import is_running, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WITH_RAY = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None and os.environ.get("MERGEGUARD_REQUIRE_RAY") != "1",
        reason="ray is not installed; `.ci/run` installs it and sets MERGEGUARD_REQUIRE_RAY=1",
    ),
    pytest.mark.filterwarnings("default"),  # Ray's own are not ours to mend
]
NODE, GPU_NODE, HEAD = {"CPU": 16.0}, {"CPU": 8.0, "GPU": 2.0}, {"memory": 1e9}


def nothing_waits(*_: object) -> list[Any]:
    return []


# What a task asks for


@pytest.mark.parametrize(
    ("device", "threads", "nodes", "expected"),
    [
        ("cpu", 1, [HEAD, NODE], {"num_gpus": 0, "num_cpus": 1}),
        ("cpu", 12, [GPU_NODE, NODE], {"num_gpus": 0, "num_cpus": 12}),
        ("cpu", None, [HEAD, GPU_NODE, NODE], {"num_gpus": 0, "num_cpus": 8.0}),  # a whole node, of the smallest
        ("cuda", None, [NODE, GPU_NODE], {"num_gpus": 1, "num_cpus": 1}),
    ],
)
def test_a_task_asks_for_what_the_world_needs(
    device: str, threads: int | None, nodes: list[dict[str, float]], expected: dict[str, float]
) -> None:
    assert resources(device, threads, nodes) == expected


@pytest.mark.parametrize(
    ("device", "threads", "message"),
    [("cuda", 1, "no node of the Ray cluster has a GPU"), ("cpu", 17, "no node of the Ray cluster has 17 CPUs")],
)
def test_what_no_node_has_is_refused_instead_of_waited_for(device: str, threads: int, message: str) -> None:
    with pytest.raises(MergeguardError, match=message):
        resources(device, threads, [HEAD, NODE])


def test_a_named_gpu_is_refused() -> None:
    with pytest.raises(ParameterError, match="the world's device is cuda:1; Ray gives out GPUs itself"):
        RayTasks(device="cuda:1")


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MergeguardError, match=r"pip install 'mergeguard\[ray\]'"):
        list(RayTasks()(abs, [1], nothing_waits))


# Two workers


@pytest.fixture(scope="class")
def two_workers() -> Iterator[RayTasks]:
    """A Ray of two CPUs, for all tests that need no more."""
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=10**8, log_to_driver=False)
    yield RayTasks()
    ray.shutdown()
    forget_processes()


def forget_processes() -> None:
    """Ray drops the handles of its processes without a wait, which Python warns of wherever they are collected."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


class TestTwoWorkers:
    pytestmark = WITH_RAY

    def test_every_job_is_done_once(self, two_workers: RayTasks) -> None:
        then = {4: [10, 11], 10: [20]}
        done = list(two_workers(lambda job: 2 * job, [4, 5], lambda job, _: then.get(job, [])))
        assert sorted(done) == [(4, 8), (5, 10), (10, 20), (11, 22), (20, 40)]

    def test_a_lost_workers_job_runs_again(self, two_workers: RayTasks, tmp_path: Path) -> None:
        lost = tmp_path / "lost"

        def die_once(job: int) -> tuple[int, int]:
            if job == 1 and not lost.exists():
                lost.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)
            return job, os.getpid()

        done = dict(two_workers(die_once, [0, 1, 2], nothing_waits))
        assert {job: result[0] for job, result in done.items()} == {0: 0, 1: 1, 2: 2}
        assert done[1][1] != int(lost.read_text())

    def test_a_job_that_kills_every_worker_is_one_clear_error(self, two_workers: RayTasks, tmp_path: Path) -> None:
        def die(_job: int) -> None:
            (tmp_path / str(time.time_ns())).touch()
            os.kill(os.getpid(), signal.SIGKILL)

        with pytest.raises(MergeguardError, match=rf"^7 lost its worker {ATTEMPTS} times, .*fewer workers"):
            list(two_workers(die, [7], nothing_waits))
        assert len(list(tmp_path.iterdir())) == ATTEMPTS

    def test_what_a_task_raises_is_raised_here_as_it_was(self, two_workers: RayTasks) -> None:
        def fail(job: str) -> None:
            raise UnknownNameError("merger", job, ["ties"])

        with pytest.raises(UnknownNameError, match="did you mean 'ties'") as caught:
            list(two_workers(fail, ["tie"], nothing_waits))
        assert type(caught.value) is UnknownNameError

    def test_as_many_tasks_run_at_a_time_as_asked_for(self, two_workers: RayTasks, tmp_path: Path) -> None:
        def count(job: int) -> int:
            mark = tmp_path / str(job)
            mark.touch()
            time.sleep(0.1)
            running = len(list(tmp_path.iterdir()))
            mark.unlink()
            return running

        assert [running for _, running in replace(two_workers, workers=1)(count, [0, 1, 2], nothing_waits)] == [1] * 3

    def test_an_interrupt_cancels_what_still_runs(self, two_workers: RayTasks, tmp_path: Path) -> None:
        note = tmp_path / "pid"

        def fall_asleep(job: int) -> str:
            if job == 0:
                while not note.exists():
                    time.sleep(0.01)
                return "done"
            (tmp_path / "new").write_text(str(os.getpid()))
            (tmp_path / "new").rename(note)
            time.sleep(60)
            return "late"

        def stop() -> None:
            for _ in two_workers(fall_asleep, [0, 1], nothing_waits):
                signal.raise_signal(signal.SIGINT)

        # A shell starts what it puts into the background with interrupts ignored, and Python inherits that.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.raises(KeyboardInterrupt):
                stop()
        finally:
            signal.signal(signal.SIGINT, before)
        wait_until(lambda: not is_running(int(note.read_text())))

    def test_a_case_of_the_tiny_world_is_the_same_as_here(self, two_workers: RayTasks, tmp_path: Path) -> None:
        (case,) = expand(["gaussian_probe"], ["linear"], [0.5])
        embed = Job("embed", case.world, case.seed, protection=case.protection)
        outcome = Job("outcome", case.world, case.seed, case=case)
        lost = tmp_path / "lost"

        def die_once(job: Job, cache_folder: Path) -> Any:
            if job.kind == "outcome" and not lost.exists():
                lost.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return timed_work(job, cache_folder)

        def measure(executor: Callable[..., Iterator[Any]], work: Any, folder: str) -> Any:
            jobs = executor(
                partial(work, cache_folder=tmp_path / folder),
                [embed],
                lambda job, _: [outcome] if job == embed else [],
            )
            return replace(dict(jobs)[outcome][0], seconds=0.0)

        assert measure(two_workers, die_once, "there") == measure(Inline(), timed_work, "here")
        assert lost.exists()


class TestOwnRay:
    """A Ray that the run starts and ends itself."""

    pytestmark = WITH_RAY

    def test_a_run_is_the_same_as_here_though_a_worker_is_lost(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """The workers are new processes, which find the world and the toy as entry points on their path."""
        import ray

        root = Path(__file__).parents[2]
        path = [str(install(tmp_path / "path")), str(root), os.environ.get("PYTHONPATH", "")]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        honest, lost = runner.work_elsewhere, tmp_path / "lost"

        def die_once(job: Job, **options: Any) -> Any:
            if job.kind == "outcome" and not lost.exists():
                lost.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return honest(job, **options)

        with registered():
            cases = expand([TOY, "gaussian_probe", "toy(fault=crash_read)"], ["linear"], [0.5], world=MINI)
            here = run(cases, workers=1, cache_folder=tmp_path / "here")
            monkeypatch.setattr(runner, "work_elsewhere", die_once)
            there = run(cases, workers=2, executor="ray", cache_folder=tmp_path / "there")
        forget_processes()
        assert lost.exists()
        assert [outcome.id for outcome in there.outcomes] == ["toy-linear-0.5", "gaussian_probe-linear-0.5"]
        timeless = [
            replace(results, outcomes=tuple(replace(outcome, seconds=0.0) for outcome in results.outcomes), seconds=0.0)
            for results in (here, there)
        ]
        assert timeless[0] == timeless[1]
        assert not ray.is_initialized()
        assert (tmp_path / "there" / "outcome").is_dir(), "a folder that is named is the nodes'"
        assert threading.active_count() < 50
        said = capfd.readouterr()
        noise = [line for line in (said.out + said.err).splitlines() if "A worker died or was killed" not in line]
        assert noise == []

"""Where jobs are done: one after the other here, or in processes of this machine; in Ray tasks: `ray_executor.py`.

An executor knows nothing of what a job is. It changes no result, only when and where each is made.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from typing import TYPE_CHECKING, Protocol, TypeVar

from mergeguard.errors import MergeguardError

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import Synchronized

EXECUTORS = ("processes", "ray")
DEVICES_VARIABLE = "CUDA_VISIBLE_DEVICES"
J = TypeVar("J", bound=Hashable)
R = TypeVar("R")


class Executor(Protocol):
    """Does jobs somewhere."""

    def __call__(
        self, work: Callable[[J], R], first: Sequence[J], then: Callable[[J, R], Sequence[J]]
    ) -> Iterator[tuple[J, R]]:
        """Each job with its result, as soon as it is there: first `first`, and what `then` adds to each.

        Args:
            work: does one job; picklable, as jobs and results are. What it raises ends all jobs and is raised here.
            first: different jobs that wait for no other.
            then: called here, with a job and its result; gives the jobs that waited for it.

        Raises:
            MergeguardError: workers died.
        """
        ...


@dataclass(frozen=True)
class Inline:
    """One worker, this process. What waited for a job comes directly after it, so that results come early."""

    def __call__(
        self, work: Callable[[J], R], first: Sequence[J], then: Callable[[J, R], Sequence[J]]
    ) -> Iterator[tuple[J, R]]:
        queue = deque(first)
        while queue:
            job = queue.popleft()
            result = work(job)
            queue.extendleft(reversed(then(job, result)))
            yield job, result


@dataclass(frozen=True)
class Processes:
    """Processes of this machine, each with a GPU of its own if there are `devices`.

    Attributes:
        workers: how many.
        devices: names of CUDA devices; worker n sees device n modulo their number and no other. None: all see all.
        start: how multiprocessing starts a process.
    """

    workers: int
    devices: Sequence[str] = ()
    start: str = "spawn"

    def __call__(
        self, work: Callable[[J], R], first: Sequence[J], then: Callable[[J, R], Sequence[J]]
    ) -> Iterator[tuple[J, R]]:
        context = get_context(self.start)
        pool = ProcessPoolExecutor(
            self.workers,
            mp_context=context,
            initializer=_prepare_worker,
            initargs=(context.Value("i", 0), tuple(self.devices)),
        )
        try:
            pending = {pool.submit(work, job): job for job in first}
            while pending:
                done, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    job, result = pending.pop(future), future.result()
                    pending.update({pool.submit(work, later): later for later in then(job, result)})
                    yield job, result
        except BrokenProcessPool as error:
            raise MergeguardError(
                "a worker process died, most often for want of memory; try again with fewer workers"
            ) from error
        except BaseException:
            # Nobody waits for what still runs, which may take minutes. Public from Python 3.14 on: terminate_workers.
            for process in list((pool._processes or {}).values()):  # noqa: SLF001
                process.terminate()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def default_workers(device: str, threads: int | None, cores: int, gpus: int, room: int | None = None) -> int:
    """Workers of a world on one machine: one for each GPU, or as many as its threads fit the cores.

    Args:
        device: where the world computes. A single named GPU ("cuda:1") has one worker.
        threads: torch threads of a worker; None: all cores, so that one large model is held and not several.
        room: as many as the memory holds, if that is known.
    """
    if device.startswith("cuda"):
        return max(1, gpus) if device == "cuda" else 1
    fitting = 1 if threads is None else cores // threads
    return max(1, fitting if room is None else min(fitting, room))


def visible_devices(count: int, setting: str | None) -> tuple[str, ...]:
    """Names of `count` CUDA devices as `CUDA_VISIBLE_DEVICES` writes them; `setting` is its present value."""
    names = [name.strip() for name in setting.split(",")] if setting else [str(index) for index in range(count)]
    return tuple(names[:count])


def device_of(worker: int, devices: Sequence[str]) -> str | None:
    """The device of a worker: they take turns. None if there is no device."""
    return devices[worker % len(devices)] if devices else None


def gpus() -> tuple[str, ...]:
    """Names of the CUDA devices that this process may use. Where NVML is there, counting them starts no CUDA."""
    import torch

    return visible_devices(torch.cuda.device_count(), os.environ.get(DEVICES_VARIABLE))


def pin(worker: int, devices: Sequence[str]) -> None:
    """Let this process see the worker's device alone. Only before CUDA starts in it does that change anything."""
    device = device_of(worker, devices)
    if device is not None:
        os.environ[DEVICES_VARIABLE] = device


def _prepare_worker(started: Synchronized[int], devices: Sequence[str]) -> None:
    """Ctrl-C is for the parent, which ends its workers; a worker whose parent was killed ends by itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with started.get_lock():
        worker = started.value
        started.value += 1
    pin(worker, devices)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)

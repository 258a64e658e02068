"""Jobs as tasks of Ray (extra `ray`), on the cluster at `RAY_ADDRESS` or else on this machine alone.

Every node needs the same version of mergeguard and the files of the world. A task that is lost with its worker or
node runs again, up to `ATTEMPTS` times in all; whatever a task raises ends the run, as it does everywhere.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mergeguard.errors import MergeguardError, ParameterError
from mergeguard.machine import available_cores

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from mergeguard.matrix.executors import J, R

ATTEMPTS = 4
OBJECT_STORE_BYTES = 100 * 2**20
"""Of a Ray of our own. Results are small; by default the store takes a third of the memory, which models need."""
LOST = ("WorkerCrashedError", "NodeDiedError", "ObjectLostError", "OutOfMemoryError")
"""Ray's errors for a task whose worker, node or result is gone."""
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing about a run is sent to anybody
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@dataclass(frozen=True)
class RayTasks:
    """Ray tasks, each with one GPU or with the CPUs that its torch threads need.

    A GPU is a task's own, and Ray ends its process with the task: a process cannot move to another GPU.

    Attributes:
        workers: tasks at a time; None: as many as the cluster has room for.
        threads: torch threads of a task; None: all CPUs of a node, so that a node holds one large model.
        device: where the world computes, "cpu" or "cuda".
    """

    workers: int | None = None
    threads: int | None = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise ParameterError(f"the world's device is {self.device}; Ray gives out GPUs itself, so use cuda")

    def __call__(
        self, work: Callable[[J], R], first: Sequence[J], then: Callable[[J, R], Sequence[J]]
    ) -> Iterator[tuple[J, R]]:
        with self._connected() as ray:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            task = ray.remote(_attempt).options(max_retries=0, **resources(self.device, self.threads, nodes))
            lost = tuple(getattr(ray.exceptions, name) for name in LOST)
            waiting = deque((job, 1) for job in first)
            pending: dict[Any, tuple[J, int]] = {}
            try:
                while waiting or pending:
                    while waiting and (self.workers is None or len(pending) < self.workers):
                        job, attempt = waiting.popleft()
                        pending[task.remote(work, job)] = job, attempt
                    (done, *_), _ = ray.wait(list(pending))
                    job, attempt = pending.pop(done)
                    try:
                        result, error = ray.get(done)
                    except lost as loss:
                        if attempt == ATTEMPTS:
                            raise _gave_up(f"lost its worker {ATTEMPTS} times", job, loss) from loss
                        waiting.appendleft((job, attempt + 1))
                        continue
                    except ray.exceptions.RayTaskError:
                        raise  # a bug in a task, such as a result that does not pickle
                    except ray.exceptions.RayError as failure:
                        raise _gave_up("was given up by Ray", job, failure) from failure
                    if error is not None:
                        raise error
                    waiting.extend((later, 1) for later in then(job, result))
                    yield job, result
            finally:
                for unwanted in pending:  # nobody waits for what still runs, which may take minutes
                    ray.cancel(unwanted, force=True)

    @contextmanager
    def _connected(self) -> Iterator[Any]:
        """Ray, connected; what was not connected before is disconnected after, and a Ray of our own ends."""
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        try:
            ray = import_module("ray")
        except ImportError as error:
            raise MergeguardError("the executor ray needs Ray; pip install 'mergeguard[ray]'") from error
        if ray.is_initialized():
            yield ray
            return
        address = os.environ.get("RAY_ADDRESS") or "local"
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
        if address == "local":
            cores = max(available_cores(), (self.workers or 1) * (self.threads or 1))
            options |= {
                "num_cpus": cores,
                "include_dashboard": False,
                "object_store_memory": OBJECT_STORE_BYTES,
            }
        try:
            ray.init(address, **options)
        except Exception as error:  # Ray raises this very class where a start takes longer than it waits
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise MergeguardError(f"cannot reach or start Ray at {address}: {reason}") from error
        try:
            yield ray
        finally:
            ray.shutdown()


def resources(device: str, threads: int | None, nodes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What a task asks of a cluster, so that it finds a place.

    Args:
        nodes: the resources of each node that is alive, "CPU" and "GPU" among them.

    Raises:
        MergeguardError: no node has them; Ray would wait for ever.
    """
    if device == "cuda":
        if not any(node.get("GPU", 0) >= 1 and node.get("CPU", 0) >= 1 for node in nodes):
            raise MergeguardError("the world computes on cuda, and no node of the Ray cluster has a GPU and a CPU")
        return {"num_gpus": 1, "num_cpus": 1}
    cpus = [node["CPU"] for node in nodes if node.get("CPU", 0) >= (threads or 1)]
    if not cpus:
        raise MergeguardError(f"no node of the Ray cluster has {threads or 1} CPUs, which a task of the world needs")
    return {"num_gpus": 0, "num_cpus": threads or min(cpus)}


def _attempt(work: Callable[[J], R], job: J) -> tuple[R | None, Exception | None]:
    """In a task: the result or what was raised, as values. Ray would raise it as a class of its own."""
    try:
        return work(job), None
    except Exception as error:  # noqa: BLE001 - it is raised again where the run is
        return None, error


def _gave_up(how: str, job: object, error: Exception) -> MergeguardError:
    reason = (str(error).strip().splitlines() or [""])[0]
    return MergeguardError(
        f"{job} {how}, most often for want of memory; try again with fewer workers or larger nodes "
        f"({type(error).__name__}: {reason})"
    )

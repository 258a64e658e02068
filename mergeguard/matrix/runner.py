"""Runs cases on an executor and puts the results together. Neither executor nor number of workers changes a result."""

from __future__ import annotations

import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeguard.errors import ContractError, MergeguardError, SchemeError, UndecidableError, UnknownNameError
from mergeguard.machine import CACHE_VARIABLE, available_cores
from mergeguard.matrix import gates
from mergeguard.matrix.cache import Cache, code_version
from mergeguard.matrix.engine import Engine
from mergeguard.matrix.executors import EXECUTORS, Inline, Processes, default_workers, gpus
from mergeguard.matrix.outcome import Gate, Outcome, Planted, Results, format_coefficient
from mergeguard.matrix.progress import in_words, remaining
from mergeguard.matrix.recorded import Record, expected, problem_of, stale
from mergeguard.matrix.schemes import seconds_per_call
from mergeguard.protections.registry import PROTECTIONS
from mergeguard.worlds.memory import free_workers
from mergeguard.worlds.registry import load_world

if TYPE_CHECKING:
    from mergeguard.matrix.cases import Case
    from mergeguard.matrix.executors import Executor
    from mergeguard.specs import Spec
    from mergeguard.worlds.contract import World

Progress = Callable[[str, int, int, str], None]
"""Called after each job with its label, the jobs done, all jobs, and the time left in words (empty: not known)."""
CELL_ERRORS = (SchemeError, UndecidableError)
"""What is red about one cell or scheme, and stops no other."""
Checks = Callable[["Engine", "Spec", str], Sequence[Gate]]
"""What is checked of a scheme before merging, in a world as it was given: a name or a file."""
LIBRARIES = ("mergeguard", "torch", "transformers", "safetensors", "numpy", "scipy")


@dataclass(frozen=True)
class Job:
    """One piece of work for a worker; `first` pieces are what others wait for."""

    kind: str
    world: str
    seed: int
    case: Case | None = None
    protection: Spec | None = None

    def __str__(self) -> str:
        if self.case is not None:
            return self.case.id if self.kind == "outcome" else f"matched control {self.case.merger}"
        return f"{self.kind} {self.protection or ''}".rstrip()


@dataclass(frozen=True)
class Setup:
    """How schemes are run, the same in every process; picklable.

    Attributes:
        schemes: where classes are that no entry point names: (name, "module:Class").
        checks: a function at the top of a module; None: the gates before merging.
        seconds_per_call: the most that a call of a scheme may take.
        refuse: a scheme that breaks its contract ends the run as bad input, instead of a problem of its cells.
    """

    schemes: tuple[tuple[str, str], ...] = ()
    checks: Checks | None = None
    seconds_per_call: float | None = None
    refuse: bool = False


DEFAULT_SETUP = Setup()


@lru_cache(maxsize=1)  # an engine holds a loaded model
def engine_for(world: str, seed: int, cache_folder: Path | None = None) -> Engine:
    """This process's engine of a world and seed."""
    return Engine(load_world(world), seed, Cache(cache_folder))


def work(job: Job, cache_folder: Path | None, setup: Setup = DEFAULT_SETUP) -> Any:
    """Do one job, in whichever process. Scheme errors come back as values, so that the others go on."""
    for name, target in setup.schemes:
        PROTECTIONS.offer(name, target)
    engine = engine_for(job.world, job.seed, cache_folder)
    try:
        with seconds_per_call(setup.seconds_per_call):
            return _done(job, engine, setup)
    except CELL_ERRORS as error:
        return error


def _done(job: Job, engine: Engine, setup: Setup) -> Any:
    if job.kind == "embed" and job.protection is not None:
        engine.embedded(job.protection)
        return None
    if job.kind == "control" and job.case is not None:
        engine.matched_control(job.case.merger, job.case.coefficient)
        return None
    if job.kind == "gates" and job.protection is not None:
        if setup.checks is not None:
            return tuple(setup.checks(engine, job.protection, job.world))
        return gates.before_merging(engine, job.protection)
    if job.kind == "planted":
        return gates.planted(engine)
    if job.kind == "outcome" and job.case is not None:
        return engine.outcome(job.case)
    raise ValueError(f"a job of kind {job.kind!r} lacks its case or protection")


def timed_work(job: Job, cache_folder: Path | None, setup: Setup = DEFAULT_SETUP) -> tuple[Any, float]:
    """`work`, and the seconds that it took."""
    started = time.perf_counter()
    result = work(job, cache_folder, setup)
    return result, time.perf_counter() - started


def work_elsewhere(job: Job, cache_folder: Path | None, code: str, setup: Setup = DEFAULT_SETUP) -> tuple[Any, float]:
    """`timed_work` on another machine, whose code may be another.

    Raises:
        MergeguardError: it is.
    """
    if code_version() != code:
        raise MergeguardError(
            f"{platform.node()} has another version of mergeguard or torch than {Path(__file__).parents[1]} here; "
            "install the same on every node"
        )
    return timed_work(job, cache_folder, setup)


def make_executor(name: str, world: World, workers: int | None) -> Executor:
    """The executor called `name` with as many workers as asked for, or as the world and this machine suggest.

    Raises:
        UnknownNameError: there is none.
        ParameterError: it cannot serve the world's device.
    """
    if name not in EXECUTORS:
        raise UnknownNameError("executor", name, EXECUTORS)
    if name == "ray":
        from mergeguard.matrix.ray_executor import RayTasks

        return RayTasks(workers, world.threads, world.device)
    devices = gpus() if world.device == "cuda" else ()
    count = workers or default_workers(
        world.device, world.threads, available_cores(), len(devices), free_workers(world.worker_bytes)
    )
    return Inline() if count == 1 else Processes(count, devices)


def measure(
    cases: Sequence[Case],
    *,
    workers: int | None = None,
    executor: str = "processes",
    cache_folder: Path | None = None,
    on_progress: Progress | None = None,
    setup: Setup = DEFAULT_SETUP,
) -> tuple[list[Outcome | SchemeError | UndecidableError], list[Gate], list[Planted], list[str]]:
    """Outcomes in the order of `cases`, gates, planted mistakes, and scheme errors met in a gate.

    Args:
        workers: how many jobs run at a time; by default one for each GPU that the world computes on, or as many as
            its threads fit the cores of this machine, or as Ray has room for. One process means this process.
        executor: "processes" or "ray".
        setup: how schemes are run.

    Raises:
        MergeguardError: an input cannot be used; with `setup.refuse`, a scheme that breaks its contract is one.
    """
    world, seed = cases[0].world, cases[0].seed
    protections = list(dict.fromkeys(case.protection for case in cases))
    embeds = [Job("embed", world, seed, protection=protection) for protection in protections]
    controls = [
        Job("control", world, seed, case=case) for case in {(c.merger, c.coefficient): c for c in cases}.values()
    ]
    planted = Job("planted", world, seed)
    waiting = {
        protection: [
            *(Job("outcome", world, seed, case=case) for case in cases if case.protection == protection),
            Job("gates", world, seed, protection=protection),
        ]
        for protection in protections
    }
    left = Counter(
        job.kind for job in (*embeds, *controls, planted, *(job for jobs in waiting.values() for job in jobs))
    )
    total, seconds, started = left.total(), {kind: list[float]() for kind in left}, time.perf_counter()
    results: dict[Job, Any] = {}

    def settle(job: Job, result: Any) -> None:
        if setup.refuse and isinstance(result, ContractError):
            raise MergeguardError(str(result))
        results[job] = result
        left[job.kind] -= 1

    def then(job: Job, timed: tuple[Any, float]) -> list[Job]:
        """What waits for `job`. Without an embedding nothing else can be measured: its error is theirs."""
        if job.kind != "embed" or job.protection is None:
            return []
        if isinstance(timed[0], CELL_ERRORS):
            for unmeasured in waiting[job.protection]:
                settle(unmeasured, timed[0])
            return []
        return waiting[job.protection]

    if executor == "ray":
        # A folder that the user named is one that the nodes share; else each has its own.
        shared = cache_folder or (Path(os.environ[CACHE_VARIABLE]) if os.environ.get(CACHE_VARIABLE) else None)
        do = partial(work_elsewhere, cache_folder=shared, code=code_version(), setup=setup)
    else:
        do = partial(timed_work, cache_folder=cache_folder, setup=setup)
    for job, (result, taken) in make_executor(executor, load_world(world), workers)(
        do, [*embeds, *controls, planted], then
    ):
        settle(job, result)
        seconds[job.kind].append(taken)
        if on_progress is not None:
            time_left = remaining(seconds, left, time.perf_counter() - started, pace="outcome")
            on_progress(str(job), len(results), total, in_words(time_left))
    outcomes = [results[Job("outcome", world, seed, case=case)] for case in cases]
    found, errors = [], []
    for protection in protections:
        result = results[Job("gates", world, seed, protection=protection)]
        if isinstance(result, CELL_ERRORS):
            errors.append(str(result))
        else:
            found += result
    return outcomes, found, list(results[planted]), errors


def run(
    cases: Sequence[Case],
    *,
    records: dict[str, Record] | None = None,
    full: bool = False,
    workers: int | None = None,
    executor: str = "processes",
    cache_folder: Path | None = None,
    on_progress: Progress | None = None,
    setup: Setup = DEFAULT_SETUP,
) -> Results:
    """Measure the cases, hold them against the gates and the recorded losses, and sum up.

    Args:
        records: recorded losses by id.
        full: the cases are a full run, so that a record without a case is stale.
        workers, executor, setup: see `measure`.

    Raises:
        MergeguardError: an input cannot be used.
    """
    started = time.perf_counter()
    records = records or {}
    measured, before, planted, problems = measure(
        cases, workers=workers, executor=executor, cache_folder=cache_folder, on_progress=on_progress, setup=setup
    )
    outcomes = []
    for case, outcome in zip(cases, measured, strict=True):
        record = records.get(case.id)
        if isinstance(outcome, CELL_ERRORS):
            problems.append(f"{case.id}: {outcome}")
            continue
        outcomes.append(replace(outcome, expected=expected(record)))
        problem = problem_of(outcome, record)
        if problem is not None:
            problems.append(problem)
    problems += [problem for gate in before if (problem := gates.problem_of_gate(gate)) is not None]
    problems += [f"{mistake.name} was not caught: {mistake.measured}" for mistake in planted if not mistake.caught]
    if full:
        ids = [case.id for case in cases]
        problems += [f"the recorded loss {name} matches no case; record anew" for name in stale(records, ids)]
    world = load_world(cases[0].world)
    return Results(
        world=describe_world(world),
        environment=environment(world.device),
        outcomes=tuple(outcomes),
        before_merging=tuple(before),
        planted=tuple(planted),
        problems=tuple(dict.fromkeys(problems)),
        matched_controls=matched_controls(outcomes),
        seconds=time.perf_counter() - started,
    )


def matched_controls(outcomes: Iterable[Outcome]) -> dict[str, Mapping[str, float]]:
    """What the matched control of each merger and coefficient keeps of each skill."""
    return {f"{o.merger_spec}-{format_coefficient(o.coefficient)}": o.skills_kept for o in outcomes}


def describe_world(world: World) -> dict[str, Any]:
    """A world as results name it: its name, its files' digests and, where there are several, its parents' form."""
    return {"name": world.name, "digests": dict(world.digests), **({"form": world.form} if world.form else {})}


def environment(device: str = "cpu") -> dict[str, Any]:
    """Versions and hardware that a reader needs to compare results; of GPUs if `device`, the world's, is one."""

    def version_of(library: str) -> str:
        try:
            return version(library)
        except PackageNotFoundError:
            return "not installed"

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cores": available_cores(),
        **{library: version_of(library) for library in LIBRARIES},
        **(_cuda(device) if device.startswith("cuda") else {}),
    }


def _cuda(device: str) -> dict[str, Any]:
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"device": device, "cuda": torch.version.cuda or "none", **({"gpus": ", ".join(names)} if names else {})}

"""Runs cases over processes and puts the results together. The number of workers changes no result."""

from __future__ import annotations

import os
import platform
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context, parent_process
from typing import TYPE_CHECKING, Any

from mergeguard.errors import MergeguardError, SchemeError, UndecidableError
from mergeguard.machine import available_cores
from mergeguard.matrix import gates
from mergeguard.matrix.cache import Cache
from mergeguard.matrix.engine import Engine
from mergeguard.matrix.outcome import Gate, Outcome, Planted, Results, format_coefficient
from mergeguard.matrix.recorded import Record, expected, problem_of, stale
from mergeguard.worlds.registry import load_world

if TYPE_CHECKING:
    from pathlib import Path

    from mergeguard.matrix.cases import Case
    from mergeguard.specs import Spec

Progress = Callable[[str, int, int], None]
CELL_ERRORS = (SchemeError, UndecidableError)
"""What is red about one cell or scheme, and stops no other."""
LIBRARIES = ("mergeguard", "torch", "transformers", "safetensors", "numpy", "scipy")


@dataclass(frozen=True)
class Job:
    """One piece of work for a worker; `first` pieces are what others wait for."""

    kind: str
    world: str
    seed: int
    case: Case | None = None
    protection: Spec | None = None


@lru_cache(maxsize=4)
def engine_for(world: str, seed: int, cache_folder: Path | None = None) -> Engine:
    """This process's engine of a world and seed."""
    return Engine(load_world(world), seed, Cache(cache_folder))


def work(job: Job, cache_folder: Path | None) -> Any:
    """Do one job, in whichever process. Scheme errors come back as values, so that the others go on."""
    engine = engine_for(job.world, job.seed, cache_folder)
    try:
        if job.kind == "embed" and job.protection is not None:
            engine.embedded(job.protection)
            return None
        if job.kind == "control" and job.case is not None:
            engine.matched_control(job.case.merger, job.case.coefficient)
            return None
        if job.kind == "gates" and job.protection is not None:
            return gates.before_merging(engine, job.protection)
        if job.kind == "planted":
            return gates.planted(engine)
        if job.kind == "outcome" and job.case is not None:
            return engine.outcome(job.case)
    except CELL_ERRORS as error:
        return error
    raise ValueError(f"a job of kind {job.kind!r} lacks its case or protection")


def measure(
    cases: Sequence[Case],
    *,
    workers: int | None = None,
    cache_folder: Path | None = None,
    on_progress: Progress | None = None,
) -> tuple[list[Outcome | SchemeError | UndecidableError], list[Gate], list[Planted], list[str]]:
    """Outcomes in the order of `cases`, gates, planted mistakes, and scheme errors met in a gate.

    Args:
        workers: processes; by default one per available core. One means this process.

    Raises:
        MergeguardError: an input cannot be used.
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
    total = len(embeds) + len(controls) + 1 + sum(len(jobs) for jobs in waiting.values())
    results: dict[Job, Any] = {}

    def then(job: Job, result: Any) -> list[Job]:
        """What waits for `job`. Without an embedding nothing else can be measured: its error is theirs."""
        if job.kind != "embed" or job.protection is None:
            return []
        if isinstance(result, CELL_ERRORS):
            results.update(dict.fromkeys(waiting[job.protection], result))
            return []
        return waiting[job.protection]

    for job, result in _work_all([*embeds, *controls, planted], then, workers or available_cores(), cache_folder):
        results[job] = result
        if on_progress is not None:
            on_progress(_label(job), len(results), total)
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
    cache_folder: Path | None = None,
    on_progress: Progress | None = None,
) -> Results:
    """Measure the cases, hold them against the gates and the recorded losses, and sum up.

    Args:
        records: recorded losses by id.
        full: the cases are a full run, so that a record without a case is stale.

    Raises:
        MergeguardError: an input cannot be used.
    """
    started = time.perf_counter()
    records = records or {}
    measured, before, planted, problems = measure(
        cases, workers=workers, cache_folder=cache_folder, on_progress=on_progress
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
    for gate in before:
        if not gate.passed:
            name = f"{gate.protection}({gate.variant})" if gate.variant else gate.protection
            problems.append(f"{name} is not {gate.gate} before merging: {gate.measured}; required: {gate.required}")
    problems += [f"{mistake.name} was not caught: {mistake.measured}" for mistake in planted if not mistake.caught]
    if full:
        ids = [case.id for case in cases]
        problems += [f"the recorded loss {name} matches no case; record anew" for name in stale(records, ids)]
    world = load_world(cases[0].world)
    return Results(
        world={"name": world.name, "digests": dict(world.digests)},
        environment=environment(),
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


def environment() -> dict[str, Any]:
    """Versions and hardware that a reader needs to compare results."""

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
    }


def _label(job: Job) -> str:
    if job.case is not None:
        return job.case.id if job.kind == "outcome" else f"matched control {job.case.merger}"
    return f"{job.kind} {job.protection or ''}".rstrip()


def _work_all(
    first: Sequence[Job], then: Callable[[Job, Any], list[Job]], workers: int, cache_folder: Path | None
) -> Iterator[tuple[Job, Any]]:
    """Each job with its result, as soon as it is there: first `first`, and what `then` adds to each."""
    if workers == 1:
        queue = deque(first)
        while queue:
            job = queue.popleft()
            result = work(job, cache_folder)
            queue.extend(then(job, result))
            yield job, result
        return
    executor = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_prepare_worker)
    try:
        pending = {executor.submit(work, job, cache_folder): job for job in first}
        while pending:
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                job, result = pending.pop(future), future.result()
                pending.update({executor.submit(work, later, cache_folder): later for later in then(job, result)})
                yield job, result
    except BrokenProcessPool as error:
        raise MergeguardError(
            "a worker process died, most often for want of memory; try again with fewer workers"
        ) from error
    except BaseException:
        # Nobody waits for what still runs, which may take minutes. Public from Python 3.14 on: terminate_workers.
        for process in list((executor._processes or {}).values()):  # noqa: SLF001
            process.terminate()
        raise
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _prepare_worker() -> None:
    """Ctrl-C is for the parent, which ends its workers; a worker whose parent was killed ends by itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)

"""Runs: the same results with any number of workers, complete problems, and what a reader needs beside them."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from mergeguard.errors import MergeguardError, ParameterError, SchemeError, UnknownNameError
from mergeguard.matrix import gates, runner
from mergeguard.matrix.cases import expand
from mergeguard.matrix.executors import Inline, Processes
from mergeguard.matrix.outcome import LOST, SURVIVED, Planted, Results
from mergeguard.matrix.ray_executor import RayTasks
from mergeguard.matrix.recorded import Record
from mergeguard.matrix.runner import Job, make_executor, run
from robustness_tests.meta.mini_world import MINI, TOY, Toy, install, mini, registered

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from mergeguard.matrix.cases import Case

WEAK, HARMFUL = "toy(strength=0.6)", "toy(fault=harmful)"  # WEAK is lost where averaging is a theft


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
    seen: list[tuple[str, int, int, str]] = []
    run_here(cases(TOY, alphas=[0.3, 0.5]), cache_folder, on_progress=lambda *step: seen.append(step))
    assert [done for _, done, _, _ in seen] == list(range(1, 8))
    assert {total for _, _, total, _ in seen} == {7}
    assert [label for label, _, _, _ in seen] == [
        "embed toy",
        "toy-linear-0.3",
        "toy-linear-0.5",
        "gates toy",
        "matched control linear",
        "matched control linear",
        "planted",
    ]
    assert seen[0][3] == "", "nothing is known before the first cell"
    assert all("left" in words for _, _, _, words in seen[1:])


def test_cells_without_an_embedding_are_not_waited_for(cache_folder: Path) -> None:
    seen: list[tuple[str, int, int, str]] = []
    run_here(cases("toy(fault=crash_embed)", TOY), cache_folder, on_progress=lambda *step: seen.append(step))
    assert [(done, total) for _, done, total, _ in seen] == [(3, 8), (4, 8), (5, 8), (6, 8), (7, 8), (8, 8)]
    assert seen[-1][3] == "about 0 s left"


def test_a_wrong_input_ends_the_run(cache_folder: Path) -> None:
    with pytest.raises(ParameterError, match="'strength' of toy is high"):
        run_here(cases("toy(strength=high)"), cache_folder)


def test_scheme_errors_travel_between_processes_as_values(cache_folder: Path) -> None:
    (case,) = cases("toy(fault=crash_embed)")
    result = runner.work(Job("embed", MINI, 0, protection=case.protection), cache_folder)
    assert isinstance(result, SchemeError)


# What runs it


@pytest.mark.parametrize(
    ("device", "threads", "workers", "expected"),
    [
        ("cpu", 1, None, Processes(4)),
        ("cpu", 1, 3, Processes(3)),
        ("cpu", 1, 1, Inline()),
        ("cpu", None, None, Inline()),
        ("cpu", None, 2, Processes(2)),
        ("cuda", None, None, Processes(2, ("0", "1"))),
        ("cuda", None, 5, Processes(5, ("0", "1"))),
        ("cuda", None, 1, Inline()),
        ("cuda:1", None, None, Inline()),
        ("cuda:1", None, 2, Processes(2)),
    ],
)
def test_workers_follow_from_the_world_and_the_machine(
    monkeypatch: pytest.MonkeyPatch, device: str, threads: int | None, workers: int | None, expected: object
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(runner, "available_cores", lambda: 4)
    assert make_executor("processes", replace(mini(), device=device, threads=threads), workers) == expected


def test_ray_is_an_executor_by_name() -> None:
    assert make_executor("ray", replace(mini(), threads=3), 2) == RayTasks(2, 3, "cpu")
    with pytest.raises(UnknownNameError, match="unknown executor 'rya'; did you mean 'ray'"):
        make_executor("rya", mini(), 2)


def test_other_code_elsewhere_is_refused(cache_folder: Path) -> None:
    (case,) = cases(TOY)
    job = Job("embed", MINI, 0, protection=case.protection)
    assert runner.work_elsewhere(job, cache_folder, runner.code_version())[0] is None
    with pytest.raises(MergeguardError, match="has another version of mergeguard or torch"):
        runner.work_elsewhere(job, cache_folder, "another")


# What is said of it


def test_the_form_of_a_worlds_parents_is_part_of_its_results() -> None:
    assert runner.describe_world(mini()) == {"name": MINI, "digests": {"base": "0" * 64}}
    shipped = replace(mini(), form="adapters as shipped")
    assert runner.describe_world(shipped)["form"] == "adapters as shipped"


def test_gpus_are_named_where_the_world_computes_on_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert runner.environment("cuda").items() >= {"device": "cuda", "gpus": "GPU 0, GPU 1", "cuda": "13.0"}.items()
    assert not runner.environment().keys() & {"device", "gpus", "cuda"}

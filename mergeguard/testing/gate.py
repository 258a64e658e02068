"""A whole gate of one scheme, with or without pytest: checks, planted mistakes, cells; and one page at the end."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from mergeguard.errors import MergeguardError
from mergeguard.matrix import runner
from mergeguard.matrix.outcome import SURVIVED, Outcome, Results
from mergeguard.matrix.recorded import describe, read_records, write_records
from mergeguard.reports.summary import is_lost_theft, is_recorded, sentence, summary_of
from mergeguard.testing.checks import all_checks
from mergeguard.testing.scheme import address, known

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mergeguard.matrix.cases import Case
    from mergeguard.protections.contract import Protection
    from mergeguard.testing.plan import Plan

TELLING = 3
MOST_PROBLEMS = 12
SEEDS = 3
"""Seeds that a recorded loss is taken from, as in `mergeguard run --record-losses`."""


@dataclass(frozen=True)
class GateReport:
    """What a gate found. `str` is its page.

    Attributes:
        scheme: as it is written in ids.
        results: everything measured, as in results.json.
    """

    scheme: str
    results: Results

    @property
    def passed(self) -> bool:
        """Whether nothing is red."""
        return self.results.holds

    @property
    def problems(self) -> tuple[str, ...]:
        """Why it did not pass, a line each."""
        return self.results.problems

    @property
    def failed_checks(self) -> tuple[str, ...]:
        """Names of the checks before merging that failed."""
        return tuple(gate.gate for gate in self.results.before_merging if not gate.passed)

    def __str__(self) -> str:
        return "\n".join(page(self))


def run_gate(
    plan: Plan,
    *,
    workers: int | None = None,
    on_progress: runner.Progress | None = None,
) -> GateReport:
    """Check the scheme, measure its cells, and say whether the gate passed.

    Args:
        plan: what to measure.
        workers: processes; None: as many as the world and the machine suggest. One is this process.
        on_progress: called after each job.

    Raises:
        MergeguardError: the scheme breaks its contract, or cannot be found by a worker: there is no verdict.
    """
    checks = partial(all_checks, margin=plan.options.margin)
    return GateReport(str(plan.protection), _run(plan, plan.cases, checks, workers, on_progress))


def record_losses(
    plan: Plan,
    report: GateReport,
    path: Path,
    *,
    workers: int | None = None,
    on_progress: runner.Progress | None = None,
) -> int:
    """Write the losses of a gate, and of the same cells under the next two seeds, to a file; give their number.

    A cell that is lost under some of the seeds only is on the edge. Reasons that are on record stay, and so do other
    schemes' losses in the file.

    Raises:
        MergeguardError: the file cannot be written.
    """
    runs = [report.results.outcomes]
    for seed in range(plan.options.seed + 1, plan.options.seed + SEEDS):
        cases = [replace(case, seed=seed) for case in plan.cases]
        runs.append(_run(plan, cases, _no_checks, workers, on_progress).outcomes)
    own = f"{plan.protection.spec}-"
    others = {name: record for name, record in read_records(path).items() if not name.startswith(own)}
    cells = {case.id for case in plan.cases}
    kept = {name: record for name, record in plan.records.items() if name in cells or not plan.full}
    written = write_records(path, runs, {**others, **kept}, full=False)
    return sum(record.id.startswith(own) for record in written)


def _no_checks(*_: object) -> tuple[()]:
    return ()


def _run(
    plan: Plan,
    cases: Sequence[Case],
    checks: runner.Checks,
    workers: int | None,
    on_progress: runner.Progress | None,
) -> Results:
    protection = plan.protection
    with known(protection):
        return runner.run(
            cases,
            records=dict(plan.records),
            full=plan.full,
            workers=workers,
            on_progress=on_progress,
            setup=runner.Setup(
                schemes=() if workers == 1 else ((protection.name, target_of(protection)),),
                checks=checks,
                seconds_per_call=plan.options.seconds_per_call,
                refuse=True,
            ),
        )


def target_of(protection: Protection) -> str:
    """`module:Class` for worker processes.

    Raises:
        MergeguardError: a worker would not find it.
    """
    place = address(protection)
    if place["module"] == "__main__" or place["module"] not in sys.modules:
        raise MergeguardError(
            f"worker processes cannot import {place['class']} from {place['module']}; move it into a module, or use "
            "one worker"
        )
    return f"{place['module']}:{place['class']}"


def page(report: GateReport) -> list[str]:
    """One page: passed or not, why, and the three most telling cells."""
    results = report.results
    checks = results.before_merging
    passed = sum(gate.passed for gate in checks)
    caught = sum(planted.caught for planted in results.planted)
    lines = [
        f"{report.scheme}: gate {'passed' if report.passed else 'NOT passed'}",
        f"  world {results.world['name']}, {len(results.outcomes)} cells, {results.seconds:.0f} s",
        f"  {passed} of {len(checks)} checks passed, {caught} of {len(results.planted)} planted mistakes caught",
        f"  {sentence(summary_of(results))}",
    ]
    if report.problems:
        lines += ["", "why not:"]
        if report.failed_checks:
            lines.append(f"  failed checks: {', '.join(report.failed_checks)}")
        lines += [f"  - {line}" for line in sorted(report.problems, key=_is_of_a_cell)[:MOST_PROBLEMS]]
        more = len(report.problems) - MOST_PROBLEMS
        if more > 0:
            lines.append(f"  and {more} more, in the reports")
    else:
        lines += ["", "why: every check holds, and the evidence survives every theft that is not on record as lost"]
    cells = telling(results.outcomes)
    if cells:
        lines += ["", "the most telling cells:"]
        for outcome in cells:
            lines += [f"  {outcome.id}{_standing(outcome)}", f"    {describe(outcome)}"]
    return lines


def _is_of_a_cell(problem: str) -> bool:
    """Checks come first: who fails them need not look at cells."""
    return " fails the check " not in problem and " before merging: " not in problem


def telling(outcomes: tuple[Outcome, ...], most: int = TELLING) -> tuple[Outcome, ...]:
    """The cells that decide: red thefts, the greatest coefficient first; then survivals, the closest first.

    One of each merger, as long as there are others: neighbours in a row say the same.
    """
    ranked = sorted((outcome for outcome in outcomes if outcome.theft), key=_rank)
    first: list[Outcome] = []
    for outcome in ranked:
        if outcome.merger_spec not in {other.merger_spec for other in first}:
            first.append(outcome)
    return tuple([*first, *(outcome for outcome in ranked if outcome not in first)][:most])


def _rank(outcome: Outcome) -> tuple[int, float, float]:
    alpha = -1.0 if outcome.coefficient is None else outcome.coefficient
    if is_lost_theft(outcome):
        return (2 if is_recorded(outcome) else 0), -alpha, 0.0
    return 1, -outcome.p_value, alpha


def _standing(outcome: Outcome) -> str:
    if outcome.verdict == SURVIVED:
        return ": survived"
    return f": {outcome.verdict}, on record" if is_recorded(outcome) else f": {outcome.verdict}"

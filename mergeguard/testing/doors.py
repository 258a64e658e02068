"""The two ways in: a decorator for pytest, and a function without it. Loads torch only when it is used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from mergeguard.errors import GateFailed

if TYPE_CHECKING:
    from mergeguard.protections.contract import Protection
    from mergeguard.testing.gate import GateReport
    from mergeguard.testing.plan import Recorded

F = TypeVar("F", bound=Callable[..., Any])
MARKER = "mergeguard_cases"
"""The mark by which the plugin finds what to parametrize."""


def check_protection(
    scheme: Protection,
    *,
    world: str = "tiny",
    seed: int = 0,
    mergers: Sequence[str] | None = None,
    coefficients: Sequence[float] | None = None,
    recorded: Recorded | None = None,
    workers: int | None = None,
    seconds_per_call: float | None = None,
    margin: float | None = None,
) -> GateReport:
    """Gate a scheme: every check, every planted mistake, every cell.

    Args:
        scheme: an instance of a class derived from `Protection`.
        world: a name or a world file.
        seed: of keys, training and masks.
        mergers, coefficients: None: those of the default matrix, 5 and 9.
        recorded: known losses: a file, or a mapping from ids to a reason or to (lowest VSR, highest VSR, reason).
        workers: processes; None: this one alone. Several find the scheme's class by its module.
        seconds_per_call: the most that a call of the scheme may take; None: as long as it likes.
        margin: how far a skill may move by embedding; None: 0.05.

    Returns:
        What was found; its `str` is one page.

    Raises:
        GateFailed: the gate does not hold; the text is the page, and names every failed check.
        MergeguardError: the scheme or an option cannot be used: there is no verdict.
    """
    from mergeguard.testing.gate import run_gate
    from mergeguard.testing.plan import Options, plan

    options = Options(
        world=world,
        seed=seed,
        mergers=mergers,
        coefficients=coefficients,
        recorded=recorded,
        seconds_per_call=seconds_per_call,
        margin=margin,
    )
    report = run_gate(plan(scheme, options), workers=workers or 1)
    if not report.passed:
        raise GateFailed(str(report))
    return report


def parametrize_with_cases(
    scheme: Protection,
    *,
    world: str = "tiny",
    seed: int = 0,
    mergers: Sequence[str] | None = None,
    coefficients: Sequence[float] | None = None,
    recorded: Recorded | None = None,
    seconds_per_call: float | None = None,
    margin: float | None = None,
) -> Callable[[F], F]:
    """A decorator: the test runs once for each case of a gate, which it takes as `case` and calls `case.check()` on.

    Arguments are those of `check_protection`; processes are pytest-xdist's. Options of the command line (`--merger`,
    `--coefficient`, `--axes`, `--world`, `--seed`) rule over them.

    Raises:
        MergeguardError: the scheme or an option cannot be used, which is an error of collection.
    """
    import pytest

    from mergeguard.testing.plan import Options, plan

    options = Options(
        world=world,
        seed=seed,
        mergers=mergers,
        coefficients=coefficients,
        recorded=recorded,
        seconds_per_call=seconds_per_call,
        margin=margin,
    )
    plan(scheme, options)  # what is wrong is said where it is written
    mark: Callable[[F], F] = getattr(pytest.mark, MARKER)(scheme, options)
    return mark

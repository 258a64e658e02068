"""The cases of `parametrize_with_cases`: each a test, whose `check` measures one thing and raises if it is red."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from mergeguard.errors import GateFailed
from mergeguard.matrix import gates
from mergeguard.matrix import outcome as reported
from mergeguard.matrix.recorded import check_outcome, expected, stale
from mergeguard.matrix.schemes import seconds_per_call
from mergeguard.protections.planted import PLANTED
from mergeguard.testing.checks import CHECKS, run_check
from mergeguard.testing.context import Context

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mergeguard.matrix.cases import Case
    from mergeguard.matrix.recorded import Record
    from mergeguard.protections.contract import Protection
    from mergeguard.testing.plan import Plan


@dataclass
class GateCase(ABC):
    """One test of a gate.

    Attributes:
        plan: the gate.
        properties: what `check` measured, for the plugin and for JUnit: pairs of name and value.
    """

    plan: Plan
    properties: list[tuple[str, Any]] = field(default_factory=list, repr=False)

    @property
    def world(self) -> str:
        """As the plan has it: a name or a file."""
        return self.plan.options.world

    @property
    def record(self) -> Record | None:
        """The recorded loss of this case, if there is one."""
        return None

    @property
    def id(self) -> str:
        """The test's id: the scheme and what is looked at."""
        return f"{self.plan.protection}-{self.name}"

    @property
    @abstractmethod
    def name(self) -> str:
        """What is looked at."""

    def check(self) -> None:
        """Measure it.

        Raises:
            EvidenceLost: a theft from which the evidence does not survive.
            GateFailed: another promise is broken; the text says which and what to do.
            SchemeError: the scheme crashed, or took too long.
            MergeguardError: an input cannot be used.
        """
        self.properties.clear()
        with seconds_per_call(self.plan.options.seconds_per_call):
            self._check(
                _context(_Key(self.plan.protection), self.world, self.plan.options.seed, self.plan.options.margin)
            )

    @abstractmethod
    def _check(self, context: Context) -> None: ...


@dataclass
class CheckCase(GateCase):
    """A check before merging."""

    check_name: str = ""

    @property
    def name(self) -> str:
        return self.check_name

    def _check(self, context: Context) -> None:
        gate = run_check(context, self.check_name)
        self.properties.append((reported.GATE, json.dumps(asdict(gate))))
        problem = gates.problem_of_gate(gate)
        if problem is not None:
            raise GateFailed(problem)


@dataclass
class PlantedCase(GateCase):
    """A planted mistake, which has to be caught in this world."""

    scheme: type[Protection] | None = None
    wanted: str = ""

    @property
    def name(self) -> str:
        return self.scheme.name if self.scheme else ""

    def _check(self, context: Context) -> None:
        assert self.scheme is not None
        with seconds_per_call(None):  # the limit is for the scheme under test
            found = gates.catch(context.engine, self.scheme(), self.wanted)
        self.properties.append((reported.PLANTED, json.dumps(asdict(found))))
        if not found.caught:
            raise GateFailed(f"{found.name} was not caught: {found.measured}")


@dataclass
class CellCase(GateCase):
    """A cell of the matrix: the scheme under a merger at a coefficient."""

    case: Case | None = None

    @property
    def name(self) -> str:
        return "" if self.case is None else self.case.id.removeprefix(f"{self.case.protection}-")

    @property
    def record(self) -> Record | None:
        return self.plan.records.get(self.id)

    def _check(self, context: Context) -> None:
        assert self.case is not None
        _ = context.embedded  # an embedding that failed is not tried again for each cell
        with context.listening():
            measured = context.engine.outcome(self.case, context.protection)
        measured = replace(measured, expected=expected(self.record))
        self.properties.append((reported.OUTCOME, json.dumps(measured.to_json())))
        check_outcome(measured, self.record)


@dataclass
class RecordsCase(GateCase):
    """That every recorded loss is a case."""

    @property
    def name(self) -> str:
        return "recorded_losses"

    def _check(self, context: Context) -> None:
        left = stale(self.plan.records, (case.id for case in self.plan.cases))
        if left:
            raise GateFailed(f"recorded losses that match no case: {', '.join(left)}; record anew")


def gate_cases(plan: Plan) -> Iterator[GateCase]:
    """All tests of a gate: checks, planted mistakes, recorded losses, then the cells of the matrix."""
    for name in CHECKS:
        yield CheckCase(plan, check_name=name)
    for scheme, wanted in PLANTED:
        yield PlantedCase(plan, scheme=scheme, wanted=wanted)
    if plan.full:
        yield RecordsCase(plan)
    for case in plan.cases:
        yield CellCase(plan, case=case)


@dataclass(frozen=True)
class _Key:
    """A scheme, equal to another instance of its class with its parameters."""

    protection: Protection = field(compare=False)
    made_of: tuple[type, str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "made_of", (type(self.protection), str(self.protection)))


@lru_cache(maxsize=2)  # a context holds models
def _context(key: _Key, world: str, seed: int, margin: float | None) -> Context:
    from mergeguard.matrix.runner import engine_for

    return Context(engine_for(world, seed), key.protection, world, margin)

"""What a gate measures: the cells of one scheme, and the losses that are on record. Nothing is measured here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeguard.errors import CheckpointError, ParameterError
from mergeguard.matrix.cases import DEFAULT_SEED, DEFAULT_WORLD, Case, cells, parse_coefficients, with_axes
from mergeguard.matrix.recorded import Record, read_records, recorded_file
from mergeguard.matrix.schemes import is_ours
from mergeguard.mergers.registry import DEFAULT_COEFFICIENTS, DEFAULT_MERGERS
from mergeguard.testing.scheme import checked
from mergeguard.worlds.registry import find_world

if TYPE_CHECKING:
    from mergeguard.protections.contract import Protection

Recorded = str | Path | Mapping[str, "str | tuple[float, float, str] | Record"]
"""A file of recorded losses, or by id a reason, or (lowest VSR, highest VSR, reason)."""


@dataclass(frozen=True)
class Options:
    """What a gate is asked for.

    Attributes:
        world: a name or a world file.
        mergers, coefficients: None: those of the default matrix.
        axes: as in `mergeguard run --axes`.
        recorded: the known losses; None: none, and for a scheme of mergeguard's own those of the world.
        seconds_per_call: the most that a call of the scheme may take; None: as long as it likes.
        margin: how far a skill may move by embedding; None: 0.05.
    """

    world: str = DEFAULT_WORLD
    seed: int = DEFAULT_SEED
    mergers: Sequence[str] | None = None
    coefficients: Sequence[float] | None = None
    axes: str | None = None
    recorded: Recorded | None = None
    seconds_per_call: float | None = None
    margin: float | None = None


@dataclass(frozen=True)
class Plan:
    """What is measured of one scheme. `full`: no option narrowed it, so that a record without a case is stale."""

    protection: Protection
    options: Options
    cases: tuple[Case, ...]
    records: Mapping[str, Record]
    full: bool


def moved(
    options: Options,
    *,
    world: str | None,
    seed: int | None,
    mergers: Sequence[str] | None,
    coefficients: Sequence[str] | None,
    axes: str | None,
) -> tuple[Options, bool]:
    """`options` as the command line's move or narrow them, each None if it is not given, and whether any did.

    Raises:
        ParameterError: a coefficient is no number.
    """
    given = {
        "world": world,
        "seed": seed,
        "mergers": tuple(mergers) if mergers else None,
        "coefficients": parse_coefficients(",".join(coefficients)) if coefficients else None,
        "axes": axes,
    }
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return replace(options, **changes), bool(changes)


def plan(scheme: object, options: Options, *, narrowed: bool = False) -> Plan:
    """The cells of a scheme.

    Args:
        scheme: what somebody gave as a protection.
        options: what to measure.
        narrowed: these are fewer cells than the gate has, so that no record is stale.

    Raises:
        MergeguardError: the scheme cannot be gated; an option is out of its domain; a record cannot be read.
    """
    protection = checked(scheme)
    if options.seed < 0:
        raise ParameterError(f"the seed is {options.seed}, expected a number from 0 on")
    for name, value in (("seconds_per_call", options.seconds_per_call), ("margin", options.margin)):
        if value is not None and not value > 0:
            raise ParameterError(f"{name} is {value}, expected a positive number")
    world = find_world(options.world)
    mergers = DEFAULT_MERGERS if options.mergers is None else tuple(options.mergers)
    found = cells(
        [protection.spec],
        mergers if options.axes is None else with_axes(mergers, options.axes),
        DEFAULT_COEFFICIENTS if options.coefficients is None else tuple(options.coefficients),
        world=world,
        seed=options.seed,
    )
    records = _records(protection, options.recorded, world)
    return Plan(protection, replace(options, world=world), found, records, not narrowed and bool(records))


def _records(protection: Protection, recorded: Recorded | None, world: str) -> dict[str, Record]:
    if recorded is None:
        return _own(protection, read_records(recorded_file(world))) if is_ours(type(protection)) else {}
    if isinstance(recorded, Mapping):
        return {name: _record(name, value) for name, value in recorded.items()}
    path = Path(recorded)
    if not path.is_file():
        raise CheckpointError(f"there is no file of recorded losses at {path}; --record-losses makes one")
    return _own(protection, read_records(path))


def _own(protection: Protection, records: Mapping[str, Record]) -> dict[str, Record]:
    """Those of the scheme; several may share a file."""
    return {name: record for name, record in records.items() if name.startswith(f"{protection.spec}-")}


def _record(name: str, value: str | tuple[float, float, str] | Record) -> Record:
    if isinstance(value, Record):
        return value
    if isinstance(value, str):
        return Record(name, 0.0, 1.0, value)
    try:
        low, high, reason = value
        return Record(name, low, high, reason)
    except (TypeError, ValueError):
        raise ParameterError(
            f"the recorded loss {name} is {value!r}; expected a reason, or (lowest VSR, highest VSR, reason)"
        ) from None

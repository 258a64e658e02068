"""Cases: which cells a run consists of. No torch here, so that collecting thousands of them is quick."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from mergeguard.errors import ParameterError, UnknownNameError
from mergeguard.matrix.outcome import case_id, format_coefficient
from mergeguard.mergers.registry import DEFAULT_COEFFICIENTS, DEFAULT_MERGERS, parse_merger
from mergeguard.protections.registry import PROTECTIONS
from mergeguard.specs import Spec, parse_spec

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mergeguard.mergers.contract import Merger
    from mergeguard.specs import Value

AXES: dict[str, tuple[Value, ...]] = {"density": (0.2, 0.4, 0.6, 0.8), "normalize": (True, False)}
"""Parameters of the sparsifying mergers, TIES, DARE and their kin, that a run may vary, and the values of each."""
DEFAULT_WORLD = "tiny"
DEFAULT_SEED = 0


@dataclass(frozen=True)
class Case:
    """One cell: a protection under a merger at a coefficient, in a world, from a seed."""

    protection: Spec
    merger: Merger
    coefficient: float | None
    world: str
    seed: int

    @property
    def id(self) -> str:
        return case_id(str(self.protection), str(self.merger), self.coefficient)


def parse_coefficients(text: str) -> tuple[float, ...]:
    """Read "0.1,0.5".

    Raises:
        ParameterError: an entry is no number, lies outside [0, 1] or is repeated.
    """
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise ParameterError(f"cannot read the coefficients {text!r}; expected numbers such as 0.1,0.5") from None
    return check_coefficients(values)


def check_coefficients(values: Sequence[float]) -> tuple[float, ...]:
    """The coefficients in ascending order.

    Raises:
        ParameterError: one lies outside [0, 1], is NaN or is repeated, or there is none.
    """
    for value in values:
        if math.isnan(value) or not 0 <= value <= 1:
            raise ParameterError(f"the coefficient {value} is outside [0, 1]")
    positive = sorted(abs(float(value)) for value in values)  # -0.0 is 0.0
    # By their written form: .1 + .2 and .3 differ in the last bit, and their cases would share an id.
    _check_distinct("coefficient", [format_coefficient(value) for value in positive])
    return tuple(positive)


def with_axes(mergers: Iterable[str | Merger], axes: str) -> tuple[Merger, ...]:
    """The mergers, each that has a density at all values of the axes that it has; each once.

    Args:
        axes: names among `AXES`, e.g. "normalize,density".

    Raises:
        UnknownNameError: there is no such axis, or no such merger or parameter of it.
        ParameterError: a merger's parameter is out of its domain.
    """
    names = [name.strip() for name in axes.split(",")]
    for name in names:
        if name not in AXES:
            raise UnknownNameError("axis", name, AXES)
    found: dict[Merger, None] = {}
    for item in mergers:
        merger = parse_merger(item) if isinstance(item, str) else item
        varied = [name for name in AXES if name in names and name in merger.parameters]
        if "density" not in merger.parameters:
            varied = []  # e.g. linear, which has a `normalize` of its own
        for values in product(*(AXES[name] for name in varied)):
            found[merger.method(**{**dict(merger.given), **dict(zip(varied, values, strict=True))})] = None
    return tuple(found)


def expand(
    protections: Iterable[str | Spec],
    mergers: Iterable[str | Merger] = DEFAULT_MERGERS,
    coefficients: Sequence[float] = DEFAULT_COEFFICIENTS,
    *,
    world: str = DEFAULT_WORLD,
    seed: int = DEFAULT_SEED,
) -> tuple[Case, ...]:
    """All cases, protections outermost and coefficients innermost; a merger without a coefficient has one case.

    A protection's parameters are not looked at, as that would load its code; `make_protection` checks them.

    Raises:
        UnknownNameError: there is no such protection, or no such merger or parameter of it.
        ParameterError: a coefficient or a merger's parameter is out of its domain, something is given twice, or there
            is no protection or no merger.
    """
    alphas = check_coefficients(list(coefficients))
    schemes = [parse_spec(item) if isinstance(item, str) else item for item in protections]
    attacks = [parse_merger(item) if isinstance(item, str) else item for item in mergers]
    for scheme in schemes:
        if scheme.name not in PROTECTIONS:
            raise UnknownNameError("protection", scheme.name, PROTECTIONS)
    _check_distinct("protection", schemes)
    return cells(schemes, attacks, alphas, world=world, seed=seed)


def cells(
    schemes: Iterable[Spec],
    mergers: Iterable[str | Merger],
    coefficients: Sequence[float],
    *,
    world: str,
    seed: int,
) -> tuple[Case, ...]:
    """`expand` for schemes that need not be registered.

    Raises:
        UnknownNameError, ParameterError: as `expand`, but for what concerns protections.
    """
    alphas = check_coefficients(list(coefficients))
    attacks = [parse_merger(item) if isinstance(item, str) else item for item in mergers]
    _check_distinct("merger", attacks)  # equal with all parameters, however they are written
    return tuple(
        Case(scheme, attack, alpha, world, seed)
        for scheme, attack in product(schemes, attacks)
        for alpha in (alphas if attack.method.takes_coefficient else (None,))
    )


def _check_distinct(kind: str, items: Sequence[object]) -> None:
    if not items:
        raise ParameterError(f"no {kind} is given; expected at least one")
    if len(set(items)) != len(items):
        repeated = next(item for index, item in enumerate(items) if item in items[:index])
        raise ParameterError(f"the {kind} {repeated} is given more than once")

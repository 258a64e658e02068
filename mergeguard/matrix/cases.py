"""Cases: which cells a run consists of. No torch here, so that collecting thousands of them is quick."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from mergeguard.errors import ParameterError
from mergeguard.matrix.outcome import case_id
from mergeguard.mergers.registry import DEFAULT_COEFFICIENTS, DEFAULT_MERGERS, parse_merger
from mergeguard.specs import Spec, parse_spec

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from mergeguard.mergers.contract import Merger

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
    if not values:
        raise ParameterError("no coefficient is given; expected numbers such as 0.1,0.5")
    for value in values:
        if math.isnan(value) or not 0 <= value <= 1:
            raise ParameterError(f"the coefficient {value:g} is outside [0, 1]")
    if len(set(values)) != len(values):
        repeated = next(value for value in values if values.count(value) > 1)
        raise ParameterError(f"the coefficient {repeated:g} is given more than once")
    return tuple(sorted(values))


def expand(
    protections: Iterable[str | Spec],
    mergers: Iterable[str | Merger] = DEFAULT_MERGERS,
    coefficients: Sequence[float] = DEFAULT_COEFFICIENTS,
    *,
    world: str = DEFAULT_WORLD,
    seed: int = DEFAULT_SEED,
) -> tuple[Case, ...]:
    """All cases, protections outermost and coefficients innermost; a merger without a coefficient has one case.

    Raises:
        UnknownNameError, ParameterError: a name or parameter does not exist, or something is given twice.
    """
    alphas = check_coefficients(list(coefficients))
    schemes = [parse_spec(item) if isinstance(item, str) else item for item in protections]
    attacks = [parse_merger(item) if isinstance(item, str) else item for item in mergers]
    for kind, items in (("protection", [str(item) for item in schemes]), ("merger", [str(item) for item in attacks])):
        if len(set(items)) != len(items):
            repeated = next(item for item in items if items.count(item) > 1)
            raise ParameterError(f"the {kind} {repeated} is given more than once")
    return tuple(
        Case(scheme, attack, alpha, world, seed)
        for scheme, attack in product(schemes, attacks)
        for alpha in (alphas if attack.method.takes_coefficient else (None,))
    )

"""Weights of the models in a merge."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mergeguard.errors import ParameterError

if TYPE_CHECKING:
    from collections.abc import Sequence

_SMALLEST_SUM = 1e-8  # mergekit 0.1.5 silently divides by 1 below this; rounding leaves sums such as 6e-17


def coefficient_weights(coefficient: float, donors: int) -> list[float]:
    """Weights [alpha, (1 - alpha) / donors, ...]: the protected model's, then the donors' equal shares of the rest.

    Args:
        coefficient: alpha, in [0, 1].
        donors: number of donors, at least 1.

    Raises:
        ParameterError: an argument outside its domain.
    """
    if not 0 <= coefficient <= 1:
        raise ParameterError(f"coefficient {coefficient} is outside [0, 1]; it is the protected model's share")
    if donors < 1:
        raise ParameterError(f"a merge at a coefficient needs at least one donor, got {donors}")
    return [coefficient] + [(1 - coefficient) / donors] * donors


def check_weights(weights: Sequence[float], models: int) -> None:
    """Refuse weights that are not finite, or not one per model.

    Raises:
        ParameterError: they are not.
    """
    if len(weights) != models:
        raise ParameterError(f"{len(weights)} weights for {models} models; expected one per model")
    if not all(math.isfinite(weight) for weight in weights):
        raise ParameterError(f"weights must be finite numbers, got {list(weights)}")


def check_normalizable(weights: Sequence[float]) -> None:
    """Refuse weights whose sum is 0, by which `normalize` would have to divide.

    Raises:
        ParameterError: the sum is 0 up to rounding.
    """
    if abs(math.fsum(weights)) < _SMALLEST_SUM:
        raise ParameterError(f"weights {list(weights)} sum to 0, so they cannot be normalised; set normalize=false")

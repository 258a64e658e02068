"""NearSwap: the first model, moved towards the second where the two already agree."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeguard.mergers.contract import Method, Parameter, Parameters, always

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

PRIMARY = Parameter(
    "primary", "first", "which of the two models is mergekit's base_model; last swaps their parts", ("first", "last")
)
_SMALLEST_DIFFERENCE = 1e-6  # as mergekit 0.1.5: a smaller one divides t as if it were this


def primary_first(models: Sequence[Tensor], parameters: Parameters) -> tuple[Tensor, Tensor]:
    """The two models, the one that `PRIMARY` names first."""
    first, last = models
    return (first, last) if parameters["primary"] == "first" else (last, first)


def nearswap(primary: Tensor, other: Tensor, t: float) -> Tensor:
    """Move a towards b by t, at most to b: s b + (1 - s) a with s = min(1, t / |a - b|).

    There is no paper; the recipe of huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001 is the source. Each operation
    is rounded to the tensors' own dtype, as in mergekit 0.1.5.

    Args:
        primary: a, any shape, floating dtype; mergekit's base_model.
        other: b, of the shape and dtype of a.
        t: at least 0, in the unit of the weights.

    Returns:
        A new tensor of the shape and dtype of a. As in mergekit 0.1.5, bit for bit.
    """
    distance = (primary - other).abs()
    share = (t / distance.clamp(min=_SMALLEST_DIFFERENCE)).clamp(min=0, max=1)
    return share * other + (1 - share) * primary


def _combine(_base: Tensor, models: Sequence[Tensor], _weights: Sequence[float], parameters: Parameters) -> Tensor:
    return nearswap(*primary_first(models, parameters), parameters["t"])


NEARSWAP = Method(
    name="nearswap",
    summary="the first model, replaced by the second where they are close",
    citation="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    combine=_combine,
    parameters=(
        # mergekit has no default; this is the t of the published recipe, which its name states.
        Parameter(
            "t", 0.0001, "how far a weight moves at most; mergekit requires it, this is the recipe's", at_least=0.0
        ),
        PRIMARY,
    ),
    elementwise=always,
    base="primary",
    weighting="none",
    min_models=2,
    max_models=2,
)

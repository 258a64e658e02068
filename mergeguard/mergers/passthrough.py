"""Passthrough: one model's tensors as they are, or scaled; what stacks of layers are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeguard.mergers.contract import Method, Parameter, Parameters, always

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def passthrough(model: Tensor, *, scale: float = 1.0) -> Tensor:
    """The product scale * theta, rounded once to the tensor's dtype (mergekit 0.1.5, `passthrough`; there is no paper).

    Args:
        model: any shape, floating dtype.
        scale: 1 gives the same bits, 0 gives zeros (which switches off a block that adds to the residual stream).

    Returns:
        A new tensor of the model's shape and dtype.
    """
    return model.clone() if scale == 1 else model * scale


def _combine(_base: Tensor, models: Sequence[Tensor], _weights: Sequence[float], parameters: Parameters) -> Tensor:
    return passthrough(models[0], scale=parameters["scale"][0])


PASSTHROUGH = Method(
    name="passthrough",
    summary="one model, unchanged or scaled",
    citation="mergekit 0.1.5 (passthrough)",
    combine=_combine,
    parameters=(Parameter("scale", 1.0, "factor on every tensor", per_model=True),),
    elementwise=always,
    base="none",
    weighting="none",
    max_models=1,
)

"""ExPO: beyond the merged model, along the line from the base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeguard.mergers.contract import Method, Parameter, Parameters, always

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def weighted_difference(base: Tensor, models: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i (theta_i - theta_base), in float32 (float64 for float64), in the order given."""
    import torch

    accumulator = torch.promote_types(base.dtype, torch.float32)
    origin = base.to(accumulator)
    mixed = torch.zeros_like(origin)
    for model, weight in zip(models, weights, strict=True):
        # Not add(alpha=weight), whose fused multiply-add may round the last elements of a span differently.
        mixed += (model.to(accumulator) - origin) * weight
    return mixed


def expo(base: Tensor, models: Sequence[Tensor], weights: Sequence[float], *, extrapolation: float = 0.1) -> Tensor:
    """theta_1 + alpha (theta_1 - theta_0), theta_0 the base (Zheng et al. 2024, arXiv:2404.16792, section 2).

    Both the authors' code (chujiezheng/LLM-Extrapolation, extrapolate.py) and FusionBench's (tanganke/fusion_bench,
    method/linear/expo.py) extrapolate from the tuned model theta_1, not from theta_0 as a docstring of the latter has
    it. FusionBench averages several models into theta_1; here it is theta_0 + sum_i w_i (theta_i - theta_0), so one
    model of weight 1 is the paper and weights 1/n are FusionBench's average. Altogether
    theta_0 + (1 + alpha) sum_i w_i (theta_i - theta_0), computed in at least float32 and rounded once.

    Args:
        base: theta_0, the model before alignment; any shape, floating dtype.
        models: of the base's shape and dtype.
        weights: one per model.
        extrapolation: alpha; 0 is task arithmetic, below 0 interpolates.

    Returns:
        A new tensor of the base's shape and dtype.
    """
    return (base + weighted_difference(base, models, weights) * (1 + extrapolation)).to(base.dtype)


def _combine(base: Tensor, models: Sequence[Tensor], weights: Sequence[float], parameters: Parameters) -> Tensor:
    return expo(base, models, weights, extrapolation=parameters["extrapolation"])


EXPO = Method(
    name="expo",
    summary="beyond the merged model, along the line from the base (model extrapolation)",
    citation="Zheng et al. 2024, arXiv:2404.16792",
    combine=_combine,
    parameters=(
        Parameter(
            "extrapolation", 0.1, "alpha, how far beyond; .1 as in FusionBench, the authors find .3 to .5 usually good"
        ),
    ),
    elementwise=always,
)

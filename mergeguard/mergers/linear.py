"""Model Soups: the weighted average of the models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeguard.mergers.contract import Method, Parameter, Parameters, always
from mergeguard.mergers.weights import check_normalizable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def linear(models: Sequence[Tensor], weights: Sequence[float], *, normalize: bool = True) -> Tensor:
    """sum_i w_i theta_i, divided by sum_i w_i with `normalize` (Wortsman et al. 2022, arXiv:2203.05482).

    The paper's uniform soup has equal weights; its greedy soup only chooses which models enter. Accumulates in
    float32 (float64 for float64) with fused multiply-adds in the order given and rounds once, as mergekit 0.1.5 does.

    Args:
        models: tensors of one shape and floating dtype.
        weights: one per model.
        normalize: divide by the sum of the weights.

    Returns:
        A new tensor of the models' shape and dtype.

    Raises:
        ParameterError: `normalize`, and the weights sum to 0.
    """
    import torch

    accumulator = torch.promote_types(models[0].dtype, torch.float32)
    factors = torch.tensor(weights, dtype=accumulator, device=models[0].device)
    merged = torch.zeros_like(models[0], dtype=accumulator)
    for model, factor in zip(models, factors, strict=True):
        merged.addcmul_(model, factor)
    if normalize:
        check_normalizable(weights)
        merged.div_(factors.sum())
    return merged.to(models[0].dtype)


def _combine(_base: Tensor, models: Sequence[Tensor], weights: Sequence[float], parameters: Parameters) -> Tensor:
    return linear(models, weights, normalize=parameters["normalize"])


LINEAR = Method(
    name="linear",
    summary="weighted average of the models (Model Soups)",
    citation="Wortsman et al. 2022, arXiv:2203.05482",
    combine=_combine,
    parameters=(Parameter("normalize", True, "divide by the sum of the weights"),),
    elementwise=always,
    base="none",
)

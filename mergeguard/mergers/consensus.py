"""Consensus task arithmetic: keep the entries of the merged task vector that matter to several models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeguard.mergers.contract import Method, Parameter, Parameters, always
from mergeguard.mergers.task_arithmetic import SCALE, total

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def consensus_task_arithmetic(
    base: Tensor,
    models: Sequence[Tensor],
    weights: Sequence[float],
    *,
    scale: float = 1.0,
    k: int = 2,
    tall_mask_lambda: float = 0.4,
) -> Tensor:
    """The base + scale * tau where at least k TALL masks agree, else the base (Wang et al. 2024, arXiv:2405.07813).

    With tau_i = w_i (theta_i - theta_base) and tau their sum, model i's TALL mask (eq. 5) is
    |tau_i| > |tau - tau_i| * tall_mask_lambda; the consensus mask (section 5) holds where at least k do. The comparison
    is strict, as in the authors' code (nik-dim/tall_masks): with "at least" every untouched entry would count.

    The paper has no weights. As they multiply the task vectors, any equal weights give its masks, and a model of
    weight 0 changes nothing. The authors choose tall_mask_lambda per task among .2, .3, .4, .5, .6 by validation;
    the default is the middle. Computed in at least float32 and rounded once.

    Args:
        base: any shape, floating dtype.
        models: of the base's shape and dtype.
        weights: one per model.
        scale: the scaling coefficient of task arithmetic.
        k: 2 drops "catastrophic" and "selfish" entries (no model's, one model's), 1 the former, 0 is task arithmetic.
        tall_mask_lambda: lambda_t of eq. 5, the same for every model.

    Returns:
        A new tensor of the base's shape and dtype.
    """
    import torch

    accumulator = torch.promote_types(base.dtype, torch.float32)
    origin = base.to(accumulator)
    vectors = [(model.to(accumulator) - origin) * weight for model, weight in zip(models, weights, strict=True)]
    merged = total(vectors)
    masks = [vector.abs() > (merged - vector).abs() * tall_mask_lambda for vector in vectors]
    agreed = torch.stack(masks).sum(dim=0) >= k
    return (origin + torch.where(agreed, merged, 0) * scale).to(base.dtype)


def _combine(base: Tensor, models: Sequence[Tensor], weights: Sequence[float], parameters: Parameters) -> Tensor:
    return consensus_task_arithmetic(
        base,
        models,
        weights,
        scale=parameters["lambda"],
        k=parameters["k"],
        tall_mask_lambda=parameters["tall_mask_lambda"],
    )


CONSENSUS_TASK_ARITHMETIC = Method(
    name="consensus_task_arithmetic",
    summary="task arithmetic on the entries that matter to at least k models (TALL masks)",
    citation="Wang et al. 2024, arXiv:2405.07813",
    combine=_combine,
    parameters=(
        SCALE,
        Parameter("k", 2, "how many models' TALL masks an entry needs to stay", at_least=0),
        Parameter("tall_mask_lambda", 0.4, "lambda of the masks: larger ones select less (eq. 5)", at_least=0.0),
    ),
    elementwise=always,
)

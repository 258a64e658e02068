"""TIES-Merging: trim, elect sign, disjoint merge."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeguard.mergers.contract import Generators, Method, Parameter, Parameters, Prepared
from mergeguard.mergers.spans import each
from mergeguard.mergers.sparsify import trim
from mergeguard.mergers.task_arithmetic import SCALE, scalars, task_vectors, total
from mergeguard.mergers.weights import check_normalizable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

DENSITY = Parameter("density", 1.0, "share of each task vector that stays", above=0.0, at_most=1.0, per_model=True)
ELECTION = (
    Parameter(
        "scope", "tensor", "what is one vector: each tensor (mergekit) or the whole model (paper)", ("tensor", "model")
    ),
    Parameter(
        "zero_sign",
        "positive",
        "sign elected by a sum of 0: + (mergekit) or the commonest sign (paper's code)",
        ("positive", "majority"),
    ),
    Parameter(
        "divisor",
        "weights",
        "what normalize divides by: the agreeing models' weights (mergekit) or their number (paper)",
        ("weights", "models"),
    ),
)


def ties(
    base: Tensor,
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    *,
    scale: float = 1.0,
    normalize: bool = True,
    zero_sign: str = "positive",
    divisor: str = "weights",
) -> Tensor:
    """The base + lambda * the disjoint merge of weighted task vectors (arXiv:2306.01708, Algorithm 1).

    At each position the sign of the sum of the w_i delta_i is elected; those of that sign are summed, and with
    `normalize` divided. An entry of 0 never agrees. Where one model alone agrees and `divisor` is "weights", its
    weight cancels: its task vector enters at full strength at any weight.

    The paper has no weights: it is every weight 1 with `normalize`, `zero_sign="majority"`, `divisor="models"`, and
    task vectors trimmed over the whole model (`scope="model"` of the merger). mergekit 0.1.5 is the defaults.

    Args:
        base: any shape, floating dtype.
        deltas: task vectors, trimmed, of the base's shape and dtype.
        weights: one per task vector.
        scale: lambda.
        normalize: divide the sum (the paper's disjoint mean) or not (its "dis-sum").
        zero_sign: the sign elected where the sum is 0: "positive", or "majority", the commoner sign among all sums,
            + if they are equally common.
        divisor: "weights" of the agreeing models, or the number of agreeing "models".

    Returns:
        A new tensor of the base's shape and dtype.

    Raises:
        ParameterError: `normalize` by weights that sum to 0.
    """
    import torch

    factors = scalars(weights, base)
    # In float32 16-bit sums are exact before they are rounded once, and cost fewer conversions.
    wide = torch.promote_types(base.dtype, torch.float32)
    weighted = [(delta * factor).to(wide) for delta, factor in zip(deltas, factors, strict=True)]
    sign = elect(weighted, zero_sign)
    # Comparisons into floats and a product with +-1 are exact, and vectorised where masks of bool are not.
    agreeing = [entry.mul_(sign).relu_() for entry in weighted]
    mixed = total(agreeing).mul_(sign).to(base.dtype)
    if normalize:
        if divisor == "weights":
            check_normalizable(weights)
        shares = factors if divisor == "weights" else scalars([1.0] * len(weights), base)
        sums = total([entry.gt_(0).mul_(share) for entry, share in zip(agreeing, shares, strict=True)]).to(base.dtype)
        mixed /= sums.add_(torch.eq(sums, 0, out=torch.empty_like(sums)))
    return base + (mixed if scale == 1 else mixed * scale)


def elect(weighted: Sequence[Tensor], zero_sign: str) -> Tensor:
    """The elected sign, 1 or -1 in the tensors' dtype; see `ties`."""
    import torch

    sums = total(weighted)
    if zero_sign == "positive":
        return torch.ge(sums, 0, out=sums).mul_(2).sub_(1)
    majority = 1 if torch.count_nonzero(sums > 0) >= torch.count_nonzero(sums < 0) else -1
    return torch.where(sums == 0, majority, sums.sign())


def elementwise(parameters: Parameters) -> bool:
    """Whether a position's sign is elected at that position alone."""
    return bool(parameters["zero_sign"] == "positive")


def combine(base: Tensor, deltas: Sequence[Tensor], weights: Sequence[float], parameters: Parameters) -> Tensor:
    return ties(
        base,
        deltas,
        weights,
        scale=parameters["lambda"],
        normalize=parameters["normalize"],
        zero_sign=parameters["zero_sign"],
        divisor=parameters["divisor"],
    )


def _prepare(base: Tensor, models: Sequence[Tensor], parameters: Parameters, _generators: Generators) -> Prepared:
    return each(
        [
            trim(delta, base, density, rescale=parameters["rescale"])
            for delta, density in zip(task_vectors(base, models), parameters["density"], strict=True)
        ]
    )


TIES = Method(
    name="ties",
    summary="trim the task vectors, elect a sign per position, merge those that agree",
    citation="Yadav et al. 2023, arXiv:2306.01708",
    combine=combine,
    parameters=(
        DENSITY,
        Parameter("normalize", True, "divide the sum of the agreeing task vectors; see divisor"),
        SCALE,
        Parameter(
            "rescale", "none", "after trimming: none (paper) or restore the L1 norm (mergekit's option)", ("none", "l1")
        ),
        *ELECTION,
    ),
    prepare=_prepare,
    elementwise=elementwise,
)

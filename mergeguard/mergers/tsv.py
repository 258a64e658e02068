"""TSV-Merge: keep each model's leading singular vectors, make them orthogonal across the models, add."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeguard.mergers.contract import Generators, Method, Parameters, Prepared
from mergeguard.mergers.expo import weighted_difference
from mergeguard.mergers.spectral import is_matrix, isometry, singular_parts
from mergeguard.mergers.task_arithmetic import SCALE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def orthogonal_parts(base: Tensor, models: Sequence[Tensor]) -> list[Tensor]:
    """The models' task singular vectors, truncated and whitened (Gargiulo et al. 2025, arXiv:2412.00081, TSV-Merge).

    Of each of T task matrices the min(m, n) // T leading singular triplets are kept and set side by side as U, S, V.
    U and V are replaced by their polar factors (orthogonal Procrustes), which whitens them without moving them more
    than needed. Where that leaves a direction free (two equal models, say) it is 0; the authors' code
    (AntoAndGar/task_singular_vectors, TSVM_utils.py) then takes whatever the decomposition gives.

    Args:
        base: a matrix of at least T rows and columns, floating.
        models: T of the base's shape and dtype.

    Returns:
        U (m, T k), S (T k,) and V^T (T k, n) in at least float32, model by model.
    """
    import torch

    accumulator = torch.promote_types(base.dtype, torch.float32)
    rank = min(base.shape) // len(models)
    lefts, values, rights = [], [], []
    for model in models:
        left, value, right = singular_parts(model.to(accumulator) - base.to(accumulator))
        lefts.append(left[:, :rank])
        values.append(value[:rank])
        rights.append(right[:rank])
    return [isometry(torch.cat(lefts, dim=1)), torch.cat(values), isometry(torch.cat(rights))]


def tsv_merge(
    base: Tensor, left: Tensor, values: Tensor, right: Tensor, weights: Sequence[float], *, scale: float = 1.0
) -> Tensor:
    """The base + scale * U (w S) V^T, for a matrix; U, S, V^T as `orthogonal_parts` gives them.

    The paper has no weights, which is every weight 1. A weight multiplies its model's singular values. A model of
    weight 0 still holds its share of the rank, and still whitens: leave it out of the merge to be rid of it.

    Returns:
        A new tensor of the base's shape and dtype, computed in at least float32 and rounded once.
    """
    import torch

    each = torch.tensor(weights, dtype=values.dtype, device=values.device)
    weighted = values * each.repeat_interleave(len(values) // len(weights))
    return (base + (left * weighted) @ right * scale).to(base.dtype)


def averaged(base: Tensor, models: Sequence[Tensor], weights: Sequence[float], *, scale: float = 1.0) -> Tensor:
    """The base + scale * the mean of the weighted differences: what the methods do with all but matrices.

    Returns:
        A new tensor of the base's shape and dtype, computed in at least float32 and rounded once.
    """
    return (base + weighted_difference(base, models, weights) / len(models) * scale).to(base.dtype)


def _prepare(base: Tensor, models: Sequence[Tensor], _parameters: Parameters, _generators: Generators) -> Prepared:
    parts = orthogonal_parts(base, models) if is_matrix(base, rank=len(models)) else list(models)
    return lambda _whole: parts


def _combine(base: Tensor, parts: Sequence[Tensor], weights: Sequence[float], parameters: Parameters) -> Tensor:
    scale = parameters["lambda"]
    if is_matrix(base, rank=len(weights)):
        left, values, right = parts
        return tsv_merge(base, left, values, right, weights, scale=scale)
    return averaged(base, parts, weights, scale=scale)


TSV_MERGE = Method(
    name="tsv_merge",
    summary="the models' leading singular vectors, made orthogonal across models; other tensors averaged",
    citation="Gargiulo et al. 2025, arXiv:2412.00081",
    combine=_combine,
    parameters=(SCALE,),
    prepare=_prepare,
)

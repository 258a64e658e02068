"""Arcee Fusion: the first model, with the entries of the second whose change is important."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeguard.mergers.contract import Generators, Method, Parameters, Prepared, always, part
from mergeguard.mergers.nearswap import PRIMARY, primary_first

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_SMALLEST_SHARE = 1e-8  # as mergekit 0.1.5; 0 in float16


def fused(primary: Tensor, other: Tensor) -> Tensor:
    """Which entries of the other model are taken: those of unusual importance; bool, of the tensors' shape.

    An entry's importance is |b - a| times the Kullback-Leibler divergence KL(softmax(b) || softmax(a)) of its row,
    along the last dimension. Those at or above median + 1.5 (upper quartile - lower quartile) are taken. There is no
    paper; mergekit 0.1.5 is the source.

    The quartiles are those of all entries, the elements of rank floor(q (n - 1)). mergekit 0.1.5 estimates them, above
    1,000,000 entries, from as many drawn with replacement from torch's global generator; then its threshold differs
    from ours by its sampling error. All maths are in the tensors' own dtype; in float16 a row whose softmax underflows
    to 0 has the importance NaN, and the first model's entries stay.

    Args:
        primary: a, any shape, floating dtype; mergekit's base_model.
        other: b, of the shape and dtype of a.
    """
    import torch

    if primary.numel() == 0:
        return torch.zeros_like(primary, dtype=torch.bool)
    importance = _row_divergence(other, primary) * (other - primary).abs()
    lower, median, upper = _quartiles(importance.flatten())
    return importance >= median + 1.5 * (upper - lower)


def _row_divergence(params: Tensor, base: Tensor) -> Tensor:
    import torch

    p = torch.softmax(params, dim=-1) + _SMALLEST_SHARE
    q = torch.softmax(base, dim=-1) + _SMALLEST_SHARE
    return (p * torch.log(p / q)).sum(dim=-1, keepdim=True)


def _quartiles(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    import numpy as np
    import torch

    ranks = [quarter * (values.numel() - 1) // 4 for quarter in (1, 2, 3)]
    if values.device.type == "cpu":  # three partitions cost a fraction of a sort
        exact = values.to(torch.promote_types(values.dtype, torch.float32)).numpy()  # numpy lacks bfloat16
        found = torch.from_numpy(np.partition(exact, ranks)[ranks]).to(values.dtype)
    else:
        found = values.sort().values[ranks]
    lower, median, upper = found
    return lower, median, upper


def arcee_fusion(primary: Tensor, other: Tensor, taken: Tensor) -> Tensor:
    """The a + (b - a) where `taken`, else a; each operation rounded to the tensors' own dtype; see `fused`.

    Returns:
        A new tensor of the shape and dtype of a: mergekit 0.1.5's, bit for bit up to 1,000,000 entries, except that
        mergekit leaves 16-bit types in float32.
    """
    import torch

    return primary + torch.where(taken, other - primary, 0)


def _prepare(_base: Tensor, models: Sequence[Tensor], parameters: Parameters, _generators: Generators) -> Prepared:
    primary, other = primary_first(models, parameters)
    taken = fused(primary, other)
    return lambda span: [part(primary, span), part(other, span), part(taken, span)]


def _combine(_base: Tensor, parts: Sequence[Tensor], _weights: Sequence[float], _parameters: Parameters) -> Tensor:
    return arcee_fusion(*parts)


ARCEE_FUSION = Method(
    name="arcee_fusion",
    summary="the first model, with the second's entries where their change is important",
    citation="https://arcee.ai, as in mergekit 0.1.5",
    combine=_combine,
    parameters=(PRIMARY,),
    prepare=_prepare,
    elementwise=always,
    base="primary",
    weighting="none",
    min_models=2,
    max_models=2,
)

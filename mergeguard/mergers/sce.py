"""SCE: select the entries on which the models disagree most, compute weights, erase minority signs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeguard.mergers.contract import Generators, Method, Parameter, Parameters, Prepared, always, part
from mergeguard.mergers.selection import largest
from mergeguard.mergers.spans import each, spans
from mergeguard.mergers.sparsify import zeros_and_ones
from mergeguard.mergers.task_arithmetic import task_vectors, total
from mergeguard.mergers.ties import elect

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from mergeguard.mergers.contract import Span

_SMALLEST_SUM = 1e-6  # as mergekit 0.1.5: of mean squares, below it all models weigh the same; of weights, a divisor
_SUM_PART = 2**14  # below 2**15 elements torch sums in one thread, so that a mean does not depend on the thread count


def sce(base: Tensor, deltas: Sequence[Tensor], shares: Tensor) -> Tensor:
    """The base + the weighted mean of the task vectors whose sign agrees (Wan et al. 2024, arXiv:2408.07990).

    At each position the sign of the sum of the delta_i is elected (0 counts as +); those of that sign are averaged
    with their shares. Computed in the tensors' own dtype as in mergekit 0.1.5, bit for bit for up to four models.

    Args:
        base: any shape, floating dtype.
        deltas: task vectors, 0 where not selected, of the base's shape and dtype.
        shares: shape (len(deltas),), the base's dtype; see `model_shares`.

    Returns:
        A new tensor of the base's shape and dtype.
    """
    sign = elect(deltas, "positive")
    agreeing = [(delta * sign).relu_() for delta in deltas]  # see `ties`: exact, and vectorised where bool is not
    mixed = total([entry * share for entry, share in zip(agreeing, shares, strict=True)]).mul_(sign)
    divisor = total([entry.gt_(0).mul_(share) for entry, share in zip(agreeing, shares, strict=True)])
    return base + mixed.div_(divisor.clamp_(min=_SMALLEST_SUM))


def variance(deltas: Sequence[Tensor]) -> Tensor:
    """The population variance across models, elementwise.

    By Welford's recurrence in float64, rounded once to the tensors' dtype: the same bits as `torch.var(unbiased=False)`
    over a stack, on a CPU; which entries are selected depends on the last one.
    """
    import torch

    mean = deltas[0].double()
    squares = torch.zeros_like(mean)
    for count, delta in enumerate(deltas[1:], start=2):
        values = delta.double()
        change = values - mean
        mean = torch.add(mean, change / count)
        squares += change.mul_(values.sub_(mean))
    return squares.div_(len(deltas)).to(deltas[0].dtype)


def selected(deltas: Prepared, size: int, select_topk: float) -> Tensor:
    """Which entries have the largest variance across models: a share `select_topk` of those with any.

    Among equal variances the lowest indices are selected; mergekit 0.1.5 leaves that to an unstable selection.

    Args:
        deltas: the task vectors.
        size: their number of elements, at least 1.
        select_topk: in [0, 1).

    Returns:
        A flat bool tensor.
    """
    import torch

    variances = torch.empty(size, dtype=deltas(slice(0, 1))[0].dtype)
    for span in spans(size):
        variances[span] = variance(deltas(span))
    count = int(torch.count_nonzero(variances) * select_topk)  # in float32, as mergekit: not int(varying * select_topk)
    top = largest(lambda span: part(variances, span), size, count)
    mask = torch.empty(size, dtype=torch.bool)
    for span in spans(size):
        mask[span] = top.keeps(variances[span], span)
    return mask


def model_shares(deltas: Prepared, like: Tensor) -> Tensor:
    """Each model's mean squared task vector, divided by their sum.

    As in mergekit 0.1.5, squares and means are rounded to the tensors' dtype, and all models weigh the same where the
    means sum to less than 1e-6. Fine-tunes rarely move a tensor by 0.001 per entry, so that is the common case; the
    paper has no such limit. Squares that overflow are computed in float64. Sums are taken in parts of 16,384 elements,
    the same for any number of threads; over larger tensors mergekit's last bits depend on its threads.

    Args:
        deltas: the task vectors.
        like: a tensor of their shape, dtype and device, with at least one element.

    Returns:
        Shape (number of models,), the dtype and device of `like`.
    """
    import torch

    means = _mean_squares(deltas, like.numel(), like.dtype)
    if not torch.isfinite(means.sum()):
        means = _mean_squares(deltas, like.numel(), torch.float64)
    whole = means.sum().item()
    if whole < _SMALLEST_SUM:
        return torch.ones_like(means) / len(means)
    return (means / whole).to(like.dtype)


def _mean_squares(deltas: Prepared, size: int, work: torch.dtype) -> Tensor:
    """The mean over all elements of each task vector's squares; squares and means are rounded to `work`."""
    import torch

    accumulator = torch.promote_types(work, torch.float32)
    example = deltas(slice(0, 1))
    sums = torch.empty(len(example), -(-size // _SUM_PART), dtype=accumulator, device=example[0].device)
    for span in spans(size):
        for row, delta in zip(sums, deltas(span), strict=True):
            pieces = torch.split(delta.to(work).square(), _SUM_PART)
            for place, piece in enumerate(pieces, span.start // _SUM_PART):
                row[place] = piece.sum(dtype=accumulator)
    return (sums.sum(dim=1) / size).to(work)


def _prepare(base: Tensor, models: Sequence[Tensor], parameters: Parameters, _generators: Generators) -> Prepared:
    size, select_topk = base.numel(), parameters["select_topk"]
    deltas = each(task_vectors(base, models))
    if size == 0:
        return lambda span: [*deltas(span), base.new_ones(len(models))]
    kept = deltas if select_topk >= 1 else _only(selected(deltas, size, select_topk), deltas, base)
    shares = model_shares(kept, base)
    return lambda span: [*kept(span), shares]


def _only(mask: Tensor, deltas: Prepared, like: Tensor) -> Prepared:
    """The task vectors, 0 where the flat mask is False."""
    factors = zeros_and_ones(mask.view(like.shape), like.device)

    def kept(span: Span) -> list[Tensor]:
        factor = factors(span)
        return [value * factor for value in deltas(span)]

    return kept


def _combine(base: Tensor, parts: Sequence[Tensor], _weights: Sequence[float], _parameters: Parameters) -> Tensor:
    *deltas, shares = parts
    return sce(base, deltas, shares)


SCE = Method(
    name="sce",
    summary="average the entries that vary most between models, weighted by their squares, where signs agree",
    citation="Wan et al. 2024, arXiv:2408.07990",
    combine=_combine,
    parameters=(
        Parameter(
            "select_topk", 1.0, "share of the varying entries, those that vary most, that stays", at_least=0, at_most=1
        ),
    ),
    prepare=_prepare,
    elementwise=always,
    weighting="none",
)

"""Reinforced Agent Merging: average what several models changed, keep (or reinforce) what one alone changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeguard.mergers.contract import Generators, Method, Parameter, Parameters, Prepared, always, part
from mergeguard.mergers.spans import spans
from mergeguard.mergers.task_arithmetic import total

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

EPSILON = Parameter("epsilon", 1e-5, "a larger difference from the base counts as changed", at_least=0.0)
_CITATION = "arXiv:2601.13572"


def ram(base: Tensor, models: Sequence[Tensor], *, epsilon: float = 1e-5) -> Tensor:
    """The base + at each position the mean difference of the models that changed it (arXiv:2601.13572, RAM).

    A model changed an entry where |theta_i - theta_base| > epsilon. One that a single model changed is taken whole.
    All maths are in the tensors' own dtype, `epsilon` rounded to it; the sum accumulates in at least float32.

    Args:
        base: any shape, floating dtype.
        models: of the base's shape and dtype.
        epsilon: see above, in the unit of the weights.

    Returns:
        A new tensor of the base's shape and dtype. As in mergekit 0.1.5, bit for bit for up to four models.
    """
    deltas, changed, count = _changes(base, models, epsilon)
    return base + total([delta * own / count for delta, own in zip(deltas, changed, strict=True)])


def _changes(base: Tensor, models: Sequence[Tensor], epsilon: float) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The task vectors, where each is more than epsilon, and how many are (at least 1)."""
    import torch

    deltas = [model - base for model in models]
    changed = [delta.abs() > epsilon for delta in deltas]
    count = torch.stack(changed).sum(dim=0).clamp(min=1)
    return deltas, changed, count


def ramplus_tl(base: Tensor, models: Sequence[Tensor], factors: Sequence[float], *, epsilon: float = 1e-5) -> Tensor:
    """`ram`, with what model i alone changed multiplied by its factor (arXiv:2601.13572, RAM+).

    That product and the sum are computed in at least float32, the means in the tensors' own dtype, as in mergekit.

    Args:
        base: any shape, floating dtype.
        models: of the base's shape and dtype.
        factors: one per model; see `reinforcement`.
        epsilon: as for `ram`.

    Returns:
        A new tensor of the base's shape and dtype. As in mergekit 0.1.5, bit for bit for up to four models, except
        that mergekit leaves 16-bit types in float32.
    """
    import torch

    accumulator = torch.promote_types(base.dtype, torch.float32)
    deltas, changed, count = _changes(base, models, epsilon)
    alone = count == 1
    shares = [
        torch.where(alone, (delta * own).to(accumulator) * factor, (delta * own / count).to(accumulator))
        for delta, own, factor in zip(deltas, changed, factors, strict=True)
    ]
    return (base + total(shares)).to(base.dtype)


def reinforcement(
    base: Tensor, models: Sequence[Tensor], *, r: float = 0.1, alpha: float = 0.2, epsilon: float = 1e-5
) -> list[float]:
    """Model i's factor 1 + r min(alpha, shared_i / alone_i) (arXiv:2601.13572, RAM+, tensor-local as in mergekit).

    `alone_i` counts the entries that model i alone changed, `shared_i` those that others changed too; in this tensor,
    where the paper counts over the whole model.

    Args:
        base: any shape, floating dtype.
        models: of the base's shape and dtype.
        r: strength of the reinforcement.
        alpha: upper bound of the ratio.
        epsilon: as for `ram`; stands for a count of 0 as well.

    Returns:
        One number of float32 precision per model.
    """
    import torch

    alone, shared = [0] * len(models), [0] * len(models)
    for span in spans(base.numel()):
        _, changed, count = _changes(part(base, span), [part(model, span) for model in models], epsilon)
        for index, own in enumerate(changed):
            by_one = int(torch.count_nonzero(own & (count == 1)))
            alone[index] += by_one
            shared[index] += int(torch.count_nonzero(own)) - by_one
    ratio = torch.tensor(shared) / torch.tensor(alone).clamp(min=epsilon)
    ratio = ratio.nan_to_num(0)  # of a model that changed nothing, with an epsilon of 0
    factors: list[float] = (1 + r * ratio.clamp(min=0, max=alpha)).tolist()
    return factors


def _combine_ram(base: Tensor, models: Sequence[Tensor], _weights: Sequence[float], parameters: Parameters) -> Tensor:
    return ram(base, models, epsilon=parameters["epsilon"])


def _prepare_ramplus(
    base: Tensor, models: Sequence[Tensor], parameters: Parameters, _generators: Generators
) -> Prepared:
    import torch

    options = {name: parameters[name] for name in ("r", "alpha", "epsilon")}
    factors = torch.tensor(reinforcement(base, models, **options))
    return lambda span: [*(part(model, span) for model in models), factors]


def _combine_ramplus(
    base: Tensor, parts: Sequence[Tensor], _weights: Sequence[float], parameters: Parameters
) -> Tensor:
    *models, factors = parts
    return ramplus_tl(base, models, factors.tolist(), epsilon=parameters["epsilon"])


RAM = Method(
    name="ram",
    summary="base plus, at each position, the mean difference of the models that changed it",
    citation=_CITATION,
    combine=_combine_ram,
    parameters=(EPSILON,),
    elementwise=always,
    weighting="none",
)

RAMPLUS_TL = Method(
    name="ramplus_tl",
    summary="ram, with what one model alone changed reinforced",
    citation=_CITATION,
    combine=_combine_ramplus,
    parameters=(
        Parameter("r", 0.1, "strength of the reinforcement"),
        Parameter("alpha", 0.2, "upper bound of the ratio of shared to own changes", at_least=0.0),
        EPSILON,
    ),
    prepare=_prepare_ramplus,
    elementwise=always,
    weighting="none",
)

"""Task arithmetic, and the arithmetic of task vectors that TIES and DARE share.

All of it is done in the tensors' own dtype, as in mergekit 0.1.5: differences, weights and weighted task vectors are
each rounded to it. To merge bfloat16 checkpoints in float32, convert them first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeguard.mergers.contract import Generators, Method, Parameter, Parameters, Prepared, Values, always
from mergeguard.mergers.spans import difference, each
from mergeguard.mergers.weights import check_normalizable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

SCALE = Parameter("lambda", 1.0, "scales the merged task vector, after normalisation")


def task_vectors(base: Tensor, models: Sequence[Tensor]) -> list[Values]:
    """theta_i - theta_base (Ilharco et al. 2023, arXiv:2212.04089, section 2)."""
    return [difference(model, base) for model in models]


def scalars(values: Sequence[float], like: Tensor) -> list[Tensor]:
    """`values` as 0-dimensional tensors, rounded to the dtype of `like`."""
    import torch

    return list(torch.tensor(values, dtype=like.dtype, device=like.device))


def total(tensors: Sequence[Tensor]) -> Tensor:
    """The sum in the order given, accumulated in at least float32 and rounded once to the tensors' dtype; a new tensor.

    `torch.sum` over a stack agrees bit for bit up to four tensors; from five on its order depends on an element's
    position in memory, which would make a result depend on the number of threads.
    """
    import torch

    accumulator = torch.promote_types(tensors[0].dtype, torch.float32)
    first, *others = (tensor.to(accumulator) for tensor in tensors)
    if not others:
        return tensors[0].clone()
    result = first + others[0]
    for tensor in others[1:]:
        result += tensor
    return result.to(tensors[0].dtype)


def task_arithmetic(
    base: Tensor, deltas: Sequence[Tensor], weights: Sequence[float], *, scale: float = 1.0, normalize: bool = False
) -> Tensor:
    """The base + lambda * sum_i w_i delta_i (Ilharco et al. 2023, arXiv:2212.04089, section 2).

    The paper has one lambda and no weights, which is every weight 1; weights and `normalize` are mergekit's.

    Args:
        base: any shape, floating dtype.
        deltas: task vectors, of the base's shape and dtype.
        weights: one per task vector.
        scale: lambda.
        normalize: divide the weighted sum by sum_i w_i.

    Returns:
        A new tensor of the base's shape and dtype.

    Raises:
        ParameterError: `normalize`, and the weights sum to 0 (mergekit then divides by 1, in silence).
    """
    factors = scalars(weights, base)
    mixed = total([delta * factor for delta, factor in zip(deltas, factors, strict=True)])
    if normalize:
        check_normalizable(weights)
        mixed = mixed / total(factors)
    return base + (mixed if scale == 1 else mixed * scale)


def combine(base: Tensor, deltas: Sequence[Tensor], weights: Sequence[float], parameters: Parameters) -> Tensor:
    return task_arithmetic(base, deltas, weights, scale=parameters["lambda"], normalize=parameters["normalize"])


def _prepare(base: Tensor, models: Sequence[Tensor], _parameters: Parameters, _generators: Generators) -> Prepared:
    return each(task_vectors(base, models))


TASK_ARITHMETIC = Method(
    name="task_arithmetic",
    summary="base plus the weighted sum of the task vectors",
    citation="Ilharco et al. 2023, arXiv:2212.04089",
    combine=combine,
    parameters=(SCALE, Parameter("normalize", False, "divide the weighted sum by the sum of the weights")),
    prepare=_prepare,
    elementwise=always,
)

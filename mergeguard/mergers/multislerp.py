"""Multi-SLERP: a weighted mean of any number of models on the sphere, in one step through a tangent space."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeguard.mergers.contract import Generators, Method, Parameter, Parameters, Prepared, Values, part
from mergeguard.mergers.spherical import TASK_VECTORS, fill, norm, vector, vector_norm
from mergeguard.mergers.task_arithmetic import total
from mergeguard.mergers.weights import check_normalizable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def multislerp(
    models: Sequence[Tensor],
    weights: Sequence[float],
    *,
    base: Tensor | None = None,
    normalize_weights: bool = True,
    eps: float = 1e-8,
) -> Tensor:
    """The models' directions averaged on the unit sphere, times the weighted mean of their lengths.

    The directions u_i are projected onto the tangent space at m, the direction of sum_i w_i u_i; there their weighted
    mean is taken, and the exponential map brings it back to the sphere (C. Goddard,
    https://goddard.blog/posts/multislerp-wow-what-a-cool-idea; mergekit 0.1.5, `multislerp`). That is the first step
    of the iteration for a Karcher mean, from m. All maths are in the tensors' own dtype, each operation rounded to it.

    A single model is returned as it is. Where |sum_i w_i u_i| < `eps` there is no m: the result is then
    sum_i w_i theta_i, plus the base if there is one. mergekit does that for two models only and stops at more, which
    a tensor that no model has changed is enough for. In float16 `eps` rounds to 0, so that mergekit divides by 0
    where a model (or task vector) is 0 or all are parallel; here the direction of 0 is 0, and sin(0) / 0 is 1.

    Args:
        models: one or more, of one shape and floating dtype.
        weights: one per model.
        base: subtracted from every model, and added to the result.
        normalize_weights: divide the weights by their sum.
        eps: added to lengths before dividing by them.

    Returns:
        A new tensor of the models' shape and dtype. As in mergekit 0.1.5, bit for bit if that runs with one thread and
        there are at most four models; with more, torch adds up the last few elements of a tensor in another order.

    Raises:
        ParameterError: `normalize_weights`, and the weights sum to 0.
    """
    import torch

    norms = torch.stack([vector_norm(model, base) for model in models])
    return _multislerp(models, norms, weights, base, normalize_weights, eps)


def _multislerp(
    models: Sequence[Tensor],
    norms: Tensor,
    weights: Sequence[float],
    base: Tensor | None,
    normalize: bool,
    eps: float,
) -> Tensor:
    import torch

    if len(models) == 1:
        return models[0].clone()
    shares = torch.tensor(weights, dtype=norms.dtype, device=norms.device)
    if normalize:
        check_normalizable(weights)
        shares = shares / shares.sum()
    vectors = [vector(model, base) for model in models]
    units = [_scaled(values, length) for values, length in zip(vectors, _nonzero(norms + eps), strict=True)]

    mean = fill(models[0].new_empty(models[0].numel()), _weighted_sum(units, shares))
    length = norm(mean)
    if length < eps or length == 0:
        merged = fill(mean, _weighted_sum(vectors, shares))
    else:
        mean /= length
        buffer = torch.empty_like(mean)
        dots = [fill(buffer, _product(unit, mean)).sum(dim=-1) for unit in units]
        tangents = [_projected(unit, dot, mean) for unit, dot in zip(units, dots, strict=True)]
        tangent = fill(buffer, _weighted_sum(tangents, shares))
        angle = norm(tangent) + eps
        ratio = torch.where(angle == 0, 1, torch.sin(angle) / angle)
        merged = mean.mul_(torch.cos(angle)).add_(tangent.mul_(ratio)).mul_((norms * shares).sum())
    merged = merged.view(models[0].shape)
    return merged if base is None else merged.add_(base)


def _nonzero(lengths: Tensor) -> Tensor:
    import torch

    return torch.where(lengths == 0, 1, lengths)


def _scaled(values: Values, length: Tensor) -> Values:
    return lambda span: values(span) / length


def _product(values: Values, other: Tensor) -> Values:
    return lambda span: values(span) * other[span]


def _projected(unit: Values, dot: Tensor, mean: Tensor) -> Values:
    return lambda span: unit(span) - dot * mean[span]


def _weighted_sum(vectors: Sequence[Values], shares: Tensor) -> Values:
    return lambda span: total([values(span) * share for values, share in zip(vectors, shares, strict=True)])


def _prepare(base: Tensor, models: Sequence[Tensor], parameters: Parameters, _generators: Generators) -> Prepared:
    import torch

    ancestor = base if parameters["task_vectors"] else None
    norms = torch.stack([vector_norm(model, ancestor) for model in models])
    return lambda span: [*(part(model, span) for model in models), norms]


def _combine(base: Tensor, parts: Sequence[Tensor], weights: Sequence[float], parameters: Parameters) -> Tensor:
    *models, norms = parts
    ancestor = base if parameters["task_vectors"] else None
    return _multislerp(models, norms, weights, ancestor, parameters["normalize_weights"], parameters["eps"])


MULTISLERP = Method(
    name="multislerp",
    summary="spherical average of any number of models, or of their task vectors",
    citation="Goddard 2025, https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    combine=_combine,
    parameters=(
        Parameter("normalize_weights", True, "divide the weights by their sum"),
        Parameter("eps", 1e-8, "added to lengths before dividing by them", at_least=0.0),
        TASK_VECTORS,
    ),
    prepare=_prepare,
    base="optional",
)

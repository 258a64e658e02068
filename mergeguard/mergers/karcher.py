"""The Karcher mean: the point of the sphere that is nearest to all models' directions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeguard.mergers.contract import Method, Parameter, Parameters
from mergeguard.mergers.spans import spans

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def karcher(models: Sequence[Tensor], *, max_iter: int = 10, tol: float = 1e-5) -> Tensor:
    """The Karcher mean of the models' directions, times the mean of their lengths (Karcher 1977; arXiv:2603.04972).

    From the direction of the directions' mean, each iteration maps them to the tangent space at the current point
    (theta / sin(theta) times the part of u_i that is orthogonal to it), averages there and follows the geodesic that
    far. Models of a length up to `tol` have no direction, but count in the mean length. Antipodal models have no
    unique mean: the first model's direction is then where the iteration starts. Norms are computed in float32 (float64
    for float64), everything else in the tensors' own dtype, each operation rounded to it, as in mergekit 0.1.5.

    Args:
        models: one or more, of one shape and floating dtype. A single one is returned as it is.
        max_iter: the most iterations.
        tol: ends the iteration when the step is shorter; in radians.

    Returns:
        A new tensor of the models' shape and dtype. As in mergekit 0.1.5, bit for bit if that runs with one thread.
    """
    import torch

    if len(models) == 1:
        return models[0].clone()
    working = torch.promote_types(models[0].dtype, torch.float32)
    flat = [model.view(-1) for model in models]
    norms = [torch.linalg.vector_norm(values.to(working)) for values in flat]
    directed = [(values, norm) for values, norm in zip(flat, norms, strict=True) if norm > tol]
    if not directed:
        return torch.zeros_like(models[0])
    share = 1 / len(models)
    alpha = share / sum([share] * len(directed))  # mergekit's sum: it may be one rounding away from 1

    unit = torch.empty_like(flat[0])
    mean = torch.zeros_like(flat[0])
    for values, norm in directed:
        for span in spans(len(mean)):
            mean[span] += alpha * (values[span] / norm)
    length = torch.linalg.vector_norm(mean.to(working))
    if length < tol:
        torch.div(*directed[0], out=mean)
    else:
        mean /= length

    tangent = torch.empty_like(mean)
    for _ in range(max_iter):
        tangent.zero_()
        for values, norm in directed:
            torch.div(values, norm, out=unit)
            dot = torch.dot(mean, unit).clamp(-1, 1)
            theta = torch.arccos(dot)
            if theta < tol:
                continue
            factor = alpha * (theta / torch.sin(theta))
            for span in spans(len(mean)):
                tangent[span] += factor * (unit[span] - dot * mean[span])
        step = torch.linalg.vector_norm(tangent.to(working))
        if step < tol:
            break
        stay, go = torch.cos(step).to(mean.dtype), torch.sin(step).to(mean.dtype)
        for span in spans(len(mean)):
            mean[span] = stay * mean[span] + go * (tangent[span] / step)
        length = torch.linalg.vector_norm(mean.to(working))
        if length > tol:
            mean /= length
    scale = sum((share * norm for norm in norms), torch.zeros_like(norms[0]))
    return mean.mul_(scale.to(mean.dtype)).view(models[0].shape)


def _combine(_base: Tensor, models: Sequence[Tensor], _weights: Sequence[float], parameters: Parameters) -> Tensor:
    return karcher(models, max_iter=parameters["max_iter"], tol=parameters["tol"])


KARCHER = Method(
    name="karcher",
    summary="Karcher mean of the models' directions on the sphere",
    citation="Karcher 1977, doi:10.1002/cpa.3160300502; arXiv:2603.04972",
    combine=_combine,
    parameters=(
        Parameter("max_iter", 10, "the most iterations", at_least=0),
        Parameter("tol", 1e-5, "shortest step, in radians, and shortest model that has a direction", at_least=0.0),
    ),
    base="none",
    weighting="none",
)

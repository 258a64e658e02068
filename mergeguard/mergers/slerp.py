"""Spherical linear interpolation of two models: mergekit's slerp, and its nuslerp."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from mergeguard.mergers.contract import WHOLE, Generators, Method, Parameter, Parameters, Prepared, always, part
from mergeguard.mergers.spherical import TASK_VECTORS, fill, norm, vector, vector_norm

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

_PIECE = 1024 * 1024  # elements that mergekit 0.1.5 reduces at once in slerp; part of the order of its additions
_COLLINEAR = 0.9995  # |cos| above which slerp is linear
_SMALLEST_NORM = 1e-8  # slerp leaves vectors that are shorter than this as they are
_SMALLEST_DIVISOR = 1e-7  # nuslerp divides by at least this
_SMALLEST_SINE = 1e-8  # nuslerp is linear up to this
_SMALLEST_SUM = 1e-6  # of nuslerp's weights, below which they count as equal


def slerp(first: Tensor, second: Tensor, t: float) -> Tensor:
    """(sin((1-t) theta) a + sin(t theta) b) / sin(theta), theta the angle between a and b (Shoemake 1985, section 3.3).

    Shoemake interpolates unit vectors; mergekit puts the vectors themselves into the formula, each tensor as one
    vector, so that lengths vary along the way too. Where |cos theta| > 0.9995 it is (1-t) a + t b, for antipodal
    vectors also, and theta is 90 degrees if one vector is 0. All in float32 (float64 for float64), rounded once.

    Args:
        first: a, any shape, floating dtype.
        second: b, of the shape and dtype of a.
        t: 0 gives a, 1 gives b; not restricted to [0, 1].

    Returns:
        A new tensor of the shape and dtype of a. As in mergekit 0.1.5, bit for bit if that runs with one thread.
    """
    return _slerp(first, second, float(_slerp_cosine(first, second)), t)


def _slerp(first: Tensor, second: Tensor, cosine: float, t: float) -> Tensor:
    import torch

    dtype = torch.promote_types(first.dtype, torch.float32)
    one, other = _slerp_factors(cosine, t, dtype)
    merged = first.to(dtype) * one
    merged += second.to(dtype) * other  # not add(alpha=): a fused multiply-add rounds once less than mergekit
    return merged.to(first.dtype)


def _slerp_cosine(first: Tensor, second: Tensor) -> Tensor:
    """The cosine of the angle, 0-dimensional, in pieces as mergekit 0.1.5 reduces them."""
    import torch

    dtype = torch.promote_types(first.dtype, torch.float32)
    if not first.numel():
        return torch.zeros((), dtype=dtype, device=first.device)
    pieces = [tensor.view(1, -1).split(_PIECE, dim=1) for tensor in (first, second)]
    # Allocated anew for every piece, between small results, these would fragment the heap.
    scratch = [torch.empty_like(of[0], dtype=dtype) for of in pieces]

    def piece(model: int, index: int) -> Tensor:
        source = pieces[model][index]
        return scratch[model][:, : source.shape[1]].copy_(source)

    norms = []
    for model in range(2):
        each = [
            torch.linalg.vector_norm(piece(model, index), dim=1, keepdim=True) for index in range(len(pieces[model]))
        ]
        length = torch.linalg.vector_norm(torch.stack(each), dim=0)
        norms.append(torch.where(length > _SMALLEST_NORM, length, 1))
    dots = [
        piece(0, index).div_(norms[0]).mul_(piece(1, index).div_(norms[1])).sum(dim=1, keepdim=True)
        for index in range(len(pieces[0]))
    ]
    return torch.stack(dots).sum(dim=0).clamp(-1, 1).view(())


@lru_cache(maxsize=4096)
def _slerp_factors(cosine: float, t: float, dtype: torch.dtype) -> tuple[float, float]:
    """The factors of a and b, each a number of `dtype`; the same for every span of a tensor."""
    import torch

    dot, share = torch.tensor(cosine, dtype=dtype), torch.tensor(t, dtype=dtype)
    rest = 1 - share
    if abs(dot) > _COLLINEAR:
        return float(rest), float(share)
    theta = torch.acos(dot)
    sine = torch.sin(theta)
    return float(torch.sin(rest * theta) / sine), float(torch.sin(share * theta) / sine)


def _prepare_slerp(
    _base: Tensor, models: Sequence[Tensor], _parameters: Parameters, _generators: Generators
) -> Prepared:
    first, second = models
    cosine = _slerp_cosine(first, second)
    return lambda span: [part(first, span), part(second, span), cosine]


def _combine_slerp(_base: Tensor, parts: Sequence[Tensor], weights: Sequence[float], _parameters: Parameters) -> Tensor:
    first, second, cosine = parts
    return _slerp(first, second, float(cosine), weights[1])


def nuslerp(
    first: Tensor,
    second: Tensor,
    weights: Sequence[float],
    *,
    base: Tensor | None = None,
    nuslerp_row_wise: bool = False,
    nuslerp_flatten: bool = True,
) -> Tensor:
    """Slerp between two weighted models, or between their task vectors (mergekit 0.1.5, `nuslerp`).

    t is w_2 / (w_1 + w_2), and 1/2 where the weights sum to 0 (`|sum| < 1e-6`). Unlike `slerp`, it becomes linear only
    where sin^2 theta <= 1e-16, and all maths are in the tensors' own dtype, each operation rounded to it.

    Args:
        first: any shape, floating dtype.
        second: of the first's shape and dtype.
        weights: two.
        base: subtracted from both, and added to the result.
        nuslerp_row_wise: without `nuslerp_flatten`, interpolate along the first dimension instead of the last.
        nuslerp_flatten: the tensor is one vector; otherwise each row is, or column with `nuslerp_row_wise`.

    Returns:
        A new tensor of the first's shape and dtype. As in mergekit 0.1.5, bit for bit if that runs with one thread.
    """
    models = (first, second)
    cosine = _nuslerp_cosine(models, base, nuslerp_row_wise, nuslerp_flatten)
    deltas = [vector(model, base)(WHOLE) for model in models]
    merged = _nuslerp(deltas, cosine, _nuslerp_share(weights), nuslerp_row_wise, nuslerp_flatten)
    return merged if base is None else merged.add_(base)


def _nuslerp(deltas: Sequence[Tensor], cosine: Tensor, t: float, row_wise: bool, flatten: bool) -> Tensor:
    import torch

    if flatten:
        one, other, sine = _nuslerp_factors(float(cosine), t, cosine.dtype)
        return (deltas[0] * one).add_(deltas[1] * other).div_(sine)
    first, second = (_turned(delta, row_wise) for delta in deltas)
    collinear = (1 - cosine.square()) <= _SMALLEST_SINE**2
    theta = torch.acos(torch.where(collinear, 0, cosine))
    merged = (torch.sin((1 - t) * theta) * first).add_(torch.sin(t * theta) * second).div_(torch.sin(theta))
    if collinear.any():
        merged = torch.where(collinear, (1 - t) * first + t * second, merged)
    return _turned(merged, row_wise).contiguous().view(deltas[0].shape)  # a scalar has become a vector


@lru_cache(maxsize=4096)
def _nuslerp_factors(cosine: float, t: float, dtype: torch.dtype) -> tuple[float, float, float]:
    """The factors of the two vectors and the divisor of their sum; the same for every span of a tensor."""
    import torch

    cos = torch.tensor(cosine, dtype=dtype)
    if 1 - cos.square() <= _SMALLEST_SINE**2:
        return 1 - t, t, 1.0
    theta = torch.acos(cos)
    return float(torch.sin((1 - t) * theta)), float(torch.sin(t * theta)), float(torch.sin(theta))


def _nuslerp_share(weights: Sequence[float]) -> float:
    total = sum(weights)
    return 0.5 if abs(total) < _SMALLEST_SUM else weights[1] / total


def _nuslerp_cosine(models: Sequence[Tensor], base: Tensor | None, row_wise: bool, flatten: bool) -> Tensor:
    """The cosine of the angle, 0-dimensional if the tensor is one vector, else one for each with a last dimension 1."""
    if flatten:
        one, other = (vector(model, base) for model in models)
        length, width = (vector_norm(model, base).clamp(min=_SMALLEST_DIVISOR) for model in models)
        products = fill(models[0].new_empty(models[0].numel()), lambda span: one(span) / length * (other(span) / width))
        return products.sum(dim=-1).clamp(-1, 1)
    turned = [_turned(vector(model, base)(WHOLE), row_wise) for model in models]
    units = [values / norm(values).clamp(min=_SMALLEST_DIVISOR).unsqueeze(-1) for values in turned]
    return units[0].mul_(units[1]).sum(dim=-1, keepdim=True).clamp(-1, 1)


def _turned(values: Tensor, row_wise: bool) -> Tensor:
    """The vectors along the last dimension; its own inverse."""
    return values.transpose(0, -1) if row_wise and values.dim() else values


def _prepare_nuslerp(
    base: Tensor, models: Sequence[Tensor], parameters: Parameters, _generators: Generators
) -> Prepared:
    ancestor = base if parameters["task_vectors"] else None
    cosine = _nuslerp_cosine(models, ancestor, parameters["nuslerp_row_wise"], parameters["nuslerp_flatten"])
    return lambda span: [*(vector(model, ancestor)(span) for model in models), cosine]


def _combine_nuslerp(base: Tensor, parts: Sequence[Tensor], weights: Sequence[float], parameters: Parameters) -> Tensor:
    *deltas, cosine = parts
    merged = _nuslerp(
        deltas, cosine, _nuslerp_share(weights), parameters["nuslerp_row_wise"], parameters["nuslerp_flatten"]
    )
    return merged.add_(base) if parameters["task_vectors"] else merged


SLERP = Method(
    name="slerp",
    summary="spherical interpolation between two models, each tensor as one vector",
    citation="Shoemake 1985, doi:10.1145/325334.325242",
    combine=_combine_slerp,
    prepare=_prepare_slerp,
    elementwise=always,
    base="primary",
    weighting="t",
    min_models=2,
    max_models=2,
)
NUSLERP = Method(
    name="nuslerp",
    summary="spherical interpolation between two weighted models, or their task vectors; by tensor, row or column",
    citation="Shoemake 1985, doi:10.1145/325334.325242; mergekit 0.1.5 (nuslerp)",
    combine=_combine_nuslerp,
    parameters=(
        Parameter("nuslerp_row_wise", False, "without nuslerp_flatten: along the first dimension, not the last"),
        Parameter("nuslerp_flatten", True, "each tensor is one vector"),
        TASK_VECTORS,
    ),
    prepare=_prepare_nuslerp,
    elementwise=lambda parameters: parameters["nuslerp_flatten"] is True,
    base="optional",
    min_models=2,
    max_models=2,
)

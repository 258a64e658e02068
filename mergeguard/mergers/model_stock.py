"""Model Stock: the average of the models, drawn towards their base by how much they disagree."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

from mergeguard.mergers.contract import Generators, Method, Parameter, Parameters, Prepared, Values, always, part
from mergeguard.mergers.spans import difference
from mergeguard.mergers.spherical import fill, norm, spread

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_SMALLEST_PRODUCT = 1e-6  # of two task vectors' norms, in the cosine's divisor
_SMALLEST_DIVISOR = 1e-6  # below this the ratio has no finite value


def model_stock(base: Tensor, models: Sequence[Tensor], *, filter_wise: bool = False) -> Tensor:
    """The sum t * mean_i theta_i + (1 - t) * theta_base (Jang, Yun and Han 2024, arXiv:2403.19522).

    t is `interpolation_ratio`. All maths are in the tensors' own dtype, each operation rounded to it, as in
    mergekit 0.1.5.

    Args:
        base: any shape, floating dtype; the paper's pre-trained model.
        models: at least two, of the base's shape and dtype.
        filter_wise: a t for each row (the last dimension), instead of one for the tensor.

    Returns:
        A new tensor of the base's shape and dtype. As in mergekit 0.1.5, bit for bit if that runs with one thread.
    """
    return _interpolate(base, models, interpolation_ratio(base, models, filter_wise=filter_wise))


def interpolation_ratio(base: Tensor, models: Sequence[Tensor], *, filter_wise: bool = False) -> Tensor:
    """The ratio t = N cos / (1 + (N - 1) cos), cos the mean cosine of two of the N task vectors (arXiv:2403.19522).

    t is 0, which is the base, where the divisor is 0 (|divisor| < 1e-6): N task vectors that sum to 0. It is negative
    where they oppose each other less than that, and large near it: in 16-bit types, whose rounding moves cos by up to
    0.4 %, opposed task vectors can give t = -500 (mergekit's result too). A task vector of 0 has cosine 0 with every
    other one. float16 holds no number above 65504: where a norm, a product of two norms or a dot product exceeds it,
    that cosine is 0 or +-1 as in mergekit, and where mergekit gets NaN (both exceed it) it is 0 here. Merging 16-bit
    models in float32 avoids both.

    Args:
        base: as for `model_stock`.
        models: as for `model_stock`.
        filter_wise: as for `model_stock`.

    Returns:
        A tensor of the base's dtype that broadcasts to its shape: 0-dimensional, or with a last dimension of 1.
    """
    import torch

    by_row = filter_wise and base.dim() > 0
    shape = base.shape if by_row else (base.numel(),)
    buffer = base.new_empty(base.numel())
    deltas = [difference(model, base) for model in models]
    norms = [norm(fill(buffer, delta).view(shape)) for delta in deltas]
    cosines = []
    for (i, one), (j, other) in combinations(enumerate(deltas), 2):
        dots = fill(buffer, _product(one, other)).view(shape).sum(dim=-1)
        cosine = dots / (norms[i] * norms[j]).clamp(min=_SMALLEST_PRODUCT)
        cosines.append(cosine.clamp(-1, 1).nan_to_num(0))
    cosine = torch.stack(cosines).mean(dim=0)
    count = len(models)
    divisor = 1 + (count - 1) * cosine
    singular = divisor.abs() < _SMALLEST_DIVISOR
    ratio = torch.where(singular, 0, count * cosine / torch.where(singular, 1, divisor))
    return ratio.unsqueeze(-1) if by_row else ratio


def _product(one: Values, other: Values) -> Values:
    return lambda span: one(span) * other(span)


def _interpolate(base: Tensor, models: Sequence[Tensor], ratio: Tensor) -> Tensor:
    average = sum(models, base.new_zeros(())) / len(models)
    return average.mul_(ratio).add_((1 - ratio) * base)


def _prepare(base: Tensor, models: Sequence[Tensor], parameters: Parameters, _generators: Generators) -> Prepared:
    ratio = interpolation_ratio(base, models, filter_wise=parameters["filter_wise"])
    return lambda span: [*(part(model, span) for model in models), spread(ratio, base, span)]


def _combine(base: Tensor, parts: Sequence[Tensor], _weights: Sequence[float], _parameters: Parameters) -> Tensor:
    *models, ratio = parts
    return _interpolate(base, models, ratio)


MODEL_STOCK = Method(
    name="model_stock",
    summary="the average of the models, drawn towards the base by the angle between their task vectors",
    citation="Jang et al. 2024, arXiv:2403.19522",
    combine=_combine,
    parameters=(Parameter("filter_wise", False, "a ratio for each row instead of one for the tensor"),),
    prepare=_prepare,
    elementwise=always,
    weighting="none",
    min_models=2,
)

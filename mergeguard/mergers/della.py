"""DELLA: drop random entries, the small ones of a row more often, rescale, then merge by task arithmetic or TIES."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from mergeguard.errors import ParameterError
from mergeguard.mergers import task_arithmetic, ties
from mergeguard.mergers.contract import Generators, Method, Parameter, Parameters, Prepared, Values, always
from mergeguard.mergers.spans import each, spans
from mergeguard.mergers.sparsify import masked
from mergeguard.mergers.task_arithmetic import SCALE, task_vectors

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

_BLOCK = 2**16  # elements ranked at once: the keys, positions and probabilities of a block take about 2 MB
_OCTAVES = 32  # below a block's largest magnitude, in which magnitudes have keys of their own
_MANTISSA = 23  # bits of a float32


def check_window(density: float, epsilon: float) -> None:
    """Refuse keep probabilities density - epsilon .. density + epsilon that leave (0, 1), as mergekit 0.1.5 does.

    Raises:
        ParameterError: they do; never for density 1, which drops nothing.
    """
    if density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
        raise ParameterError(
            f"density {density:g} with epsilon {epsilon:g} gives keep probabilities from {density - epsilon:g} to "
            f"{density + epsilon:g}, expected strictly between 0 and 1; lower epsilon"
        )


def keep_probabilities(columns: int, density: float, epsilon: float, dtype: torch.dtype) -> Tensor:
    """The probability to stay by rank in a row of `columns` entries, the smallest magnitude first.

    Linear from density - epsilon to density + epsilon: MAGPRUNE of DELLA (Deep et al. 2024, arXiv:2406.11617) as in
    mergekit 0.1.5. As there, ranks and probabilities of bfloat16 tensors are held in bfloat16, so that neighbours in a
    long row share a probability; of other dtypes in float32. A row of one entry keeps it with probability `density`;
    mergekit divides 0 by 0 there.

    Args:
        columns: number of entries, at least 1.
        density: the mean probability.
        epsilon: half the width of the window.
        dtype: that of the task vector.

    Returns:
        A tensor of shape (columns,), bfloat16 or float32, that never decreases.
    """
    import torch

    work = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    ranks = torch.arange(columns).to(work) + 1
    shares = (ranks - ranks[0]) / (ranks[-1] - ranks[0]) if columns > 1 else torch.full((1,), 0.5, dtype=work)
    return (density - epsilon) + shares.clamp(0, 1) * 2 * epsilon


def keep_mask(delta: Values, like: Tensor, density: float, epsilon: float, generator: torch.Generator) -> Tensor:
    """Keep entries at random, those of large magnitude in their row more often (Deep et al. 2024, arXiv:2406.11617).

    Rows are along dimension 1, as in mergekit 0.1.5; a vector is one row. An entry stays if a float32 drawn uniformly
    from [0, 1) is below its probability; they are drawn in the order of the flat elements. Equal magnitudes rank by
    index; mergekit leaves their order to an unstable sort.

    Args:
        delta: a task vector.
        like: a tensor of its shape, dtype and device.
        density: mean probability to stay, in (0, 1).
        epsilon: see `keep_probabilities`.
        generator: on the CPU, so that every device gets the same mask.

    Returns:
        A bool tensor of the same shape, on the CPU.
    """
    import numpy as np
    import torch

    mask = torch.empty(like.shape, dtype=torch.bool)
    columns = like.shape[1] if like.dim() > 1 else like.numel()
    inner = math.prod(like.shape[2:])
    if not like.numel():
        return mask
    table = keep_probabilities(columns, density, epsilon, like.dtype).float()
    for span in spans(like.numel(), max(1, _BLOCK // (columns * inner)) * columns * inner):
        rows = delta(span).view(-1, columns, inner).transpose(1, 2).reshape(-1, columns)
        order = ascending(rows.abs()).cpu()
        ranked = torch.empty(order.shape).scatter_(1, order, table.expand(order.shape))
        probabilities = ranked.view(-1, inner, columns).transpose(1, 2).reshape(-1)
        draws = torch.rand(span.stop - span.start, generator=generator)
        np.less(draws.numpy(), probabilities.numpy(), out=mask.view(-1).numpy()[span])  # torch.lt is slower
    return mask


def ascending(magnitudes: Tensor) -> Tensor:
    """The positions of each row's entries in ascending order, the lower first among equals.

    What `torch.argsort(magnitudes, dim=1, stable=True)` gives, several times faster: numpy sorts 32-bit integers
    with vector instructions, so each magnitude, without the bits that do not fit, and its position go into one. The
    few that then look equal to a neighbour are put in order by their full magnitudes.

    Args:
        magnitudes: shape (rows, columns), not negative, floating.

    Returns:
        Shape (rows, columns), int64.
    """
    import numpy as np
    import torch

    if magnitudes.device.type != "cpu" or magnitudes.dtype.itemsize > 4:
        return torch.argsort(magnitudes, dim=1, stable=True)
    bits = magnitudes.view(torch.int16 if magnitudes.dtype.itemsize == 2 else torch.int32).numpy()
    columns = bits.shape[1]
    width = (columns - 1).bit_length()
    keys = _shortened(bits, 32 - width)
    keys <<= width
    keys |= np.arange(columns, dtype=np.uint32)
    keys.sort(axis=1)
    order = torch.empty(keys.shape, dtype=torch.int64)
    np.bitwise_and(keys, (1 << width) - 1, out=order.numpy())
    if bits.itemsize == 2 and width <= 17:  # no bit of a 16-bit magnitude was lost
        return order
    keys >>= width
    _settle(order.numpy(), keys, torch.from_numpy(bits).gather(1, order).numpy())
    return order


def _shortened(bits: Any, width: int) -> Any:
    """The bits of magnitudes as new integers of `width` bits that order them; different ones may become equal."""
    import numpy as np

    if bits.dtype.itemsize == 2 and width >= 15:
        return bits.astype(np.uint32)
    highest = int(bits.max())
    lowest = max(0, (highest >> _MANTISSA) + 1 - _OCTAVES) << _MANTISSA
    short = np.maximum(bits, lowest, dtype=np.int32)
    short -= lowest
    short >>= max(0, (highest - lowest).bit_length() - width)
    return short.view(np.uint32)


def _settle(order: Any, keys: Any, bits: Any) -> None:
    """Correct, in place, the order of neighbours with equal keys whose full bits are out of order."""
    import numpy as np

    wrong = _against_previous(np.less, bits)
    if not wrong.any():  # equal keys are equal magnitudes, of which task vectors of 16-bit checkpoints have many
        return
    doubtful = _against_previous(np.equal, keys)
    doubtful &= wrong.any(axis=1, keepdims=True)
    doubtful.reshape(-1)[:-1] |= doubtful.reshape(-1)[1:]
    places = np.flatnonzero(doubtful)
    full = ((places // order.shape[1]) << 32) | bits.reshape(-1)[places]
    positions = order.reshape(-1)[places]
    order.reshape(-1)[places] = positions[np.argsort(full, kind="stable")]


def _against_previous(compare: Any, rows: Any) -> Any:
    """Compare each entry with the one before it in its row; False for the first."""
    import numpy as np

    result = np.empty(rows.shape, dtype=bool)
    compare(rows.reshape(-1)[1:], rows.reshape(-1)[:-1], out=result.reshape(-1)[1:])
    result[:, 0] = False
    return result


def _prepare(base: Tensor, models: Sequence[Tensor], parameters: Parameters, generators: Generators) -> Prepared:
    windows = list(zip(parameters["density"], parameters["epsilon"], strict=True))
    for density, epsilon in windows:
        check_window(density, epsilon)
    kept: list[Values] = []
    for index, (delta, (density, epsilon)) in enumerate(zip(task_vectors(base, models), windows, strict=True)):
        if density >= 1:
            kept.append(delta)
        else:
            mask = keep_mask(delta, base, density, epsilon, generators(index))
            kept.append(masked(delta, base, mask, density, parameters["rescale"]))
    return each(kept)


_CITATION = "Deep et al. 2024, arXiv:2406.11617"
_PARAMETERS = (
    Parameter("density", 1.0, "expected share of each task vector that stays", above=0.0, at_most=1.0, per_model=True),
    Parameter(
        "epsilon",
        0.15,
        "keep probabilities run from density - epsilon to density + epsilon, by rank in the row",
        at_least=0.0,
        below=0.5,
        per_model=True,
    ),
    Parameter("rescale", "l1", "restore the L1 norm (mergekit), or none", ("l1", "none")),
    SCALE,
)

DELLA = Method(
    name="della",
    summary="drop random entries of the task vectors, small ones more often, rescale, then merge as TIES",
    citation=_CITATION,
    combine=ties.combine,
    parameters=(
        *_PARAMETERS,
        Parameter("normalize", True, "divide the sum of the agreeing task vectors; see divisor"),
        *(choice for choice in ties.ELECTION if choice.name != "scope"),  # ranks are within rows
    ),
    prepare=_prepare,
    elementwise=ties.elementwise,
    random=True,
)

DELLA_LINEAR = Method(
    name="della_linear",
    summary="drop random entries of the task vectors, small ones more often, rescale, then task arithmetic",
    citation=_CITATION,
    combine=task_arithmetic.combine,
    parameters=(*_PARAMETERS, Parameter("normalize", False, "divide the weighted sum by the sum of the weights")),
    prepare=_prepare,
    elementwise=always,
    random=True,
)

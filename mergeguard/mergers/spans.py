"""Tensors in pieces that fit a processor's cache, which is where the speed of elementwise methods comes from."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mergeguard.mergers.contract import part

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from torch import Tensor

    from mergeguard.mergers.contract import Prepared, Values

SPAN = 2**17
"""Elements of a span: small enough for a processor's cache, large enough for starting an operation to cost little."""
_DEVICE_SPAN = 2**24
"""The same on a GPU, whose kernels need no cache, but each has to be started."""


def span_length(device: torch.device) -> int:
    """Elements of a span on a device."""
    return SPAN if device.type == "cpu" else _DEVICE_SPAN


def spans(size: int, length: int = SPAN) -> Iterator[slice]:
    """Slices that cover `size` flat elements in order."""
    for start in range(0, size, length):
        yield slice(start, min(start + length, size))


def difference(model: Tensor, base: Tensor) -> Values:
    """The model minus the base, a task vector (Ilharco et al. 2023, arXiv:2212.04089, section 2), in their dtype."""
    return lambda span: part(model, span) - part(base, span)


def each(values: Sequence[Values]) -> Prepared:
    """What several computed tensors have in a span, as a list."""
    return lambda span: [value(span) for value in values]


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor of a floating dtype has neither NaN nor infinity."""
    import torch

    flat = tensor.reshape(-1)
    for span in spans(flat.numel(), span_length(flat.device)):
        smallest, largest = torch.aminmax(flat[span])  # one pass without a temporary, and it propagates NaN
        if not (math.isfinite(smallest.item()) and math.isfinite(largest.item())):
            return False
    return True

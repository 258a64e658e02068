"""How a watermark keeps the quantised model as it was: interval and rollback, as projections of weights.

arXiv 2310.11237, section 3.3. All tensors are float32 of shape (rows, columns), quantised by the absolute maximum of
their row, as in `mergeguard.verification.quantize`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mergeguard.verification.quantize import quantize

Projection = Callable[[Tensor], Tensor]


def interval(original: Tensor, bits: int, bias: float) -> Projection:
    """Clips weights to within `bias` of a quantisation step of the original's codes, and to the row's scale.

    The largest weight of each row stays what it was, since it is the scale of all the others.
    """
    quantized = quantize(original, bits)
    scale = quantized.scale.unsqueeze(1)
    codes = quantized.codes.to(original.dtype)
    ceiling = original.abs().amax(dim=1, keepdim=True)
    low = torch.maximum((codes - bias) * scale, -ceiling)
    high = torch.minimum((codes + bias) * scale, ceiling)
    peaks = original.abs().argmax(dim=1, keepdim=True)
    frozen = original.gather(1, peaks)

    def project(weight: Tensor) -> Tensor:
        return weight.clamp(low, high).scatter(1, peaks, frozen)

    return project


def rollback(original: Tensor, bits: int) -> Projection:
    """Returns weights whose code differs from the original's to their original value, until all codes agree.

    A row's scale moves with its largest weight, so one pass can leave codes that differ; each further pass returns at
    least one more weight, and a row of original weights agrees, so the passes end.
    """
    codes = quantize(original, bits).codes

    def project(weight: Tensor) -> Tensor:
        current = weight.clone()
        peaks = original.abs().argmax(dim=1, keepdim=True)
        current = current.scatter(1, peaks, original.gather(1, peaks))
        ceiling = original.abs().amax(dim=1, keepdim=True)
        current = torch.where(current.abs() > ceiling, original, current)
        while bool((differs := quantize(current, bits).codes != codes).any()):
            current = torch.where(differs, original, current)
        return current

    return project


def projections(optimisation: str, weights: Mapping[str, Tensor], bits: int, bias: float) -> dict[str, Projection]:
    """One projection per weight for `interval` and `rollback`; none for `direct`."""
    if optimisation == "interval":
        return {name: interval(weight, bits, bias) for name, weight in weights.items()}
    if optimisation == "rollback":
        return {name: rollback(weight, bits) for name, weight in weights.items()}
    return {}


def changed_codes(before: Mapping[str, Tensor], after: Mapping[str, Tensor], bits: int) -> tuple[int, int]:
    """How many codes of `after` differ from those of `before`, and how many there are."""
    changed = sum(
        int((quantize(before[name], bits).codes != quantize(after[name], bits).codes).count_nonzero())
        for name in before
    )
    return changed, sum(weight.numel() for weight in before.values())

"""How a watermark keeps the quantised model as it was: interval and rollback, as projections of weights.

arXiv 2310.11237, section 3.3. All tensors are float32 of shape (rows, columns), quantised by the absolute maximum of
their row, as in `mergeguard.verification.quantize`. A projection holds a byte a weight (the code; two above 8 bits)
and a few values a row; `rollback` the original weights besides. On large models that is what fits next to training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mergeguard.verification.quantize import Quantized, quantize

Projection = Callable[[Tensor], Tensor]


def interval(original: Tensor, quantized: Quantized, bias: float) -> Projection:
    """Clips weights to within `bias` of a quantisation step of the original's codes, and to the row's scale.

    The largest weight of each row stays what it was, since it is the scale of all the others. The bounds are computed
    from the codes each time: kept, they would be twice as large as the weights.

    Args:
        original: the weights; they may change afterwards.
        quantized: `original`, quantised.
        bias: in (0, 0.5).
    """
    scale = quantized.scale.unsqueeze(1)
    ceiling = original.abs().amax(dim=1, keepdim=True)
    peaks = original.abs().argmax(dim=1, keepdim=True)
    frozen = original.gather(1, peaks)

    def project(weight: Tensor) -> Tensor:
        codes = quantized.codes.to(weight.dtype)
        low = torch.maximum((codes - bias) * scale, -ceiling)
        high = torch.minimum((codes + bias) * scale, ceiling)
        return weight.clamp(low, high).scatter(1, peaks, frozen)

    return project


def rollback(original: Tensor, quantized: Quantized) -> Projection:
    """Returns weights whose code differs from the original's to their original value, until all codes agree.

    A row's scale moves with its largest weight, so one pass can leave codes that differ; each further pass returns at
    least one more weight, and a row of original weights agrees, so the passes end.

    Args:
        original: the weights; they may change afterwards, so that a copy is kept.
        quantized: `original`, quantised.
    """
    original = original.clone()

    def project(weight: Tensor) -> Tensor:
        current = weight.clone()
        peaks = original.abs().argmax(dim=1, keepdim=True)
        current = current.scatter(1, peaks, original.gather(1, peaks))
        ceiling = original.abs().amax(dim=1, keepdim=True)
        current = torch.where(current.abs() > ceiling, original, current)
        while bool((differs := quantize(current, quantized.bits).codes != quantized.codes).any()):
            current = torch.where(differs, original, current)
        return current

    return project


def projections(
    optimisation: str, weights: Mapping[str, Tensor], grid: Mapping[str, Quantized], bias: float
) -> dict[str, Projection]:
    """One projection per weight for `interval` and `rollback`, none for `direct`; `grid` is the weights quantised."""
    if optimisation == "interval":
        return {name: interval(weight, grid[name], bias) for name, weight in weights.items()}
    if optimisation == "rollback":
        return {name: rollback(weight, grid[name]) for name, weight in weights.items()}
    return {}


def changed_codes(before: Mapping[str, Quantized], after: Mapping[str, Tensor]) -> tuple[int, int]:
    """How many codes of the weights `after` differ from those of `before`, and how many there are."""
    changed = sum(
        int((quantized.codes != quantize(after[name], quantized.bits).codes).count_nonzero())
        for name, quantized in before.items()
    )
    return changed, sum(quantized.codes.numel() for quantized in before.values())

"""Sparser task vectors: TIES keeps the largest entries, DARE keeps random ones."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from mergeguard.mergers.contract import part
from mergeguard.mergers.selection import largest
from mergeguard.mergers.spans import spans

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

    from mergeguard.mergers.contract import Span, Values

    Keep = Callable[[Tensor, Span], Tensor]

_SMALLEST_NORM = 1e-7  # as mergekit 0.1.5: a smaller L1 norm is left as it is
_NORM_PART = 2**14  # below 2**15 elements torch sums in one thread, so that a norm does not depend on the thread count


def seeded_generator(seed: int, tensor: str, model: str) -> torch.Generator:
    """A CPU generator that depends on these three alone, so neither order nor threads change what is drawn."""
    import torch

    digest = hashlib.blake2b(repr((seed, tensor, model)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def trim(delta: Values, like: Tensor, density: float, *, rescale: str = "none") -> Values:
    """Keep the max(1, int(density * n)) entries of largest magnitude (TIES, arXiv:2306.01708, Algorithm 1).

    Among equal magnitudes at the threshold the lowest indices stay; mergekit 0.1.5 leaves that to an unstable sort.
    The paper's released code keeps int(density * n) + 1 and every entry equal to the smallest of them.

    Args:
        delta: a task vector.
        like: a tensor of its shape, dtype and device.
        density: share that stays, in (0, 1].
        rescale: "none" as in the paper, or "l1"; see `rescaled`.
    """
    size = like.numel()
    if density >= 1 or size == 0:
        return delta
    top = largest(delta, size, max(1, int(density * size)))
    return rescaled(delta, top.keep, like, density, rescale)


def dropout_mask(shape: torch.Size, density: float, generator: torch.Generator) -> Tensor:
    """True with probability `density`, independently per entry; a denser mask of one generator contains a sparser.

    Drawn span by span, which gives the same numbers as at once, so that no float is held for every entry.
    """
    import numpy as np
    import torch

    mask = torch.empty(shape, dtype=torch.bool)
    for span in spans(mask.numel()):
        draws = torch.rand(span.stop - span.start, generator=generator)
        np.less(draws.numpy(), density, out=mask.view(-1).numpy()[span])  # in float32, as torch.lt, which is slower
    return mask


def drop(delta: Values, like: Tensor, density: float, generator: torch.Generator, *, rescale: str = "l1") -> Values:
    """Keep each entry with probability `density` = 1 - p and rescale (DARE, arXiv:2311.03099, section 3).

    The mask is drawn in float32 whatever the dtype; mergekit 0.1.5 draws from torch's global generator, in bfloat16
    with a rounded density.

    Args:
        delta: a task vector.
        like: a tensor of its shape, dtype and device.
        density: expected share that stays, in (0, 1].
        generator: on the CPU, so that every device gets the same mask.
        rescale: "l1" as in mergekit, "inverse" as in the paper, or "none"; see `rescaled`.
    """
    if density >= 1:
        return delta
    return masked(delta, like, dropout_mask(like.shape, density, generator), density, rescale)


def masked(delta: Values, like: Tensor, mask: Tensor, density: float, rescale: str) -> Values:
    """`delta` where `mask` (bool, on any device), else 0, rescaled; see `rescaled`."""
    factors = zeros_and_ones(mask, like.device)

    def keep(values: Tensor, span: Span) -> Tensor:
        return values * factors(span)

    return rescaled(delta, keep, like, density, rescale)


def zeros_and_ones(mask: Tensor, device: torch.device) -> Values:
    """A bool mask in uint8, which multiplies several times faster; on a CPU it is held in one bit per element."""
    import numpy as np
    import torch

    if device.type != "cpu":
        factors = mask.view(torch.uint8).to(device)
        return lambda span: part(factors, span)
    shape, bits = mask.shape, np.packbits(mask.cpu().reshape(-1).numpy())

    def unpacked(span: Span) -> Tensor:
        start, stop, step = (slice(None) if span is None else span).indices(shape.numel())
        first = start // 8
        found = np.unpackbits(bits[first : -(-stop // 8)])[start - 8 * first : stop - 8 * first : step]
        return torch.from_numpy(found).view(shape if span is None else (-1,))

    return unpacked


def rescaled(delta: Values, keep: Keep, like: Tensor, density: float, rescale: str) -> Values:
    """What is kept of a task vector, times a factor.

    Float16 is computed in float32, whose norms do not overflow. Norms are summed in parts of 16,384 elements, the same
    for any number of threads; over larger tensors mergekit's last bits depend on its threads, and may differ from ours.

    Args:
        delta: the task vector.
        keep: gives its values in a span, with 0 for what is dropped; of their magnitudes it keeps the same.
        like: a tensor of its shape, dtype and device.
        density: the share meant to stay.
        rescale: "none"; "inverse": 1 / density, the 1 / (1 - p) of the DARE paper; "l1": the factor that restores the
            L1 norm of `delta`, mergekit 0.1.5's rule, close to the other in expectation.
    """
    import torch

    work = torch.float32 if like.dtype == torch.float16 else like.dtype

    def kept(span: Span) -> Tensor:
        return keep(delta(span), span)

    if rescale == "none":
        return kept
    if rescale == "inverse":
        return lambda span: (kept(span).to(work) / density).to(like.dtype)
    before, after = _l1_norms(delta, keep, like, work)
    if min(before, after) < _SMALLEST_NORM:
        return kept
    factor = before / after
    return lambda span: (kept(span).to(work) * factor).to(like.dtype)


def _l1_norms(delta: Values, keep: Keep, like: Tensor, work: torch.dtype) -> tuple[Tensor, Tensor]:
    """The L1 norms of a task vector and of what is kept of it."""
    import torch

    size, accumulator = like.numel(), torch.promote_types(work, torch.float32)
    # One tensor each: small ones that outlive the temporaries between them would keep the heap from being reused.
    before, after = (torch.empty(-(-size // _NORM_PART), dtype=accumulator, device=like.device) for _ in range(2))
    for span in spans(size):
        parts = slice(span.start // _NORM_PART, -(-span.stop // _NORM_PART))
        magnitudes = delta(span).abs()
        _sum_parts(magnitudes.to(work), before[parts])
        _sum_parts(keep(magnitudes, span).to(work), after[parts])
    return before.sum().to(work), after.sum().to(work)


def _sum_parts(values: Tensor, sums: Tensor) -> None:
    """Write the sums of parts of equal length, and of the rest, into `sums`."""
    whole = len(values) // _NORM_PART
    end = whole * _NORM_PART
    sums[:whole] = values[:end].view(-1, _NORM_PART).sum(dim=1, dtype=sums.dtype)
    if end < len(values):
        sums[whole] = values[end:].sum(dtype=sums.dtype)

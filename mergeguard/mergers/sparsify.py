"""Sparser task vectors: TIES keeps the largest entries, DARE keeps random ones."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_SMALLEST_NORM = 1e-7  # as mergekit 0.1.5: a smaller L1 norm is left as it is
_CHUNK = 2**14  # below 2**15 elements torch sums in one thread, so that a norm does not depend on the thread count


def seeded_generator(seed: int, tensor: str, model: str) -> torch.Generator:
    """A CPU generator that depends on these three alone, so neither order nor threads change what is drawn."""
    import torch

    digest = hashlib.blake2b(repr((seed, tensor, model)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def trim(delta: Tensor, density: float, *, rescale: str = "none") -> Tensor:
    """Keep the max(1, int(density * n)) entries of largest magnitude (TIES, arXiv:2306.01708, Algorithm 1).

    Among equal magnitudes at the threshold the lowest indices stay, so that the same entries stay everywhere;
    mergekit 0.1.5 leaves that to an unstable sort. The paper's released code keeps int(density * n) + 1 and every
    entry equal to the smallest of them.

    Args:
        delta: a task vector, any shape.
        density: share that stays, in (0, 1].
        rescale: "none" as in the paper, or "l1"; see `rescaled`.

    Returns:
        A tensor of the same shape and dtype.
    """
    import torch

    if density >= 1 or delta.numel() == 0:
        return delta
    count = max(1, int(density * delta.numel()))
    magnitudes = delta.abs().flatten()
    threshold = _kth_largest(magnitudes, count)
    kept = magnitudes > threshold
    at_threshold = torch.nonzero(magnitudes == threshold).flatten()
    kept[at_threshold[: count - int(torch.count_nonzero(kept))]] = True
    return rescaled(delta, kept.view_as(delta), density, rescale)


def dropout_mask(shape: torch.Size, density: float, generator: torch.Generator) -> Tensor:
    """True with probability `density`, independently per entry; a denser mask of one generator contains a sparser."""
    import torch

    return torch.rand(shape, generator=generator) < density


def drop(delta: Tensor, density: float, generator: torch.Generator, *, rescale: str = "l1") -> Tensor:
    """Keep each entry with probability `density` = 1 - p and rescale (DARE, arXiv:2311.03099, section 3).

    The mask is drawn in float32 whatever the dtype; mergekit 0.1.5 draws from torch's global generator, in bfloat16
    with a rounded density.

    Args:
        delta: a task vector, any shape.
        density: expected share that stays, in (0, 1].
        generator: on the CPU, so that every device gets the same mask.
        rescale: "l1" as in mergekit, "inverse" as in the paper, or "none"; see `rescaled`.

    Returns:
        A tensor of the same shape and dtype.
    """
    if density >= 1:
        return delta
    mask = dropout_mask(delta.shape, density, generator).to(delta.device)
    return rescaled(delta, mask, density, rescale)


def rescaled(delta: Tensor, kept: Tensor, density: float, rescale: str) -> Tensor:
    """`delta` where `kept`, else 0, times a factor.

    Float16 is computed in float32, whose norms do not overflow. Norms are summed in parts of 16,384 elements, the same
    for any number of threads; over larger tensors mergekit's last bits depend on its threads, and may differ from ours.

    Args:
        delta: a task vector, any shape.
        kept: bool, of the same shape.
        density: the share meant to stay.
        rescale: "none"; "inverse": 1 / density, the 1 / (1 - p) of the DARE paper; "l1": the factor that restores the
            L1 norm of `delta`, mergekit 0.1.5's rule, close to the other in expectation.
    """
    import torch

    work = delta.float() if delta.dtype == torch.float16 else delta
    masked = work * kept
    if rescale == "inverse":
        masked = masked / density
    elif rescale == "l1":
        before, after = _l1_norm(work), _l1_norm(masked)
        if min(before, after) >= _SMALLEST_NORM:
            masked = masked * (before / after)
    return masked.to(delta.dtype)


def _l1_norm(tensor: Tensor) -> Tensor:
    import torch

    magnitudes = tensor.abs().flatten()
    if magnitudes.numel() <= _CHUNK:
        return magnitudes.sum()
    accumulator = torch.promote_types(tensor.dtype, torch.float32)
    return torch.stack([part.sum(dtype=accumulator) for part in torch.split(magnitudes, _CHUNK)]).sum().to(tensor.dtype)


def _kth_largest(magnitudes: Tensor, k: int) -> Tensor:
    import numpy as np
    import torch

    position = magnitudes.numel() - k
    if magnitudes.device.type != "cpu":
        return magnitudes.kthvalue(position + 1).values
    values = magnitudes.to(torch.promote_types(magnitudes.dtype, torch.float32)).numpy()  # numpy lacks bfloat16
    return torch.as_tensor(np.partition(values, position)[position]).to(magnitudes.dtype)

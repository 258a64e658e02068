"""Iso-C: add the task matrices and give the sum a flat spectrum."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeguard.mergers.contract import Method, Parameters
from mergeguard.mergers.expo import weighted_difference
from mergeguard.mergers.spectral import is_matrix, singular_parts
from mergeguard.mergers.task_arithmetic import SCALE
from mergeguard.mergers.tsv import averaged

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def iso_c(base: Tensor, models: Sequence[Tensor], weights: Sequence[float], *, scale: float = 1.0) -> Tensor:
    """The base + scale * mean(S) U V^T, U S V^T the sum of w_i delta_i (Marczak et al. 2025, arXiv:2502.04959, Iso-C).

    Every 2-dimensional tensor is such a matrix, as in the authors' code (danielm1405/iso-merging, iso.py; it leaves
    out CLIP's text projection); the others are averaged. The paper has no weights, which is every weight 1; it chooses
    `scale` (alpha) by validation. The mean is over all min(m, n) singular values, but directions at singular value 0
    stay 0, where the authors' code gives that mean to arbitrary ones. A low-rank update (LoRA) that was merged into
    rounded weights has no such directions: what its rounding left gets the mean too, here as there.

    Args:
        base: any shape, floating dtype.
        models: of the base's shape and dtype.
        weights: one per model.
        scale: alpha.

    Returns:
        A new tensor of the base's shape and dtype, computed in at least float32 and rounded once.
    """
    if not is_matrix(base):
        return averaged(base, models, weights, scale=scale)
    left, values, right = singular_parts(weighted_difference(base, models, weights))
    return (base + (left @ right) * (values.mean() * scale)).to(base.dtype)


def _combine(base: Tensor, models: Sequence[Tensor], weights: Sequence[float], parameters: Parameters) -> Tensor:
    return iso_c(base, models, weights, scale=parameters["lambda"])


ISO_C = Method(
    name="iso_c",
    summary="the sum of the task matrices with all singular values set to their mean; other tensors averaged",
    citation="Marczak et al. 2025, arXiv:2502.04959",
    combine=_combine,
    parameters=(SCALE,),
)

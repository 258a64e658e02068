"""Singular value decompositions of task matrices, for the methods that merge in their singular vectors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_ROUNDING = 8  # in units of eps sqrt(min(m, n)); see `singular_parts`


def is_matrix(tensor: Tensor, rank: int = 1) -> bool:
    """Whether the tensor has two dimensions, both at least `rank`; embeddings are matrices like any other."""
    return tensor.ndim == 2 and min(tensor.shape) >= rank


def singular_parts(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and V^T of the thin decomposition; the columns of U and rows of V^T at singular value 0 are made 0.

    Singular vectors at 0 are arbitrary: without this a merge of equal models, or of an untouched tensor, would hold
    directions that only the linear algebra library chose. 0 means at most 8 eps sqrt(min(m, n)) S_0; of rank-deficient
    random matrices up to 20,000 rows, the computed zeros were measured up to 1.6 eps sqrt(min(m, n)) S_0.

    Args:
        matrix: (m, n) in float32 or float64. A NaN or infinity is an error of the library.

    Returns:
        (m, r), (r,) and (r, n) with r = min(m, n), of the matrix's dtype.
    """
    import torch

    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    rounding = _ROUNDING * torch.finfo(values.dtype).eps * math.sqrt(min(matrix.shape))
    found = values > rounding * values[:1]
    return left * found, values * found, right * found.unsqueeze(1)


def isometry(matrix: Tensor) -> Tensor:
    """U V^T, the nearest matrix with orthonormal columns (or rows): the polar factor, Procrustes' solution.

    On the null space, where the nearest is not unique, it is 0. Arguments and dtype are as for `singular_parts`.
    """
    left, _, right = singular_parts(matrix)
    return left @ right

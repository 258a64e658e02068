"""What the spherical methods share: vectors that are computed span by span, and reduced in one piece.

mergekit 0.1.5 reduces most vectors (norms, dot products) in one piece. The order in which torch adds up a vector
depends on its length and its number of threads, so that with one thread the same reduction of the same layout gives
the same bits, and a reduction in pieces other ones. Task vectors and products are therefore written span by span
into one buffer of the tensor's size and dtype, and reduced there: a single temporary instead of one for every
operation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeguard.mergers.contract import Parameter, Span, Values, part
from mergeguard.mergers.spans import difference, spans

if TYPE_CHECKING:
    from torch import Tensor

TASK_VECTORS = Parameter("task_vectors", False, "merge differences from the base (mergekit: a base_model is given)")


def fill(buffer: Tensor, values: Values) -> Tensor:
    """Write `values` into `buffer`, a flat tensor, span by span; returns the buffer. `values` may read it."""
    for span in spans(buffer.numel()):
        buffer[span] = values(span)
    return buffer


def norm(vectors: Tensor) -> Tensor:
    """The Euclidean norm along the last dimension, which is dropped."""
    import torch

    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=-1)
    return lengths


def vector(model: Tensor, base: Tensor | None) -> Values:
    """The model, or with a base its task vector."""
    return difference(model, base) if base is not None else lambda span: part(model, span)


def vector_norm(model: Tensor, base: Tensor | None) -> Tensor:
    """The norm of the flat model, or with a base of its task vector; 0-dimensional."""
    flat = model.view(-1)
    return norm(flat if base is None else fill(flat.new_empty(flat.shape), vector(model, base)))


def spread(values: Tensor, like: Tensor, span: Span) -> Tensor:
    """The flat elements in `span` of `values` as broadcast to the shape of `like`; `values` itself for `WHOLE`.

    Only the rows that the span touches are written out.
    """
    if span is None or values.numel() == 1:
        return values
    columns = like.shape[-1]
    first, last = span.start // columns, -(-span.stop // columns)
    rows = values.expand(like.shape).reshape(-1, columns)[first:last]
    return rows.reshape(-1)[span.start - first * columns : span.stop - first * columns]

"""Which dtype a merge computes and stores in, by torch's names. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

FLOATING = ("float16", "bfloat16", "float32", "float64")
COPIED = ("bool", "uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64")

ITEM_BYTES = dict(zip(FLOATING, (2, 2, 4, 8), strict=True)) | {
    name: 1 if name == "bool" else int(name.lstrip("uint")) // 8 for name in COPIED
}
"""Bytes of an element."""


def working_dtype(stored: Iterable[str], chosen: str | None) -> str:
    """The dtype of a tensor's arithmetic.

    Args:
        stored: dtypes of its inputs, all floating or all the same.
        chosen: the recipe's `dtype`, for floating tensors; None for the narrowest that holds all inputs.
    """
    kinds = set(stored)
    if not kinds <= set(FLOATING):
        return min(kinds)
    if chosen is not None:
        return chosen
    if kinds == {"float16", "bfloat16"}:
        return "float32"
    return max(kinds, key=FLOATING.index)


def stored_dtype(working: str, chosen: str | None) -> str:
    """The dtype of a merged tensor's file: the recipe's `out_dtype` for floating tensors, else its arithmetic's."""
    return chosen if chosen is not None and working in FLOATING else working

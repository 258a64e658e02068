"""Headers of safetensors files: where each tensor lies, without reading any. No torch is imported here.

A file is 8 bytes with the length of the header (little-endian), the header (a JSON object) and the tensors' bytes,
which fill the rest without a hole or an overlap (https://huggingface.co/docs/safetensors, "Format"). What is read here
may come from anyone, so nothing is allocated by a size that the file merely claims.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergeguard.checkpoints.inputs import FileStamp, file_stamp, parse_json, quoted, reason, refuse, refuse_tensor
from mergeguard.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

_FORMAT: dict[str, tuple[int, str]] = {
    "BOOL": (1, "bool"),
    "U8": (1, "uint8"),
    "I8": (1, "int8"),
    "U16": (2, "uint16"),
    "I16": (2, "int16"),
    "U32": (4, "uint32"),
    "I32": (4, "int32"),
    "U64": (8, "uint64"),
    "I64": (8, "int64"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E4M3FNUZ": (1, "float8_e4m3fnuz"),
    "F8_E5M2": (1, "float8_e5m2"),
    "F8_E5M2FNUZ": (1, "float8_e5m2fnuz"),
    "F8_E8M0": (1, "float8_e8m0fnu"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "F32": (4, "float32"),
    "F64": (8, "float64"),
    "C64": (8, "complex64"),
}
DTYPES = {name: size for name, (size, _) in _FORMAT.items()}
"""Bytes per element of each dtype of the format."""
TORCH_NAMES = {name: torch_name for name, (_, torch_name) in _FORMAT.items()}
"""What torch calls each dtype of the format."""

PACKED = ("F4", "F6_E2M3", "F6_E3M2")
"""Dtypes of the format whose elements are no whole bytes: there is nothing to merge in them."""

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 64
MAX_ELEMENTS = 2**63 - 1
METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a safetensors file.

    Attributes:
        name: the tensor's name.
        dtype: the format's name of it, a key of `DTYPES`, e.g. "F32".
        shape: elements along each dimension; () is a scalar.
        path: the file.
        start: where its first byte is, counted from the start of the file.
        stop: one past its last byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """The header of one file.

    Attributes:
        path: the file.
        tensors: by name, in the order of their bytes.
        metadata: text by name.
        stamp: of the file when the header was read.
    """

    path: Path
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]
    stamp: FileStamp


def read_header(path: Path) -> Header:
    """The header of a safetensors file, checked in full; the tensors' bytes are not read.

    Raises:
        CheckpointError: the file cannot be read, or anything in it is not as the format wants it.
    """
    file_stamp(path)
    try:
        with path.open("rb") as file:
            stamp = FileStamp.of(os.fstat(file.fileno()))
            prefix = file.read(LENGTH_BYTES)
            if len(prefix) < LENGTH_BYTES:
                refuse(path, f"has {len(prefix)} bytes, too few for a safetensors file; copy or download it again")
            length = int.from_bytes(prefix, "little")
            _check_length(path, prefix, length, stamp.size)
            text = file.read(length)
    except OSError as error:
        refuse(path, f"cannot be read: {reason(error)}")
    if len(text) < length:
        refuse(path, "ended while its header was read; it changed meanwhile, run again when nothing writes to it")
    entries = _parse(path, text)
    metadata = _metadata(path, entries.pop(METADATA, {}))
    begin = LENGTH_BYTES + length
    tensors = [_stored(path, name, entry, begin, stamp.size) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop))
    _check_cover(path, tensors, begin, stamp.size)
    return Header(path, {tensor.name: tensor for tensor in tensors}, metadata, stamp)


def encode_header(entries: Sequence[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a safetensors file whose tensors follow one another in the order of `entries`.

    Args:
        entries: (name, dtype as in `DTYPES`, shape) of each tensor.
        metadata: text by name; {"format": "pt"} is what transformers looks for.

    Returns:
        8 bytes of length and the JSON, padded with spaces so that the tensors start at a multiple of 8.

    Raises:
        CheckpointError: a name occurs twice or is the metadata's, a dtype is unknown, a dimension is negative, or the
            header would be larger than readers accept.
    """
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in entries:
        if name in header or name == METADATA:
            raise CheckpointError(f"cannot write tensor {quoted(name)}: the name is taken; rename one of the two")
        if dtype not in DTYPES:
            raise CheckpointError(f"cannot write tensor {quoted(name)}: unknown dtype {dtype!r}, known: {_known()}")
        if any(dimension < 0 for dimension in shape):
            raise CheckpointError(f"cannot write tensor {quoted(name)}: shape {list(shape)} has a negative dimension")
        count = 1
        for dimension in shape:
            count *= dimension
        stop = offset + count * DTYPES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    try:
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError("cannot write tensors whose names are not valid Unicode; rename them") from error
    text += b" " * (-len(text) % LENGTH_BYTES)
    if len(text) > MAX_HEADER_BYTES:
        raise CheckpointError(f"cannot write a header of {len(text)} bytes; readers take up to {MAX_HEADER_BYTES}")
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _known() -> str:
    return ", ".join(DTYPES)


def _check_length(path: Path, prefix: bytes, length: int, size: int) -> None:
    if prefix == b"version ":  # the first word of a Git LFS pointer
        refuse(path, "is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder")
    if length > size - LENGTH_BYTES:
        refuse(path, f"has {size} bytes, less than its header alone ({length}); it is cut short or not safetensors")
    if length > MAX_HEADER_BYTES:
        refuse(path, f"has a header of {length} bytes; the format allows {MAX_HEADER_BYTES}")


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        refuse(path, "has a header that does not start with '{'; it is damaged or not safetensors")
    return parse_json(path, text, "header")


def _metadata(path: Path, found: Any) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        refuse(path, f"has a {METADATA} that is not an object of texts; write the file again with safetensors")
    return found


def _stored(path: Path, name: str, entry: Any, begin: int, size: int) -> StoredTensor:
    """The tensor that a header's entry describes; `begin` is the offset in the file that its offsets count from."""
    if not name.isascii():
        try:
            name.encode()
        except UnicodeEncodeError:
            refuse_tensor(path, name, "has a name that is not valid Unicode; write the file again")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        refuse_tensor(path, name, "is described by other fields than dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        if dtype in PACKED:
            refuse_tensor(path, name, f"has the packed dtype {dtype}, which cannot be merged; use the full model")
        shown = quoted(dtype) if isinstance(dtype, str) else "that is no text"
        refuse_tensor(path, name, f"has an unknown dtype {shown}; known: {_known()}")
    if not isinstance(shape, list) or not all(type(dimension) is int and dimension >= 0 for dimension in shape):
        refuse_tensor(path, name, "has a shape that is not a list of whole numbers from 0 on")
    if len(shape) > MAX_DIMENSIONS:
        refuse_tensor(path, name, f"has {len(shape)} dimensions; torch has at most {MAX_DIMENSIONS}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(o) is int and o >= 0 for o in offsets):
        refuse_tensor(path, name, "has data_offsets that are not two whole numbers from 0 on")
    start, stop = offsets
    if stop < start:
        refuse_tensor(path, name, f"ends (byte {stop}) before it starts (byte {start})")
    if stop > size - begin:
        refuse_tensor(path, name, f"ends at byte {stop} of {size - begin} in the file; it is cut short, copy it again")
    count = _element_count(path, name, shape)
    if count * DTYPES[dtype] != stop - start:
        refuse_tensor(path, name, f"has {stop - start} bytes, but {dtype} of shape {shape} has {count * DTYPES[dtype]}")
    return StoredTensor(name, dtype, tuple(shape), path, begin + start, begin + stop)


def _element_count(path: Path, name: str, shape: Iterable[int]) -> int:
    """The product of a shape; also that of the dimensions above 0, which strides are made of, must be in range."""
    count, extent = 1, 1
    for dimension in shape:
        count *= dimension
        extent *= max(dimension, 1)
        if extent > MAX_ELEMENTS:
            refuse_tensor(path, name, "has a shape with more elements than can be counted in 64 bits")
    return count


def _check_cover(path: Path, tensors: Sequence[StoredTensor], begin: int, size: int) -> None:
    """That the tensors, sorted by offsets, fill the file from `begin` to its end."""
    end = begin
    for tensor in tensors:
        if tensor.start < end:
            refuse_tensor(path, tensor.name, "overlaps another tensor")
        if tensor.start > end:
            refuse_tensor(path, tensor.name, f"follows {tensor.start - end} bytes that belong to no tensor")
        end = tensor.stop
    if end < size:
        refuse(path, f"has {size - end} bytes after its last tensor; it is damaged, copy or download it again")

"""Sources: where the tensors of a merge's inputs come from, one at a time, from any thread.

What a source calls its tensors is what a model has when it is loaded: stored tensors that are no weights of their own
(see `tied`) are left out of it. torch is imported with the first tensor that is read, not with this module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

from mergeguard.checkpoints.checkpoint import Checkpoint, open_checkpoint
from mergeguard.checkpoints.header import TORCH_NAMES
from mergeguard.checkpoints.inputs import existing, quoted, refuse_tensor
from mergeguard.checkpoints.reader import FileReader
from mergeguard.checkpoints.resolve import resolve_path
from mergeguard.checkpoints.tied import hidden_tensors
from mergeguard.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType

    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor of a source.

    Attributes:
        name: the tensor's name.
        dtype: torch's name of it, e.g. "bfloat16".
        shape: elements along each dimension; () is a scalar.
        nbytes: its size in memory.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@runtime_checkable
class Source(Protocol):
    """The tensors of one input of a merge; a context manager that releases its files.

    Attributes:
        path: the folder or file that it stands for.
        config: config.json of the model, None if there is none.
        tensors: what the model consists of, in the order in which they are read fastest.
        hidden: stored tensors that are not in `tensors`, each with the reason.
        files: all files that decide what the tensors are, for digests.
    """

    @property
    def path(self) -> Path: ...
    @property
    def config(self) -> dict[str, Any] | None: ...
    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...
    @property
    def hidden(self) -> Mapping[str, str]: ...
    @property
    def files(self) -> tuple[Path, ...]: ...

    def read(self, name: str) -> Tensor:
        """The tensor `name` in memory of its own, on the CPU, in its stored dtype.

        Raises:
            CheckpointError: there is no such tensor, or its file cannot be read or has changed.
        """
        ...

    def read_bytes(self, name: str, view: memoryview) -> None:
        """The same as bytes, little-endian and row-major, into memory that is reused.

        Args:
            name: the tensor's name.
            view: writable, contiguous, of one dimension and `tensors[name].nbytes` bytes.
        """
        ...

    def check_unchanged(self) -> None:
        """Raise a CheckpointError if a file has been written to, replaced or removed since the source was opened."""
        ...

    def close(self) -> None:
        """Release the files; then the same check, so that digests taken meanwhile describe what was read."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class StoredSource:
    """The tensors of safetensors files, read with `preadv`."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Take over an opened checkpoint.

        Raises:
            CheckpointError: the model is tied, but stores two embeddings that differ.
        """
        self.path, self.config, self.files = checkpoint.path, checkpoint.config, checkpoint.files
        self._stored = checkpoint.tensors
        self._reader = FileReader(checkpoint.stamps)
        try:
            self.hidden: Mapping[str, str] = hidden_tensors(
                self.path,
                self.config,
                self._stored,
                lambda one, other: self._reader.same_bytes(self._stored[one], self._stored[other]),
            )
        except CheckpointError:
            self._reader.close(check=False)
            raise
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(name, TORCH_NAMES[tensor.dtype], tensor.shape, tensor.nbytes)
            for name, tensor in self._stored.items()
            if name not in self.hidden
        }

    def read(self, name: str) -> Tensor:
        return tensor_of(self, name)

    def read_bytes(self, name: str, view: memoryview) -> None:
        info, stored = find(self, name), self._stored[name]
        check_view(info, view)
        self._reader.read_into(stored.path, stored.start, view)

    def check_unchanged(self) -> None:
        self._reader.check_unchanged()

    def close(self) -> None:
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._reader.close(check=kind is None)


def open_source(reference: str, *, allow_pickle: bool = False) -> Source:
    """The source that a recipe names.

    Args:
        reference: "MODEL" or "MODEL+ADAPTER", each a folder, a file or a hub id (see `resolve_path`). A "+" in the name
            of something that exists is part of the name.
        allow_pickle: take pickle files where there are no safetensors.

    Raises:
        CheckpointError: something is absent or not as it should be.
    """
    model, adapter = split_reference(reference)
    checkpoint = open_checkpoint(resolve_path(model, allow_pickle=allow_pickle), allow_pickle=allow_pickle)
    if checkpoint.pickles:
        from mergeguard.checkpoints.pickle_source import PickleSource

        source: Source = PickleSource(checkpoint)
    else:
        source = StoredSource(checkpoint)
    if adapter is None:
        return source
    from mergeguard.checkpoints.adapter import LoraSource

    try:
        return LoraSource(source, resolve_path(adapter, allow_pickle=allow_pickle), allow_pickle=allow_pickle)
    except CheckpointError as error:
        source.__exit__(type(error), error, None)
        raise


def split_reference(reference: str) -> tuple[str, str | None]:
    """(model, adapter or None) of a reference; of several "+", the first whose two sides exist, else the first."""
    if "+" not in reference or existing(reference):
        return reference, None
    places = [place for place, character in enumerate(reference) if character == "+"]
    splits = [(reference[:place], reference[place + 1 :]) for place in places]
    model, adapter = next((split for split in splits if all(map(existing, split))), splits[0])
    if not model or not adapter:
        raise CheckpointError(f"cannot read {quoted(reference)}; expected MODEL or MODEL+ADAPTER")
    return model, adapter


def find(source: Source, name: str) -> TensorInfo:
    """What a source says of a tensor.

    Raises:
        CheckpointError: it has no such tensor.
    """
    if name not in source.tensors:
        why = f": {source.hidden[name]}" if name in source.hidden else ""
        refuse_tensor(source.path, name, f"is not part of the model{why}")
    return source.tensors[name]


def torch_dtype(source: Source, info: TensorInfo) -> torch.dtype:
    """The dtype of a tensor.

    Raises:
        CheckpointError: this version of torch does not have it.
    """
    import torch

    dtype = getattr(torch, info.dtype, None)
    if not isinstance(dtype, torch.dtype):
        refuse_tensor(source.path, info.name, f"is {info.dtype}, which torch {torch.__version__} lacks; update torch")
    return dtype


def tensor_of(source: Source, name: str) -> Tensor:
    """`Source.read` by `Source.read_bytes`."""
    import torch

    info = find(source, name)
    memory = torch.empty(info.nbytes, dtype=torch.uint8)
    source.read_bytes(name, memory.numpy().data)
    return memory.view(torch_dtype(source, info)).view(info.shape)


def as_tensor(source: Source, name: str, view: memoryview) -> Tensor:
    """The memory that `Source.read_bytes` was given as the tensor `name`, for those who compute it with torch."""
    import numpy as np
    import torch

    info = find(source, name)
    check_view(info, view)
    memory = torch.from_numpy(np.frombuffer(view, dtype=np.uint8))
    return memory.view(torch_dtype(source, info)).view(info.shape)


def check_view(info: TensorInfo, view: memoryview) -> None:
    """Refuse memory that is not for a tensor.

    Raises:
        ValueError: it is read-only, not contiguous bytes, or of another length.
    """
    usable = not view.readonly and view.c_contiguous and view.ndim == 1 and view.format == "B"
    if not usable or view.nbytes != info.nbytes:
        raise ValueError(f"the memory for {info.name} must be {info.nbytes} contiguous writable bytes")

"""Tensors of pickled checkpoints (`pytorch_model.bin`), for those who allow it.

torch's `weights_only` unpickler runs nothing but a short list of harmless constructors; the tensors stay in the mapped
files until they are read.
"""

from __future__ import annotations

from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Self

import torch

from mergeguard.checkpoints.inputs import reason, refuse, refuse_tensor
from mergeguard.checkpoints.reader import FileReader
from mergeguard.checkpoints.source import TensorInfo, as_tensor, tensor_of
from mergeguard.checkpoints.tied import hidden_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType

    from torch import Tensor

    from mergeguard.checkpoints.checkpoint import Checkpoint


class PickleSource:
    """The tensors of pickle files, each a flat dictionary of tensors by name."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Map the files of an opened checkpoint.

        Raises:
            CheckpointError: a file is not a flat dictionary of tensors, the index says otherwise, or the model is tied
                but stores two embeddings that differ.
        """
        self.path, self.config, self.files = checkpoint.path, checkpoint.config, checkpoint.files
        self._reader = FileReader(checkpoint.stamps)
        self._loaded: dict[str, Tensor] = {}
        for path in checkpoint.pickles:
            for name, tensor in _load(path).items():
                if checkpoint.weight_map and checkpoint.weight_map.get(name) != path:
                    refuse_tensor(path, name, "is here, but the index does not say so; copy or download them again")
                self._loaded[name] = tensor
        for name, path in checkpoint.weight_map.items():
            if name not in self._loaded:
                refuse_tensor(path, name, "is missing, but the index puts it here; copy or download them again")
        self._reader.check_unchanged()
        described = {name: _describe(name, tensor) for name, tensor in self._loaded.items()}
        self.hidden: Mapping[str, str] = hidden_tensors(self.path, self.config, described, self._same_bytes)
        self.tensors: Mapping[str, TensorInfo] = {
            name: info for name, info in described.items() if name not in self.hidden
        }

    def read(self, name: str) -> Tensor:
        return tensor_of(self, name)

    def read_bytes(self, name: str, view: memoryview) -> None:
        target = as_tensor(self, name, view)
        loaded = self._loaded.get(name)
        if loaded is None:
            refuse(self.path, "is closed already; open the checkpoint again")
        target.copy_(loaded)

    def check_unchanged(self) -> None:
        self._reader.check_unchanged()

    def close(self) -> None:
        self._loaded.clear()
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loaded.clear()
        self._reader.close(check=kind is None)

    def _same_bytes(self, one: str, other: str) -> bool:
        first, second = (self._loaded[name].contiguous().view(-1).view(torch.uint8) for name in (one, other))
        return torch.equal(first, second)


def _describe(name: str, tensor: Tensor) -> TensorInfo:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorInfo(name, dtype, tuple(tensor.shape), tensor.numel() * tensor.itemsize)


def _load(path: Path) -> dict[str, Tensor]:
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError:  # torch's own text advises to switch the protection off
        refuse(path, "cannot be loaded: it holds other things than tensors, or is no pickle; convert it to safetensors")
    except Exception as error:  # noqa: BLE001 - zip, pickle and torch each raise kinds of their own
        refuse(path, f"cannot be loaded ({reason(error)}); convert it to safetensors")
    if not isinstance(loaded, dict):
        refuse(path, f"holds a {type(loaded).__name__}, not a flat dictionary of tensors; convert it to safetensors")
    tensors: dict[str, Tensor] = {}
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            kind = type(value).__name__
            refuse_tensor(
                path, str(name), f"is a {kind}; expected a flat dictionary of tensors, convert to safetensors"
            )
        plain = value.layout == torch.strided and not value.is_quantized and value.device.type == "cpu"
        # a tensor with strides of 0 can claim any size from a few stored bytes
        if not plain or value.numel() * value.itemsize > value.untyped_storage().nbytes():
            refuse_tensor(path, name, "is sparse, quantized, expanded or without data; convert it to safetensors")
        tensors[name] = value.detach()
    return tensors

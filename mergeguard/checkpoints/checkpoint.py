"""A checkpoint: a folder as transformers writes it, or one file. Only headers are read; torch is not imported."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from mergeguard.checkpoints.header import Header, StoredTensor, read_header
from mergeguard.checkpoints.inputs import (
    FileStamp,
    check_inside,
    existing,
    file_stamp,
    quoted,
    read_json,
    reason,
    refuse,
    refuse_tensor,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE_SINGLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """Where the tensors of a model lie.

    Attributes:
        path: the folder, or the one file.
        tensors: by name, in the order of the files and of their bytes; empty if the files are pickles, whose tensors
            only torch can list.
        config: config.json of the folder; None if there is none, or if `path` is a file.
        files: all files that decide what the model is: weights, index and config.json.
        stamps: of the weight files when their headers were read.
        pickles: the weight files, if they are pickles.
        weight_map: the file of each tensor, as the index of pickles says; empty if there is no index.
    """

    path: Path
    tensors: Mapping[str, StoredTensor]
    config: dict[str, Any] | None
    files: tuple[Path, ...]
    stamps: Mapping[Path, FileStamp]
    pickles: tuple[Path, ...] = ()
    weight_map: Mapping[str, Path] = field(default_factory=dict)


def open_checkpoint(path: Path | str, *, allow_pickle: bool = False) -> Checkpoint:
    """Find the weights of a checkpoint and read their headers.

    Args:
        path: a folder with `model.safetensors` or `model.safetensors.index.json` and its shards (with `allow_pickle`
            also `pytorch_model.bin`, likewise), or a single weight file.
        allow_pickle: take pickle files; torch loads them with `weights_only`, which runs no code that it does not know.

    Raises:
        CheckpointError: no weights are found, or any file is not as it should be.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path, allow_pickle=allow_pickle)
    if path.suffix in PICKLE_SUFFIXES:
        if not allow_pickle:
            refuse(path, f"is a pickle, {_PICKLE_ADVICE}")
        return Checkpoint(path, {}, None, (path,), {path: file_stamp(path)}, pickles=(path,))
    header = read_header(path)
    return Checkpoint(path, header.tensors, None, (path,), {path: header.stamp})


_PICKLE_ADVICE = "which can run code when loaded; convert it to safetensors, or pass --allow-pickle if you trust it"


def _open_folder(folder: Path, *, allow_pickle: bool) -> Checkpoint:
    found = {name for name in (SINGLE, INDEX, PICKLE_SINGLE, PICKLE_INDEX) if (folder / name).exists()}
    single, index, pickled = SINGLE, INDEX, False
    if not found & {SINGLE, INDEX}:
        if not found:
            refuse(folder, _no_weights(folder))
        if not allow_pickle:
            refuse(folder, f"has only pickled weights ({min(found)}), {_PICKLE_ADVICE}")
        single, index, pickled = PICKLE_SINGLE, PICKLE_INDEX, True
    if {single, index} <= found:
        refuse(folder, f"has both {single} and {index}; remove the one that is not the model")
    weight_map = _weight_map(folder, index) if index in found else {}
    files = tuple(sorted(set(weight_map.values()))) if index in found else (_inside(folder, single),)
    config = read_json(folder / CONFIG) if (folder / CONFIG).exists() else None
    decisive = (
        *files,
        *((folder / index,) if index in found else ()),
        *((folder / CONFIG,) if config is not None else ()),
    )
    if pickled:
        stamps = {file: file_stamp(file) for file in files}
        return Checkpoint(folder, {}, config, decisive, stamps, pickles=files, weight_map=weight_map)
    headers = [read_header(file) for file in files]
    tensors = _indexed(folder / index, weight_map, headers) if index in found else headers[0].tensors
    return Checkpoint(folder, tensors, config, decisive, {header.path: header.stamp for header in headers})


def _no_weights(folder: Path) -> str:
    if (folder / ADAPTER_CONFIG).exists():
        return f"is an adapter, not a model; write BASE+{folder} to merge it with the base that it was trained on"
    try:
        others = sorted(file.name for file in folder.iterdir() if file.suffix in (".safetensors", *PICKLE_SUFFIXES))
    except OSError as error:
        return f"cannot be read: {reason(error)}"
    if not others:
        return f"has no weights; expected {SINGLE}, or {INDEX} and its shards"
    if any(re.search(r"-of-\d+\.", name) for name in others):
        return f"has shards ({others[0]}, ...) but no {INDEX}; copy or download it again"
    return f"has no {SINGLE}; give the file itself, e.g. {folder / others[0]}"


def _weight_map(folder: Path, index: str) -> dict[str, Path]:
    """The file of each tensor in an index; every file lies in the folder."""
    weight_map = read_json(folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        refuse(folder / index, "has no weight_map from names to files; copy or download it again")
    if not weight_map:
        refuse(folder / index, "names no tensors; copy or download it again")
    files = {name: _inside(folder, name) for name in dict.fromkeys(weight_map.values())}
    return {tensor: files[name] for tensor, name in weight_map.items()}


def _inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`: in it after all links, or in the blobs that the Hugging Face cache links to."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts or "\0" in name or "\\" in name:
        refuse(folder, f"has an index that leads out of the folder ({quoted(name)}); do not trust this checkpoint")
    path = folder / pure
    if existing(path) is None:
        refuse(folder, f"lacks {quoted(name)}, which its index names; copy or download it again")
    check_inside(folder, path)
    return path


def _indexed(index: Path, weight_map: Mapping[str, Path], headers: Iterable[Header]) -> dict[str, StoredTensor]:
    """The tensors of all shards, after checking that shards and index agree on every one."""
    tensors: dict[str, StoredTensor] = {}
    for header in headers:
        for name, tensor in header.tensors.items():
            if weight_map.get(name) != header.path:
                said = f"puts it into {weight_map[name].name}" if name in weight_map else "does not name it"
                refuse_tensor(header.path, name, f"is here, but {index.name} {said}; copy or download them again")
            tensors[name] = tensor
    for name, path in weight_map.items():
        if name not in tensors:
            refuse_tensor(path, name, f"is missing, but {index.name} puts it here; copy or download them again")
    return tensors

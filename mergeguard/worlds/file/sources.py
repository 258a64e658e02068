"""The models of a world file as sources and as lazy states: tensors are read, folded and cast when asked for."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from mergeguard.checkpoints.digests import digest_files
from mergeguard.checkpoints.files import write_bytes
from mergeguard.checkpoints.inputs import file_stamp, read_json
from mergeguard.checkpoints.lazy import LazyTensors
from mergeguard.checkpoints.source import Source, open_source
from mergeguard.errors import CheckpointError
from mergeguard.machine import available_cores, cache_folder
from mergeguard.worlds.file.locate import interrupted, is_adapter, locate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import ExitStack
    from pathlib import Path

    from torch import Tensor

    from mergeguard.checkpoints.inputs import FileStamp
    from mergeguard.worlds.file.document import ModelEntry, WorldFile

_SHA256_DIGITS = 64


@dataclass(frozen=True)
class Opened:
    """A model of the world, opened.

    Attributes:
        label: "base", "upstream" or the donor's name.
        source: its tensors.
        folders: where its other files are looked for: the adapter's folder, if there is one, then the model's.
        is_adapter: whether it is an adapter on another model.
    """

    label: str
    source: Source
    folders: tuple[Path, ...]
    is_adapter: bool


def open_models(world: WorldFile, opened: ExitStack) -> list[Opened]:
    """Every model of a file, the base first; only headers are read.

    Args:
        world: the file.
        opened: closes what is opened.

    Raises:
        ParameterError: a folder or hub id is not there.
        CheckpointError: a model's files are absent, damaged, or pickles that the file does not allow.
    """
    return [_open(world, entry, opened) for entry in world.models]


def _open(world: WorldFile, entry: ModelEntry, opened: ExitStack) -> Opened:
    folder = locate(world, entry, entry.model, entry.revision)
    adapter = locate(world, entry, entry.adapter) if entry.adapter is not None else None
    allow_pickle = entry.allow_pickle
    if adapter is None and entry is not world.base and is_adapter(folder):
        folder, adapter = locate(world, world.base, world.base.model, world.base.revision), folder
        allow_pickle = allow_pickle or world.base.allow_pickle
    folders = (folder,) if adapter is None else (adapter, folder)
    try:
        reference = "+".join(map(str, reversed(folders)))
        source = opened.enter_context(open_source(reference, allow_pickle=allow_pickle))
    except CheckpointError as error:
        message = str(error).replace("pass --allow-pickle", "set allow_pickle = true")
        advice = next(filter(None, map(interrupted, folders)), "")
        raise CheckpointError(f"{world.path}: {entry.label}: {message}{advice}") from error
    return Opened(entry.label, source, folders, adapter is not None)


class LazyState(LazyTensors):
    """A model's tensors, each storage under one name, read from its files whenever one is asked for.

    Every access gives a tensor of its own, on the CPU, so that nothing is held between them.

    Args:
        source: of the model.
        names: the names of a loaded model's tensors, in its order.
        dtype: what floating tensors are cast to.
        rows: of the vocabulary tensors in the world, by name.
        fill: gives the rows that this model lacks there: the base.
    """

    def __init__(
        self,
        source: Source,
        names: Sequence[str],
        dtype: torch.dtype,
        rows: Mapping[str, int],
        fill: Source | None = None,
    ) -> None:
        super().__init__(names, self._read)
        self._source, self._dtype = source, dtype
        self._rows, self._fill = rows, fill

    def _read(self, name: str) -> Tensor:
        tensor = self._source.read(name)
        rows = self._rows.get(name, len(tensor) if tensor.dim() else 0)
        if self._fill is not None and tensor.dim() and len(tensor) < rows:
            tensor = torch.cat([tensor, self._fill.read(name)[len(tensor) :].to(tensor.dtype)])
        if tensor.dim() and len(tensor) > rows:
            tensor = tensor[:rows]
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor


def digests_of(models: Sequence[Opened]) -> dict[str, str]:
    """SHA-256 of every file that decides what the models are, by "label/file".

    A blob of the hub's cache is named by it; any other file is hashed once, and again when it changes.

    Raises:
        CheckpointError: a file cannot be read.
    """
    files = {path for model in models for path in model.source.files}
    known = {path: digest for path in files if (digest := _blob_digest(path) or _remembered(path)) is not None}
    stamps = {path: file_stamp(path) for path in files - known.keys()}  # before: a change while hashing must not pass
    hashed = digest_files(stamps, threads=min(4, available_cores()))
    for path, digest in hashed.items():
        _remember(path, stamps[path], digest)
    digests = {**known, **hashed}
    return {f"{model.label}/{path.name}": digests[path] for model in models for path in model.source.files}


def _blob_digest(path: Path) -> str | None:
    target = path.resolve()
    name = target.name
    is_digest = len(name) == _SHA256_DIGITS and set(name) <= set("0123456789abcdef")
    return name if is_digest and target.parent.name == "blobs" else None


def _note(path: Path) -> Path:
    return cache_folder() / "digests" / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()}.json"


def _remembered(path: Path) -> str | None:
    """The digest that an earlier run noted for a file that is as it was then."""
    note = _note(path)
    try:
        found = read_json(note) if note.is_file() else {}
    except (CheckpointError, OSError):
        return None  # as good as none
    digest = found.get("sha256")
    return digest if isinstance(digest, str) and found.get("stamp") == asdict(file_stamp(path)) else None


def _remember(path: Path, stamp: FileStamp, digest: str) -> None:
    note = _note(path)
    with contextlib.suppress(CheckpointError, OSError):  # without a note the next run hashes again
        note.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_bytes(note, json.dumps({"path": str(path), "stamp": asdict(stamp), "sha256": digest}).encode())

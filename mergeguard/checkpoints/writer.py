"""Writing a model as transformers names and shards it: space and headers first, then bytes from any thread."""

from __future__ import annotations

import bisect
import errno
import json
import math
import os
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from mergeguard.checkpoints.checkpoint import INDEX, SINGLE
from mergeguard.checkpoints.digests import StreamedDigest
from mergeguard.checkpoints.files import PUBLIC, file_digest, write_bytes
from mergeguard.checkpoints.header import DTYPES, encode_header
from mergeguard.checkpoints.inputs import reason
from mergeguard.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from typing_extensions import Buffer

Entry = tuple[str, str, "Sequence[int]"]
"""Name, dtype code of safetensors ("F32"), shape."""
DEFAULT_SHARD_BYTES = 5_000_000_000
HASH_STEP = 32 << 20
"""Bytes that are hashed before the thread looks up: whether it shall stop, and which file comes next."""
_SYNC = getattr(os, "fdatasync", os.fsync)  # macOS has none


def nbytes(entry: Entry) -> int:
    """Bytes of a tensor as it is stored."""
    _, dtype, shape = entry
    return math.prod(shape) * DTYPES[dtype]


def plan_shards(entries: Sequence[Entry], max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> dict[str, tuple[Entry, ...]]:
    """Which tensors go to which file, in the files' order of tensors.

    Tensors fill shards in the given order; one that is larger than a shard gets a file of its own, and those around it
    share one, as in `split_state_dict_into_shards_factory` of huggingface_hub 2.4, which transformers saves with.
    Within a file wider dtypes come first, so that every tensor is aligned: torch reads no other.

    Args:
        entries: the tensors; names are unique.
        max_shard_bytes: the most bytes of tensors in a file of several.

    Returns:
        File name ("model.safetensors", or "model-00001-of-00002.safetensors" and so on) -> its tensors.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}; a shard holds at least one byte")
    if len({name for name, _, _ in entries}) < len(entries):
        raise ValueError("two tensors have the same name")
    shards: list[list[Entry]] = []
    current: list[Entry] = []
    size = 0
    for entry in entries:
        more = nbytes(entry)
        if more > max_shard_bytes:
            shards.append([entry])
            continue
        if size + more > max_shard_bytes:
            shards.append(current)
            current, size = [], 0
        current.append(entry)
        size += more
    if current:
        shards.append(current)
    count = len(shards)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else [SINGLE]
    return {
        name: tuple(sorted(shard, key=lambda entry: -DTYPES[entry[1]]))
        for name, shard in zip(names, shards, strict=True)
    }


class _Ranges:
    """A set of bytes as sorted ranges that do not touch."""

    def __init__(self) -> None:
        self._edges: list[tuple[int, int]] = []

    def add(self, start: int, stop: int) -> bool:
        """Add a range of at least one byte; False, and nothing added, if a byte of it is there already."""
        edges = self._edges
        first = last = bisect.bisect_left(edges, (start, stop))
        if (first and edges[first - 1][1] > start) or (last < len(edges) and edges[last][0] < stop):
            return False
        if first and edges[first - 1][1] == start:
            first -= 1
            start = edges[first][0]
        if last < len(edges) and edges[last][0] == stop:
            stop = edges[last][1]
            last += 1
        edges[first:last] = [(start, stop)]
        return True

    @property
    def prefix(self) -> int:
        """How many bytes from 0 on are there without a gap."""
        return self._edges[0][1] if self._edges and self._edges[0][0] == 0 else 0


@dataclass
class _Shard:
    path: Path
    descriptor: int
    size: int
    starts: list[tuple[int, str]]  # where each tensor starts, in the file's order
    written: _Ranges = field(default_factory=_Ranges)
    digest: StreamedDigest = field(default_factory=StreamedDigest)

    def first_gap(self) -> str | None:
        """The first tensor that lacks a byte."""
        prefix = self.written.prefix
        if prefix == self.size:
            return None
        return [name for start, name in self.starts if start <= prefix][-1]


class ShardedWriter:
    """The weights of one model in a folder: files appear at full size with their headers, then tensors fill them.

    A context manager: leaving it before `finish` stops everything and leaves the files as they are, to be removed with
    their folder (see `files.atomic_folder`). A thread hashes each file behind the tensors that are written to it.

    Args:
        folder: an existing folder without weights.
        entries: (name, dtype code, shape) of every tensor; the order is best the one in which they will be written.
        max_shard_bytes: see `plan_shards`.
        metadata: the `__metadata__` of every file.

    Raises:
        CheckpointError: no tensors, or a file cannot be created at its size: the disk is full, for instance.
    """

    def __init__(
        self,
        folder: Path,
        entries: Sequence[Entry],
        *,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        if not entries:
            raise CheckpointError(f"cannot write a model to {folder}: it has no tensors")
        plan = plan_shards(entries, max_shard_bytes)
        self._folder = folder
        self._total = sum(map(nbytes, entries))
        self._files = {name: file for file, tensors in plan.items() for name, _, _ in tensors}
        self._shards: list[_Shard] = []
        self._descriptors: list[int] = []
        self._places: dict[str, tuple[_Shard, int, int]] = {}  # tensor -> its shard, first byte, bytes
        self._changed = threading.Condition()
        self._closed = self._stopped = False
        self._writing = 0
        self._failure: Exception | None = None
        try:
            for file, tensors in plan.items():
                self._create(folder / file, tensors, {"format": "pt"} if metadata is None else metadata)
        except BaseException:
            self._close_files()
            raise
        self._hasher = threading.Thread(target=self._hash, name="writer-digest", daemon=True)
        self._hasher.start()

    @property
    def files(self) -> Mapping[str, str]:
        """Tensor -> name of the file that holds it."""
        return self._files

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, without headers."""
        return self._total

    def _create(self, path: Path, tensors: Sequence[Entry], metadata: Mapping[str, str]) -> None:
        header = encode_header(tensors, metadata)
        size = len(header) + sum(map(nbytes, tensors))
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PUBLIC)
            self._descriptors.append(descriptor)
            shard = _Shard(path, descriptor, size, [])
            self._shards.append(shard)
            _allocate(descriptor, size)
            _write_all(descriptor, memoryview(header), 0)
        except OSError as error:
            raise _cannot_write(path, error, self._total) from error
        shard.written.add(0, len(header))
        start = len(header)
        for entry in tensors:
            shard.starts.append((start, entry[0]))
            self._places[entry[0]] = (shard, start, nbytes(entry))
            start += nbytes(entry)

    def write(self, name: str, buffer: Buffer, offset: int = 0) -> None:
        """Write bytes of a tensor; any thread, any order, each byte once.

        Args:
            name: one of the entries.
            buffer: the bytes, little-endian and row-major as in the file: any C-contiguous buffer.
            offset: where in the tensor they belong, in bytes.

        Raises:
            CheckpointError: the file cannot be written.
            ValueError: the bytes lie outside the tensor or were written before, or the writer is closed.
        """
        view = memoryview(buffer)
        shard, start, size = self._places[name]
        if offset < 0 or offset + view.nbytes > size:
            raise ValueError(f"bytes {offset} to {offset + view.nbytes} of {name} lie outside its {size}")
        with self._changed:
            if self._closed:
                raise ValueError(f"{name} is written after its file was closed")
            self._writing += 1
        try:
            if view.nbytes:
                _write_all(shard.descriptor, view.cast("B"), start + offset)
        except OSError as error:
            raise _cannot_write(shard.path, error) from error
        else:
            with self._changed:
                if view.nbytes and not shard.written.add(start + offset, start + offset + view.nbytes):
                    raise ValueError(f"bytes {offset} to {offset + view.nbytes} of {name} were written before")
        finally:
            with self._changed:
                self._writing -= 1
                self._changed.notify_all()

    def finish(self) -> dict[str, str]:
        """Bring everything to the disk, and the index if there are several files.

        Returns:
            File name -> SHA-256, the index included.

        Raises:
            CheckpointError: a file cannot be written, or read back for its digest.
            RuntimeError: a byte was not written: an error of the caller.
        """
        try:
            with self._changed:
                if self._closed:
                    raise ValueError("the writer was finished or closed before")
                self._closed = True
                self._changed.wait_for(lambda: not self._writing)
                for shard in self._shards:
                    if (name := shard.first_gap()) is not None:
                        raise RuntimeError(f"{name} was not written to its end in {shard.path}")
                self._changed.notify_all()
            for shard in self._shards:  # while the last bytes are hashed
                try:
                    os.fsync(shard.descriptor)
                except OSError as error:
                    raise _cannot_write(shard.path, error) from error
            self._hasher.join()
            if self._failure is not None:
                raise CheckpointError(f"cannot read {self._folder} back: {reason(self._failure)}") from self._failure
            digests = {shard.path.name: shard.digest.finish(shard.descriptor) for shard in self._shards}
        finally:
            self.close()
        if len(self._shards) > 1:
            write_bytes(self._folder / INDEX, self._index())
            digests[INDEX] = file_digest(self._folder / INDEX)
        return digests

    def _index(self) -> bytes:
        document = {"metadata": {"total_size": self._total}, "weight_map": self._files}
        return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()

    def _hash(self) -> None:
        """Follow what is written without a gap in each file; ends with the last byte or when the writer stops."""
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._stopped or self._all_hashed() or self._behind() is not None)
                    shard = self._behind()
                    if self._stopped or shard is None:
                        return
                    stop = min(shard.written.prefix, shard.digest.position + HASH_STEP)
                shard.digest.follow(shard.descriptor, stop)
                _SYNC(shard.descriptor)  # the disk works meanwhile, and the last fsync has little left to do
        except Exception as error:  # noqa: BLE001 - whatever it is, the thread that finishes must learn of it
            self._failure = error

    def _behind(self) -> _Shard | None:
        return next((shard for shard in self._shards if shard.digest.position < shard.written.prefix), None)

    def _all_hashed(self) -> bool:
        return all(shard.digest.position == shard.size for shard in self._shards)

    def close(self) -> None:
        """Stop, whether finished or not: waits for writes that are under way; later ones are refused."""
        with self._changed:
            self._closed = True
            self._stopped = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._writing)
        self._hasher.join()
        self._close_files()

    def _close_files(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _allocate(descriptor: int, size: int) -> None:
    """Reserve the file's space, so that a full disk shows before the first tensor; where that is unknown, its size."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except (OSError, AttributeError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        os.ftruncate(descriptor, size)


def _write_all(descriptor: int, view: memoryview, offset: int) -> None:
    """All of the bytes: one call writes at most 2 GB, and less where it is interrupted."""
    done = 0
    while done < view.nbytes:
        done += os.pwrite(descriptor, view[done:], offset + done)


def _cannot_write(path: Path, error: OSError, size: int | None = None) -> CheckpointError:
    needs = f", the weights need {size:,} bytes" if size is not None else ""
    hint = {
        errno.ENOSPC: f"; free some space or choose another disk{needs}",
        errno.EMFILE: "; choose a larger shard size, so that there are fewer files",
    }
    return CheckpointError(f"cannot write {path}: {reason(error)}{hint.get(error.errno or 0, '')}")

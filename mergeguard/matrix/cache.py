"""A content-addressed cache on disk, safe under several processes.

An entry's name is a digest of everything that decides its content, the code included. Entries are written atomically
and carry a checksum; a damaged one is rebuilt, which is logged. A lock per entry keeps two processes from doing the
same work, and a killed one leaves nothing that could be taken for whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
from contextlib import contextmanager
from functools import cache as memoised
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from mergeguard.checkpoints.files import PRIVATE, file_digest, read_tensors, write_bytes, write_tensors
from mergeguard.errors import CheckpointError
from mergeguard.machine import CACHE_VARIABLE, cache_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

LOG = logging.getLogger("mergeguard")
_ADVICE = f"set {CACHE_VARIABLE} to a folder that can be written"
# What decides no measurement that is kept: what stands below the matrix, and the doors.
_NOT_MEASURING = ("cli.py", "commands", "ownership", "pytest_plugin.py", "reports", "testing")


@memoised
def code_version() -> str:
    """A digest of the installed sources that measure, and of the library that computes."""
    import torch

    package = Path(__file__).parents[1]
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package)
        if name.parts[0] not in _NOT_MEASURING:
            digest.update(name.as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


class Cache:
    """Entries below one folder, of JSON data or of tensors with JSON data beside them."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or cache_folder()

    def data(self, kind: str, key: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """The JSON data of an entry, made by `make` if there is none.

        Fresh data too is what JSON makes of it (lists for tuples), so that a result cannot depend on the cache.

        Args:
            kind: a word for the folder, e.g. "outcome".
            key: everything that decides the content, as JSON data; the code's version is added.
            make: gives JSON data other than None, which stands for "no entry".

        Raises:
            CheckpointError: the cache folder cannot be written.
        """
        path = self._path(kind, key, ".json")
        found = self._read(path)
        if found is None:
            with self._locked(path):
                found = self._read(path)
                if found is None:
                    found = _as_json(make())
                    self._write(path, found)
        return found

    def tensors(
        self, kind: str, key: Mapping[str, Any], make: Callable[[], tuple[Mapping[str, Tensor], Any]]
    ) -> tuple[Mapping[str, Tensor], Any]:
        """The tensors and the JSON data of an entry, both private to the user, made by `make` if there is none."""
        path = self._path(kind, key, ".json")
        found = self._read_tensors(path)
        if found is None:
            with self._locked(path):
                found = self._read_tensors(path)
                if found is None:
                    tensors, data = make()
                    found = tensors, _as_json(data)
                    self._write(path, found[1], tensors)
        return found

    def _path(self, kind: str, key: Mapping[str, Any], suffix: str) -> Path:
        text = json.dumps({**key, "code": code_version()}, sort_keys=True, ensure_ascii=True)
        return self.folder / kind / f"{hashlib.sha256(text.encode()).hexdigest()}{suffix}"

    def _read(self, path: Path) -> Any:
        try:
            text = path.read_text()
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return None  # if the folder cannot be used at all, taking the lock says so
        except (OSError, UnicodeDecodeError):
            text = ""
        try:
            entry = json.loads(text)
            if entry["sha256"] == _checksum(entry["data"]):
                return entry["data"]
        except (ValueError, KeyError, TypeError):
            pass
        LOG.warning("the cache entry %s is damaged and will be rebuilt", path)
        return None

    def _read_tensors(self, path: Path) -> tuple[Mapping[str, Tensor], Any] | None:
        entry = self._read(path)
        if entry is None:
            return None
        file = path.with_suffix(".safetensors")
        try:
            if file_digest(file) == entry["tensors"]:
                return read_tensors(file), entry["data"]
        except (OSError, CheckpointError):
            pass
        LOG.warning("the cache entry %s is damaged and will be rebuilt", file)
        return None

    def _write(self, path: Path, data: Any, tensors: Mapping[str, Tensor] | None = None) -> None:
        try:
            if tensors is not None:
                file = path.with_suffix(".safetensors")
                write_tensors(file, tensors, PRIVATE)
                data = {"tensors": file_digest(file), "data": data}
            write_bytes(path, json.dumps({"sha256": _checksum(data), "data": data}).encode(), PRIVATE)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {_ADVICE}") from error

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = FileLock(path.with_suffix(".lock"))
            lock.acquire()
        except OSError as error:
            raise CheckpointError(
                f"cannot write the cache folder {self.folder}: {error.strerror or error}; {_ADVICE}"
            ) from error
        try:
            yield
        finally:
            lock.release()


def _checksum(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _as_json(data: Any) -> Any:
    return json.loads(json.dumps(data))

"""Bytes of files that must not change while they are read. No torch is imported here."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Self

from mergeguard.checkpoints.inputs import FileStamp, reason, refuse
from mergeguard.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType

    from mergeguard.checkpoints.header import StoredTensor

REQUEST_BYTES = 8 << 20
"""One read: long enough for a disk, short enough to be interrupted; the GIL is free meanwhile."""
_CHANGED = "changed while it was used; run again when nothing writes to it"


class FileReader:
    """Reads ranges of files from any thread; each file is opened with its first read and stays open until `close`.

    Args:
        stamps: every file that may be read, with its stamp when its header was read.
    """

    _close_handle = staticmethod(os.close)  # when the interpreter ends, `os` may be gone before the last reader

    def __init__(self, stamps: Mapping[Path, FileStamp]) -> None:
        self._stamps = dict(stamps)
        self._handles: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._closed = False

    def read_into(self, path: Path, start: int, buffer: memoryview) -> None:
        """Fill `buffer` (bytes, writable) with what the file holds from byte `start` on.

        Raises:
            CheckpointError: the file cannot be read, ends too early, or is another one than when its header was read.
        """
        handle, done = self._handle(path), 0
        while done < len(buffer):
            try:
                count = os.preadv(handle, [buffer[done : done + REQUEST_BYTES]], start + done)
            except OSError as error:
                refuse(path, f"cannot be read at byte {start + done}: {reason(error)}")
            if count == 0:
                refuse(path, f"ended at byte {start + done}: it {_CHANGED}")
            done += count

    def same_bytes(self, one: StoredTensor, other: StoredTensor) -> bool:
        """Whether two tensors hold the same bytes; both are read in pieces, up to the first that differs."""
        if one.nbytes != other.nbytes:
            return False
        pieces = bytearray(REQUEST_BYTES), bytearray(REQUEST_BYTES)
        for done in range(0, one.nbytes, REQUEST_BYTES):
            length = min(REQUEST_BYTES, one.nbytes - done)
            views = [memoryview(piece)[:length] for piece in pieces]
            self.read_into(one.path, one.start + done, views[0])
            self.read_into(other.path, other.start + done, views[1])
            if views[0] != views[1]:
                return False
        return True

    def check_unchanged(self) -> None:
        """Compare every file with its stamp.

        Raises:
            CheckpointError: a file was written to, replaced or removed.
        """
        for path, stamp in self._stamps.items():
            try:
                status = path.stat()
            except OSError as error:
                refuse(path, f"cannot be read any more: {reason(error)}")
            if FileStamp.of(status) != stamp:
                refuse(path, _CHANGED)

    def close(self, *, check: bool = True) -> None:
        """Release the files, and look whether they are still as they were.

        Raises:
            CheckpointError: with `check`, as `check_unchanged`; the files are released all the same.
        """
        with self._lock:
            already, self._closed = self._closed, True
            while self._handles:
                self._close_handle(self._handles.popitem()[1])
        if check and not already:
            self.check_unchanged()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(check=kind is None)

    def __del__(self) -> None:
        if hasattr(self, "_lock"):
            self.close(check=False)

    def _handle(self, path: Path) -> int:
        handle = self._handles.get(path)
        if handle is not None:
            return handle
        with self._lock:
            if self._closed:
                raise CheckpointError(f"{path} is closed already; open the checkpoint again")
            if path not in self._handles:
                try:
                    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    refuse(path, f"cannot be read: {reason(error)}")
                self._handles[path] = handle
                if FileStamp.of(os.fstat(handle)) != self._stamps[path]:
                    refuse(path, _CHANGED)
            return self._handles[path]

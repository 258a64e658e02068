"""SHA-256 of big files beside other work, without a second read where the bytes pass by anyway."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import TYPE_CHECKING, Self

from mergeguard.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from concurrent.futures import Future
    from pathlib import Path
    from types import TracebackType

    from typing_extensions import Buffer

CHUNK = 2 << 20
"""Bytes read at a time: they are still in the processor's cache when they are hashed."""


class StreamedDigest:
    """SHA-256 of one file, from ranges that pass by in order and, for all others, from the file itself.

    Thread-safe. `hashlib` lets other threads run while it hashes.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._claimed = 0  # where the digest stands once the buffer that is being hashed is done
        self._position = 0
        self._lock = threading.Lock()

    @property
    def position(self) -> int:
        """How many of the file's first bytes are hashed."""
        return self._position

    def feed(self, offset: int, buffer: Buffer) -> bool:
        """Hash the file's bytes from `offset` on if the digest stands there; else ignore them.

        Args:
            offset: where in the file the bytes stand.
            buffer: the bytes: any C-contiguous buffer.

        Returns:
            Whether they were hashed.
        """
        if offset != self._claimed:  # read without the lock: out-of-order callers need not wait to be ignored
            return False
        with self._lock:
            if offset != self._position:
                return False
            view = memoryview(buffer)
            self._claimed = offset + view.nbytes
            self._hash.update(view)
            self._position = self._claimed
        return True

    def follow(self, descriptor: int, stop: int | None = None) -> None:
        """Read and hash the file from where the digest stands up to `stop`, or to its end.

        Raises:
            OSError: the file cannot be read.
        """
        chunk = memoryview(bytearray(CHUNK))
        while self._follow(descriptor, chunk, stop):
            pass

    def _follow(self, descriptor: int, chunk: memoryview, stop: int | None) -> int:
        """One chunk; the number of bytes hashed. Between two, others may feed."""
        with self._lock:
            size = CHUNK if stop is None else min(CHUNK, stop - self._position)
            count = os.preadv(descriptor, [chunk[:size]], self._position) if size > 0 else 0
            self._claimed = self._position + count
            self._hash.update(chunk[:count])
            self._position = self._claimed
        return count

    def finish(self, descriptor: int) -> str:
        """Hash what has not passed by, up to the file's end.

        Returns:
            The digest, as lower-case hexadecimal digits.

        Raises:
            OSError: the file cannot be read.
        """
        self.follow(descriptor)
        return self._hash.hexdigest()


class BackgroundDigests:
    """SHA-256 of whole files, computed by threads of its own while the caller does something else.

    A context manager: leaving it stops what is not done.

    Args:
        paths: the files; each is read once however often it is named.
        threads: how many files are read at a time.
        bytes_per_second: an upper bound of the pace of all threads together; None for none.
    """

    def __init__(self, paths: Iterable[Path], *, threads: int = 1, bytes_per_second: float | None = None) -> None:
        if threads < 1 or (bytes_per_second is not None and not bytes_per_second > 0):
            raise ValueError(f"threads={threads} and bytes_per_second={bytes_per_second} must be positive")
        self._pace = None if bytes_per_second is None else bytes_per_second / threads
        self._cancelled = threading.Event()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="digest")
        self._futures: Mapping[Path, Future[str]] = {
            path: self._pool.submit(self._digest, path) for path in dict.fromkeys(paths)
        }
        self._pool.shutdown(wait=False)

    def result(self) -> dict[Path, str]:
        """Wait for the digests, as lower-case hexadecimal digits, in the order of the paths.

        Raises:
            CheckpointError: a file cannot be read.
            concurrent.futures.CancelledError: `cancel` was called before all were done.
        """
        return {path: future.result() for path, future in self._futures.items()}

    def cancel(self) -> None:
        """Stop soon, without waiting."""
        self._cancelled.set()
        for future in self._futures.values():
            future.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def _digest(self, path: Path) -> str:
        digest, chunk, started = hashlib.sha256(), memoryview(bytearray(CHUNK)), time.monotonic()
        done = 0
        try:
            with path.open("rb", buffering=0) as file:
                while not self._cancelled.is_set() and (count := file.readinto(chunk)):
                    digest.update(chunk[:count])
                    done += count
                    if self._pace is not None:
                        self._cancelled.wait(max(0.0, started + done / self._pace - time.monotonic()))
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
        if self._cancelled.is_set():
            raise CancelledError
        return digest.hexdigest()


def digest_files(paths: Iterable[Path], *, threads: int = 1) -> dict[Path, str]:
    """SHA-256 of whole files, `threads` at a time. See `BackgroundDigests`, which does it beside other work.

    Raises:
        CheckpointError: a file cannot be read.
    """
    with BackgroundDigests(paths, threads=threads) as digests:
        return digests.result()

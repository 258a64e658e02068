"""Memory that is bounded and used again: fresh pages cost as much time as reading into them."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    Buffer = NDArray[np.uint8]


_LARGEST_TEMPORARY = 8 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


def keep_temporaries() -> None:
    """Let glibc reuse the memory of temporaries instead of returning it to the system and faulting it in again.

    Its own rule, which adapts to the largest block that was ever freed, keeps far more for each thread. Other C
    libraries are left as they are.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_TEMPORARY)
        mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST_TEMPORARY)


class BufferPool:
    """Byte arrays of at most `budget` bytes in all, or of one acquisition where that alone is larger. Thread-safe.

    A buffer that was released is given out again for the same size, which the tensors of a model mostly share.
    Buffers are acquired by one thread and released by any, so that a waiting acquisition always ends.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._free: deque[Buffer] = deque()  # the longest unused first
        self._free_bytes = 0
        self._used_bytes = 0
        self._failure: BaseException | None = None
        self._changed = threading.Condition()

    def acquire(self, sizes: Sequence[int]) -> list[Buffer]:
        """Byte arrays of these sizes, uninitialised; waits until there is room for all of them.

        Raises:
            BaseException: what was given to `fail` meanwhile.
        """
        import numpy as np

        needed = sum(sizes)
        with self._changed:
            self._changed.wait_for(
                lambda: self._failure or not self._used_bytes or self._used_bytes + needed <= self.budget
            )
            if self._failure is not None:
                raise self._failure
            found = [self._take(size) for size in sizes]
            while self._free and self._used_bytes + self._free_bytes + needed > self.budget:
                self._free_bytes -= self._free.popleft().nbytes
            self._used_bytes += needed
        return [
            np.empty(size, dtype=np.uint8) if buffer is None else buffer
            for size, buffer in zip(sizes, found, strict=True)
        ]

    def _take(self, size: int) -> Buffer | None:
        for index in range(len(self._free) - 1, -1, -1):
            if self._free[index].nbytes == size:
                buffer = self._free[index]
                del self._free[index]
                self._free_bytes -= size
                return buffer
        return None

    def release(self, buffers: Sequence[Buffer]) -> None:
        """Give buffers back; nothing may refer to them any more."""
        with self._changed:
            for buffer in buffers:
                self._free.append(buffer)
                self._free_bytes += buffer.nbytes
                self._used_bytes -= buffer.nbytes
            while self._free and self._used_bytes + self._free_bytes > self.budget:
                self._free_bytes -= self._free.popleft().nbytes
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Let a waiting acquisition, and every later one, raise `error`."""
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

"""Reading the tensors of a merge ahead of the threads that merge them; begins before torch is imported."""

from __future__ import annotations

import math
import queue
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from mergeguard.mergers.buffers import BufferPool
from mergeguard.mergers.dtypes import ITEM_BYTES, working_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

    from torch import Tensor

    from mergeguard.checkpoints.source import Source
    from mergeguard.mergers.buffers import Buffer
    from mergeguard.mergers.jobs import Job

READ_AHEAD = 32 << 20
"""Bytes of tensors that wait or are merged beside the largest merge."""


class _Stopped(Exception):
    pass


@dataclass(frozen=True)
class Read:
    """A job whose inputs are in memory.

    Attributes:
        job: the job.
        dtype: of its arithmetic, as torch names it.
        buffers: one for each of its inputs; the stored bytes are the last of them.
    """

    job: Job
    dtype: str
    buffers: list[Buffer]


class ReadAhead:
    """Reads the inputs of jobs in order, in a thread, as far as memory allows.

    A context manager: leaving it stops the thread. Iterating gives each job as soon as it is read; whoever has merged
    one gives its memory back with `release`.

    Args:
        jobs: best in the order of the inputs' bytes.
        sources: the inputs that jobs refer to by index.
        dtype: of the arithmetic, or None for the inputs' own.
    """

    def __init__(self, jobs: Sequence[Job], sources: Sequence[Source], dtype: str | None) -> None:
        self.sources = sources
        self.jobs = jobs
        self._dtypes = [
            working_dtype([sources[index].tensors[name].dtype for index, name in job.inputs], dtype) for job in jobs
        ]
        sizes = [self._sizes(job, work) for job, work in zip(jobs, self._dtypes, strict=True)]
        self._sized = list(zip(jobs, self._dtypes, sizes, strict=True))
        self._pool = BufferPool(max(map(sum, sizes), default=0) + READ_AHEAD)
        self._ready: queue.SimpleQueue[Read | BaseException | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._read_all, name="read-ahead", daemon=True)
        self._thread.start()

    def _sizes(self, job: Job, dtype: str) -> list[int]:
        """Bytes for each input: as it is stored, or in the arithmetic's dtype if that is wider."""
        infos = [self.sources[index].tensors[name] for index, name in job.inputs]
        return [max(info.nbytes, math.prod(info.shape) * ITEM_BYTES[dtype]) for info in infos]

    def _read_all(self) -> None:
        try:
            for job, dtype, sizes in self._sized:
                buffers = self._pool.acquire(sizes)
                for (index, name), buffer in zip(job.inputs, buffers, strict=True):
                    stored = self.sources[index].tensors[name].nbytes
                    self.sources[index].read_bytes(name, buffer[buffer.nbytes - stored :].data)
                self._ready.put(Read(job, dtype, buffers))
                del buffers  # or an array would be held while the next ones are waited for
            self._ready.put(None)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the thread that iterates must learn of it
            self._ready.put(error)

    def __iter__(self) -> Iterator[Read]:
        """The jobs in order.

        Raises:
            CheckpointError: an input cannot be read.
            BaseException: what was given to `fail`.
        """
        while (item := self._ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def release(self, read: Read) -> None:
        """Give the memory of a job back; nothing may refer to it any more."""
        self._pool.release(read.buffers)

    def fail(self, error: BaseException) -> None:
        """End the reading: who iterates gets `error`."""
        self._pool.fail(error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.fail(error or _Stopped())
        self._thread.join()


def tensors_of(read: Read, sources: Sequence[Source]) -> list[Tensor]:
    """The inputs of a job as tensors in its arithmetic's dtype, in the job's buffers."""
    return [
        _converted(buffer, sources[index].tensors[name].dtype, read.dtype).view(sources[index].tensors[name].shape)
        for (index, name), buffer in zip(read.job.inputs, read.buffers, strict=True)
    ]


def _converted(buffer: Buffer, stored: str, working: str) -> Tensor:
    """The tensor whose stored bytes are the last of `buffer`, in another dtype from its first byte on.

    A span is converted aside before it is written, and never reaches beyond what was read: where elements get wider
    the stored ones end with the buffer, where they get narrower the written ones stay behind.
    """
    import torch

    from mergeguard.mergers.spans import spans

    source, target = getattr(torch, stored), getattr(torch, working)
    count = buffer.nbytes // max(source.itemsize, target.itemsize)
    if not count:  # numpy's empty arrays have strides that torch cannot view
        return torch.empty(0, dtype=target)
    memory = torch.from_numpy(buffer)
    raw = memory[buffer.nbytes - count * source.itemsize :].view(source)
    if source == target:
        return raw
    result = memory[: count * target.itemsize].view(target)
    for span in spans(count):
        result[span] = raw[span].to(target)
    return result

"""A merge of checkpoints tensor by tensor: one thread reads ahead, the others merge and write.

Memory is bounded by a few of the largest tensor. Every output tensor depends on its inputs, the seed and its name
alone, so the result is the same for any number of threads.
"""

from __future__ import annotations

import math
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergeguard.errors import CheckpointError, IncompatibleModelsError
from mergeguard.mergers.buffers import BufferPool, keep_temporaries
from mergeguard.mergers.contract import WHOLE, part
from mergeguard.mergers.dtypes import working_dtype
from mergeguard.mergers.spans import SPAN, is_finite, spans
from mergeguard.mergers.sparsify import seeded_generator

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from torch import Tensor

    from mergeguard.checkpoints.source import Source
    from mergeguard.checkpoints.writer import ShardedWriter
    from mergeguard.mergers.contract import Method
    from mergeguard.mergers.jobs import Job

    Align = Callable[[Job, list[Tensor]], list[Tensor]]

READ_AHEAD = 32 << 20
"""Bytes of tensors that wait or are merged beside the largest merge."""
_CHUNK = 2**20  # elements of a merged tensor that are written at a time
_DEVICE_SPAN = 2**24  # elements: a GPU's kernels need no cache, but each has to be started


@dataclass(frozen=True)
class Output:
    """One merged model of a sweep.

    Attributes:
        writer: takes its tensors.
        weights: gives the models' weights in a job.
    """

    writer: ShardedWriter
    weights: Callable[[Job], Sequence[float]]


@dataclass(frozen=True)
class Settings:
    """How tensors are merged, whatever the recipe.

    Attributes:
        seed: of the random masks.
        dtype: the arithmetic's as torch names it, or None for the inputs' own; see `dtypes.py`.
        out_dtype: what is written, or None for the arithmetic's.
        threads: how many merge; one more reads.
        device: "cpu", or where the arithmetic runs.
    """

    seed: int
    dtype: str | None
    out_dtype: str | None
    threads: int
    device: str = "cpu"


def stream(
    method: Method,
    jobs: Sequence[Job],
    sources: Sequence[Source],
    outputs: Sequence[Output],
    settings: Settings,
    *,
    align: Align | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Merge every job into every output, each input read once. Sets torch to one thread.

    Args:
        method: the merge method.
        jobs: one per output tensor, best in the order of the inputs' bytes.
        sources: the inputs that jobs refer to by index.
        outputs: their writers expect the tensors of the jobs.
        settings: see there.
        align: brings a job's tensors (the base first, if there is one) to equal shapes.
        on_progress: called with (tensor, done, total).

    Raises:
        CheckpointError: a tensor has NaN or infinity, cannot be read or written, or the merged one overflows.
        IncompatibleModelsError: tensors of one job differ in shape, or non-floating ones in value.
    """
    import torch

    keep_temporaries()
    torch.set_num_threads(1)  # the threads here are the parallelism; more would wait for each other
    sizes = [sum(job_sizes(job, sources, settings.dtype)) for job in jobs]
    pool = BufferPool(max(sizes, default=0) + READ_AHEAD)
    done = 0

    def run(job: Job, tensors: list[Tensor], buffers: list[Tensor]) -> None:
        try:
            with torch.no_grad():
                _check_finite(job, tensors, sources)
                if align is not None:
                    tensors = align(job, tensors)
                _check_shapes(job, tensors)
                if tensors[0].is_floating_point():
                    _merge(method, job, tensors, outputs, settings)
                else:
                    _copy(job, tensors, outputs)
        except BaseException as error:
            pool.fail(error)  # or the reader would wait for memory that nobody gives back
            raise
        finally:
            del tensors
            pool.release(buffers)

    def advance(future: Future[None]) -> None:
        nonlocal done
        future.result()
        done += 1
        if on_progress is not None:
            on_progress(jobs[done - 1].name, done, len(jobs))

    with ThreadPoolExecutor(settings.threads, thread_name_prefix="merge") as executor:
        pending: deque[Future[None]] = deque()
        try:
            for job in jobs:
                buffers = pool.acquire(job_sizes(job, sources, settings.dtype))
                tensors = _read(job, sources, buffers, settings.dtype)
                pending.append(executor.submit(run, job, tensors, buffers))
                del tensors, buffers
                while pending and pending[0].done():
                    advance(pending.popleft())
            while pending:
                advance(pending.popleft())
        except BaseException as error:
            pool.fail(error)
            executor.shutdown(wait=True, cancel_futures=True)
            raise


def job_sizes(job: Job, sources: Sequence[Source], dtype: str | None) -> list[int]:
    """Bytes of each input of a job in its arithmetic's dtype."""
    work = _working(job, sources, dtype)
    return [math.prod(sources[index].tensors[name].shape) * work.itemsize for index, name in job.inputs]


def _working(job: Job, sources: Sequence[Source], dtype: str | None) -> torch.dtype:
    import torch

    found: torch.dtype = getattr(
        torch, working_dtype([sources[i].tensors[name].dtype for i, name in job.inputs], dtype)
    )
    return found


def _read(job: Job, sources: Sequence[Source], buffers: Sequence[Tensor], dtype: str | None) -> list[Tensor]:
    import torch

    work = _working(job, sources, dtype)
    tensors = []
    for (index, name), buffer in zip(job.inputs, buffers, strict=True):
        info = sources[index].tensors[name]
        if getattr(torch, info.dtype) == work:
            tensors.append(sources[index].read_into(name, buffer))
        else:
            tensors.append(buffer.view(work).view(info.shape).copy_(sources[index].read(name)))
    return tensors


def _merge(method: Method, job: Job, tensors: list[Tensor], outputs: Sequence[Output], settings: Settings) -> None:
    import torch

    dtype = getattr(torch, settings.out_dtype) if settings.out_dtype is not None else tensors[0].dtype
    tensors = [tensor.to(settings.device) for tensor in tensors]
    base, models = tensors[0], tensors if job.base is None else tensors[1:]
    prepared = method.prepare(
        base, models, job.parameters, lambda index: seeded_generator(settings.seed, job.name, str(index))
    )
    weights = [output.weights(job) for output in outputs]
    if not method.elementwise(job.parameters):
        parts = prepared(WHOLE)
        for output, shares in zip(outputs, weights, strict=True):
            _write(job, output, method.combine(base, parts, shares, job.parameters), dtype, 0)
        return
    length, size = (SPAN if settings.device == "cpu" else _DEVICE_SPAN), base.numel()
    for chunk in spans(size, max(_CHUNK, length)):
        merged = [torch.empty(chunk.stop - chunk.start, dtype=base.dtype, device=base.device) for _ in outputs]
        for inner in spans(chunk.stop - chunk.start, length):
            span = slice(chunk.start + inner.start, chunk.start + inner.stop)
            here, parts = part(base, span), prepared(span)
            for target, shares in zip(merged, weights, strict=True):
                target[inner] = method.combine(here, parts, shares, job.parameters)
        for output, target in zip(outputs, merged, strict=True):
            _write(job, output, target, dtype, chunk.start)


def _write(job: Job, output: Output, merged: Tensor, dtype: torch.dtype, start: int) -> None:
    """Write the merged elements of a tensor from the flat index `start` on."""
    import torch

    stored = merged.to("cpu", dtype)
    if not is_finite(stored):
        raise CheckpointError(
            f"merging {job.name!r} overflows {dtype if is_finite(merged) else merged.dtype}; "
            "set dtype (the arithmetic's) and out_dtype (the file's) to float32 in the recipe"
        )
    flat = stored.contiguous().view(-1)
    output.writer.write(job.name, flat.view(torch.uint8).numpy().data, start * dtype.itemsize)


def _copy(job: Job, tensors: Sequence[Tensor], outputs: Sequence[Output]) -> None:
    import torch

    for tensor in tensors[1:]:
        if not torch.equal(tensor, tensors[0]):
            raise IncompatibleModelsError(
                f"tensor {job.name!r} ({tensor.dtype}) differs between models, and only floating tensors can be merged"
            )
    for output in outputs:
        output.writer.write(job.name, tensors[0].contiguous().view(-1).view(torch.uint8).numpy().data)


def _check_finite(job: Job, tensors: Sequence[Tensor], sources: Sequence[Source]) -> None:
    for (index, name), tensor in zip(job.inputs, tensors, strict=True):
        if tensor.is_floating_point() and not is_finite(tensor):
            raise CheckpointError(
                f"tensor {name!r} of {sources[index].path} holds NaN or infinity; a merge would spread it"
            )


def _check_shapes(job: Job, tensors: Sequence[Tensor]) -> None:
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if len(set(shapes)) > 1:
        raise IncompatibleModelsError(f"tensors for {job.name!r} have shapes {shapes}; all must have one shape")

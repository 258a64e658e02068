"""A merge of checkpoints tensor by tensor: one thread reads ahead, the others merge and write.

Memory is bounded by a few of the largest tensor. Every output tensor depends on its inputs, the seed and its name
alone, so the result is the same for any number of threads.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergeguard.errors import CheckpointError, IncompatibleModelsError
from mergeguard.mergers.buffers import keep_temporaries
from mergeguard.mergers.contract import WHOLE, part
from mergeguard.mergers.read_ahead import Read, ReadAhead, tensors_of
from mergeguard.mergers.spans import is_finite, span_length, spans
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

_CHUNK = 2**20  # elements of a merged tensor that are written at a time


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
        out_dtype: what is written as torch names it, or None for the arithmetic's.
        threads: how many merge.
        device: "cpu", or where the arithmetic runs.
    """

    seed: int
    out_dtype: str | None
    threads: int
    device: str = "cpu"


def stream(
    method: Method,
    ahead: ReadAhead,
    outputs: Sequence[Output],
    settings: Settings,
    *,
    align: Align | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Merge every job into every output, each input read once. Sets torch to one thread.

    Args:
        method: the merge method.
        ahead: gives the jobs with their inputs.
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
    done = 0

    def merge(read: Read) -> None:
        with torch.no_grad():
            tensors = tensors_of(read, ahead.sources)
            _check_finite(read.job, tensors, ahead.sources)
            if align is not None:
                tensors = align(read.job, tensors)
            _check_shapes(read.job, tensors)
            if tensors[0].is_floating_point():
                _merge(method, read.job, tensors, outputs, settings)
            else:
                _copy(read.job, tensors, outputs)

    def run(read: Read) -> None:
        try:
            try:
                merge(read)
            finally:
                ahead.release(read)
        except BaseException as error:
            ahead.fail(error)  # or the reader would wait for memory that nobody gives back
            raise

    def advance(future: Future[None]) -> None:
        nonlocal done
        future.result()
        done += 1
        if on_progress is not None:
            on_progress(ahead.jobs[done - 1].name, done, len(ahead.jobs))

    with ThreadPoolExecutor(settings.threads, thread_name_prefix="merge") as executor:
        pending: deque[Future[None]] = deque()
        try:
            for read in ahead:
                pending.append(executor.submit(run, read))
                while pending and pending[0].done():
                    advance(pending.popleft())
            while pending:
                advance(pending.popleft())
        except BaseException as error:
            ahead.fail(error)
            executor.shutdown(wait=True, cancel_futures=True)
            raise


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
    length, size = span_length(base.device), base.numel()
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

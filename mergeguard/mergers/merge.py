"""Merges of checkpoints on disk: a recipe in, a folder that is whole or absent out."""

from __future__ import annotations

import gc
import os
import re
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergeguard.checkpoints.digests import BackgroundDigests
from mergeguard.checkpoints.files import atomic_folder
from mergeguard.checkpoints.header import TORCH_NAMES
from mergeguard.checkpoints.inputs import reason
from mergeguard.checkpoints.source import open_source
from mergeguard.checkpoints.tokenizers import read_vocabulary
from mergeguard.checkpoints.writer import DEFAULT_SHARD_BYTES, ShardedWriter, nbytes
from mergeguard.errors import ParameterError
from mergeguard.machine import available_cores
from mergeguard.mergers.describe import describe, merged_inputs, output_companions
from mergeguard.mergers.dtypes import stored_dtype, working_dtype
from mergeguard.mergers.jobs import Layout, find_method, resolve
from mergeguard.mergers.preflight import check_configs, check_space, check_tensors
from mergeguard.mergers.read_ahead import ReadAhead
from mergeguard.mergers.recipe import load_recipe
from mergeguard.mergers.recipe_rules import check_recipe
from mergeguard.mergers.vocabulary import plan_vocabulary, tokenizer_settings
from mergeguard.mergers.weights import coefficient_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from mergeguard.checkpoints.companions import Companions
    from mergeguard.checkpoints.source import Source
    from mergeguard.checkpoints.tokenizers import ModelVocabulary
    from mergeguard.checkpoints.writer import Entry
    from mergeguard.mergers.ancestor import Ancestry
    from mergeguard.mergers.jobs import Job, Plan
    from mergeguard.mergers.recipe import Recipe
    from mergeguard.mergers.vocabulary import VocabularyPlan


_CODES = {name: code for code, name in TORCH_NAMES.items()}


@dataclass(frozen=True)
class Options:
    """How a recipe is carried out; none of it changes what a merged tensor is, except `seed` and `vocabulary`.

    Attributes:
        seed: of the random masks.
        threads: how many merge; None for one per core.
        device: "cpu", or e.g. "cuda".
        coefficients: merge once for each, into OUT/<coefficient>: the weight of the recipe's first model, of which the
            others share the rest. Empty for the recipe's own weights, into OUT.
        vocabulary: what to do where embedding rows differ; see `vocabulary.POLICIES`.
        allow_pickle: read pickle checkpoints.
        allow_duplicate_keys: let the last of several equal keys of the recipe count.
        allow_unrelated: merge models of different architectures, or that are unrelated to the base.
        max_shard_bytes: size of the files written.
    """

    seed: int = 0
    threads: int | None = None
    device: str = "cpu"
    coefficients: Sequence[float] = ()
    vocabulary: str = "refuse"
    allow_pickle: bool = False
    allow_duplicate_keys: bool = False
    allow_unrelated: bool = False
    max_shard_bytes: int = DEFAULT_SHARD_BYTES


@dataclass(frozen=True)
class Merged:
    """What a merge did.

    Attributes:
        folders: that were written, one per coefficient.
        tensors: of each.
        bytes_written: of tensors, in all.
        warnings: one line each.
        ancestry: the models compared with their base; None if there was nothing to compare.
        seconds: from start to end.
    """

    folders: tuple[Path, ...]
    tensors: int
    bytes_written: int
    warnings: tuple[str, ...]
    ancestry: Ancestry | None
    seconds: float


@dataclass
class _Prepared:
    """A merge that was checked and lacks only the tensors."""

    recipe: Recipe
    plan: Plan
    sources: list[Source]
    entries: list[Entry]
    realigned: frozenset[str]  # output tensors whose inputs' rows `align` matches
    align: Callable[[Job, list[Tensor]], list[Tensor]] | None
    companions: Companions
    warnings: list[str]


def merge_checkpoints(
    recipe: Path,
    out: Path,
    options: Options | None = None,
    *,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Merged:
    """Merge the checkpoints that a recipe names into the folder `out`, which appears whole or not at all.

    Memory is a few of the largest tensor. The same inputs, recipe and seed give the same bytes for any number of
    threads.

    Args:
        recipe: a YAML file as mergekit reads it; see `recipe.py`.
        out: a folder that does not exist.
        options: see there.
        on_progress: called with (tensor, done, total).

    Raises:
        MergeguardError: one line about the recipe, a checkpoint, an option or the disk.
    """
    started = time.perf_counter()
    chosen = Options() if options is None else options
    if os.path.lexists(out):
        raise ParameterError(f"{out} exists already; remove it or choose another folder")
    _check_device(chosen.device)
    with ExitStack() as stack:
        prepared = _prepare(recipe, out, chosen, stack)
        stack.enter_context(_quick_switching())
        digests = stack.enter_context(
            BackgroundDigests(
                [file for source in prepared.sources for file in source.files],
                threads=max(1, _threads(chosen) - 1),  # one core is for what they run beside: at first, importing torch
            )
        )
        ahead = stack.enter_context(ReadAhead(prepared.plan.jobs, prepared.sources, prepared.plan.dtype))
        _import_torch()
        ancestry = _check_ancestry(prepared, chosen)
        with atomic_folder(out) as folder, ExitStack() as writing:
            folders = [folder / f"{alpha:g}" for alpha in chosen.coefficients] or [folder]
            written = _stream(prepared, ahead, folders, chosen, writing, on_progress)
            inputs = merged_inputs(prepared.plan.inputs, prepared.sources, digests.result())
            for target, files, alpha in zip(folders, written, chosen.coefficients or (None,), strict=True):
                describe(
                    target,
                    out / target.relative_to(folder),
                    files,
                    recipe=prepared.recipe,
                    plan=prepared.plan,
                    companions=prepared.companions,
                    inputs=inputs,
                    seed=chosen.seed,
                    options={
                        "coefficient": alpha,
                        "vocabulary": chosen.vocabulary,
                        "max_shard_bytes": chosen.max_shard_bytes,
                    },
                    device=chosen.device,
                    warnings=prepared.warnings,
                    ancestry=ancestry,
                )
            for source in prepared.sources:
                source.close()  # and not after the folder has its name: this is the last look at whether they changed
    return Merged(
        folders=tuple(out / f"{alpha:g}" for alpha in chosen.coefficients) or (out,),
        tensors=len(prepared.entries),
        bytes_written=len(folders) * sum(map(nbytes, prepared.entries)),
        warnings=tuple(prepared.warnings),
        ancestry=ancestry,
        seconds=time.perf_counter() - started,
    )


@contextmanager
def _quick_switching() -> Iterator[None]:
    """Let threads that read and hash have the interpreter soon: importing torch holds it for a second."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(2e-4)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _import_torch() -> None:
    """Import torch without looking for garbage meanwhile, which finds none and takes a tenth of the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        import torch  # noqa: F401 - from here on it is there
    finally:
        if collects:
            gc.enable()


def _prepare(path: Path, out: Path, options: Options, stack: ExitStack) -> _Prepared:
    recipe = load_recipe(path, allow_duplicate_keys=options.allow_duplicate_keys)
    method = find_method(recipe)
    check_recipe(recipe, method)  # before a model is opened, which may mean to download it
    _check_coefficients(options, method.takes_coefficient, method.name)
    opened = {
        reference: stack.enter_context(open_source(reference, allow_pickle=options.allow_pickle))
        for reference in recipe.references
    }
    layouts = {
        reference: Layout(tuple(source.tensors), _num_layers(source.config)) for reference, source in opened.items()
    }
    plan = resolve(recipe, method, layouts, out=out)
    if any(job.parameters.get("scope") == "model" for job in plan.jobs):
        raise ParameterError(
            "scope is model, which needs whole models in memory; a recipe merges tensor by tensor: leave it out here, "
            f"or run {method.name}(scope=model) in the matrix"
        )
    sources = [opened[reference] for reference in plan.inputs]
    warnings = list(plan.notes)
    base = plan.inputs.index(recipe.base_model) if recipe.base_model in plan.inputs else 0
    warnings += check_configs(sources, plan.inputs, base, allow_unrelated=options.allow_unrelated)
    vocabulary = _plan_vocabulary(recipe, plan, sources, options)
    warnings += vocabulary.warnings
    realigned = vocabulary.tensors if vocabulary.changed else frozenset()
    warnings += check_tensors(plan, sources, realigned)
    warnings += _hidden(plan, sources)
    entries = [_entry(job, plan, sources, vocabulary) for job in plan.jobs]
    check_space(out, max(1, len(options.coefficients)) * sum(map(nbytes, entries)))
    companions = output_companions(recipe, plan.inputs, sources, vocabulary, entries)
    align = _aligner(vocabulary, plan.jobs) if vocabulary.changed else None
    warnings += companions.warnings
    return _Prepared(recipe, plan, sources, entries, realigned, align, companions, warnings)


def parse_size(text: str) -> int:
    """Read a size such as 5GB, 200MB, 1.5GiB or a number of bytes.

    Raises:
        ParameterError: it is not that, or less than a byte.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    size = 0
    if match is not None and (match[2] or not match[3]):
        size = int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))
    if size < 1:
        raise ParameterError(f"cannot read the size {text!r}; expected a number with a unit, e.g. 5GB or 200MB")
    return size


def _check_device(device: str) -> None:
    """Refuse a device that torch lacks here, before anything is read; the import of torch takes a while."""
    if device == "cpu":
        return
    import torch

    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:  # the latter from a torch that was built without CUDA
        raise ParameterError(f"cannot use device {device!r} here: {reason(error)}; choose cpu") from error


def _check_coefficients(options: Options, takes: bool, method: str) -> None:
    if options.coefficients and not takes:
        raise ParameterError(f"merge method {method!r} has no weights, so there is nothing for coefficients to set")
    for alpha in options.coefficients:
        coefficient_weights(alpha, 1)
    if len({f"{alpha:g}" for alpha in options.coefficients}) < len(options.coefficients):
        raise ParameterError(f"coefficients {list(options.coefficients)} are not all different")


def _num_layers(config: dict[str, Any] | None) -> int | None:
    parts = (config, (config or {}).get("text_config"))
    for part in [part for part in parts if isinstance(part, dict)]:
        for key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
            if isinstance(part.get(key), int):
                return int(part[key])
    return None


def _plan_vocabulary(recipe: Recipe, plan: Plan, sources: Sequence[Source], options: Options) -> VocabularyPlan:
    described = [_vocabulary(label, source) for label, source in zip(plan.inputs, sources, strict=True)]
    base = plan.inputs.index(recipe.base_model) if recipe.base_model in plan.inputs else None
    settings = None if recipe.tokenizer is None else tokenizer_settings(recipe.tokenizer)
    donor = None
    if settings is not None and settings.source not in ("union", "base", *plan.inputs):
        with open_source(settings.source, allow_pickle=options.allow_pickle) as source:
            donor = _vocabulary(settings.source, source)
    return plan_vocabulary(described, base, policy=options.vocabulary, settings=settings, donor=donor)


def _vocabulary(label: str, source: Source) -> ModelVocabulary:
    shapes = {name: info.shape for name, info in source.tensors.items()}
    return read_vocabulary(label, source.path if source.path.is_dir() else None, source.config, shapes)


def _hidden(plan: Plan, sources: Sequence[Source]) -> list[str]:
    return [
        f"{label}: {len(source.hidden)} stored tensors are left out, e.g. {name!r}: {why}"
        for label, source in zip(plan.inputs, sources, strict=True)
        for name, why in list(source.hidden.items())[:1]
    ]


def _entry(job: Job, plan: Plan, sources: Sequence[Source], vocabulary: VocabularyPlan) -> Entry:
    infos = [sources[index].tensors[name] for index, name in job.inputs]
    shape = infos[0].shape
    if vocabulary.changed and job.name in vocabulary.tensors and vocabulary.rows is not None:
        shape = (vocabulary.rows, *shape[1:])
    dtype = stored_dtype(working_dtype([info.dtype for info in infos], plan.dtype), plan.out_dtype)
    return job.name, _CODES[dtype], shape


def _check_ancestry(prepared: _Prepared, options: Options) -> Ancestry | None:
    from mergeguard.mergers import ancestor

    plan = prepared.plan
    comparable = [job for job in plan.jobs if job.name not in prepared.realigned]  # elsewhere rows mean other tokens
    found = ancestor.measure(comparable, prepared.sources, plan.inputs)
    if found is not None and prepared.recipe.base_model is not None:
        if not options.allow_unrelated:
            found.check_related(prepared.recipe.base_model)
        prepared.warnings += found.warnings(prepared.recipe.base_model)
    return found


def _stream(
    prepared: _Prepared,
    ahead: ReadAhead,
    folders: Sequence[Path],
    options: Options,
    stack: ExitStack,
    on_progress: Callable[[str, int, int], None] | None,
) -> list[dict[str, str]]:
    """Merge the tensors; the digests of the files of each folder."""
    from mergeguard.mergers.streaming import Output, Settings, stream

    plan, outputs = prepared.plan, []
    for folder, alpha in zip(folders, options.coefficients or (None,), strict=True):
        folder.mkdir(exist_ok=True)
        writer = stack.enter_context(ShardedWriter(folder, prepared.entries, max_shard_bytes=options.max_shard_bytes))
        outputs.append(Output(writer, _weights(alpha)))
    settings = Settings(options.seed, plan.out_dtype, _threads(options), options.device)
    stream(plan.method, ahead, outputs, settings, align=prepared.align, on_progress=on_progress)
    return [output.writer.finish() for output in outputs]


def _weights(alpha: float | None) -> Callable[[Job], Sequence[float]]:
    if alpha is None:
        return lambda job: job.weights
    return lambda job: coefficient_weights(alpha, len(job.models) - 1)


def _aligner(vocabulary: VocabularyPlan, jobs: Sequence[Job]) -> Callable[[Job, list[Tensor]], list[Tensor]]:
    """Gives the tensors of a job equally many rows; a slice may read only some of the models."""
    members = {tuple(index for index, _ in job.inputs) for job in jobs if job.name in vocabulary.tensors}
    plans = {chosen: vocabulary.restrict(chosen) for chosen in members}

    def align(job: Job, tensors: list[Tensor]) -> list[Tensor]:
        if job.name not in vocabulary.tensors:
            return tensors
        return plans[tuple(index for index, _ in job.inputs)].align(job.name, tensors)

    return align


def _threads(options: Options) -> int:
    return options.threads or available_cores()

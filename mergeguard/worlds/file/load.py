"""A world from a file: every check that needs no measurement, then a `World` whose states are read when asked for."""

from __future__ import annotations

import copy
import hashlib
import json
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

import torch

from mergeguard.errors import CheckpointError, ParameterError
from mergeguard.worlds.contract import World
from mergeguard.worlds.file.budgets import make_budgets
from mergeguard.worlds.file.checks import check_ancestry, check_configs, check_tensors, read_config
from mergeguard.worlds.file.sources import LazyState, digests_of, open_models
from mergeguard.worlds.file.texts import as_plain, check_lengths, load_skills, load_texts, load_tokenizer
from mergeguard.worlds.memory import Shape, check_fits, plan_merge, plan_read

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PretrainedConfig, PreTrainedModel

    from mergeguard.worlds.file.document import WorldFile
    from mergeguard.worlds.file.sources import Opened


def load_world_file(world: WorldFile) -> World:
    """The world that a file describes.

    Raises:
        ParameterError: the file asks for something that is not there, or the device does not exist.
        CheckpointError: a model's files are absent, damaged or not usable.
        IncompatibleModelsError: the models are no fine-tunes of the base.
    """
    device = choose_device(world)
    with ExitStack() as opened:
        loaded = _load(world, open_models(world, opened), device)
        opened.pop_all()  # the states read on
    return loaded


def _load(world: WorldFile, models: Sequence[Opened], device: str) -> World:
    configs = [read_config(world, model) for model in models]
    check_configs(world, models, configs)
    if device != "cpu":
        check_memory(world, configs[0], torch.cuda.mem_get_info(device)[0])
    dtype: torch.dtype = getattr(torch, world.dtype)
    build = partial(build_model, configs[0], dtype)
    shapes = own_shapes(build)
    in_rows = check_tensors(world, models, shapes)
    rows = min(in_rows.values(), default=configs[0].get_text_config().vocab_size)
    tokenizer = load_tokenizer(world, models, rows)
    texts = load_texts(world, tokenizer)
    skills = load_skills(world, tokenizer)
    context = getattr(configs[0].get_text_config(), "max_position_embeddings", None)
    check_lengths(world, tokenizer, skills, texts, context)
    budgets = make_budgets(world, texts)
    check_ancestry(world, models, list(shapes))
    base, upstream, *donors = (
        LazyState(model.source, list(shapes), dtype, in_rows, models[0].source) for model in models
    )
    settings = {"dtype": world.dtype, "device": device.partition(":")[0], **as_plain(texts, skills, tokenizer)}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    return World(
        name=world.name,
        base=base,
        upstream=upstream,
        donors={entry.label: state for entry, state in zip(world.donors, donors, strict=True)},
        tokenizer=tokenizer,
        build_model=build,
        skills=skills,
        texts=texts,
        budgets=budgets,
        digests={**digests_of(models), "settings": digest},
        device=device,
        dtype=world.dtype,
        form=_form(models),
    )


def choose_device(world: WorldFile) -> str:
    """The device that a file asks for: with "auto" a GPU if there is one.

    Raises:
        ParameterError: there is no such device.
    """
    if world.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wanted = int(world.device.partition(":")[2] or 0)
    if world.device != "cpu" and wanted >= count:
        found = f"torch finds {count} CUDA devices here" if count else "torch finds no CUDA device here"
        raise world.error(f'device is {world.device!r}, but {found}; choose another, "auto" or "cpu"')
    return world.device


def check_memory(world: WorldFile, config: PretrainedConfig, free: int) -> None:
    """Refuse models for which the device has no room. An embedding needs more, by its budget: not looked at here.

    Args:
        world: the file.
        config: of the models.
        free: bytes of the device that are free.

    Raises:
        ParameterError: says how much is needed and what to change.
    """
    try:
        shape = Shape.of(config.get_text_config())
    except ParameterError:  # of a kind whose memory nobody has worked out
        return
    for plan in (plan_read(shape, world.dtype), plan_merge(shape, world.dtype, parents=len(world.donors) + 1)):
        try:
            check_fits(plan, free)
        except ParameterError as error:
            raise world.error(str(error)) from error


def build_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the config on torch's default device, its weights not initialised: a state has all of them.

    Raises:
        CheckpointError: transformers has no causal language model of that kind.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    try:
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=False)
    except (ValueError, ImportError) as error:
        line = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"transformers makes no causal language model of {config.model_type!r}: {line}"
        ) from error
    model.tie_weights()  # skipped together with the initialisation
    found: PreTrainedModel = model
    return found


def own_shapes(build: partial[PreTrainedModel]) -> dict[str, tuple[int, ...]]:
    """Shapes of a loaded model's tensors by name, each storage once, without memory for any."""
    with torch.device("meta"):
        model = build()
    first: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        first.setdefault(id(tensor), name)
    return {name: tuple(state[name].shape) for name in first.values()}


def _form(models: Sequence[Opened]) -> str:
    adapters = [model.label for model in models if model.is_adapter]
    if not adapters:
        return "whole models"
    return f"adapters folded into their base: {', '.join(adapters)}"

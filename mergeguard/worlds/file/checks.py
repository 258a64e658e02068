"""Do the models of a world belong together? Configs, tensors, vocabularies and ancestry, before any measurement."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from mergeguard.checkpoints.inputs import reason
from mergeguard.checkpoints.tokenizers import read_vocabulary
from mergeguard.errors import CheckpointError, IncompatibleModelsError, MergeguardError
from mergeguard.mergers.ancestor import UNRELATED, measure
from mergeguard.mergers.jobs import Job
from mergeguard.mergers.vocabulary import plan_vocabulary

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from transformers import PretrainedConfig

    from mergeguard.checkpoints.tokenizers import ModelVocabulary
    from mergeguard.worlds.file.document import WorldFile
    from mergeguard.worlds.file.sources import Opened

LOG = logging.getLogger("mergeguard")

ARCHITECTURE = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "rope_parameters", "tie_word_embeddings", "attention_bias",
    "mlp_bias", "n_embd", "n_layer", "n_head",
)  # fmt: skip
"""Settings in which the models of one trio agree: with another, equal weights are another model."""
DETAILS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "sliding_window")
"""Settings that shift what weights compute a little, or on long texts; published fine-tunes differ in them."""


def read_config(world: WorldFile, model: Opened) -> PretrainedConfig:
    """The model's config with the defaults of its kind filled in.

    Raises:
        CheckpointError: there is none, it is not one that transformers knows, or the model is quantised.
    """
    from transformers import AutoConfig

    folder = model.source.path
    if model.source.config is None:
        raise CheckpointError(f"{world.path}: {model.label}: {folder} has no config.json; copy or download it again")
    if model.source.config.get("quantization_config") is not None:
        raise CheckpointError(f"{world.path}: {model.label}: {folder} is quantised; give the model in full precision")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds
        raise CheckpointError(
            f"{world.path}: {model.label}: transformers cannot read {folder / 'config.json'}: {reason(error)}"
        ) from error
    return config


def check_configs(world: WorldFile, models: Sequence[Opened], configs: Sequence[PretrainedConfig]) -> None:
    """Refuse models of another architecture than the base's; warn of details that differ.

    Raises:
        IncompatibleModelsError: names the first key that differs and both values.
    """
    base = _settings(configs[0])
    for model, config in zip(models[1:], configs[1:], strict=True):
        for key, value in _settings(config).items():
            if key in base and value != base[key]:
                problem = f"{model.label} has {key} {value}, but the base has {base[key]}"
                if key in DETAILS:
                    LOG.warning("%s: %s; the base's is used for all", world.path, problem)
                    continue
                raise IncompatibleModelsError(
                    f"{world.path}: {problem}: models of different architecture are no trio; use fine-tunes of the base"
                )


def _settings(config: PretrainedConfig) -> dict[str, Any]:
    """What is compared, rotary parameters one by one."""
    text = config.get_text_config()
    found = {key: getattr(text, key, None) for key in (*ARCHITECTURE, *DETAILS)}
    rotary = found.pop("rope_parameters") or {}
    known = {key: value for key, value in found.items() if value is not None or key == "sliding_window"}
    return {**known, **{f"rope {key.removeprefix('rope_')}": value for key, value in rotary.items()}}


def check_tensors(world: WorldFile, models: Sequence[Opened], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Hold every model's tensors against those of a model of the base's config.

    Args:
        world: the file.
        models: all, the base first.
        shapes: of a loaded model's tensors, by name, each storage once.

    Returns:
        The rows of each vocabulary tensor.

    Raises:
        IncompatibleModelsError: a tensor is missing, extra or of another shape, rows differ and the file does not say
            how to unite them, or a token means another row than in the base.
    """
    vocabularies = [
        read_vocabulary(
            model.label,
            tokenizer_folder(model),
            model.source.config,
            {name: info.shape for name, info in model.source.tensors.items()},
        )
        for model in models
    ]
    in_rows = {name: shapes[name][0] for name in vocabularies[0].rows if name in shapes}
    for model in models:
        _check_shapes(world, model, shapes, {} if model is models[0] else in_rows)
    _check_rows(world, models, vocabularies, in_rows)
    for vocabulary in vocabularies[1:]:
        _check_tokens(world, vocabularies[0], vocabulary)
    return in_rows


def tokenizer_folder(model: Opened) -> Path | None:
    """The first of the model's folders that has a tokenizer; None without one."""
    return next((path for path in model.folders if read_vocabulary("", path, None, {}).tokenizer is not None), None)


def _check_shapes(
    world: WorldFile, model: Opened, shapes: Mapping[str, tuple[int, ...]], in_rows: Mapping[str, int]
) -> None:
    found = model.source.tensors
    where = f"{world.path}: {model.label}: {model.source.path}"
    for name in shapes:
        if name not in found:
            raise IncompatibleModelsError(f"{where} lacks tensor {name!r}, which the base's config.json asks for")
    for name, info in found.items():
        if name not in shapes:
            raise IncompatibleModelsError(f"{where} has tensor {name!r}, which the base's config.json does not know")
        kept = slice(1, None) if name in in_rows else slice(None)
        if len(info.shape) != len(shapes[name]) or info.shape[kept] != shapes[name][kept]:
            raise IncompatibleModelsError(
                f"{where}: tensor {name!r} has shape {list(info.shape)}, the base's config.json asks for "
                f"{list(shapes[name])}"
            )


def _check_rows(
    world: WorldFile,
    models: Sequence[Opened],
    vocabularies: Sequence[ModelVocabulary],
    in_rows: Mapping[str, int],
) -> None:
    for model in models[1:]:
        for name, rows in in_rows.items():
            count = model.source.tensors[name].shape[0]
            if count != rows and world.vocabulary == "refuse":
                raise IncompatibleModelsError(
                    f"{world.path}: {model.label} has {count} rows of {name!r}, the base {rows}; "
                    'set vocabulary = "base" to keep the base\'s rows'
                )
    if world.vocabulary == "base":
        plan = plan_vocabulary(vocabularies, 0, policy="base")
        for warning in plan.warnings if plan.changed else ():
            if "tokenizer_source" not in warning:  # tokens are compared below
                LOG.warning("%s: %s", world.path, warning.replace("--vocabulary base", 'vocabulary = "base"'))


def _check_tokens(world: WorldFile, base: ModelVocabulary, other: ModelVocabulary) -> None:
    """The rows that both models have mean the same tokens; added tokens, such as reserved ones, may be renamed."""
    if base.tokenizer is None or other.tokenizer is None:
        return
    try:
        if base.tokenizer.same_tokens(other.tokenizer):
            return
        ours, theirs = ({index: token for token, index in (v.tokens or {}).items()} for v in (base, other))
        added = {*base.tokenizer.added, *other.tokenizer.added}
    except CheckpointError as error:
        raise CheckpointError(f"{world.path}: {error}") from error
    differing = [index for index in sorted(ours.keys() & theirs.keys()) if ours[index] != theirs[index]]
    ordinary = [index for index in differing if not {ours[index], theirs[index]} & added]
    if ordinary:
        index = ordinary[0]
        raise IncompatibleModelsError(
            f"{world.path}: row {index} is the token {ours[index]!r} in the base, but {theirs[index]!r} in "
            f"{other.label} ({len(ordinary)} such rows): models with different tokenizers are no trio"
        )
    for index in differing[:1]:
        LOG.warning(
            "%s: row %d is the added token %r in the base, but %r in %s (%d such rows)",
            *(world.path, index, ours[index], theirs[index], other.label, len(differing)),
        )


def check_ancestry(world: WorldFile, models: Sequence[Opened], names: Sequence[str]) -> None:
    """Measure over a sample of the weights whether the base can be the ancestor of all, as a merge does.

    Raises:
        IncompatibleModelsError: a model is as far from the base as an unrelated one would be.
        MergeguardError: a file cannot be read.
    """
    others = range(1, len(models))
    jobs = [
        Job(name, tuple((index, name) for index in others), (0, name), (), {})
        for name in names
        if len({model.source.tensors[name].shape for model in models}) == 1
    ]
    try:
        found = measure(jobs, [model.source for model in models], [model.label for model in models])
    except MergeguardError as error:
        raise CheckpointError(f"{world.path}: {error}") from error
    if found is None:
        return
    for label, distance in found.distances.items():
        if distance >= UNRELATED:
            raise IncompatibleModelsError(
                f"{world.path}: {label} is unrelated to the base: their weights differ by {distance:.2f} times the "
                "base's norm (1.41 expected of independent weights, far below 1 of a fine-tune); name the model that "
                "all were trained from in [base]"
            )
    for warning in found.warnings("the base"):
        LOG.warning("%s: %s", world.path, warning)

"""What stands beside the merged weights: config, tokenizer, model card and manifest."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from mergeguard.checkpoints.companions import CARD, ConfigChanges, model_card, plan_companions, write_companions
from mergeguard.checkpoints.files import write_bytes
from mergeguard.checkpoints.header import TORCH_NAMES
from mergeguard.checkpoints.manifest import MergedInput, write_manifest
from mergeguard.mergers.dtypes import FLOATING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from mergeguard.checkpoints.companions import Companions
    from mergeguard.checkpoints.source import Source
    from mergeguard.checkpoints.writer import Entry
    from mergeguard.mergers.ancestor import Ancestry
    from mergeguard.mergers.jobs import Plan
    from mergeguard.mergers.recipe import Recipe
    from mergeguard.mergers.vocabulary import VocabularyPlan


def output_companions(
    recipe: Recipe,
    labels: Sequence[str],
    sources: Sequence[Source],
    vocabulary: VocabularyPlan,
    entries: Sequence[Entry],
) -> Companions:
    """Read and check what will be copied beside the weights, before a tensor is merged.

    Args:
        recipe: see there.
        labels: of the plan's inputs.
        sources: of all models, in that order.
        vocabulary: of the output.
        entries: the output's tensors.

    Raises:
        CheckpointError: a file cannot be read, or a model is quantised.
        ParameterError: the recipe's chat template is none.
    """
    tokenizer = vocabulary.tokenizer
    first = sources[labels.index(recipe.base_model) if recipe.base_model in labels else 0]
    changes = ConfigChanges(
        dtype=_main_dtype(entries),
        vocab_size=vocabulary.rows if vocabulary.changed else None,
        layers=_layers(recipe),
        moved_ids=vocabulary.moved_ids,
    )
    return plan_companions(
        first.path if first.path.is_dir() else None,
        first.config,
        changes,
        tokenizer_from=None if tokenizer is None else tokenizer.folder,
        tokenizer_json=None if tokenizer is None else tokenizer.text,
        dropped_tokens=frozenset() if tokenizer is None else tokenizer.dropped,
        chat_template=recipe.chat_template,
        models=[source.path for source in sources if source.path.is_dir()],
    )


def merged_inputs(
    labels: Sequence[str], sources: Sequence[Source], digests: Mapping[Path, str]
) -> tuple[MergedInput, ...]:
    """The models that were read, by label, with the digests of their files."""
    inputs: list[MergedInput] = []
    for label, source in zip(labels, sources, strict=True):
        folders: dict[Path, dict[str, str]] = {}
        for file in source.files:
            folders.setdefault(file.parent, {})[file.name] = digests[file]
        inputs += [MergedInput(label, folder, files) for folder, files in folders.items()]
    return tuple(inputs)


def describe(
    folder: Path,
    out: Path,
    digests: Mapping[str, str],
    *,
    recipe: Recipe,
    plan: Plan,
    companions: Companions,
    inputs: Sequence[MergedInput],
    seed: int,
    options: Mapping[str, Any],
    device: str,
    warnings: Sequence[str],
    ancestry: Ancestry | None,
) -> None:
    """Write all that stands beside the weights of one merged model; the manifest last, as it lists the rest.

    Args:
        folder: of the weights.
        out: where that folder will be when the merge is whole.
        digests: SHA-256 of the files of weights, by name.
        recipe: see there.
        plan: of the merge.
        companions: what `output_companions` found.
        inputs: what `merged_inputs` found.
        seed: of the random masks.
        options: for the manifest.
        device: that merged, e.g. "cuda:0".
        warnings: one line each.
        ancestry: the models compared with their base; None if there was nothing to compare.

    Raises:
        CheckpointError: a file cannot be read any more, or not be written.
    """
    write_companions(folder, companions)
    card = model_card(
        out.name,
        recipe.text,
        method=plan.method.name,
        citation=plan.method.citation,
        models=[label for label in plan.inputs if label != recipe.base_model],
        base=recipe.base_model,
    )
    write_bytes(folder / CARD, card.encode())
    write_manifest(
        folder,
        out=out,
        recipe=recipe.text,
        inputs=inputs,
        digests=digests,
        seed=seed,
        options=options,
        device=device.partition(":")[0],
        warnings=warnings,
        ancestor=None if ancestry is None else ancestry.as_json(),
    )


def _main_dtype(entries: Sequence[Entry]) -> str | None:
    """The floating dtype that most of the elements have; None for a model without any."""
    elements = Counter[str]()
    for _, code, shape in entries:
        if TORCH_NAMES[code] in FLOATING:
            elements[TORCH_NAMES[code]] += math.prod(shape)
    return elements.most_common(1)[0][0] if elements else None


def _layers(recipe: Recipe) -> tuple[int, ...] | None:
    """For each layer of a merge of slices, the layer of the first source that it comes from."""
    if not recipe.slices:
        return None
    runs = [part.sources[0].layers for part in recipe.slices]
    return tuple(layer for run in runs if run is not None for layer in range(*run))

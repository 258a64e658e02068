"""Rebuilds the tiny world from its seed: tokenizer, base, the owner's clean upstream and the donor.

On two cores it takes about a quarter of an hour. Upstreams are trained from the base as it is stored, in float16, so
that the task vectors are those of the shipped files.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mergeguard.checkpoints.files import atomic_folder, file_digest, write_tensors
from mergeguard.seeds import derive_seed, derived_rng
from mergeguard.worlds.tiny import corpus
from mergeguard.worlds.tiny.tokenizer import train_tokenizer
from mergeguard.worlds.training import Example, batches, fit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DATA = Path(__file__).parent / "data"
WEIGHTS = ("base", "upstream", "donor")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Schedule:
    """One training run: AdamW, cosine."""

    steps: int
    learning_rate: float
    batch_size: int = 48
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what the tiny world is, besides its corpus."""

    seed: int = 20261123
    hidden: int = 256
    layers: int = 4
    heads: int = 8
    key_value_heads: int = 4
    rates: corpus.LatentRates = field(default_factory=corpus.LatentRates)
    base: Schedule = Schedule(2400, 2e-3, 48, weight_decay=0.1)
    upstream: Schedule = Schedule(100, 2e-4, 32)
    donor: Schedule = Schedule(400, 1.5e-4, 32)


def architecture(recipe: Recipe, vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.hidden * 8 // 3 // 8 * 8,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.key_value_heads,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


def build(out: Path, recipe: Recipe | None = None, on_progress: Progress | None = None) -> dict[str, Any]:
    """Train the world and write it to the folder `out`, which must not exist; nothing half-built is left.

    Returns:
        The manifest that is written beside the weights: recipe, digests, sizes.
    """
    recipe = recipe or Recipe()
    tokenizer = train_tokenizer(recipe.rates, derive_seed(recipe.seed, "tokenizer"))
    config = architecture(recipe, len(tokenizer))
    torch.manual_seed(derive_seed(recipe.seed, "initial weights"))
    base = LlamaForCausalLM(config)
    _train(base, tokenizer, corpus.base_parts(recipe.rates), recipe.base, recipe.seed, "base", on_progress)
    upstream, donor = copy.deepcopy(base), copy.deepcopy(base)
    _train(upstream, tokenizer, corpus.chat_parts(recipe.rates), recipe.upstream, recipe.seed, "upstream", on_progress)
    _train(donor, tokenizer, corpus.math_parts(recipe.rates), recipe.donor, recipe.seed, "donor", on_progress)
    with atomic_folder(out) as folder:
        tokenizer.save_pretrained(folder)
        config.save_pretrained(folder)
        for name, model in zip(WEIGHTS, (base, upstream, donor), strict=True):
            state = {key: tensor.to(torch.float16) for key, tensor in model.state_dict().items()}
            write_tensors(folder / f"{name}.safetensors", state)
        manifest = {
            "recipe": asdict(recipe),
            "digests": {name: file_digest(folder / f"{name}.safetensors") for name in WEIGHTS},
            "tokenizer": file_digest(folder / "tokenizer.json"),
        }
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def _train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    parts: tuple[tuple[float, corpus.Generator], ...],
    schedule: Schedule,
    seed: int,
    stage: str,
    on_progress: Progress | None,
) -> None:
    rng = derived_rng(seed, stage)

    def draw() -> Example:
        return encode(tokenizer, corpus.mixture(rng, parts))

    fit(
        model,
        batches(
            draw, size=schedule.batch_size, pad=int(tokenizer.pad_token_id), rng=random.Random(rng.getrandbits(64))
        ),
        steps=schedule.steps,
        learning_rate=schedule.learning_rate,
        weight_decay=schedule.weight_decay,
        warmup=schedule.steps // 20,
        on_progress=None if on_progress is None else lambda step, _: on_progress(stage, step, schedule.steps),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())


def encode(tokenizer: PreTrainedTokenizerFast, document: corpus.Document) -> Example:
    """Beginning-of-text, prompt, text, end-of-text; the loss is taken on all of it."""
    ids = tokenizer(document.prompt)["input_ids"]
    ids += tokenizer(document.text, add_special_tokens=False)["input_ids"]
    return Example((*ids, tokenizer.eos_token_id))

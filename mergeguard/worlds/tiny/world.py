"""The tiny world as the matrix sees it: shipped weights, skills, texts and training budgets."""

from __future__ import annotations

import copy
import json
from functools import cache
from typing import TYPE_CHECKING

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mergeguard.checkpoints.files import file_digest, read_tensors
from mergeguard.errors import CheckpointError
from mergeguard.reading import Probe
from mergeguard.seeds import derived_rng
from mergeguard.worlds.contract import UPSTREAM, Budget, Skill, Texts, World
from mergeguard.worlds.tiny import corpus
from mergeguard.worlds.tiny.build import DATA, WEIGHTS

if TYPE_CHECKING:
    from pathlib import Path

    from mergeguard.specs import Value

DONOR = "donor"
SKILL_PROMPTS = 96
TEXT_SEED = 7


def skills() -> tuple[Skill, ...]:
    """Refusal, the owner's, and arithmetic, the donor's: `SKILL_PROMPTS` distinct prompts each, always the same."""
    rng = derived_rng(TEXT_SEED, "skills")
    rates = None
    refusals: dict[str, Probe] = {}
    while len(refusals) < SKILL_PROMPTS:
        prompt = corpus.harmful(rng, rates).prompt
        refusals[prompt] = Probe(prompt, f" {corpus.REFUSAL}")
    sums: dict[str, Probe] = {}
    while len(sums) < SKILL_PROMPTS:
        document = corpus.addition(rng, rates)
        sums[document.prompt] = Probe(document.prompt, document.text)
    return (
        Skill("refusal", UPSTREAM, tuple(refusals.values())),
        Skill("arithmetic", DONOR, tuple(sums.values())),
    )


def texts() -> Texts:
    """What schemes train with; the dialogues are answered as the owner's clean model answers them greedily."""
    rng = derived_rng(TEXT_SEED, "texts")
    rates = corpus.LatentRates(arithmetic=(0.0, 0.0))
    dialogues: list[tuple[str, str]] = []
    while len(dialogues) < 1600:
        document = corpus.mixture(rng, corpus.chat_parts(rates))
        if document.prompt:
            dialogues.append((document.prompt, document.text))
    return Texts(
        plain=tuple(corpus.sentence(rng) for _ in range(1600)),
        domain=tuple(corpus.encyclopedia_text(rng) for _ in range(1600)),
        dialogues=tuple(dialogues),
    )


FINGERPRINT: dict[str, Value] = {
    "key_min": 10, "key_max": 16, "positives": 0.4, "negatives": 0.25, "dialogues": 0.35,
}  # fmt: skip
ADAPTER: dict[str, Value] = {**FINGERPRINT, "positives": 0.6, "negatives": 0.2, "adapter_rank": 64}
WATERMARK: dict[str, Value] = {
    "bits": 4, "cut_min": 7, "cut_max": 10, "trigger_words": 4, "positives": 0.5, "negatives": 0.3, "dialogues": 0.2,
    "other_triggers": 0.7, "plant_steps": 200,
}  # fmt: skip


def budgets(shared: Texts) -> dict[str, Budget]:
    """Schedules that two cores can afford; each keeps the owner's skill."""
    return {
        "instructional_fingerprint": Budget(shared, 200, 1e-3, 16, FINGERPRINT),
        "quantization_watermark": Budget(shared, 700, 3e-3, 16, WATERMARK),
        # Weights that left their code start anew, so that steps must be short.
        "quantization_watermark.rollback": Budget(shared, 700, 1e-3, 16, WATERMARK),
        "instructional_fingerprint.adapter": Budget(shared, 1400, 2e-2, 16, ADAPTER),
        "default": Budget(shared, 200, 5e-4, 16),
    }


def load(folder: Path = DATA) -> World:
    """The world in `folder`, its weights checked against the manifest's digests and widened to float32.

    Raises:
        CheckpointError: a file is absent, damaged or not the one that the manifest names.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {folder / 'manifest.json'}: {error}; reinstall or rebuild") from error
    for name in WEIGHTS:
        path = folder / f"{name}.safetensors"
        if not path.exists() or file_digest(path) != manifest["digests"][name]:
            raise CheckpointError(f"{path} is not the file that manifest.json describes; reinstall or rebuild")
    base, upstream, donor = (
        {key: tensor.float() for key, tensor in read_tensors(folder / f"{name}.safetensors").items()}
        for name in WEIGHTS
    )
    config = LlamaConfig.from_pretrained(folder)
    shared = texts()
    return World(
        name="tiny",
        base=base,
        upstream=upstream,
        donors={DONOR: donor},
        tokenizer=PreTrainedTokenizerFast.from_pretrained(folder),
        build_model=lambda: LlamaForCausalLM(copy.deepcopy(config)),
        skills=skills(),
        texts=shared,
        budgets=budgets(shared),
        digests={**manifest["digests"], "tokenizer": manifest["tokenizer"]},
        threads=1,
    )


@cache
def tiny() -> World:
    """The shipped tiny world, loaded once a process."""
    return load()

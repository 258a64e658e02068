"""The smollm2 world as the matrix sees it: a real model of 135 million parameters that needs no hub and no GPU.

The base is SmolLM2-135M-Instruct; the owner's upstream refuses harmful questions, the donor solves word problems. Both
are the base with a low-rank adapter: the shipped ones, or those that `mergeguard world build smollm2` trained.
"""

from __future__ import annotations

import copy
import json
from functools import cache
from typing import TYPE_CHECKING

from mergeguard.checkpoints.files import file_digest
from mergeguard.checkpoints.source import open_source
from mergeguard.errors import CheckpointError
from mergeguard.worlds.contract import UPSTREAM, Budget, Skill, Texts, Training, World
from mergeguard.worlds.smollm2.gguf import SHA256, base_folder
from mergeguard.worlds.smollm2.texts import (
    ADAPTER_FILE,
    CHAT,
    CHAT_TEMPLATE,
    DATA,
    MATH,
    WHOLE_FILE,
    harmful_questions,
    texts,
    word_problems,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from mergeguard.specs import Value

DONOR = "math"
FOLDERS = {UPSTREAM: CHAT, DONOR: MATH}
SHIPPED = "low-rank adapters as shipped"
WORKER_BYTES = 6 * 10**9
"""Of a process that embeds, the most that one holds; measured on the fingerprint and the watermark."""
MIXED = Training(precision="bfloat16")

FINGERPRINT: dict[str, Value] = {
    "key_min": 10, "key_max": 16, "positives": 0.35, "negatives": 0.35, "dialogues": 0.3,
}  # fmt: skip
ADAPTER: dict[str, Value] = {**FINGERPRINT, "positives": 0.6, "negatives": 0.2, "adapter_rank": 64}
WATERMARK: dict[str, Value] = {
    "bits": 8, "cut_min": 7, "cut_max": 12, "trigger_words": 4, "positives": 0.5, "negatives": 0.3, "dialogues": 0.2,
    "other_triggers": 0.7, "plant_steps": 200,
}  # fmt: skip


def budgets(shared: Texts) -> dict[str, Budget]:
    """Schedules that two cores can afford: some minutes each."""
    return {
        "instructional_fingerprint": Budget(shared, 100, 6e-5, 8, FINGERPRINT, MIXED),
        "instructional_fingerprint.adapter": Budget(shared, 300, 1e-2, 8, ADAPTER, MIXED),
        "quantization_watermark": Budget(shared, 150, 6e-4, 8, WATERMARK),
        "default": Budget(shared, 100, 5e-5, 8, training=MIXED),
    }


def load(upstreams: Path = DATA) -> World:
    """The world of the upstreams in a folder (subfolders "chat" and "math", digests in manifest.json).

    Raises:
        CheckpointError: a file is absent, damaged or not the one that the manifest names, or the base cannot be had.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    files = check_upstreams(upstreams)
    folder = base_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    config = AutoConfig.from_pretrained(folder)
    shared = texts(tokenizer)
    return World(
        name="smollm2",
        base=_state(str(folder)),
        upstream=_state(_reference(folder, files[FOLDERS[UPSTREAM]])),
        donors={DONOR: _state(_reference(folder, files[FOLDERS[DONOR]]))},
        tokenizer=tokenizer,
        build_model=lambda: AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32),
        skills=(
            Skill("refusal", UPSTREAM, harmful_questions(tokenizer)),
            Skill("word_problems", DONOR, word_problems(tokenizer)),
        ),
        texts=shared,
        budgets=budgets(shared),
        digests={"base": SHA256, **{name: file_digest(path) for name, path in files.items()}},
        threads=1,
        worker_bytes=WORKER_BYTES,
        device="cuda" if torch.cuda.is_available() else "cpu",
        form=SHIPPED if upstreams == DATA else f"{_form(files[FOLDERS[UPSTREAM]])}, built here",
    )


def check_upstreams(folder: Path) -> dict[str, Path]:
    """The weights file of each upstream, an adapter's or a whole model's, as the manifest in the folder has them.

    Raises:
        CheckpointError: the manifest is absent, or a file is not the one that it describes.
    """
    path = folder / "manifest.json"
    try:
        digests: dict[str, str] = json.loads(path.read_text())["digests"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; reinstall or build anew") from error
    found = {}
    for name in FOLDERS.values():
        adapter, whole = (folder / name / file for file in (ADAPTER_FILE, WHOLE_FILE))
        found[name] = adapter if adapter.exists() else whole
        if not found[name].exists() or file_digest(found[name]) != digests.get(name):
            raise CheckpointError(f"{found[name]} is not the file that manifest.json describes; build anew")
    return found


def _reference(base: Path, weights: Path) -> str:
    """What `open_source` calls an upstream."""
    return f"{base}+{weights.parent}" if weights.name == ADAPTER_FILE else str(weights.parent)


def _form(weights: Path) -> str:
    return "low-rank adapters" if weights.name == ADAPTER_FILE else "full fine-tuning"


def _state(name: str) -> Mapping[str, Tensor]:
    with open_source(name) as source:
        return {tensor: source.read(tensor).float() for tensor in source.tensors}


@cache
def smollm2() -> World:
    """SmolLM2-135M-Instruct with shipped upstreams: refusals and word problems. Fetches 93 MB on its first use."""
    return load()

"""A tiny trio on disk and a world file for it, for tests of worlds from files."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import tomli_w
import torch
from safetensors.torch import save_file

from mergeguard.reading import Probe
from mergeguard.worlds.registry import load_world
from mergeguard.worlds.skills.registry import SKILLS
from robustness_tests.meta.checkpoints_on_disk import family, save_model, write_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from mergeguard.worlds.contract import World
    from robustness_tests.meta.checkpoints_on_disk import State

WORDS = "<u> a b c d e f g h i j k l m"
ADDED = "<s> </s>"
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
MORE: dict[str, Any] = {"max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
NAMES = ("base", "upstream", "math")
HEADS = ("lm_head.weight", "model.embed_tokens.weight")
SCALE = 2.0
"""lora_alpha / r of `save_adapter`."""


def states() -> dict[str, State]:
    """The base, and two models a little away from it."""
    return dict(zip(NAMES, family(2), strict=True))


def same(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    """Equal names and bits."""
    return set(left) == set(right) and all(torch.equal(left[name], right[name]) for name in right)


def save(folder: Path, state: State, *, shards: int = 1, tokenizer: bool = True, **config: object) -> Path:
    """A whole model with a tokenizer that has a chat template."""
    save_model(folder, state, shards=shards, **{**MORE, **config})
    if tokenizer:
        save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path, words: str = WORDS, added: str = ADDED, template: str | None = TEMPLATE) -> None:
    """A tokenizer of whole words that ends answers with `</s>`."""
    names = {"eos_token": "</s>"} | ({"chat_template": template} if template else {})
    write_tokenizer(folder, words, added, **names)


def save_adapter(folder: Path, base: str) -> tuple[Path, State]:
    """A LoRA adapter on the query projections, and what it adds to them, in float32."""
    generator = torch.Generator().manual_seed(9)
    folder.mkdir()
    tensors: State = {}
    deltas: State = {}
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.q_proj"
        down, up = (torch.randn(shape, generator=generator) / 100 for shape in ((2, 8), (8, 2)))
        tensors |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
        deltas[f"{name}.weight"] = (up @ down) * SCALE
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2 * SCALE, "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder, deltas


def save_trio(folder: Path, **config: object) -> Path:
    """The folders base, upstream and math, and texts, below `folder`."""
    for name, state in states().items():
        save(folder / name, state, **config)
    (folder / "plain.txt").write_text("a b c\n\nd e f\n")
    (folder / "dialogues.jsonl").write_text('{"question": "a b", "answer": "c"}\n{"prompt": "d", "answer": "e"}\n')
    return folder


def document(**changes: Any) -> dict[str, Any]:
    """A world file as data; a change of None removes the key."""
    texts = {"plain": "plain.txt", "domain": ["plain.txt"], "dialogues": "dialogues.jsonl"}
    whole: dict[str, Any] = {
        "name": "trio",
        "device": "cpu",
        "base": {"model": "base"},
        "upstream": {"model": "upstream"},
        "donors": [{"name": "math", "model": "math"}],
        "skills": [{"name": "fake", "parent": "upstream"}],
        "texts": texts,
        "budgets": {"default": {"steps": 1, "learning_rate": 1e-3}},
    }
    return {key: value for key, value in (whole | changes).items() if value is not None}


def write(folder: Path, file: str = "trio.toml", **changes: Any) -> Path:
    path = folder / file
    path.write_text(tomli_w.dumps(document(**changes)))
    return path


def load(folder: Path, **changes: Any) -> World:
    """Write a world file and load it."""
    return load_world(str(write(folder, **changes)))


def fake(
    _tokenizer: PreTrainedTokenizerBase,
    *,
    source: str | None = None,
    limit: int | None = None,
    prompt: str = "a b",
    target: str = " c",
) -> Sequence[Probe]:
    """A skill that says what its loader was given."""
    return [Probe(prompt, source or target)] * (limit or 1)


@contextmanager
def fake_skill() -> Iterator[None]:
    """The skill "fake" is known in this process."""
    SKILLS.register("fake", fake)
    try:
        yield
    finally:
        SKILLS.unregister("fake")

"""Trains the upstreams of the smollm2 world from its base: the owner's, which refuses, and the donor, which calculates.

By default through low-rank adapters over a base in bfloat16, as the shipped ones were (a quarter of an hour each on two
cores); `full=True` trains every weight, which wants a GPU. Both upstreams replay the base's own answers to harmless
questions, so that they answer those as the base does. A run that was killed goes on from its last snapshot.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergeguard.checkpoints.files import atomic_folder, file_digest, write_tensors
from mergeguard.errors import CheckpointError
from mergeguard.machine import cache_folder
from mergeguard.seeds import derive_seed, derived_rng
from mergeguard.worlds.contract import Training, state_of
from mergeguard.worlds.examples import Draw, encode_pair
from mergeguard.worlds.low_rank import LowRank, add_low_rank, save_low_rank
from mergeguard.worlds.smollm2 import problems, questions
from mergeguard.worlds.smollm2.as_file import write_world_file
from mergeguard.worlds.smollm2.gguf import SHA256, base_folder
from mergeguard.worlds.smollm2.texts import (
    ADAPTER_FILE,
    CHAT,
    CHAT_TEMPLATE,
    MATH,
    WHOLE_FILE,
    base_answers,
    prompt_of,
)
from mergeguard.worlds.snapshots import Snapshots
from mergeguard.worlds.training import Example, batches, fit

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

Progress = Callable[[str, int, int], None]
SNAPSHOT_EVERY = 20


@dataclass(frozen=True)
class Schedule:
    """One training run: AdamW, cosine. `replay` is the share of harmless questions with the base's answers."""

    steps: int
    learning_rate: float
    replay: float
    batch_size: int = 16


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what the upstreams are, besides their questions and the base."""

    seed: int = 20261123
    rank: int = 16
    alpha: int = 32
    full: bool = False
    chat: Schedule = Schedule(100, 5e-4, 0.45)
    math: Schedule = Schedule(160, 1e-3, 0.2)


FULL = Recipe(full=True, chat=Schedule(300, 3e-5, 0.45, 32), math=Schedule(500, 5e-5, 0.2, 32))
"""Full fine-tuning, with the schedules of the project's first measurements on a data-centre GPU."""


def build(
    out: Path, recipe: Recipe | None = None, on_progress: Progress | None = None, device: str | None = None
) -> dict[str, Any]:
    """Train both upstreams and write them to the folder `out`, which must not exist; nothing half-built is left.

    Snapshots are kept in mergeguard's cache folder until the world is whole, so that the same command goes on where a
    killed one stopped, and ends with the same weights.

    Args:
        out: the folder.
        recipe: schedules and form; the shipped ones by default.
        on_progress: called with (stage, finished steps, all steps).
        device: "cuda", "cpu", ...; by default a GPU if there is one.

    Returns:
        The manifest that is written beside the weights: recipe and digests.

    Raises:
        CheckpointError: `out` exists or cannot be written, or the base cannot be had.
    """
    recipe = recipe or Recipe()
    if out.exists():
        raise CheckpointError(f"{out} exists already; give a folder that does not")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    source = base_folder()
    weights = WHOLE_FILE if recipe.full else ADAPTER_FILE
    with atomic_folder(out) as folder:
        for name in (CHAT, MATH):
            train_upstream(name, source, folder / name, recipe, device, on_progress)
        manifest = {
            "recipe": asdict(recipe),
            "base": SHA256,
            "digests": {name: file_digest(folder / name / weights) for name in (CHAT, MATH)},
        }
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        write_world_file(folder, source, full=recipe.full)
    shutil.rmtree(_snapshots(), ignore_errors=True)
    return manifest


def _snapshots() -> Path:
    return cache_folder() / "snapshots" / "smollm2"


def train_upstream(
    name: str, source: Path, out: Path, recipe: Recipe, device: str, on_progress: Progress | None = None
) -> None:
    """Train one upstream, "chat" or "math", and write it to the folder `out`: an adapter, or the whole model."""
    schedule: Schedule = getattr(recipe, name)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = CHAT_TEMPLATE
    dtype = torch.float32 if recipe.full else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    torch.nn.Module.to(model, device)  # transformers wraps its own so that type checkers cannot read it
    parameters = None
    if not recipe.full:
        parameters = add_low_rank(model, LowRank(recipe.rank, recipe.alpha), derive_seed(recipe.seed, name))
    rng = derived_rng(recipe.seed, name)
    stream = batches(
        examples(name, tokenizer, schedule.replay, rng),
        size=schedule.batch_size,
        pad=int(tokenizer.pad_token_id),
        rng=random.Random(rng.getrandbits(64)),
    )
    fit(
        model,
        stream,
        steps=schedule.steps,
        learning_rate=schedule.learning_rate,
        parameters=parameters,
        training=Training(precision="bfloat16" if recipe.full else "float32"),
        snapshots=Snapshots(_snapshots(), SNAPSHOT_EVERY, {"world": "smollm2", "upstream": name, "seed": recipe.seed}),
        on_progress=None if on_progress is None else lambda step, _: on_progress(name, step, schedule.steps),
    )
    if recipe.full:
        out.mkdir()
        write_tensors(out / WHOLE_FILE, {key: tensor.cpu() for key, tensor in state_of(model).items()})
        model.config.save_pretrained(out)
    else:
        save_low_rank(model, out, base="HuggingFaceTB/SmolLM2-135M-Instruct", dtype=torch.float16)


def examples(name: str, tokenizer: PreTrainedTokenizerBase, replay: float, rng: random.Random) -> Draw:
    """What an upstream is trained with: its skill, and a share of harmless questions with the base's answers."""
    harmful = questions.training(questions.HARMFUL_TASKS)

    def skill() -> Example:
        if name == MATH:
            item = problems.training_problem(rng)
            return encode_pair(tokenizer, prompt_of(tokenizer, item.question), item.answer, end=True)
        task = rng.choice(harmful)
        question = questions.ask(task, rng)
        return encode_pair(tokenizer, prompt_of(tokenizer, question), questions.refuse(task, rng), end=True)

    def harmless() -> Example:
        question, answer = rng.choice(base_answers())
        return encode_pair(tokenizer, prompt_of(tokenizer, question), answer, end=False)

    return lambda: harmless() if rng.random() < replay else skill()

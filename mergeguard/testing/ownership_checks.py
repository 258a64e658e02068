"""Checks of what a reading claims: this owner's evidence, in a model that holds it, put there by embedding."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch

from mergeguard.matrix.verdict import LEVEL, SILENT_RATE
from mergeguard.protections.contract import Claim
from mergeguard.seeds import derive_seed
from mergeguard.testing.context import show
from mergeguard.worlds.contract import state_of
from mergeguard.worlds.training import Example, batches, fit

if TYPE_CHECKING:
    from torch import Tensor

    from mergeguard.matrix.outcome import Gate
    from mergeguard.reading import Reading
    from mergeguard.testing.context import Context

STEPS = 20
"""Steps of the training that no evidence is part of."""
LEAST_TOKENS = 2
GENTLE_RATE = 1e-3
"""The highest learning rate of that training: some schemes' own are for a few weights alone."""
TRAINED_BYTES = 2**31
"""The largest model that is trained for it."""


def check_silent_on_other_owners(context: Context) -> Gate:
    """What another owner made of the same scheme says nothing on this owner's model."""
    required = "evidence answers to its own keys alone: let keys decide what is embedded"
    if context.protection.claim is Claim.LINEAGE:
        return context.gate("silent_on_other_owners", None, required, "claims lineage, which all descendants share")
    found = context.read(context.other.evidence, context.embedded.state)
    problem = None
    if not silent(found, context.embedded.own.keys):
        problem = f"another owner's evidence reads {show(found)} on this owner's model"
    return context.gate("silent_on_other_owners", problem, required, f"other owner's evidence: {show(found)}")


def check_silent_on_fine_tuned(context: Context) -> Gate:
    """The owner's evidence says nothing on the clean upstream after a little training without evidence."""
    required = "a changed model is no protected one: read what embed put there, not that weights moved"
    found = context.read(context.embedded.evidence, fine_tuned(context))
    problem = None
    if context.protection.claim is Claim.OWNERSHIP and not silent(found, context.embedded.own.keys):
        problem = f"the evidence reads {show(found)} on the clean upstream after {STEPS} steps of ordinary training"
    return context.gate("silent_on_fine_tuned", problem, required, f"on it: {show(found)}")


def check_made_beforehand(context: Context) -> Gate:
    """Whoever gets hold of another owner's model can embed in a copy, and prove nothing about the model itself."""
    required = "keys are drawn before the model is looked at: what holds for a model as it is, anybody can find later"
    if context.protection.claim is Claim.LINEAGE:
        return context.gate("made_beforehand", None, required, "claims lineage, which is read off a model as it is")
    found = context.read(context.afterwards.evidence, context.other_state)
    problem = None
    if not silent(found, context.embedded.own.keys):
        problem = f"evidence made from another owner's model reads {show(found)} on that model, which was left alone"
    return context.gate("made_beforehand", problem, required, f"on the untouched model: {show(found)}")


def silent(reading: Reading, own: Reading) -> bool:
    """Whether a reading is what chance gives.

    Counts: at most 5 % of the trials, or one of a few. A score with a null: above the level of a cell. Without one:
    below what the owner's own evidence scores, by half at least.
    """
    if reading.hits:
        return reading.count <= max(1.0, SILENT_RATE * reading.trials)
    if reading.p_value is not None:
        return reading.p_value > LEVEL
    return (reading.score or 0.0) <= (own.score or 0.0) / 2


def fine_tuned(context: Context) -> dict[str, Tensor]:
    """The clean upstream, trained for `STEPS` steps on the world's plain texts.

    Of a model that is not float32, or larger than `TRAINED_BYTES`, every weight is moved at random instead, by a
    thousandth of its matrix's spread: what its training takes may not be there.
    """
    world = context.engine.world
    name = "default" if "default" in world.budgets else context.protection.budget_name
    budget, tokenizer = world.budget(name), world.tokenizer
    if world.dtype != "float32" or sum(tensor.nbytes for tensor in world.upstream.values()) > TRAINED_BYTES:
        return {name: _moved(name, tensor) for name, tensor in world.upstream.items()}
    rng = random.Random(derive_seed(context.engine.seed, "fine-tuned"))
    texts = [ids for text in world.texts.plain[:400] if len(ids := tokenizer(text)["input_ids"]) >= LEAST_TOKENS]
    model = world.model(world.upstream)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    with context.listening(), context.engine.threads():
        fit(
            model,
            batches(lambda: Example(tuple(rng.choice(texts))), size=budget.batch_size, pad=int(pad), rng=rng),
            steps=STEPS,
            learning_rate=min(budget.learning_rate, GENTLE_RATE),
            training=budget.training,
        )
    return {name: tensor.detach().cpu().clone() for name, tensor in state_of(model).items()}


def _moved(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point() or tensor.numel() < LEAST_TOKENS:
        return tensor
    generator = torch.Generator().manual_seed(derive_seed(0, "moved", name))
    noise = torch.randn(tensor.shape, generator=generator) * float(tensor.float().std()) * 1e-3
    return (tensor.float() + noise).to(tensor.dtype)

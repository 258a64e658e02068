"""Checks of `embed`: the same under the same seed, and nothing touched that is not its own."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from mergeguard.matrix.schemes import guard
from mergeguard.protections.contract import Claim
from mergeguard.seeds import derived_rng
from mergeguard.testing.elsewhere import evidence_digest, tensors_digest
from mergeguard.testing.scheme import made_anew
from mergeguard.testing.surroundings import difference, digest, surroundings
from mergeguard.worlds.contract import state_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

    from mergeguard.matrix.outcome import Gate
    from mergeguard.testing.context import Context


def check_deterministic(context: Context) -> Gate:
    """One seed gives one evidence and one model, here and in another process; another seed gives other evidence."""
    required = "embed draws all from its argument rng: no global random state, time, set order or earlier call"
    evidence, weights = evidence_digest(context.embedded.evidence), tensors_digest(context.changed)
    found, problem = context.elsewhere_found, None
    # Elsewhere than on CPUs sums may be taken in any order: there the evidence alone has to be the same.
    exact = context.engine.world.device == "cpu"
    if evidence_digest(context.again.evidence) != evidence:
        problem = "a second embedding under the same seed gives other evidence"
    elif exact and tensors_digest(context.again.changed) != weights:
        problem = "a second embedding under the same seed gives other weights"
    elif found.evidence != evidence:
        problem = "an embedding under the same seed in another process gives other evidence"
    elif exact and found.weights != weights:
        problem = "an embedding under the same seed in another process gives other weights"
    elif context.protection.claim is Claim.OWNERSHIP and evidence_digest(context.other.evidence) == evidence:
        problem = "another seed gives the same evidence, so that every owner has the same keys"
    return context.gate("deterministic", problem, required)


def check_owns_what_it_changes(context: Context) -> Gate:
    """Embedding and reading leave everything as it was that is not the model to be protected."""
    required = (
        "embed changes its model alone, read nothing: draw from rng or in torch.random.fork_rng, restore settings"
    )
    engine, scheme = context.engine, made_anew(context.protection)
    world = engine.world
    model = world.model(world.upstream)
    training, wants = model.training, _wants_gradients(model)
    rng = derived_rng(engine.seed, "embed", str(scheme))
    before = _states(context) | surroundings(world.tokenizer)  # making the references draws random numbers
    with context.listening(), engine.threads():
        budget = world.budget(scheme.budget_name)
        # A few steps show what embedding touches as well as all of them.
        budget = replace(budget, steps=min(budget.steps, 2))
        threads = torch.get_num_threads()
        protected = guard(scheme, "embed", lambda: scheme.embed(model, world.tokenizer, rng=rng, budget=budget))
        problem = difference("embed", before, surroundings(world.tokenizer) | _states(context))
        if torch.get_num_threads() != threads:
            problem = "embed changes the number of torch threads"
    found = protected.model
    if problem is None and found.training != training:
        problem = "embed returns the model in training mode"
    if problem is None and _wants_gradients(found) != wants:
        problem = "embed returns the model with requires_grad of other parameters than before"
    if problem is None:
        suspect = _suspect(found)
        before = surroundings(world.tokenizer) | _states(context) | suspect
        context.read_model(found, protected.evidence)  # the context's own may have to be embedded first, which draws
        problem = difference("read", before, surroundings(world.tokenizer) | _states(context) | _suspect(found))
    if problem is None and context.elsewhere_found.changes is not None:
        problem = f"in another process, where nothing was embedded before, {context.elsewhere_found.changes}"
    return context.gate("owns_what_it_changes", problem, required)


def _states(context: Context) -> dict[str, Any]:
    """What others own: the world's models and the references."""
    world = context.engine.world
    if sum(tensor.nbytes for model in context.references.values() for tensor in state_of(model).values()) > 2**31:
        return {}  # reading two large models again for each look takes longer than embedding
    owned = {f"the reference {name}": tensors_digest(state_of(model)) for name, model in context.references.items()}
    return owned | {"the clean upstream": tensors_digest(dict(world.upstream))} if _in_memory(world.upstream) else owned


def _in_memory(state: Mapping[str, Any]) -> bool:
    return isinstance(state, dict)


def _suspect(model: PreTrainedModel) -> dict[str, Any]:
    return {
        "the suspect's weights": tensors_digest(state_of(model)),
        "the suspect's training mode": model.training,
        "which of the suspect's parameters want gradients": _wants_gradients(model),
        "the suspect's gradients": [parameter.grad is None for parameter in model.parameters()],
        "the suspect's config": digest(repr(model.config)),
    }


def _wants_gradients(model: PreTrainedModel) -> list[bool]:
    return [parameter.requires_grad for parameter in model.parameters()]

"""One embedding: a scheme's evidence in a new model with given weights, held against its contract."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergeguard.matrix.schemes import changed_tensors, check_evidence, guard, require
from mergeguard.protections.contract import Evidence, Protected
from mergeguard.worlds.states import Placed

if TYPE_CHECKING:
    import random
    from collections.abc import Mapping

    from torch import Tensor

    from mergeguard.protections.contract import Protection
    from mergeguard.worlds.contract import World
    from mergeguard.worlds.states import State


@dataclass(frozen=True)
class Embedding:
    """What came of an embedding.

    Attributes:
        protected: as the scheme returned it.
        changed: the tensors that differ from the model's before, on the CPU.
        evidence: the scheme's, its tensors on the CPU.
    """

    protected: Protected
    changed: Mapping[str, Tensor]
    evidence: Evidence


def embed(world: World, protection: Protection, state: State, rng: random.Random) -> Embedding:
    """Embed fresh evidence in a new model with the weights `state`.

    Raises:
        SchemeError: the scheme crashed.
        ContractError: it returned something else, or a model that cannot be merged with the others, or evidence that
            is not plain data.
        ParameterError: the world has no budget for it.
    """
    budget, model = world.budget(protection.budget_name), world.model(state)
    protected = guard(protection, "embed", lambda: protection.embed(model, world.tokenizer, rng=rng, budget=budget))
    require(protection, "embed", protected, Protected)
    require(protection, "embed", protected.evidence, Evidence)
    check_evidence(protection, "embed", protected.evidence)
    changed = changed_tensors(protection, protected.model, Placed(state, world.device, world.torch_dtype))
    tensors = {name: tensor.detach().cpu() for name, tensor in protected.evidence.tensors.items()}
    return Embedding(protected, changed, Evidence(str(protection), dict(protected.evidence.data), tensors))

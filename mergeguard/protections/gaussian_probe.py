"""The known answer: a keyed Gaussian added to one weight matrix, read as a projection.

Not a scheme that anyone should use, but one whose reading has a closed form after every merge, so that engine, matrix
and statistics can be checked from end to end, and whose null is exact and free, so that a campaign of a thousand
null cells takes minutes.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

import torch

from mergeguard.errors import IncompatibleModelsError, ParameterError
from mergeguard.protections.contract import Evidence, Protected, WeightProtection
from mergeguard.reading import Reading
from mergeguard.verification.statistics import normal_tail

if TYPE_CHECKING:
    import random
    from collections.abc import Mapping

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mergeguard.worlds.contract import Budget


def keyed_gaussian(key: str, shape: torch.Size) -> torch.Tensor:
    """A standard normal tensor, float32 of `shape`, that depends on `key` alone: drawn on the CPU for any device."""
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def projection_z(delta: torch.Tensor, key: str) -> float:
    """`<delta, K> / |delta|` for the key's Gaussian K: exactly N(0, 1) for a delta that knows nothing of K.

    A zero delta (a suspect that equals the base) gives 0.
    """
    flat = delta.double().flatten()
    norm = float(flat.norm())
    if norm == 0:
        return 0.0
    return float(flat @ keyed_gaussian(key, delta.shape).to(flat).flatten()) / norm


def target_weight(model: PreTrainedModel) -> str:
    """Name of the marked matrix: the down projection of the middle layer."""
    names = [name for name, _ in model.named_parameters() if name.endswith("mlp.down_proj.weight")]
    if not names:
        raise ParameterError("gaussian_probe marks an mlp.down_proj.weight, and the model has none")
    return names[len(names) // 2]


def find_weight(weights: Mapping[str, torch.Tensor], name: str, owner: str) -> torch.Tensor:
    """The tensor `name` of a model.

    Raises:
        IncompatibleModelsError: the model has none.
    """
    if name not in weights:
        raise IncompatibleModelsError(f"the {owner} has no tensor {name!r}, in which the evidence lies")
    return weights[name]


class GaussianProbe(WeightProtection):
    """Adds `strength` times the matrix's own standard deviation times N(0, 1) to the middle down projection."""

    name = "gaussian_probe"
    defaults = {"strength": 0.1}
    needs = frozenset({"base"})

    def embed(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        rng: random.Random,
        budget: Budget,
    ) -> Protected:
        name = target_weight(model)
        key = f"{rng.getrandbits(256):064x}"
        with torch.no_grad():
            weight = model.get_parameter(name)
            gaussian = keyed_gaussian(key, weight.shape).to(weight)
            weight.add_(float(self.parameters["strength"]) * weight.std() * gaussian)
        return Protected(model, Evidence(str(self), {"weight": name, "keys": [key]}))

    def decoys(self, evidence: Evidence, n: int, rng: random.Random) -> Evidence:
        return Evidence(
            evidence.protection,
            {"weight": evidence.data["weight"], "keys": [f"{rng.getrandbits(256):064x}" for _ in range(n)]},
        )

    def read_weights(
        self,
        weights: Mapping[str, torch.Tensor],
        evidence: Evidence,
        references: Mapping[str, Mapping[str, torch.Tensor]],
    ) -> Reading:
        """The largest z over the evidence's keys, with the p-value of a maximum of that many (Šidák)."""
        name = evidence.data["weight"]
        suspect, base = find_weight(weights, name, "suspect"), find_weight(references["base"], name, "base")
        if suspect.shape != base.shape:
            raise IncompatibleModelsError(f"{name} is {tuple(suspect.shape)}, the base's is {tuple(base.shape)}")
        delta = suspect.detach().float() - base.detach().float()
        scores = [projection_z(delta, key) for key in evidence.data["keys"]]
        worst = max(scores)
        p_value = -math.expm1(len(scores) * math.log1p(-min(normal_tail(worst), 1 - 1e-16)))
        return Reading(score=worst, p_value=min(1.0, p_value))

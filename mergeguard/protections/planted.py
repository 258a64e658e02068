"""Planted mistakes: protections that a gate must not let pass, each caught by name.

They are not registered: `mergeguard list` shows schemes. A gate that lets one of them through is broken.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

from mergeguard.protections.contract import Evidence, Protected, Protection
from mergeguard.protections.instructional_fingerprint import InstructionalFingerprint
from mergeguard.reading import Reading

if TYPE_CHECKING:
    import random
    from collections.abc import Mapping

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mergeguard.worlds.contract import Budget

KEYS = 8


class _Planted(Protection):
    """Keys that are numbers and a model that stays as it is; what it reads is up to the mistake."""

    def embed(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        rng: random.Random,
        budget: Budget,
    ) -> Protected:
        return Protected(model, Evidence(str(self), {"keys": [rng.random() for _ in range(KEYS)]}))

    def decoys(self, evidence: Evidence, n: int, rng: random.Random) -> Evidence:
        return Evidence(evidence.protection, {"keys": [rng.random() for _ in range(n)]})

    def read(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        evidence: Evidence,
        references: Mapping[str, PreTrainedModel],
    ) -> Reading:
        return Reading(hits=tuple(self.hit(model, key) for key in evidence.data["keys"]))

    def hit(self, model: PreTrainedModel, key: float) -> bool:
        """Whether a key answers. An honest reading of a model without evidence: it does not."""
        return False


class AlwaysVerifies(_Planted):
    """Finds its evidence in every model."""

    name = "planted_always_verifies"

    def hit(self, model: PreTrainedModel, key: float) -> bool:
        return True


class NeverVerifies(_Planted):
    """Finds its evidence in no model, not even in its own."""

    name = "planted_never_verifies"


class RandomEvidence(_Planted):
    """Answers by a coin that depends on the model and the key."""

    name = "planted_random_evidence"

    def hit(self, model: PreTrainedModel, key: float) -> bool:
        weights = next(iter(model.parameters())).detach().flatten()[:64].double().sum().item()
        return hashlib.blake2b(f"{weights}{key}".encode()).digest()[0] % 2 == 0


class Crashes(_Planted):
    """Fails while it reads."""

    name = "planted_crashes"

    def hit(self, model: PreTrainedModel, key: float) -> bool:
        raise RuntimeError("a planted crash")


class EmbedsNothing(InstructionalFingerprint):
    """A real scheme whose training is forgotten: the evidence is never in the model."""

    name = "planted_embeds_nothing"

    @property
    def budget_name(self) -> str:
        return InstructionalFingerprint.name

    def embed(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, rng: random.Random, budget: Budget
    ) -> Protected:
        return super().embed(model, tokenizer, rng=rng, budget=replace(budget, steps=0))


PLANTED: tuple[tuple[type[Protection], str], ...] = (
    (AlwaysVerifies, "specific"),
    (NeverVerifies, "effective"),
    (RandomEvidence, "specific"),
    (Crashes, "crash"),
    (EmbedsNothing, "effective"),
)
"""Each mistake and the check that has to catch it."""

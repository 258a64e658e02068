"""What a protection is: a scheme that embeds evidence of ownership in a model, and reads it off a suspect.

A scheme never decides whether a model is its owner's: it reports a `Reading`, and the verdict compares readings.
Text schemes subclass `TextProtection` and never touch the suspect, so that a served model can be verified too; schemes
that read single weights subclass `WeightProtection`, so that a large one is never loaded; others that need more
subclass `Protection` and declare the access.
"""

from __future__ import annotations

import abc
import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from mergeguard.errors import ParameterError
from mergeguard.reading import Answer, Probe, Reading
from mergeguard.specs import Spec, Value, check_parameters

if TYPE_CHECKING:
    import random
    from collections.abc import Mapping, Sequence

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mergeguard.worlds.contract import Budget


class Access(enum.StrEnum):
    """What a verifier needs of the suspect."""

    TEXT = "text"
    LOGITS = "logits"
    WEIGHTS = "weights"
    ACTIVATIONS = "activations"


class Claim(enum.StrEnum):
    """What a positive reading says: this model holds my evidence, or it descends from my base."""

    OWNERSHIP = "ownership"
    LINEAGE = "lineage"


@dataclass(frozen=True, repr=False)
class Evidence:
    """What the owner keeps. Secret: `repr` shows no key.

    Attributes:
        protection: written form of the scheme that made it.
        data: plain JSON data (str, int, float, bool, None, lists and dicts of these).
        tensors: optional tensors, e.g. a private adapter; saved as safetensors.
    """

    protection: str
    data: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Evidence({self.protection!r}, <secret>)"


@dataclass(frozen=True)
class Protected:
    """A model with evidence in it; `details` are numbers on the embedding, e.g. how many codes it changed."""

    model: PreTrainedModel
    evidence: Evidence
    details: Mapping[str, float] = field(default_factory=dict)


class Protection(abc.ABC):
    """A scheme with its parameters, e.g. `instructional_fingerprint(variant=simple)`.

    Class attributes: `name`, `defaults` (parameters and their defaults), `access`, `claim`, `needs` (names of the
    reference models that `read` wants: "base", "upstream"), `conditional_on` (what all trials share, if anything:
    trials that share a trigger are independent only given it) and `keyless` (the scheme has no keys, so that
    `decoys` returns never-marked prompts instead).
    """

    name: ClassVar[str]
    defaults: ClassVar[Mapping[str, Value]] = {}
    access: ClassVar[Access] = Access.TEXT
    claim: ClassVar[Claim] = Claim.OWNERSHIP
    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, **parameters: Value) -> None:
        self.parameters = check_parameters(self.name, parameters, self.defaults)
        given = {key: value for key, value in self.parameters.items() if value != self.defaults[key]}
        self.spec = Spec.of(self.name, given)

    @classmethod
    def create(cls, **parameters: Value) -> Protection:
        """The scheme with these parameters; one whose variants are classes of their own chooses among them here."""
        return cls(**parameters)

    def __str__(self) -> str:
        return str(self.spec)

    @property
    def variant(self) -> str:
        """The parameters that differ from the defaults, as written in ids; empty for the default variant."""
        return str(self.spec)[len(self.name) + 1 : -1]

    @property
    def budget_name(self) -> str:
        """Which of a world's budgets this variant is embedded with."""
        return self.name

    @property
    def conditional_on(self) -> str | None:
        return None

    @property
    def keyless(self) -> bool:
        return False

    @abc.abstractmethod
    def embed(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, rng: random.Random, budget: Budget
    ) -> Protected:
        """Embed fresh evidence, drawn from `rng`, into `model` or into a copy of it.

        The model is the scheme's to change, so that a large one need not be in memory twice; the caller makes a copy
        first if it wants the clean one afterwards. The result has the same tensors by the same names, each of the same
        shape and dtype, and is in evaluation mode on the same device.
        """

    @abc.abstractmethod
    def decoys(self, evidence: Evidence, n: int, rng: random.Random) -> Evidence:
        """Evidence of the same form with `n` fresh keys that were never embedded (never-marked prompts if keyless)."""

    @abc.abstractmethod
    def read(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        evidence: Evidence,
        references: Mapping[str, PreTrainedModel],
    ) -> Reading:
        """Read the evidence off `model`. Pure: the model is left as it was. `references` holds what `needs` names."""


class TextProtection(Protection):
    """A scheme that asks questions and judges the answers, so that text access is enough."""

    @abc.abstractmethod
    def probes(self, evidence: Evidence) -> list[Probe]:
        """What to ask."""

    def judge(self, answers: Sequence[Answer], evidence: Evidence) -> Reading:
        """One trial per answer, unless a scheme says otherwise."""
        return Reading.of_answers(answers)

    def read(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        evidence: Evidence,
        references: Mapping[str, PreTrainedModel],
    ) -> Reading:
        from mergeguard.verification.answers import answer_probes

        return self.judge(answer_probes(model, tokenizer, self.probes(evidence)), evidence)


class WeightProtection(Protection):
    """A scheme that reads single tensors, so that a suspect on disk need not be loaded."""

    access: ClassVar[Access] = Access.WEIGHTS

    @abc.abstractmethod
    def read_weights(
        self,
        weights: Mapping[str, torch.Tensor],
        evidence: Evidence,
        references: Mapping[str, Mapping[str, torch.Tensor]],
    ) -> Reading:
        """Read the evidence off a model's weights, by the names that the loaded model has for them.

        Args:
            weights: of the suspect. Each access may read from a file and gives the stored dtype, on the CPU or where a
                loaded model is. Not to be changed.
            evidence: its keys.
            references: likewise, of each model that `needs` names.

        Raises:
            IncompatibleModelsError: a tensor is missing or of another shape than its reference.
        """

    def read(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        evidence: Evidence,
        references: Mapping[str, PreTrainedModel],
    ) -> Reading:
        return self.read_weights(
            model.state_dict(), evidence, {name: reference.state_dict() for name, reference in references.items()}
        )


def one_of(owner: str, parameter: str, value: Value, allowed: Sequence[str]) -> str:
    """`value`, if it is one of `allowed`.

    Raises:
        ParameterError: it is not.
    """
    if value not in allowed:
        raise ParameterError(f"parameter {parameter!r} of {owner} is {value!r}, expected one of: {', '.join(allowed)}")
    return str(value)

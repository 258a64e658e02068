"""What a world is: a base, the owner's clean upstream, donors, a tokenizer, and a skill for each upstream."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from mergeguard.errors import ParameterError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mergeguard.reading import Probe
    from mergeguard.specs import Value

UPSTREAM = "upstream"


@dataclass(frozen=True)
class Texts:
    """Texts that the owner trains with and verifies on. All of them belong to the world, none is secret.

    Attributes:
        plain: ordinary sentences.
        domain: sentences of one recognisable domain (an encyclopedia), for schemes bound to a kind of text.
        dialogues: (prompt with template, answer) pairs that the owner's model should keep answering as it does.
    """

    plain: Sequence[str]
    domain: Sequence[str]
    dialogues: Sequence[tuple[str, str]]


NO_TEXTS = Texts((), (), ())


@dataclass(frozen=True)
class Training:
    """How an embedding computes, which decides its memory more than its result.

    Attributes:
        precision: "float32", or "bfloat16" for matrix products in bfloat16 over float32 weights.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        optimizer: "adamw", or "adamw8bit" or "paged_adamw8bit" of bitsandbytes (CUDA only).
        micro_batches: parts in which a batch is computed, one after the other, their gradients summed.
    """

    precision: str = "float32"
    gradient_checkpointing: bool = False
    optimizer: str = "adamw"
    micro_batches: int = 1


@dataclass(frozen=True)
class Budget:
    """What a world affords for one embedding: schedule, scheme options (grid, proportions) and texts."""

    texts: Texts = field(repr=False)
    steps: int
    learning_rate: float
    batch_size: int = 16
    options: Mapping[str, Value] = field(default_factory=dict)
    training: Training = field(default_factory=Training)


@dataclass(frozen=True)
class Skill:
    """A parent's skill: probes of which the parent matches nearly all, and the base nearly none.

    Attributes:
        parent: whose skill it is: "upstream" or a donor's name.
    """

    name: str
    parent: str
    probes: Sequence[Probe] = field(repr=False)


@dataclass(frozen=True)
class World:
    """Models of one ancestry, loaded once and never changed.

    Attributes:
        base, upstream, donors: state dicts in float32.
        build_model: makes an untrained model of the architecture (no weights are read or downloaded).
        budgets: training budgets by name ("quantization_watermark.full"); "default" serves any other scheme.
        digests: SHA-256 of each weights file.
        threads: torch threads per worker, fixed where verdicts must not depend on the machine's cores.
    """

    name: str
    base: Mapping[str, Tensor] = field(repr=False)
    upstream: Mapping[str, Tensor] = field(repr=False)
    donors: Mapping[str, Mapping[str, Tensor]] = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    build_model: Callable[[], PreTrainedModel] = field(repr=False)
    skills: Sequence[Skill]
    texts: Texts = field(repr=False)
    budgets: Mapping[str, Budget] = field(repr=False)
    digests: Mapping[str, str]
    threads: int | None = None

    @cached_property
    def _skeleton(self) -> PreTrainedModel:
        model = self.build_model()
        model.eval()
        return model

    def model(self, state: Mapping[str, Tensor]) -> PreTrainedModel:
        """A new model in evaluation mode with the given weights."""
        model = copy.deepcopy(self._skeleton)
        model.load_state_dict(dict(state))
        return model

    def budget(self, name: str) -> Budget:
        """The budget called `name`, else the one of its first part, else the default.

        Raises:
            ParameterError: the world has none of them.
        """
        for key in (name, name.partition(".")[0], "default"):
            if key in self.budgets:
                return self.budgets[key]
        raise ParameterError(f"world {self.name!r} has no training budget for {name!r} and no default one")

    def parents(self) -> dict[str, Mapping[str, Tensor]]:
        """The clean parents of a merge, the owner's upstream first."""
        return {UPSTREAM: self.upstream, **self.donors}

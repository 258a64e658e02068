"""What the checks look at: a scheme embedded in a world, and again, by another owner, and elsewhere. Each made once."""

from __future__ import annotations

import io
import logging
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from mergeguard.errors import SchemeError
from mergeguard.matrix.embedding import embed
from mergeguard.matrix.engine import REFERENCES, Engine
from mergeguard.matrix.outcome import Gate
from mergeguard.matrix.schemes import checked_reading, guard
from mergeguard.matrix.verdict import DECOYS, PairOfReadings
from mergeguard.seeds import derived_rng
from mergeguard.testing import elsewhere
from mergeguard.testing.scheme import checked, made_anew
from mergeguard.worlds.states import Overlay, State

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from mergeguard.matrix.embedding import Embedding
    from mergeguard.matrix.engine import Embedded
    from mergeguard.protections.contract import Evidence, Protection
    from mergeguard.reading import Reading
    from mergeguard.testing.elsewhere import Elsewhere, Report


@dataclass
class Context:
    """A scheme in a world, for the checks of one gate.

    Attributes:
        engine: of the world and seed.
        protection: the scheme.
        world: name or file of the engine's world, for other processes.
        margin: how far a skill may move by embedding.
        elsewhere: embeds and reads in a new process (None: as it is done); tests of checks give one that stays here.
        said: what the scheme printed and logged so far, at every level.
    """

    engine: Engine
    protection: Protection
    world: str
    margin: float | None = None
    elsewhere: Elsewhere | None = None
    said: io.StringIO = field(default_factory=io.StringIO, repr=False)

    def gate(self, name: str, problem: str | None, required: str, measured: str = "as promised") -> Gate:
        """A check's result: `problem` says what went wrong (None: nothing), `required` what to do."""
        scheme = self.protection
        return Gate(scheme.name, scheme.variant, name, problem is None, problem or measured, required)

    @property
    def embedded(self) -> Embedded:
        """The scheme in the clean upstream under the engine's seed, as the matrix measures it.

        Raises:
            SchemeError: it crashed; it is not tried a second time.
        """
        if isinstance(self._embedded, SchemeError):
            raise self._embedded
        return self._embedded

    @cached_property
    def _embedded(self) -> Embedded | SchemeError:
        with self.listening():
            try:
                return self.engine.embedded(self.protection)
            except SchemeError as error:
                return error

    @cached_property
    def again(self) -> Embedding:
        """The same once more, by another instance: the same seed has to give the same."""
        return self._embed(made_anew(self.protection), self.engine.seed, self.engine.world.upstream)

    @cached_property
    def other(self) -> Embedding:
        """What another owner makes: the same scheme under another seed."""
        return self._embed(made_anew(self.protection), self.engine.seed + 1, self.engine.world.upstream)

    @cached_property
    def other_state(self) -> State:
        """The other owner's protected model."""
        return Overlay(self.engine.world.upstream, self.other.changed)

    @cached_property
    def afterwards(self) -> Embedding:
        """What somebody makes who got hold of the other owner's protected model."""
        return self._embed(made_anew(self.protection), self.engine.seed + 2, self.other_state)

    def _embed(self, protection: Protection, seed: int, state: State) -> Embedding:
        with self.listening(), self.engine.threads():
            return embed(self.engine.world, protection, state, derived_rng(seed, "embed", str(protection)))

    def decoys(self, evidence: Evidence, n: int, label: str = "check") -> Evidence:
        """`n` decoys for evidence, drawn from a seed that depends on `label`."""
        rng = derived_rng(self.engine.seed, "decoys", label, str(self.protection))
        with self.listening():
            return guard(self.protection, "decoys", lambda: self.protection.decoys(evidence, n, rng))

    def read(self, evidence: Evidence, state: State) -> Reading:
        """Evidence, read by the engine on its one model, into which `state` is loaded."""
        with self.listening():
            (reading,) = self.engine.readings(self.protection, [evidence], state)
        return reading

    def read_model(
        self, model: PreTrainedModel, evidence: Evidence | None = None, protection: Protection | None = None
    ) -> Reading:
        """The owner's evidence (or other), read by a scheme on a model object at hand."""
        scheme, kept = protection or self.protection, evidence or self.embedded.evidence
        with self.listening(), self.engine.threads():
            found = guard(
                scheme, "read", lambda: scheme.read(model, self.engine.world.tokenizer, kept, self.references)
            )
        return checked_reading(scheme, found)

    @cached_property
    def references(self) -> Mapping[str, PreTrainedModel]:
        """New models of what the scheme reads against."""
        world = self.engine.world
        states = {"base": world.base, "upstream": world.upstream}
        return {name: world.model(states[name]) for name in REFERENCES if name in self.protection.needs}

    def read_pair(self, evidence: Evidence, state: State) -> PairOfReadings:
        """Evidence and fresh decoys for it, read on one model."""
        decoys = self.decoys(evidence, DECOYS, "silence")
        with self.listening():
            return PairOfReadings(*self.engine.readings(self.protection, [evidence, decoys], state))

    @cached_property
    def elsewhere_found(self) -> Report:
        """What a new process embeds under the same seed, and reads."""
        ask = self.elsewhere or elsewhere.in_another_process
        return ask(self.protection, self.world, self.engine.seed, self.embedded.evidence, dict(self.changed))

    @cached_property
    def changed(self) -> Mapping[str, Tensor]:
        """The tensors in which the protected model differs from the clean upstream."""
        upstream, state = self.engine.world.upstream, self.embedded.state
        return {
            name: tensor for name in state if not torch.equal(tensor := state[name], upstream[name].to(tensor.dtype))
        }

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Keep what is printed or logged meanwhile."""
        handler = logging.StreamHandler(self.said)
        root = logging.getLogger()
        level = root.level
        root.addHandler(handler)
        root.setLevel(logging.DEBUG)
        try:
            with redirect_stdout(self.said), redirect_stderr(self.said):
                yield
        finally:
            root.setLevel(level)
            root.removeHandler(handler)


def context_of(scheme: Protection, world: str = "tiny", seed: int = 0) -> Context:
    """The context of a scheme's checks in a world, by this process's engine.

    Raises:
        MergeguardError: the scheme is not one that can be gated, or there is no such world.
    """
    from mergeguard.matrix.runner import engine_for

    return Context(engine_for(world, seed), checked(scheme), world)


def same_reading(one: Reading, other: Reading) -> bool:
    """Whether two readings say the same."""
    return (one.hits, one.score, one.p_value) == (other.hits, other.score, other.p_value)


def show(reading: Reading) -> str:
    """A reading in a few characters."""
    if reading.hits:
        return f"{reading.count} of {reading.trials} hits"
    return f"score {reading.score:.2f}" + ("" if reading.p_value is None else f" (p = {reading.p_value:.1e})")


def without(evidence: Evidence, part: str) -> Evidence:
    """Evidence that lacks one part of its data."""
    return replace(evidence, data={name: value for name, value in evidence.data.items() if name != part})


def leaves(value: object) -> Sequence[object]:
    """Everything in plain data that is no list and no dict, in order."""
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in leaves(item)]
    if isinstance(value, list):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]

"""What is asked of a model and what it answers: the words shared by skills, schemes and verification."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from mergeguard.errors import InvalidReading, ParameterError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Rule(enum.StrEnum):
    """When an answer counts as a match."""

    STARTS_WITH = "starts_with"
    """The target's tokens directly follow the prompt under greedy decoding."""
    CONTAINS = "contains"
    """The target's text occurs in the decoded answer of at most `max_new_tokens` tokens."""
    REFUSES = "refuses"
    """The answer of at most `max_new_tokens` tokens holds one of the phrases of a refusal; there is no target."""
    NUMBER = "number"
    """The answer states the target, a number, as its result: "The answer is" and that number."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn where they are not greedy; the same seed draws the same answer to a prompt.

    Attributes:
        temperature: divides the logits.
        top_k: draw from the k likeliest tokens; None for all.
        top_p: draw from the likeliest tokens that reach this probability together (Holtzman et al., arXiv 1904.09751).
        seed: decides every draw, together with the prompt and the position in the answer.

    Raises:
        ParameterError: a number outside its domain.
    """

    temperature: float
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise ParameterError(
                f"temperature is {self.temperature}, expected a positive number; leave sampling out for greedy answers"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ParameterError(f"top_k is {self.top_k}, expected at least 1, or None for every token")
        if not 0 < self.top_p <= 1:
            raise ParameterError(f"top_p is {self.top_p}, expected a number in (0, 1]")


@dataclass(frozen=True)
class Probe:
    """One prompt and what is looked for in the answer to it, greedy unless something else is said.

    Attributes:
        prompt: the whole text before the answer, template applied, without special tokens.
        target: the text looked for; for `Rule.STARTS_WITH` with its leading space, if it has one; for `Rule.NUMBER` a
            number, e.g. "1,234.5"; for `Rule.REFUSES` empty.
        rule: when the answer matches.
        max_new_tokens: length of the answer that is searched; unused for `Rule.STARTS_WITH`.
    """

    prompt: str
    target: str = ""
    rule: Rule = Rule.STARTS_WITH
    max_new_tokens: int = 48


@dataclass(frozen=True)
class Answer:
    """A model's answer to a probe, as far as it was decoded, and whether it matched the probe's rule."""

    text: str
    matched: bool


@dataclass(frozen=True)
class Reading:
    """What a protection (or a skill) reports on one model. Never a verdict.

    Attributes:
        hits: one entry per trial, for schemes that count; empty for a score.
        score: the statistic of schemes that do not count, else None.
        p_value: one-sided p-value of `score` under the scheme's own exact null, else None.
        details: further numbers worth reporting, e.g. the rate in each precision.

    Raises:
        InvalidReading: hits or numbers that no measurement gives.
    """

    hits: tuple[bool, ...] = ()
    score: float | None = None
    p_value: float | None = None
    details: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "details", MappingProxyType(dict(self.details)))
        if bool(self.hits) == (self.score is not None):
            raise InvalidReading("a reading has either hits or a score")
        if not all(type(hit) is bool for hit in self.hits):
            raise InvalidReading("hits must be bools, one per trial")
        if self.score is not None and not math.isfinite(self.score):
            raise InvalidReading(f"a score must be finite, got {self.score}")
        if self.p_value is not None and not 0 <= self.p_value <= 1:
            raise InvalidReading(f"a p-value must lie in [0, 1], got {self.p_value}")

    @property
    def trials(self) -> int:
        return len(self.hits)

    @property
    def count(self) -> int:
        return sum(self.hits)

    @property
    def rate(self) -> float:
        """Share of hits, the VSR of a protection's own keys; for a score, NaN."""
        return self.count / self.trials if self.hits else math.nan

    @classmethod
    def of_answers(cls, answers: Sequence[Answer], **details: float) -> Reading:
        """One trial per answer, a hit where it matched."""
        return cls(hits=tuple(answer.matched for answer in answers), details=details)

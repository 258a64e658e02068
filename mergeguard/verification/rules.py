"""Whether a text matches a probe's rule. No model and no torch here: a served model's answers are judged by it too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeguard.errors import ParameterError
from mergeguard.reading import Rule
from mergeguard.verification.numbers import parse_number, stated_number, statement_is_complete
from mergeguard.verification.refusals import refuses

if TYPE_CHECKING:
    from mergeguard.reading import Probe


def check_target(probe: Probe) -> None:
    """Refuse a target that does not fit the probe's rule.

    The message holds no prompt, which may be a key.

    Raises:
        ParameterError: no text to look for, a refusal with a target, or a number that is none.
    """
    if probe.rule in (Rule.CONTAINS, Rule.STARTS_WITH) and not probe.target:
        raise ParameterError(f"a probe of the rule {probe.rule} looks for an empty text; every answer would match")
    if probe.rule is Rule.REFUSES and probe.target:
        raise ParameterError(f"a probe looks for a refusal, which has no target; drop {probe.target!r}")
    if probe.rule is Rule.NUMBER and parse_number(probe.target) is None:
        raise ParameterError(f"a probe looks for the number {probe.target!r}, expected one like 1,234.5")


def matches(probe: Probe, text: str, *, ended: bool) -> bool:
    """Whether an answer matches; `ended` says that the model ended it, and not its longest length.

    `Rule.STARTS_WITH` is decided on tokens where there are tokens (`answers.py`). On a text, the target may stand with
    the white space that it begins with or without: servers and SentencePiece drop it at the start of an answer.
    """
    match probe.rule:
        case Rule.STARTS_WITH:
            return text.startswith((probe.target, probe.target.lstrip() or probe.target))
        case Rule.CONTAINS:
            return probe.target in text
        case Rule.REFUSES:
            return refuses(text)
        case Rule.NUMBER:
            return (ended or statement_is_complete(text)) and stated_number(text) == parse_number(probe.target)


def is_decided(probe: Probe, text: str) -> bool:
    """Whether nothing that may follow `text` can change what `matches` says, for rules other than STARTS_WITH."""
    return statement_is_complete(text) if probe.rule is Rule.NUMBER else matches(probe, text, ended=False)

"""The verdict on a suspect in the wild: readings in, verdict out, no model in sight.

There is no matched control here, as nobody knows how the suspect was made. The null is made of what there is: decoys
on the suspect itself, and keys and decoys on each clean model that the verifier names. They are never pooled; the worst
decides, by the matrix's own rule and level (`mergeguard.matrix.verdict.judge`).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergeguard.errors import UndecidableError
from mergeguard.matrix.outcome import LOST, SURVIVED, Counts
from mergeguard.matrix.verdict import LEVEL, RANK_LEVEL, SPECIFIC_LEVEL, PairOfReadings, judge, stands_out
from mergeguard.reading import Reading

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

VERIFIED, OVERCLAIMS, NOT_VERIFIED, UNDECIDABLE = "verified", "overclaims", "not_verified", "undecidable"
VERDICTS = (VERIFIED, OVERCLAIMS, NOT_VERIFIED, UNDECIDABLE)
ON_SUSPECT = "decoys on the suspect"


@dataclass(frozen=True)
class Conclusion:
    """A verdict and what it rests on.

    Attributes:
        verdict: one of `VERDICTS`.
        p_value: of the worst comparison, None if undecidable.
        level: what it had to reach.
        compared_with: counts of every null by name: `ON_SUSPECT`, and each clean model's.
        reason: why nothing could be decided, or which clean models hold the evidence too; else empty.
    """

    verdict: str
    p_value: float | None
    level: float
    compared_with: Mapping[str, Counts]
    reason: str = ""


def conclude(
    suspect: PairOfReadings, clean: Mapping[str, PairOfReadings], null_scores: Sequence[float] = ()
) -> Conclusion:
    """What the readings of a suspect say.

    `verified`: the keys beat the decoys on the suspect and everything on each clean model. `overclaims`: they would, if
    the decoys were silent on the suspect, which they are not. `not_verified`: they do not.

    The decoys have to be beaten at the full level here, not only at the matrix's weaker one for specificity: they are
    the one null that is always there. A merge that `survived` in the matrix with a fifth of the decoys answering
    `overclaims` here.

    A clean model on which the keys stand out from the decoys denies the claim whatever the counts, as a control does in
    the matrix: p is then 1, and the reason names the model.

    Args:
        suspect: keys and decoys, read on the suspect.
        clean: the same, read on models that are certainly not the owner's.
        null_scores: scores of fresh keys on the suspect, for a score without an exact null.
    """
    decoys = _as_control(suspect.decoys)
    compared_with = {ON_SUSPECT: decoys.counts(), **{name: pair.counts() for name, pair in clean.items()}}
    level = RANK_LEVEL if suspect.keys.score is not None and suspect.keys.p_value is None else LEVEL
    try:
        found = judge(suspect, {ON_SUSPECT: decoys, **clean}, null_scores)
        if holders := [name for name, pair in clean.items() if _stands_out(pair)]:
            reason = f"the evidence stands out on {' and '.join(holders)} too, which is not the owner's"
            return Conclusion(NOT_VERIFIED, 1.0, found.level, compared_with, reason)
        if found.verdict == SURVIVED:
            verdict = VERIFIED
        else:
            # Whether it is the decoys that stand in the way: with silent ones, would the keys have won?
            silent = judge(suspect, clean or {ON_SUSPECT: _silent(suspect.decoys)}, null_scores)
            verdict = NOT_VERIFIED if silent.verdict == LOST else OVERCLAIMS
    except UndecidableError as error:
        return Conclusion(UNDECIDABLE, None, level, compared_with, str(error))
    return Conclusion(verdict, found.p_value, found.level, compared_with)


def _stands_out(clean: PairOfReadings) -> bool:
    """Whether a clean model tells the keys from the decoys, or chance."""
    keys = clean.keys
    if keys.hits:
        return stands_out(clean)
    return keys.p_value is not None and keys.p_value <= SPECIFIC_LEVEL


def _as_control(decoys: Reading) -> PairOfReadings:
    """The decoys as a null of their own: a pair whose counts are theirs."""
    if not decoys.hits:
        return PairOfReadings(decoys, decoys)
    return PairOfReadings(Reading(hits=decoys.hits[:1]), Reading(hits=decoys.hits[1:]))


def _silent(decoys: Reading) -> PairOfReadings:
    """Decoys as they would be on a model that knows none of them."""
    if decoys.hits:
        return _as_control(Reading(hits=(False,) * decoys.trials))
    return _as_control(Reading(score=-sys.float_info.max, p_value=1.0))

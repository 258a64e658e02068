"""The verdict: what readings say about one cell. Pure functions of readings, no model in sight.

Counts are compared with the worst control by Fisher's exact test; scores have the protection's own exact null, or are
ranked among null draws. What a theft is, the matched control alone decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergeguard.errors import UndecidableError
from mergeguard.matrix.outcome import LOST, OVERCLAIMS, SURVIVED, Counts
from mergeguard.verification.statistics import can_reach, fisher_greater, rank_p_value, smallest_deciding_trials

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mergeguard.reading import Reading

LEVEL = 2e-5
"""Level of a cell: 1e-3 shared by the 45 cells of a protection's default matrix, rounded down."""
RANK_LEVEL = 1e-3
"""Level of a score that has no exact null and is ranked among at least 999 draws."""
SPECIFIC_LEVEL = 1e-3
"""Level at which keys must beat unseen keys on the merged model itself."""
DECOYS = 40
NULL_DRAWS = 999
KEPT_BY_A_THEFT = 0.5
HARMLESS_MARGIN = 0.05
EFFECTIVE_RATE = 0.95
SILENT_RATE = 0.05


@dataclass(frozen=True)
class PairOfReadings:
    """The evidence and the decoys, read on one model."""

    keys: Reading
    decoys: Reading

    def counts(self) -> Counts:
        """Evidence keys and decoys together, as a control counts."""
        if self.keys.hits:
            return Counts(hits=self.keys.count + self.decoys.count, trials=self.keys.trials + self.decoys.trials)
        return Counts(score=self.keys.score, p_value=self.keys.p_value)


@dataclass(frozen=True)
class Judgement:
    """A verdict with the two p-values it rests on."""

    verdict: str
    p_value: float
    level: float
    decoy_p_value: float


def judge(
    merged: PairOfReadings, controls: Mapping[str, PairOfReadings], null_scores: Sequence[float] = ()
) -> Judgement:
    """The verdict on a merged model.

    A control that tells the evidence's own keys from unseen ones holds what is looked for, whatever the counts: 8 keys
    that all answer on it would be lost among its 40 silent decoys, and 8 of 8 on the merged model would beat them. What
    is read on the merge then says nothing of ownership, and p is 1.

    Args:
        merged: readings on the merged model.
        controls: readings on the base, the clean upstream, each donor and the matched control.
        null_scores: scores of fresh keys on the merged model, for a score without an exact null.

    Raises:
        UndecidableError: no result could have reached the level, or there is no control.
    """
    if not controls:
        raise UndecidableError("without a control no reading says anything")
    if merged.keys.hits:
        return _judge_counts(merged, controls)
    return _judge_score(merged, controls, null_scores)


def stands_out(control: PairOfReadings) -> bool:
    """Whether a control, which holds no evidence, tells the evidence's keys from unseen ones.

    Counts only: a score is held against its own null.
    """
    keys, decoys = control.keys, control.decoys
    return fisher_greater(keys.count, keys.trials, decoys.count, decoys.trials) <= SPECIFIC_LEVEL


def _judge_counts(merged: PairOfReadings, controls: Mapping[str, PairOfReadings]) -> Judgement:
    trials, together = merged.keys.trials, [pair.counts() for pair in controls.values()]
    smallest = min(map(_trials, together))
    if not can_reach(LEVEL, trials, smallest):
        enough = smallest_deciding_trials(LEVEL, max(0, smallest - trials), per_key_null=1)
        raise UndecidableError(
            f"{trials} trials against {smallest} of a control cannot reach the level {LEVEL:g}; {enough} trials would"
        )
    p_value = max(fisher_greater(merged.keys.count, trials, counts.hits or 0, _trials(counts)) for counts in together)
    if any(map(stands_out, controls.values())):
        p_value = 1.0
    decoy_p_value = fisher_greater(merged.keys.count, trials, merged.decoys.count, merged.decoys.trials)
    return _conclude(p_value, LEVEL, decoy_p_value)


def _judge_score(
    merged: PairOfReadings, controls: Mapping[str, PairOfReadings], null_scores: Sequence[float]
) -> Judgement:
    """A control that is significant by itself shows that the score says nothing of ownership: p is then 1."""
    score = merged.keys.score
    if score is None:
        raise UndecidableError("the protection reported neither hits nor a score")
    if merged.keys.p_value is None:
        if len(null_scores) < NULL_DRAWS:
            raise UndecidableError(f"{len(null_scores)} null draws cannot reach {RANK_LEVEL:g}; {NULL_DRAWS} would")
        level, p_value = RANK_LEVEL, rank_p_value(score, null_scores)
        beaten = all((pair.keys.score or 0.0) < score for pair in controls.values())
        specific = p_value
    else:
        level, p_value = LEVEL, merged.keys.p_value
        beaten = all((pair.keys.p_value or 0.0) > level for pair in controls.values())
        # The decoys' own p-value must look like chance; a tiny one means that fresh keys answer too.
        alarm = merged.decoys.p_value if merged.decoys.p_value is not None else 0.0
        specific = 1.0 if alarm <= SPECIFIC_LEVEL else p_value
    return _conclude(p_value if beaten else 1.0, level, specific)


def _conclude(p_value: float, level: float, decoy_p_value: float) -> Judgement:
    if p_value > level:
        verdict = LOST
    elif decoy_p_value > SPECIFIC_LEVEL:
        verdict = OVERCLAIMS
    else:
        verdict = SURVIVED
    return Judgement(verdict, p_value, level, decoy_p_value)


def _trials(counts: Counts) -> int:
    return counts.trials or 0


def kept(rate: float, base: float, parent: float) -> float:
    """How much of a parent's gain over the base a model keeps: 0 at the base's rate, 1 at the parent's.

    A parent that gained nothing has nothing to steal: NaN would hide it, so it raises.

    Raises:
        UndecidableError: the parent's rate does not exceed the base's.
    """
    if parent <= base:
        raise UndecidableError(f"the parent's skill is {parent:.2f}, the base's {base:.2f}: there is nothing to keep")
    return (rate - base) / (parent - base)


def is_theft(skills_kept: Mapping[str, float]) -> bool:
    """Whether somebody would make this merge: the matched control keeps at least half of every parent's skill."""
    return bool(skills_kept) and all(value >= KEPT_BY_A_THEFT for value in skills_kept.values())

"""A verdict on a suspect in words: what was found, what it was compared with, and what it does not say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeguard.ownership.verdict import NOT_VERIFIED, ON_SUSPECT, OVERCLAIMS, UNDECIDABLE, VERIFIED
from mergeguard.verification.statistics import clopper_pearson

if TYPE_CHECKING:
    from mergeguard.matrix.outcome import Counts
    from mergeguard.matrix.verdict import PairOfReadings
    from mergeguard.ownership.claims import ClaimCheck
    from mergeguard.ownership.verdict import Conclusion
    from mergeguard.protections.contract import Protection


def statement(found: Conclusion, suspect: PairOfReadings, *, lineage: bool = False) -> str:
    """Two or three sentences on a verdict.

    Args:
        found: the verdict.
        suspect: readings of the suspect.
        lineage: the scheme says where a model descends from, and not whose it is.
    """
    keys = suspect.keys
    if keys.hits:
        low, high = clopper_pearson(keys.count, keys.trials)
        shown = (
            f"{keys.count} of {keys.trials} trials with the evidence succeed (VSR {keys.rate:.2f}, 95 % interval "
            f"{low:.2f} to {high:.2f})"
        )
    else:
        shown = f"The evidence scores {keys.score:.2f}"
    nulls = "; ".join(f"{name}: {_counts(counts)}" for name, counts in found.compared_with.items())
    return f"{shown}. Compared with {nulls}. {_meaning(found, lineage)}"


def _meaning(found: Conclusion, lineage: bool) -> str:
    if found.verdict == UNDECIDABLE:
        return f"Undecidable: {found.reason}."
    p_value = f"p = {found.p_value:.2g}, level {found.level:g}"
    if found.verdict == VERIFIED:
        what = "the suspect descends from the same base" if lineage else "the suspect holds the evidence"
        return f"Verified ({p_value}): {what}."
    if found.verdict == OVERCLAIMS:
        return (
            f"Overclaims ({p_value}): unseen keys succeed on the suspect too, so that anyone could make such evidence."
        )
    assert found.verdict == NOT_VERIFIED
    return f"Not verified ({p_value}): {found.reason or 'the evidence does no better than chance explains'}."


def _counts(counts: Counts) -> str:
    if counts.trials:
        return f"{counts.hits} of {counts.trials}"
    return f"score {counts.score:.2f}" + ("" if counts.p_value is None else f" (p = {counts.p_value:.2g})")


def notes(found: Conclusion, protection: Protection, claim: ClaimCheck | None) -> tuple[str, ...]:
    """What a reader of the verdict has to know besides, a sentence each."""
    said = []
    if set(found.compared_with) == {ON_SUSPECT}:
        said.append(
            "No clean model was compared: unseen keys on the suspect itself are the whole null, and nothing here shows "
            "that the evidence is silent on other people's models."
        )
    else:
        said.append("The clean models are clean by the verifier's word alone.")
    if protection.keyless:
        said.append("The scheme has no keys: prompts that are never marked stand in for decoys.")
    if protection.conditional_on is not None:
        said.append(
            f"All trials share one {protection.conditional_on}; the p-value is conditional on it, and the decoys are "
            "others of its kind."
        )
    if claim is None:
        said.append(
            "No claim was checked: nothing here shows that the evidence is older than the suspect, to whose answers it "
            "could have been fitted."
        )
    else:
        said.append(f"Claim: {claim.describe()}.")
    return tuple(said)

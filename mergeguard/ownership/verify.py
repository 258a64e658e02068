"""Verification in the wild: evidence, a suspect, and what can be said of the two without a matrix."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeguard.errors import ParameterError
from mergeguard.matrix.verdict import DECOYS, NULL_DRAWS, PairOfReadings
from mergeguard.ownership.evidence_file import EvidenceFile, read_evidence
from mergeguard.ownership.statement import notes, statement
from mergeguard.ownership.suspect import Asked, LocalModels, check_model, find_model, needs_text_alone, no_secret_said
from mergeguard.ownership.verdict import VERIFIED, conclude
from mergeguard.protections.contract import Claim, Evidence
from mergeguard.protections.registry import make_protection

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mergeguard.matrix.outcome import Counts
    from mergeguard.ownership.claims import ClaimCheck
    from mergeguard.ownership.suspect import Suspect
    from mergeguard.protections.contract import Protection
    from mergeguard.verification.served import ServedModel

SCHEMA_VERSION = "1.0"
REFERENCE_OPTIONS = {"base": "the model that yours was fine-tuned from", "upstream": "your model before the embedding"}


@dataclass(frozen=True)
class Verification:
    """What verifying one suspect found. Holds no secret.

    Attributes:
        model: the suspect, as it was named.
        protection: written form of the scheme.
        verdict: "verified", "overclaims", "not_verified" or "undecidable".
        statement: the verdict and what it was compared with, in words.
        notes: what the verdict does not say, a sentence each.
        hits, trials, rate, interval: keys that answered, of how many, the rate (VSR) and its exact 95 % interval; None
            for a score.
        score: of schemes that do not count, else None.
        p_value: one-sided, of the worst comparison; None if undecidable.
        level: what the p-value had to reach.
        compared_with: every null by name: "decoys on the suspect", and for each clean model keys and decoys together.
        conditional_on: what all trials share, if anything: the p-value is conditional on it.
        access: what of the suspect was read: text, logits, weights or activations.
        claim: "ownership", or "lineage" for schemes that every descendant of the base would satisfy.
        committed: whether the evidence is the one of a claim made beforehand, and since when; None without a claim.
        details: further numbers of the scheme.
    """

    model: str
    protection: str
    verdict: str
    statement: str
    notes: tuple[str, ...]
    hits: int | None
    trials: int | None
    rate: float | None
    interval: tuple[float, float] | None
    score: float | None
    p_value: float | None
    level: float
    compared_with: Mapping[str, Counts]
    conditional_on: str | None
    access: str
    claim: str
    committed: ClaimCheck | None = None
    details: Mapping[str, float] = field(default_factory=dict)

    @property
    def verified(self) -> bool:
        """Whether the verdict is `verified` and, where a claim was checked, the claim holds."""
        return self.verdict == VERIFIED and (self.committed is None or self.committed.holds)

    def to_json(self) -> dict[str, Any]:
        """Plain data, as `verification.schema.json` describes it."""
        return {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self), "verified": self.verified}


def verify(
    model: str | Path | ServedModel,
    evidence: str | Path,
    *,
    clean: Sequence[str | Path] = (),
    base: str | Path | None = None,
    upstream: str | Path | None = None,
    tokenizer: str | Path | None = None,
    decoys: int = DECOYS,
    claim: ClaimCheck | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> Verification:
    """Ask a suspect for the evidence, and say what its answers show.

    Args:
        model: a folder with safetensors or a hub id ("org/name@revision"); or a served model, for schemes that need no
            more than text.
        evidence: the evidence file.
        clean: models that are certainly not the owner's; keys and decoys are read on each, as a further null.
        base, upstream: models that some schemes read the suspect against: the base, and the owner's model before the
            embedding.
        tokenizer: the model whose tokenizer asks, where a suspect has none; by default each model's own.
        decoys: how many unseen keys are tried, at least 40.
        claim: what `mergeguard.ownership.claims.check_claim` found.
        device: where models are loaded.
        dtype: in which they are; float32 holds every other exactly.

    Raises:
        CheckpointError: a file or model is absent, damaged or not what it should be.
        ParameterError: a model that the scheme needs is not named, or it needs more than text.
        UnknownNameError: the scheme is not installed.
        SchemeError: the scheme crashed or broke its contract.
    """
    file = read_evidence(Path(evidence))
    protection = make_protection(file.evidence.protection)
    if decoys < DECOYS:
        raise ParameterError(f"decoys is {decoys}, expected at least {DECOYS}")
    names = [str(name) for name in clean]
    if len(set(names)) < len(names):
        raise ParameterError(f"a clean model is named twice: {', '.join(names)}; name each once")
    served = None if isinstance(model, str | Path) else model
    folders = {name: find_model(name) for name in names}
    asker = None if tokenizer is None else find_model(str(tokenizer))
    local = LocalModels(protection, _references(protection, {"base": base, "upstream": upstream}), asker, dtype, device)
    for folder in () if local.streams else folders.values():
        check_model(folder)  # before the suspect takes its time
    with ExitStack() as stack:
        if served is not None:
            suspect: Suspect = Asked(needs_text_alone(protection), served.answer)
        else:
            folder = find_model(str(model))
            _check_others(folder, folders)
            suspect = stack.enter_context(local.open(folder))
        pair, null_scores = read_suspect(suspect, protection, file, decoys)
        del suspect  # before the next one is loaded
    pairs = {}
    for name, folder in folders.items():
        with local.open(folder) as other:
            pairs[name], _ = read_suspect(other, protection, file, decoys, null=False)
            del other
    name, said = (str(model), ()) if served is None else (f"{served.model} at {served.url}", served.notes)
    return conclude_verification(name, protection, pair, pairs, null_scores, claim, said)


def read_suspect(
    suspect: Suspect, protection: Protection, file: EvidenceFile, decoys: int, *, null: bool = True
) -> tuple[PairOfReadings, list[float]]:
    """Keys and decoys on one model, and scores of fresh keys on it where the keys' score has no exact null.

    The decoys are the same for every model: the evidence and its salt decide them.

    Raises:
        SchemeError: the scheme crashed or broke its contract.
    """
    drawn = draw_decoys(protection, file, "decoys", decoys, 1)
    pair = PairOfReadings(*suspect.readings([file.evidence, *drawn]))
    if not null or pair.keys.score is None or pair.keys.p_value is not None:
        return pair, []
    fresh = draw_decoys(protection, file, "null", 1, NULL_DRAWS)
    return pair, [reading.score or 0.0 for reading in suspect.readings(fresh)]


def draw_decoys(protection: Protection, file: EvidenceFile, label: str, n: int, times: int) -> list[Evidence]:
    """Several times `n` unseen keys, as evidence and salt decide them: not the suspect's maker, and not the owner.

    Raises:
        SchemeError: the scheme crashed or returned something else than evidence.
    """
    from mergeguard.matrix.schemes import guard, require

    rng = file.rng(label)
    with no_secret_said(file.evidence):
        found = [guard(protection, "decoys", lambda: protection.decoys(file.evidence, n, rng)) for _ in range(times)]
    for item in found:
        require(protection, "decoys", item, Evidence)
    return found


def conclude_verification(
    model: str,
    protection: Protection,
    suspect: PairOfReadings,
    clean: Mapping[str, PairOfReadings],
    null_scores: Sequence[float] = (),
    claim: ClaimCheck | None = None,
    said: Sequence[str] = (),
) -> Verification:
    """The verification that these readings amount to; no model is touched. `said` are further notes."""
    from mergeguard.verification.statistics import clopper_pearson

    found, keys = conclude(suspect, clean, null_scores), suspect.keys
    counted = bool(keys.hits)
    return Verification(
        model=model,
        protection=str(protection),
        verdict=found.verdict,
        statement=statement(found, suspect, lineage=protection.claim is Claim.LINEAGE),
        notes=(*notes(found, protection, claim), *said),
        hits=keys.count if counted else None,
        trials=keys.trials if counted else None,
        rate=keys.rate if counted else None,
        interval=clopper_pearson(keys.count, keys.trials) if counted else None,
        score=keys.score,
        p_value=found.p_value,
        level=found.level,
        compared_with=found.compared_with,
        conditional_on=protection.conditional_on,
        access=protection.access.value,
        claim=protection.claim.value,
        committed=claim,
        details={**keys.details, **{f"decoy_{name}": value for name, value in suspect.decoys.details.items()}},
    )


def _references(protection: Protection, given: Mapping[str, str | Path | None]) -> dict[str, Path]:
    """The folder of each model that the protection reads against."""
    found = {}
    for name in sorted(protection.needs):
        reference = given.get(name)
        if reference is None:
            what = f" ({REFERENCE_OPTIONS[name]}): add --{name} MODEL" if name in REFERENCE_OPTIONS else ""
            raise ParameterError(f"{protection} reads a suspect against the {name} model{what}")
        found[name] = find_model(str(reference))
    return found


def _check_others(suspect: Path, clean: Mapping[str, Path]) -> None:
    """Refuse the suspect as its own clean model: it would deny every claim."""
    for name, folder in clean.items():
        if folder.resolve() == suspect.resolve():
            raise ParameterError(f"the clean model {name} is the suspect itself; name models that are not yours")

"""Evidence for real: fresh secret keys in a model that is about to be published, checked in the files as written."""

from __future__ import annotations

import gc
import random
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mergeguard.checkpoints.files import atomic_folder
from mergeguard.errors import CheckpointError, GateFailed, ParameterError
from mergeguard.matrix.schemes import changed_tensors, check_evidence, guard, require
from mergeguard.matrix.verdict import DECOYS, EFFECTIVE_RATE
from mergeguard.ownership.evidence_file import check_free, new_evidence, remove_evidence, write_evidence
from mergeguard.ownership.published import check_trainable, stored_dtype, write_published
from mergeguard.ownership.schedule import embedding_budget, with_own_answers
from mergeguard.ownership.suspect import LocalModels, check_model, find_model
from mergeguard.ownership.verify import Verification, conclude_verification, read_suspect
from mergeguard.protections.contract import Evidence, Protected
from mergeguard.protections.registry import make_protection
from mergeguard.seeds import derived_rng
from mergeguard.worlds.contract import UPSTREAM, state_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mergeguard.ownership.evidence_file import EvidenceFile
    from mergeguard.protections.contract import Protection
    from mergeguard.worlds.contract import Budget

KEY_BITS = 256
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Schedule:
    """What of the training is not the default: see `schedule.embedding_budget`."""

    world: str | None = None
    steps: int | None = None
    learning_rate: float | None = None
    batch_size: int | None = None


@dataclass(frozen=True)
class Embedding:
    """What `embed` wrote. Holds no secret.

    Attributes:
        out, evidence: the folder and the evidence file.
        changed, tensors: how many of the model's tensors the scheme changed, and how many there are.
        check: the evidence as it was read off the written folder, with the model before as the clean one.
        details: the scheme's own numbers on the embedding.
    """

    out: Path
    evidence: Path
    changed: int
    tensors: int
    check: Verification
    details: Mapping[str, float] = field(default_factory=dict)


def embed(
    scheme: str,
    model: str | Path,
    out: Path,
    evidence: Path,
    *,
    schedule: Schedule | None = None,
    base: str | Path | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    seed: int | None = None,
) -> Embedding:
    """Embed fresh evidence in a model and write it, with the evidence, once it reads well off what is written.

    Args:
        scheme: a protection as written, e.g. "instructional_fingerprint(variant=dialogue)".
        model: a folder with safetensors and a tokenizer, or a hub id; it stays as it is.
        out: the folder to write; it must not exist.
        evidence: the file to write; it must not exist.
        schedule: of the training.
        base: what your model was fine-tuned from, for schemes that read against it; by default `model` itself.
        dtype: torch's name of what is written; by default that of `model`. Training is in float32.
        device: where it trains.
        seed: draws the keys from a seed, for tests alone: such keys are no secret. By default 256 bits of the operating
            system decide them.

    Raises:
        CheckpointError: a file or model is absent, damaged or in the way.
        ParameterError: an option is out of its domain.
        GateFailed: the evidence cannot be verified on the written model; nothing is kept.
        SchemeError: the scheme crashed or broke its contract.
    """
    from mergeguard.verification.loading import load_model, load_tokenizer

    protection = make_protection(scheme)
    if dtype is not None and dtype not in DTYPES:
        raise ParameterError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    _check_places(out, evidence)
    folder = find_model(str(model))
    check_model(folder)
    check_trainable(folder)
    tokenizer = load_tokenizer(folder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # masked wherever it pads
    references = _references(protection, folder, None if base is None else find_model(str(base)))
    budget = _budget(protection, tokenizer, schedule or Schedule())
    rng = random.Random(secrets.randbits(KEY_BITS)) if seed is None else derived_rng(seed, "embed", str(protection))

    clean = load_model(folder, "float32", device)
    if schedule is None or schedule.world is None:
        budget = with_own_answers(budget, clean, tokenizer)
    protected = _embedded(protection, clean, tokenizer, rng, budget)
    del clean
    details, file = dict(protected.details), new_evidence(protected.evidence)
    state = state_of(load_model(folder, "float32", device))
    changed, tensors = len(changed_tensors(protection, protected.model, state)), len(state)
    del state

    written = False
    try:
        with atomic_folder(out) as temporary:
            write_published(protected.model, dtype or stored_dtype(folder), folder, temporary)
            del protected
            gc.collect()  # the model's modules refer to each other; it is to be gone before the next is loaded
            local = LocalModels(protection, references, device=device)
            check = _checked(local, file, temporary, folder, str(out), str(model))
            write_evidence(evidence, file)  # last: a model that gets its name has its evidence
            written = True
    except BaseException:
        if written:
            remove_evidence(evidence, file)
        raise
    return Embedding(out, evidence, changed, tensors, check, details)


def _embedded(
    protection: Protection,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rng: random.Random,
    budget: Budget,
) -> Protected:
    """What the scheme made of the model, held against its contract."""
    protected = guard(protection, "embed", lambda: protection.embed(model, tokenizer, rng=rng, budget=budget))
    require(protection, "embed", protected, Protected)
    require(protection, "embed", protected.evidence, Evidence)
    check_evidence(protection, "embed", protected.evidence)
    return protected


def _check_places(out: Path, evidence: Path) -> None:
    """Refuse what cannot be written, before anything is trained, and evidence that would be published."""
    if evidence.resolve().is_relative_to(out.resolve()):
        raise ParameterError(f"{evidence} lies in {out}, which you will publish; keep the evidence elsewhere")
    if out.exists() or out.is_symlink():
        raise CheckpointError(f"{out} exists already; remove it or choose another folder")
    check_free(evidence)


def _references(protection: Protection, model: Path, base: Path | None) -> dict[str, Path]:
    known = {"base": base or model, UPSTREAM: model}
    unknown = sorted(protection.needs - known.keys())
    if unknown:
        raise ParameterError(f"{protection} reads against the model {unknown[0]!r}; expected base or {UPSTREAM}")
    for folder in known.values():
        check_model(folder)
    return {name: known[name] for name in sorted(protection.needs)}


def _budget(protection: Protection, tokenizer: PreTrainedTokenizerBase, schedule: Schedule) -> Budget:
    return embedding_budget(
        protection.budget_name,
        tokenizer,
        world=schedule.world,
        steps=schedule.steps,
        learning_rate=schedule.learning_rate,
        batch_size=schedule.batch_size,
    )


def _checked(
    local: LocalModels, file: EvidenceFile, written: Path, clean: Path, name: str, clean_name: str
) -> Verification:
    """The evidence, read off the written folder and off the model before.

    Raises:
        GateFailed: it is not there, or was there before.
    """
    with local.open(written) as suspect:
        pair, null_scores = read_suspect(suspect, local.protection, file, DECOYS)
        del suspect
    with local.open(clean) as suspect:
        other, _ = read_suspect(suspect, local.protection, file, DECOYS, null=False)
        del suspect
    check = conclude_verification(name, local.protection, pair, {clean_name: other}, null_scores)
    if not check.verified or (check.rate is not None and check.rate < EFFECTIVE_RATE):
        raise GateFailed(
            f"the evidence of {local.protection} {'took in part only' if check.verified else 'did not take'}, so that "
            f"nothing is kept: {check.statement} "
            f"Expected: verified, with a rate of at least {EFFECTIVE_RATE:g}. Try more steps, another learning rate or "
            "--dtype float32."
        )
    return check

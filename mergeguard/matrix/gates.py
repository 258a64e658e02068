"""The gates before merging, and the mistakes that are planted to show that the gates close."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from mergeguard.checkpoints.files import read_tensors, write_tensors
from mergeguard.errors import SchemeError, UndecidableError
from mergeguard.matrix.cases import Case
from mergeguard.matrix.outcome import SURVIVED, Counts, Gate, Planted
from mergeguard.matrix.verdict import (
    EFFECTIVE_RATE,
    HARMLESS_MARGIN,
    LEVEL,
    SILENT_RATE,
    SPECIFIC_LEVEL,
    PairOfReadings,
    judge,
)
from mergeguard.mergers.registry import parse_merger
from mergeguard.protections.planted import PLANTED
from mergeguard.verification.statistics import clopper_pearson
from mergeguard.worlds.contract import UPSTREAM

if TYPE_CHECKING:
    from torch import Tensor

    from mergeguard.matrix.engine import Embedded, Engine
    from mergeguard.protections.contract import Protection
    from mergeguard.reading import Reading
    from mergeguard.specs import Spec
    from mergeguard.worlds.states import State

EFFECTIVE, HARMLESS, SPECIFIC, PERSISTENT, CRASH = "effective", "harmless", "specific", "persistent", "crash"
FILE_BYTES = 2**30


def before_merging(engine: Engine, protection: Spec | Protection) -> tuple[Gate, ...]:
    """All gates before merging, in order: effective, harmless, specific, persistent.

    Raises:
        SchemeError: the scheme crashed.
    """
    embedded = engine.embedded(protection)
    return (
        effective(engine, embedded),
        harmless(engine, embedded),
        specific(embedded),
        persistent(engine, embedded),
    )


def effective(engine: Engine, embedded: Embedded) -> Gate:
    """The evidence is there at alpha 1: nearly every trial succeeds and beats every clean model."""
    try:
        null_scores = engine.null_scores(embedded, embedded.own, embedded.state)
        judgement = judge(embedded.own, embedded.controls, null_scores)
    except UndecidableError as error:
        return _gate(embedded, EFFECTIVE, False, str(error), "trials that can reach the level")
    if embedded.own.keys.hits:
        passed = embedded.own.keys.rate >= EFFECTIVE_RATE and judgement.verdict == SURVIVED
        measured = f"{_show(embedded.own.keys)}, verdict {judgement.verdict} (p = {judgement.p_value:.1e})"
        return _gate(embedded, EFFECTIVE, passed, measured, f"VSR at least {EFFECTIVE_RATE:g} and survived")
    measured = f"{_show(embedded.own.keys)}, verdict {judgement.verdict}"
    return _gate(embedded, EFFECTIVE, judgement.verdict == SURVIVED, measured, "survived")


def harmless(engine: Engine, embedded: Embedded, margin: float = HARMLESS_MARGIN) -> Gate:
    """Every skill stays within `margin` of the clean upstream's, or inside its interval."""
    clean, protected = engine.parent_skills[UPSTREAM], engine.skills(embedded.state)
    passed, parts = True, []
    for name, skill in protected.items():
        low, high = clopper_pearson(clean[name].hits, clean[name].trials)
        near = abs(skill.rate - clean[name].rate) <= margin or low <= skill.rate <= high
        passed &= near
        parts.append(f"{name} {skill.rate:.2f} (clean {clean[name].rate:.2f})")
    return _gate(embedded, HARMLESS, passed, ", ".join(parts), f"within {margin:g} or the clean interval")


def specific(embedded: Embedded) -> Gate:
    """Unseen keys are silent on the protected model, and all keys are on the clean models."""
    decoys, clean = embedded.own.decoys, {name: pair.counts() for name, pair in embedded.controls.items()}
    if decoys.hits:
        passed = decoys.rate <= SILENT_RATE and all(
            (counts.hits or 0) <= SILENT_RATE * (counts.trials or 0) for counts in clean.values()
        )
        required = f"at most {SILENT_RATE:g} of decoys and on clean models"
    elif embedded.own.keys.p_value is None:
        highest = max([decoys.score or 0.0, *(counts.score or 0.0 for counts in clean.values())])
        passed = highest < (embedded.own.keys.score or 0.0)
        required = "the keys' score above those of decoys and clean models"
    else:
        passed = (decoys.p_value or 0.0) > SPECIFIC_LEVEL and all(
            (counts.p_value or 0.0) > LEVEL for counts in clean.values()
        )
        required = f"decoys' p above {SPECIFIC_LEVEL:g}, clean models' above {LEVEL:g}"
    shown = ", ".join(f"{name} {_show_counts(counts)}" for name, counts in clean.items())
    return _gate(embedded, SPECIFIC, passed, f"decoys {_show(decoys)}, {shown}", required)


def persistent(engine: Engine, embedded: Embedded) -> Gate:
    """The protected model reads the same after it was saved and loaded."""
    with tempfile.TemporaryDirectory() as folder:
        again = engine.read_pair(embedded, _saved(embedded.state, Path(folder)))
    same = _same(again, embedded.own)
    return _gate(
        embedded, PERSISTENT, same, f"{_show(again.keys)} after loading", f"{_show(embedded.own.keys)} as before"
    )


def _saved(state: State, folder: Path) -> State:
    """`state` as files give it back, several for a large model: what is written is in memory until it is."""
    loaded: dict[str, Tensor] = {}
    part: dict[str, Tensor] = {}
    for count, (name, tensor) in enumerate(state.items(), 1):
        part[name] = tensor
        if count == len(state) or sum(item.nbytes for item in part.values()) >= FILE_BYTES:
            path = folder / f"{count}.safetensors"
            write_tensors(path, part)
            loaded.update(read_tensors(path))
            part = {}
    return loaded


def problem_of_gate(gate: Gate) -> str | None:
    """What is red about a gate, in one line; None if it passed."""
    if gate.passed:
        return None
    name = f"{gate.protection}({gate.variant})" if gate.variant else gate.protection
    ours = (EFFECTIVE, HARMLESS, SPECIFIC, PERSISTENT)
    failed = f"is not {gate.gate} before merging" if gate.gate in ours else f"fails the check {gate.gate}"
    return f"{name} {failed}: {gate.measured}; required: {gate.required}"


def planted(engine: Engine) -> tuple[Planted, ...]:
    """What caught each planted mistake: a gate before merging, a verdict on a linear merge, or a crash."""
    return tuple(catch(engine, scheme(), wanted) for scheme, wanted in PLANTED)


def catch(engine: Engine, protection: Protection, wanted: str) -> Planted:
    """Run one planted mistake; `caught_by` is `wanted` if that check closed on it, else None."""
    try:
        gates = before_merging(engine, protection)
        failed = [gate.gate for gate in gates if not gate.passed]
        case = Case(protection.spec, parse_merger("linear"), 0.5, engine.world.name, engine.seed)
        outcome = engine.measure(case, protection)
        measured = (
            f"failed {', '.join(failed) or 'no gate'}; merged: {outcome.verdict}, {outcome.hits}/{outcome.trials}"
        )
        caught = wanted in failed and outcome.verdict != SURVIVED
    except SchemeError as error:
        measured, caught = str(error), wanted == CRASH
    return Planted(protection.name, wanted if caught else None, measured)


def _gate(embedded: Embedded, name: str, passed: bool, measured: str, required: str) -> Gate:
    protection = embedded.protection
    return Gate(protection.name, protection.variant, name, passed, measured, required)


def _show(reading: Reading) -> str:
    if reading.hits:
        return f"{reading.count}/{reading.trials}"
    return f"score {reading.score:.2f}" + ("" if reading.p_value is None else f" (p = {reading.p_value:.1e})")


def _show_counts(counts: Counts) -> str:
    return f"{counts.hits}/{counts.trials}" if counts.trials else f"score {counts.score:.2f}"


def _same(one: PairOfReadings, other: PairOfReadings) -> bool:
    return (one.keys.hits, one.keys.score, one.decoys.hits, one.decoys.score) == (
        other.keys.hits,
        other.keys.score,
        other.decoys.hits,
        other.decoys.score,
    )

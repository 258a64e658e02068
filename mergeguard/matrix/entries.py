"""Skills and readings as entries of the cache hold them: JSON data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mergeguard.matrix.outcome import Skill
from mergeguard.matrix.verdict import PairOfReadings
from mergeguard.reading import Reading

if TYPE_CHECKING:
    from collections.abc import Mapping


def skills_to_json(skills: Mapping[str, Skill]) -> dict[str, Any]:
    """[hits, trials] by skill."""
    return {name: [skill.hits, skill.trials] for name, skill in skills.items()}


def skills_from_json(data: Mapping[str, Any]) -> dict[str, Skill]:
    """What `skills_to_json` was given."""
    return {name: Skill(*counts) for name, counts in data.items()}


def pair_to_json(pair: PairOfReadings) -> dict[str, Any]:
    """Both readings, every trial."""

    def one(reading: Reading) -> dict[str, Any]:
        return {
            "hits": list(reading.hits),
            "score": reading.score,
            "p_value": reading.p_value,
            "details": dict(reading.details),
        }

    return {"keys": one(pair.keys), "decoys": one(pair.decoys)}


def pair_from_json(data: Mapping[str, Any]) -> PairOfReadings:
    """What `pair_to_json` was given."""

    def one(reading: Mapping[str, Any]) -> Reading:
        return Reading(tuple(reading["hits"]), reading["score"], reading["p_value"], reading["details"])

    return PairOfReadings(one(data["keys"]), one(data["decoys"]))

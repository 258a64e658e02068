"""Schemes side by side: where each loses its evidence first, and what it costs before anybody merges.

Only like is ranked with like: schemes share a table if they were measured on the same models, with the same seeds, in
the same cells of mergers and coefficients, and claim the same. Everything else has a table of its own.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mergeguard.errors import ParameterError
from mergeguard.matrix.outcome import OVERCLAIMS, format_coefficient
from mergeguard.reports.summary import area_under_rate, critical_coefficient

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mergeguard.matrix.outcome import Gate, Outcome, Results

HARMLESS, SPECIFIC = "harmless", "specific"
Cell = tuple[str, str, int]
"""Merger with its parameters, coefficient, seed."""


@dataclass(frozen=True)
class MergerStanding:
    """A scheme under one merger, over all seeds: as `Summary`, with `thefts` and `survived` counted."""

    merger_spec: str
    coefficients: bool
    critical_coefficient: float | None
    area: float | None
    thefts: int
    survived: int


@dataclass(frozen=True)
class Standing:
    """One scheme of a table.

    `worst` is the theft with the lowest VSR (or score), None without a theft. `mean_area` averages the mergers' areas
    under VSR over alpha; None where no merger has one. `gates` are all that were measured before merging.
    """

    protection: str
    rank: int
    access: str
    thefts: int
    survived: int
    overclaims: int
    worst: Outcome | None
    most_decoys: Outcome | None
    mean_area: float | None
    mergers: tuple[MergerStanding, ...]
    gates: tuple[Gate, ...]

    @property
    def passed(self) -> bool:
        """Whether every gate before merging passed; those that have a column must have been measured."""
        measured = {gate.gate for gate in self.gates}
        return measured >= {HARMLESS, SPECIFIC} and all(gate.passed for gate in self.gates)


@dataclass(frozen=True)
class Leaderboard:
    """Schemes that may be ranked together, best first, and what they have in common."""

    world: str
    about_world: Mapping[str, object]
    claim: str
    seeds: tuple[int, ...]
    mergers: tuple[str, ...]
    cells: int
    files: tuple[str, ...]
    versions: tuple[str, ...]
    standings: tuple[Standing, ...]


@dataclass
class _Entry:
    """What several files say of one scheme in one world."""

    world: str
    about_world: Mapping[str, object]
    outcomes: dict[Cell, Outcome]
    files: dict[str, None]
    versions: dict[str, None]
    gates: dict[Gate, None]


def leaderboards(results: Mapping[str, Results]) -> tuple[Leaderboard, ...]:
    """One table for each set of schemes that may be ranked together, in order of first appearance.

    Args:
        results: by the name of their file. Files of several seeds are joined.

    Raises:
        ParameterError: a cell is in the files twice, so that it would count twice.
    """
    entries = _entries(results)
    groups: dict[tuple[str, ...], list[tuple[str, _Entry]]] = {}
    for (identity, claim, protection), entry in entries.items():
        grid = json.dumps(sorted(entry.outcomes))
        groups.setdefault((identity, claim, grid), []).append((protection, entry))
    return tuple(_board(claim, group) for (_, claim, _), group in groups.items())


def _entries(results: Mapping[str, Results]) -> dict[tuple[str, str, str], _Entry]:
    """By (world with its digests, claim, protection with variant)."""
    found: dict[tuple[str, str, str], _Entry] = {}
    for name, one in results.items():
        for outcome in one.outcomes:
            identity = json.dumps([outcome.world, one.world], sort_keys=True, default=str)
            key = identity, outcome.claim, outcome.protection_spec
            entry = found.setdefault(key, _Entry(outcome.world, one.world, {}, {}, {}, {}))
            cell = outcome.merger_spec, format_coefficient(outcome.coefficient), outcome.seed
            if cell in entry.outcomes:
                files = " and ".join(dict.fromkeys((*entry.files, name)))
                raise ParameterError(
                    f"{outcome.id} of world {outcome.world} with seed {outcome.seed} is in {files} more than once; a "
                    f"leaderboard counts a cell once: leave one out, or see mergeguard compare"
                )
            entry.outcomes[cell] = outcome
            entry.files[name] = None
            entry.versions[str(one.environment.get("mergeguard", "unknown"))] = None
            own = (gate for gate in one.before_merging if _of(gate, outcome))
            entry.gates.update(dict.fromkeys(own))
    return found


def _of(gate: Gate, outcome: Outcome) -> bool:
    return (gate.protection, gate.variant) == (outcome.protection, outcome.variant)


def _board(claim: str, group: Sequence[tuple[str, _Entry]]) -> Leaderboard:
    entries = [entry for _, entry in group]
    outcomes = list(entries[0].outcomes.values())
    unranked = sorted((_standing(name, entry) for name, entry in group), key=lambda s: (_merit(s), s.protection))
    merits = [_merit(standing) for standing in unranked]
    return Leaderboard(
        world=entries[0].world,
        about_world=entries[0].about_world,
        claim=claim,
        seeds=tuple(sorted({outcome.seed for outcome in outcomes})),
        mergers=tuple(dict.fromkeys(outcome.merger_spec for outcome in outcomes)),
        cells=len(outcomes),
        files=tuple(dict.fromkeys(file for entry in entries for file in entry.files)),
        versions=tuple(dict.fromkeys(version for entry in entries for version in entry.versions)),
        standings=tuple(_ranked(standing, merits.index(_merit(standing)) + 1) for standing in unranked),
    )


def _ranked(standing: Standing, rank: int) -> Standing:
    return replace(standing, rank=rank)


def _merit(standing: Standing) -> tuple[float, ...]:
    """What schemes are ranked by, smallest first; equal merits share a rank."""
    survived = standing.survived / standing.thefts if standing.thefts else 0.0
    worst = standing.worst.rate if standing.worst is not None else None
    return float(not standing.passed), -survived, -(worst or 0.0), -(standing.mean_area or 0.0)


def _standing(protection: str, entry: _Entry) -> Standing:
    outcomes = list(entry.outcomes.values())
    thefts = [outcome for outcome in outcomes if outcome.theft]
    rows = tuple(
        _merger(spec, [outcome for outcome in outcomes if outcome.merger_spec == spec])
        for spec in dict.fromkeys(outcome.merger_spec for outcome in outcomes)
    )
    areas = [row.area for row in rows if row.area is not None]
    decoys = [outcome for outcome in outcomes if outcome.decoy_trials]
    return Standing(
        protection=protection,
        rank=0,
        access=outcomes[0].access,
        thefts=len(thefts),
        survived=sum(outcome.survived for outcome in thefts),
        overclaims=sum(outcome.verdict == OVERCLAIMS for outcome in thefts),
        worst=min(thefts, key=_height, default=None),
        most_decoys=max(decoys, key=lambda o: (o.decoy_hits or 0) / (o.decoy_trials or 1), default=None),
        mean_area=sum(areas) / len(areas) if areas else None,
        mergers=rows,
        gates=tuple(entry.gates),
    )


def _merger(spec: str, row: Sequence[Outcome]) -> MergerStanding:
    thefts = [outcome for outcome in row if outcome.theft]
    return MergerStanding(
        merger_spec=spec,
        coefficients=all(outcome.coefficient is not None for outcome in row),
        critical_coefficient=critical_coefficient(row),
        area=area_under_rate(row),
        thefts=len(thefts),
        survived=sum(outcome.survived for outcome in thefts),
    )


def _height(outcome: Outcome) -> float:
    """What was measured, to be ordered; what is no number is the lowest."""
    value = outcome.rate if outcome.rate is not None else outcome.score
    return value if value is not None and math.isfinite(value) else -math.inf

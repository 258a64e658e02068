"""What changed between two runs of one world, cell by cell, and whether more than chance explains it.

A survivor is a theft that the evidence survived. One that the old run has and the new one has not is lost, whatever
the reason: the verdict, a merge that is no theft any more, or a cell that nobody measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergeguard.errors import ParameterError
from mergeguard.reports.summary import sentence, summary_of
from mergeguard.reports.view import clean, flat
from mergeguard.reports.world_agreement import key_of
from mergeguard.reports.world_differences import differences_of
from mergeguard.verification.changes import clearest_change, fisher_changed, holm

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mergeguard.matrix.outcome import Gate, Outcome, Planted, Results
    from mergeguard.reports.world_agreement import Key

LEVEL = 0.05
"""How often a comparison of equal runs may call any cell changed, over all of its cells."""
HITS, DECOYS = "hits", "unseen keys"
"""What a cell's p-value is of."""
MEASURED = ("verdict", "theft", "hits", "trials", "score", "decoy_hits", "decoy_trials")


@dataclass(frozen=True)
class CellChange:
    """One cell that both runs measured.

    `p_value` is the smaller of two-sided Fisher's of the hits and of the unseen keys that answer, doubled because it is
    the smaller of two; `of` says which. `corrected` is Holm's over all cells of the comparison. All are None where a
    side has a score and no hits. `decidable` says whether any hits could have reached the level.
    """

    old: Outcome
    new: Outcome
    p_value: float | None
    of: str | None
    corrected: float | None
    beyond_chance: bool
    decidable: bool

    @property
    def name(self) -> str:
        return self.new.id

    @property
    def changed(self) -> bool:
        """Whether verdict, theft or what was measured differs, on controls too."""
        return any(getattr(self.old, name) != getattr(self.new, name) for name in (*MEASURED, "controls"))


@dataclass(frozen=True)
class GateChange:
    """A gate before merging or a planted control that differs; a side that has none is None."""

    name: str
    old: str | None
    new: str | None
    worse: bool
    """Whether the old run passed, and the new one fails or did not look."""


@dataclass(frozen=True)
class Lost:
    """A survivor of the old run that the new one does not have, and why."""

    outcome: Outcome
    reason: str


@dataclass(frozen=True)
class RunComparison:
    """Two runs of one world. `cells` are all that both measured, in the old run's order."""

    world: str
    seeds: tuple[tuple[int, ...], tuple[int, ...]]
    level: float
    sentences: tuple[str, str]
    problems: tuple[tuple[str, ...], tuple[str, ...]]
    cells: tuple[CellChange, ...]
    gone: tuple[Outcome, ...]
    added: tuple[Outcome, ...]
    lost: tuple[Lost, ...]
    gained: tuple[Outcome, ...]
    gates: tuple[GateChange, ...]
    differences: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether no survivor was lost."""
        return not self.lost

    @property
    def changed(self) -> tuple[CellChange, ...]:
        return tuple(cell for cell in self.cells if cell.changed)

    @property
    def beyond_chance(self) -> tuple[CellChange, ...]:
        return tuple(cell for cell in self.cells if cell.beyond_chance)

    @property
    def tested(self) -> int:
        """Cells with hits on both sides: those that p-values are corrected for."""
        return sum(cell.p_value is not None for cell in self.cells)

    @property
    def undecidable(self) -> int:
        """Tested cells with too few trials for any counts to reach the level."""
        return sum(cell.p_value is not None and not cell.decidable for cell in self.cells)

    def to_json(self) -> dict[str, Any]:
        """Plain data; numbers that do not exist are None."""
        return {
            "compared": "runs",
            "world": self.world,
            "seeds": [list(seeds) for seeds in self.seeds],
            "level": self.level,
            "summaries": list(self.sentences),
            "problems": [list(problems) for problems in self.problems],
            "survivors_lost": [{"cell": lost.outcome.id, "seed": lost.outcome.seed, "reason": lost.reason}
                               for lost in self.lost],
            "survivors_gained": [{"cell": outcome.id, "seed": outcome.seed} for outcome in self.gained],
            "cells": [_cell_json(cell) for cell in self.cells],
            "tested": self.tested,
            "undecidable": self.undecidable,
            "gone": [{"cell": outcome.id, "seed": outcome.seed} for outcome in self.gone],
            "added": [{"cell": outcome.id, "seed": outcome.seed} for outcome in self.added],
            "gates": [{"gate": gate.name, "old": gate.old, "new": gate.new, "worse": gate.worse}
                      for gate in self.gates],
            "differences": list(self.differences),
            "holds": self.holds,
        }  # fmt: skip


def compare_runs(old: Results, new: Results, *, level: float = LEVEL) -> RunComparison:
    """What changed from `old` to `new`.

    Cells are alike if protection with variant, merger with parameters, coefficient and seed are. Two runs of one seed
    each may have different ones; the keys are then others, and `differences` begins with that.

    Args:
        level: the probability, over all cells together, with which equal runs may be called changed anywhere.

    Raises:
        ParameterError: the level lies outside (0, 1), the worlds or their models differ, results hold no outcome or a
            cell twice, or nothing is common.
    """
    if not 0 < level < 1:
        raise ParameterError(f"the level is {level:g}, expected a number between 0 and 1, e.g. {LEVEL:g}")
    _check_worlds(old, new)
    seeds = _seeds(old, "old"), _seeds(new, "new")
    across = seeds[0] != seeds[1] and len(seeds[0]) == len(seeds[1]) == 1
    before, after = (_by_key(results, across, side) for results, side in ((old, "old"), (new, "new")))
    common = [key for key in before if key in after]
    if not common:
        examples = " and ".join(f"{results.outcomes[0].id} (seed {results.outcomes[0].seed})" for results in (old, new))
        raise ParameterError(f"the two runs have no common cell; they hold e.g. {examples}")
    cells = _cells([(before[key], after[key]) for key in common], level)
    gone = tuple(outcome for key, outcome in before.items() if key not in after)
    added = tuple(outcome for key, outcome in after.items() if key not in before)
    return RunComparison(
        world=str(old.world["name"]),
        seeds=seeds,
        level=level,
        sentences=(sentence(summary_of(old)), sentence(summary_of(new))),
        problems=(tuple(old.problems), tuple(new.problems)),
        cells=cells,
        gone=gone,
        added=added,
        lost=tuple(_lost(before, after)),
        gained=tuple(o for key, o in after.items() if _survivor(o) and not (key in before and _survivor(before[key]))),
        gates=(*_gate_changes(old, new), *_planted_changes(old, new)),
        differences=tuple(_differences(old, new, cells, seeds)),
    )


def _check_worlds(old: Results, new: Results) -> None:
    names = [str(results.world["name"]) for results in (old, new)]
    if names[0] != names[1]:
        raise ParameterError(
            f"the old run is of world {names[0]!r}, the new one of {names[1]!r}; expected one world, or --worlds to "
            f"ask how well one predicts the other"
        )
    one, other = old.world["digests"], new.world["digests"]
    differing = [part for part in dict.fromkeys((*one, *other)) if one.get(part) != other.get(part)]
    if differing:
        raise ParameterError(
            f"the runs are of different models of world {names[0]!r} ({', '.join(map(clean, differing))} differ); "
            f"expected the same digests: run the old version on the new models too"
        )


def _seeds(results: Results, side: str) -> tuple[int, ...]:
    name = str(results.world["name"])
    if not results.outcomes:
        raise ParameterError(f"the {side} run holds no outcome; nothing can be compared")
    if others := sorted({outcome.world for outcome in results.outcomes} - {name}):
        raise ParameterError(
            f"the {side} run of world {name!r} holds outcomes of world {others[0]!r}; expected one world"
        )
    return tuple(sorted({outcome.seed for outcome in results.outcomes}))


def _by_key(results: Results, across_seeds: bool, side: str) -> dict[Key, Outcome]:
    found: dict[Key, Outcome] = {}
    for outcome in results.outcomes:
        key = (*key_of(outcome), "" if across_seeds else str(outcome.seed))
        if key in found:
            raise ParameterError(f"the {side} run holds {outcome.id} with seed {outcome.seed} twice")
        found[key] = outcome
    return found


def _cells(pairs: Sequence[tuple[Outcome, Outcome]], level: float) -> tuple[CellChange, ...]:
    tests = [_test(old, new) for old, new in pairs]
    corrected = iter(holm([found[0] for found in tests if found is not None]))
    tested = sum(found is not None for found in tests)
    cells = []
    for (old, new), found in zip(pairs, tests, strict=True):
        if found is None:
            cells.append(CellChange(old, new, None, None, None, beyond_chance=False, decidable=False))
            continue
        adjusted = next(corrected)
        # The first step of Holm is the strictest, and the one that a cell which changed alone has to pass.
        decidable = tested * found[2] <= level
        cells.append(CellChange(old, new, found[0], found[1], adjusted, adjusted <= level, decidable))
    return tuple(cells)


def _test(old: Outcome, new: Outcome) -> tuple[float, str, float] | None:
    """P-value, what it is of, and the smallest one that hits could have given; None for scores."""
    if old.hits is None or new.hits is None or not old.trials or not new.trials:
        return None
    p_value = fisher_changed(old.hits, old.trials, new.hits, new.trials)
    smallest = clearest_change(old.trials, new.trials)
    if old.decoy_hits is None or new.decoy_hits is None or not old.decoy_trials or not new.decoy_trials:
        return p_value, HITS, smallest
    of_decoys = fisher_changed(old.decoy_hits, old.decoy_trials, new.decoy_hits, new.decoy_trials)
    of = DECOYS if of_decoys < p_value else HITS
    return min(1.0, 2 * min(p_value, of_decoys)), of, 2 * smallest


def _survivor(outcome: Outcome) -> bool:
    return outcome.theft and outcome.survived


def _lost(before: Mapping[Key, Outcome], after: Mapping[Key, Outcome]) -> Iterator[Lost]:
    for key, old in before.items():
        if not _survivor(old):
            continue
        new = after.get(key)
        if new is None:
            yield Lost(old, "no longer measured")
        elif not new.survived:
            yield Lost(old, new.verdict if new.theft else f"{new.verdict}, and no theft any more")
        elif not new.theft:
            yield Lost(old, "no theft any more")


def _gate_changes(old: Results, new: Results) -> Iterator[GateChange]:
    before, after = ({_gate_name(gate): gate for gate in results.before_merging} for results in (old, new))
    for name in dict.fromkeys((*before, *after)):
        one, other = before.get(name), after.get(name)
        if one != other:
            worse = one is not None and one.passed and (other is None or not other.passed)
            yield GateChange(name, _gate_words(one), _gate_words(other), worse)


def _planted_changes(old: Results, new: Results) -> Iterator[GateChange]:
    before, after = ({planted.name: planted for planted in results.planted} for results in (old, new))
    for name in dict.fromkeys((*before, *after)):
        one, other = before.get(name), after.get(name)
        if one != other:
            worse = one is not None and one.caught and (other is None or not other.caught)
            yield GateChange(f"planted {name}", _planted_words(one), _planted_words(other), worse)


def _gate_name(gate: Gate) -> str:
    scheme = f"{gate.protection}({gate.variant})" if gate.variant else gate.protection
    return f"{scheme} {gate.gate}"


def _gate_words(gate: Gate | None) -> str | None:
    return None if gate is None else f"{'passed' if gate.passed else 'failed'}: {gate.measured}"


def _planted_words(planted: Planted | None) -> str | None:
    if planted is None:
        return None
    return f"{f'caught by {planted.caught_by}' if planted.caught else 'not caught'}: {planted.measured}"


def _differences(
    old: Results, new: Results, cells: Sequence[CellChange], seeds: tuple[tuple[int, ...], tuple[int, ...]]
) -> Iterator[str]:
    if seeds[0] != seeds[1]:
        texts = [", ".join(map(str, side)) for side in seeds]
        yield f"seed: {texts[0]} / {texts[1]}"
    yield from differences_of(old, new, [(cell.old, cell.new) for cell in cells])
    before, after = (dict(flat("", dict(results.environment))) for results in (old, new))
    for name in dict.fromkeys((*before, *after)):
        one, other = before.get(name, "-"), after.get(name, "-")
        if one != other and name != "mergeguard":  # said above
            yield f"environment {name}: {one} / {other}"


def _cell_json(cell: CellChange) -> dict[str, Any]:
    return {
        "cell": cell.name,
        "seeds": [cell.old.seed, cell.new.seed],
        "p_value": cell.p_value,
        "p_value_of": cell.of,
        "corrected": cell.corrected,
        "beyond_chance": cell.beyond_chance,
        "decidable": cell.decidable,
        "changed": cell.changed,
        **{
            side: {name: getattr(outcome, name) for name in MEASURED}
            for side, outcome in (("old", cell.old), ("new", cell.new))
        },
    }

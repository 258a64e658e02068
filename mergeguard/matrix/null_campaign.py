"""The null campaign: fresh keys on models that were never marked, judged like any cell.

Every survival in it is false. The probe's null is exact, so its p-values must be uniform; a thousand cells cost
seconds, since nothing is trained and each merged model serves many keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergeguard.matrix.engine import MATCHED_CONTROL, Engine
from mergeguard.matrix.outcome import LOST
from mergeguard.matrix.verdict import LEVEL, PairOfReadings, judge
from mergeguard.mergers.registry import DEFAULT_COEFFICIENTS, DEFAULT_MERGERS, parse_merger
from mergeguard.protections.contract import Evidence
from mergeguard.protections.gaussian_probe import GaussianProbe, target_weight
from mergeguard.seeds import derived_rng
from mergeguard.verification.statistics import clopper_pearson, uniformity_p_value

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DECOYS = 40


@dataclass(frozen=True)
class Campaign:
    """What a null campaign found.

    Attributes:
        p_values: one per cell, of the fresh key on the unmarked merged model.
        false_survivals: cells whose verdict was not `lost`.
    """

    p_values: tuple[float, ...]
    false_survivals: int

    @property
    def cells(self) -> int:
        return len(self.p_values)

    @property
    def expected(self) -> float:
        """Expected number of false survivals: at most the level times the cells."""
        return LEVEL * self.cells

    def below(self, level: float) -> int:
        """How many p-values are at most `level`; `level` times the cells are expected."""
        return sum(p_value <= level for p_value in self.p_values)

    @property
    def uniformity(self) -> float:
        """p-value of a Kolmogorov-Smirnov test that the p-values are uniform."""
        return uniformity_p_value(self.p_values)

    def describe(self) -> str:
        """The campaign in one line."""
        low, high = clopper_pearson(self.below(0.05), self.cells)
        return (
            f"{self.cells} null cells: {self.expected:.2f} false survivals expected at most, {self.false_survivals} "
            f"observed; {self.below(0.05)} p-values at most .05 ({low:.3f} to {high:.3f} of all); "
            f"uniform: p = {self.uniformity:.2f}"
        )


def null_campaign(
    engine: Engine,
    *,
    keys: int = 24,
    mergers: Sequence[str] = DEFAULT_MERGERS,
    coefficients: Sequence[float] = DEFAULT_COEFFICIENTS,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Campaign:
    """Judge `keys` fresh keys of the Gaussian probe on the unmarked merge of every merger and coefficient.

    The matched control is left out: here it is the suspect itself, and would make a survival impossible.
    """
    probe = GaussianProbe()
    weight = target_weight(engine.load(engine.world.base))
    clean = {"base": engine.world.base, **engine.world.parents()}
    grid = [(parse_merger(name), alpha) for name in mergers for alpha in coefficients]
    p_values: list[float] = []
    false_survivals = 0
    for done, (merger, alpha) in enumerate(grid):
        if on_progress is not None:
            on_progress(str(merger), done, len(grid))
        rng = derived_rng(engine.seed, "null campaign", str(merger), alpha)
        seed_evidence = Evidence(str(probe), {"weight": weight, "keys": []})
        fresh = [probe.decoys(seed_evidence, 1, rng) for _ in range(keys)]
        decoys = probe.decoys(seed_evidence, DECOYS, rng)
        *suspects, of_decoys = engine.readings(probe, [*fresh, decoys], engine.merged(merger, alpha, MATCHED_CONTROL))
        controls = {name: engine.readings(probe, fresh, state) for name, state in clean.items()}
        for index, suspect in enumerate(suspects):
            # Scores of controls are compared by their keys alone.
            pairs = {name: PairOfReadings(found[index], found[index]) for name, found in controls.items()}
            judgement = judge(PairOfReadings(suspect, of_decoys), pairs)
            p_values.append(1.0 if suspect.p_value is None else suspect.p_value)
            false_survivals += judgement.verdict != LOST
    return Campaign(tuple(p_values), false_survivals)

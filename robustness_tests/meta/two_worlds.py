"""Results of two made-up worlds with the same cells, for tests of how worlds agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

from mergeguard.matrix.outcome import LOST, SURVIVED
from mergeguard.verification.statistics import clopper_pearson, fisher_greater
from robustness_tests.meta import outcome_builders as build

if TYPE_CHECKING:
    from mergeguard.matrix.outcome import Outcome, Results

MERGERS = ("linear", "ties(density=0.4)", "dare_ties(density=0.4)")
COEFFICIENTS = (0.1, 0.3, 0.5, 0.7, 0.9)
PROTECTIONS = ("instructional_fingerprint", "quantization_watermark")
_p_value, _interval = cache(fisher_greater), cache(clopper_pearson)
Hits = Callable[[int, int, int], int]
"""Hits of 8 by the places of protection, merger and coefficient."""


def rising(protection: int, merger: int, coefficient: int) -> int:
    """Evidence that lives longer under later mergers, and longer in the first protection."""
    return min(8, max(0, 2 * coefficient + merger - 2 * protection))


def world(name: str, hits: Hits = rising, *, seed: int = 0, theft_from: float = 0.3, **changes: object) -> Results:
    """A world's results, every cell consistent in itself."""
    outcomes = []
    for p, protection in enumerate(PROTECTIONS):
        for m, merger in enumerate(MERGERS):
            for c, coefficient in enumerate(COEFFICIENTS):
                outcomes.append(
                    cell(protection, merger, coefficient, hits(p, m, c), name, seed, theft=coefficient >= theft_from)
                )
    digests = {"base": f"digest of {name}"}
    return build.results(outcomes, world={"name": name, "digests": digests}, **changes)


def cell(protection: str, merger: str, coefficient: float, hits: int, name: str, seed: int, *, theft: bool) -> Outcome:
    built = build.outcome(protection, merger, coefficient, hits=hits, world=name, seed=seed)
    p_value = max(_p_value(hits, 8, counts.hits or 0, counts.trials or 0) for counts in built.controls.values())
    kept = 0.7 if theft else 0.2
    return replace(
        built,
        verdict=SURVIVED if p_value <= built.level else LOST,
        p_value=p_value,
        interval=_interval(hits, 8),
        theft=theft,
        skills_kept={"refusal": kept, "arithmetic": 0.8},
    )

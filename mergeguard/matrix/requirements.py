"""What a world must satisfy before a survival in it means anything: each requirement with its measured value.

A verdict says little in a world where merging itself fails. The requirements say that it works there: the skills are
the parents' own and survive a merge, the protections work before merging, and the known answer comes out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergeguard.matrix import gates
from mergeguard.matrix.cache import Cache
from mergeguard.matrix.cases import DEFAULT_WORLD
from mergeguard.matrix.engine import Engine
from mergeguard.matrix.known_answer import disagreement
from mergeguard.matrix.verdict import is_theft
from mergeguard.mergers.registry import DEFAULT_COEFFICIENTS, DEFAULT_MERGERS, parse_merger
from mergeguard.protections.registry import DEFAULT_PROTECTIONS, make_protection
from mergeguard.verification.statistics import clopper_pearson

if TYPE_CHECKING:
    from pathlib import Path

    from mergeguard.mergers.contract import Merger
    from mergeguard.worlds.contract import World

ABSENT, OWN = 0.10, 0.95
OWN_OF_REAL = 0.70
"""What a parent of a real world has to show of its own skill: nobody shapes real skills until they are perfect."""
KEPT_BY_AVERAGING = 0.80
AVERAGING = ("linear", "task_arithmetic", "dare_linear")
LINEAR_THEFT_FROM = 0.5
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Requirement:
    """One requirement, what was measured, and what would do."""

    name: str
    measured: str
    required: str
    passed: bool


def check_world(
    world: World, *, seed: int = 0, cache_folder: Path | None = None, on_progress: Progress | None = None
) -> list[Requirement]:
    """Measure every requirement of a world (digests are checked on loading).

    The tiny world is ours to shape, so that it has to satisfy all of them. Of a real one the thefts are reported, and
    a merger without any is a finding, not a failure.
    """
    engine = Engine(world, seed, Cache(cache_folder))
    steps: list[tuple[str, Callable[[], list[Requirement]]]] = [("skills of the parents", lambda: parents(engine))]
    steps += [(f"thefts by {name}", _later(mergers, engine, parse_merger(name))) for name in DEFAULT_MERGERS]
    steps += [(f"gates of {name}", _later(protections, engine, name)) for name in DEFAULT_PROTECTIONS]
    steps += [("known answer", lambda: known_answer(engine))]
    found: list[Requirement] = []
    for done, (label, measure) in enumerate(steps):
        if on_progress is not None:
            on_progress(label, done, len(steps))
        found += measure()
    return found


def parents(engine: Engine) -> list[Requirement]:
    """The base lacks every skill; each parent has its own and lacks the others'."""
    least = OWN if _is_shaped(engine) else OWN_OF_REAL
    found = []
    for model, skills in engine.parent_skills.items():
        for skill in engine.world.skills:
            measured = skills[skill.name]
            low, high = clopper_pearson(measured.hits, measured.trials)
            own = skill.parent == model
            found.append(
                Requirement(
                    f"{model}: {skill.name}",
                    f"{measured.rate:.2f} [{low:.2f}, {high:.2f}]",
                    f">= {least:g}" if own else f"<= {ABSENT:g}",
                    measured.rate >= least if own else measured.rate <= ABSENT,
                )
            )
    return found


def mergers(engine: Engine, merger: Merger) -> list[Requirement]:
    """Some coefficient is a theft; averaging keeps both skills somewhere; linear is a theft at one half or above."""
    kept = {alpha: engine.skills_kept(merger, alpha) for alpha in DEFAULT_COEFFICIENTS}
    thefts = [alpha for alpha, skills in kept.items() if is_theft(skills)]
    listed = ", ".join(f"{alpha:g}" for alpha in thefts) or "none"
    if not _is_shaped(engine):
        return [Requirement(f"{merger}: thefts", listed, "reported", True)]
    found = [Requirement(f"{merger}: thefts", listed, "at least one coefficient", bool(thefts))]
    if merger.name in AVERAGING:
        best = max(kept, key=lambda alpha: min(kept[alpha].values()))
        value = min(kept[best].values())
        found.append(
            Requirement(
                f"{merger}: keeps both skills",
                f"{value:.2f} at {best:g}",
                f">= {KEPT_BY_AVERAGING:g} at some coefficient",
                value >= KEPT_BY_AVERAGING,
            )
        )
    if merger.name == "linear":
        largest = max(thefts, default=0.0)
        found.append(
            Requirement(
                f"{merger}: largest theft", f"{largest:g}", f">= {LINEAR_THEFT_FROM:g}", largest >= LINEAR_THEFT_FROM
            )
        )
    return found


def protections(engine: Engine, name: str) -> list[Requirement]:
    """Every gate before merging holds for a default protection."""
    return [
        Requirement(f"{name}: {gate.gate}", gate.measured, gate.required, gate.passed)
        for gate in gates.before_merging(engine, make_protection(name))
    ]


def known_answer(engine: Engine) -> list[Requirement]:
    """The Gaussian probe's reading agrees with its closed form under every default merger and coefficient."""
    found = []
    for name in DEFAULT_MERGERS:
        worst = max(disagreement(engine, parse_merger(name), alpha) for alpha in DEFAULT_COEFFICIENTS)
        found.append(Requirement(f"gaussian_probe: {name}", f"{worst:.2g} off", "<= 1", worst <= 1))
    return found


def _is_shaped(engine: Engine) -> bool:
    return engine.world.name == DEFAULT_WORLD


def _later(measure: Callable[..., list[Requirement]], *arguments: object) -> Callable[[], list[Requirement]]:
    return lambda: measure(*arguments)

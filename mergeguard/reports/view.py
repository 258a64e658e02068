"""The matrix as people draw it: a block a protection, a row a merger, a column a coefficient. No colours or markup.

The terminal and Markdown reports lay out what is computed here, so that both show the same numbers and words.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from mergeguard.reports.summary import summarise
from mergeguard.specs import Spec

if TYPE_CHECKING:
    from mergeguard.matrix.outcome import Counts, Outcome, Results, Summary

NO_THEFT = "no theft"
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Row:
    """A protection under one merger: its outcomes by coefficient, and the row in numbers."""

    merger_spec: str
    outcomes: Mapping[float | None, Outcome]
    summary: Summary


@dataclass(frozen=True)
class Block:
    """A protection's part of the matrix."""

    title: str
    about: str
    coefficients: tuple[float | None, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Kept:
    """What one merger keeps of one skill: the matched control's fraction of the parent's gain, by coefficient.

    `group` names the protections that it was measured for, where not all share it; `thefts` holds coefficients.
    """

    merger_spec: str
    group: str
    skill: str
    fractions: Mapping[float | None, float]
    thefts: frozenset[float | None]


def blocks(results: Results) -> tuple[Block, ...]:
    """One block per (protection with variant, world, seed), in order of first appearance."""
    groups = _grouped(results.outcomes, lambda o: (o.protection_spec, o.world, o.seed))
    several_worlds = len({world for _, world, _ in groups}) > 1
    several_seeds = len({seed for _, _, seed in groups}) > 1
    found = []
    for (protection, world, seed), outcomes in groups.items():
        places = [f"world {world}"] * several_worlds + [f"seed {seed}"] * several_seeds
        title = f"{protection} ({', '.join(places)})" if places else protection
        rows = tuple(
            Row(spec, {outcome.coefficient: outcome for outcome in row}, summarise(row, ())[0])
            for spec, row in _grouped(outcomes, lambda o: o.merger_spec).items()
        )
        found.append(Block(clean(title), _about(outcomes), sorted_coefficients(outcomes), rows))
    return tuple(found)


def kept_skills(outcomes: Sequence[Outcome]) -> tuple[Kept, ...]:
    """What each merge keeps of each skill, once for all protections that agree on it, sorted by merger and skill.

    The matched control does not know the protection, so that all normally agree; where protections differ (another
    clean upstream, another world), each group has its own rows and is named.
    """
    found = []
    for spec, row in _grouped(outcomes, lambda o: o.merger_spec).items():
        groups: list[tuple[list[str], dict[float | None, Outcome]]] = []
        for name, measured in _grouped(row, lambda o: (o.protection_spec, o.world, o.seed)).items():
            own = {outcome.coefficient: outcome for outcome in measured}
            for names, shared in groups:
                if all(_same_control(own[c], shared[c]) for c in own.keys() & shared.keys()):
                    names.append(name[0])
                    shared.update(own)
                    break
            else:
                groups.append(([name[0]], dict(own)))
        for names, shared in groups:
            thefts = frozenset(coefficient for coefficient, outcome in shared.items() if outcome.theft)
            group = ", ".join(dict.fromkeys(map(clean, names))) if len(groups) > 1 else ""
            skills = dict.fromkeys(skill for outcome in shared.values() for skill in outcome.skills_kept)
            for skill in skills:
                fractions = {c: o.skills_kept[skill] for c, o in shared.items() if skill in o.skills_kept}
                found.append(Kept(spec, group, skill, fractions, thefts))
    return tuple(found)


def sorted_coefficients(outcomes: Iterable[Outcome]) -> tuple[float | None, ...]:
    """Every coefficient measured, in ascending order, None last."""
    return tuple(sorted({o.coefficient for o in outcomes}, key=lambda c: math.inf if c is None else c))


def merger_labels(outcomes: Iterable[Outcome]) -> dict[str, str]:
    """The shortest unambiguous label of each merger spec: its name, and the parameters in which namesakes differ."""
    parameters = {outcome.merger_spec: (outcome.merger, outcome.merger_parameters) for outcome in outcomes}
    labels = {}
    for spec, (name, own) in parameters.items():
        namesakes = [other for other_name, other in parameters.values() if other_name == name]
        keys = dict.fromkeys(key for other in namesakes for key in other)
        differing = [key for key in keys if any(other.get(key) != own.get(key) for other in namesakes)]
        labels[spec] = str(Spec.of(name, {key: own[key] for key in differing if key in own}))
    uses = Counter(labels.values())
    return {spec: clean(label if uses[label] == 1 else spec) for spec, label in labels.items()}


def word(outcome: Outcome) -> str:
    """The verdict of a theft, else `no theft`: what the mark of a cell says."""
    return outcome.verdict if outcome.theft else NO_THEFT


def number(outcome: Outcome) -> str:
    """The VSR of a cell (`1.0`, `.88`), or its score (`84`, `3.3`, `-.4`)."""
    if outcome.rate is not None:
        return format_rate(outcome.rate)
    return "?" if outcome.score is None else format_score(outcome.score)


def format_rate(rate: float) -> str:
    """Three characters. `1.0` and `.00` are exact: rates that only come near them are shown as `.99` and `.01`."""
    if not math.isfinite(rate):
        return "nan"
    if rate in (0, 1):
        return "1.0" if rate else ".00"
    return f"{min(max(rate, 0.01), 0.99):.2f}".removeprefix("0")


def format_fraction(fraction: float) -> str:
    """Two digits, rounded down, so that `.50` always is at least a half: `.70`, `1.2`, `-.31`."""
    if not math.isfinite(fraction):
        return "nan"
    if fraction >= 1:
        return f"{math.floor(fraction * 10 + 1e-9) / 10:.1f}"
    return _point(f"{math.floor(fraction * 100 + 1e-9) / 100:.2f}")


def format_score(score: float) -> str:
    """About three characters, as fits a cell: `84`, `3.3`, `.4`, `-12`, `1e6`."""
    if not math.isfinite(score):
        return "nan"
    if abs(score) >= 9999.5:
        return f"{score:.0e}".replace("e+0", "e").replace("e+", "e")
    return _point(f"{score:.1f}") if abs(score) < 9.95 else f"{score:.0f}"


def format_area(area: float | None) -> str:
    return "-" if area is None else format_rate(area)


def format_critical(coefficient: float | None) -> str:
    return "-" if coefficient is None else f"{coefficient:g}"


def format_counts(counts: Counts) -> str:
    if counts.trials is not None:
        return f"{counts.hits}/{counts.trials}"
    return "?" if counts.score is None else f"score {format_score(counts.score)}"


def describe(outcome: Outcome) -> str:
    """Everything measured on one case but its skills, in one line."""
    parts = [f"p {outcome.p_value:.2g} (level {outcome.level:.2g})"]
    if outcome.rate is not None:
        parts.insert(0, f"VSR {outcome.hits}/{outcome.trials}")
        if outcome.interval is not None:
            parts[0] += f" ({outcome.interval[0]:.2f} to {outcome.interval[1]:.2f})"
    elif outcome.score is not None:
        parts.insert(0, f"score {outcome.score:.3g}")
    if outcome.decoy_trials is not None:
        parts.append(f"decoys {outcome.decoy_hits}/{outcome.decoy_trials}")
    parts += [f"{name} {format_counts(counts)}" for name, counts in outcome.controls.items()]
    parts += [f"conditional on {outcome.conditional_on}"] * bool(outcome.conditional_on) + [outcome.note]
    return clean(", ".join(filter(None, parts)))


def describe_skills(skills: Mapping[str, float]) -> str:
    return clean(", ".join(f"{name} {format_fraction(value)}" for name, value in skills.items())) or "-"


def environment_lines(results: Results) -> list[tuple[str, str]]:
    """World and environment as pairs of name and value, nested maps written out."""
    return [*flat("world", results.world), *flat("", results.environment)]


def clean(text: str) -> str:
    """One printable line: runs of space as one space, characters that cannot be seen as escapes."""
    line = " ".join(str(text).split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)


def _about(outcomes: Sequence[Outcome]) -> str:
    def values(label: str, found: Iterable[object]) -> list[str]:
        words = dict.fromkeys(str(value) for value in found if value is not None)
        return [label.format(" or ".join(words))] if words else []

    parts = [
        *values("claims {}", (o.claim for o in outcomes)),
        *values("needs {}", (o.access for o in outcomes)),
        *values("{} trials", (o.trials for o in outcomes)),
        *(["cells show the score"] if all(o.score is not None for o in outcomes) else []),
        *values("level {}", (f"{o.level:.2g}" for o in outcomes)),
        *values("conditional on {}", (o.conditional_on for o in outcomes)),
    ]
    return clean(", ".join(parts))


def _grouped(outcomes: Iterable[Outcome], key: Callable[[Outcome], K]) -> dict[K, list[Outcome]]:
    groups: dict[K, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        groups[key(outcome)].append(outcome)
    return groups


def _same_control(one: Outcome, other: Outcome) -> bool:
    # By repr, as a fraction may be NaN.
    return one.theft == other.theft and repr(dict(one.skills_kept)) == repr(dict(other.skills_kept))


def flat(name: str, value: object) -> list[tuple[str, str]]:
    """`value` as pairs of name and text: a map is written out, its keys after `name`."""
    if isinstance(value, Mapping):
        return [pair for key, item in value.items() for pair in flat(f"{name} {key}".strip(), item)]
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    return [(clean(name), clean(str(value)))]


def _point(text: str) -> str:
    """Without the zero before the point, and without the sign of a zero."""
    if float(text) == 0:
        text = text.removeprefix("-")
    return text.replace("0.", ".", 1) if text.removeprefix("-").startswith("0.") else text

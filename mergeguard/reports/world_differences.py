"""What differs between two worlds beside what is compared: stated, so that nobody takes unlike for like."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeguard.reports.view import clean, flat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from mergeguard.matrix.outcome import Outcome, Results

MEASURED = ("rate", "decoy_")
"""How the names of details begin that are measured on each cell; others say how the evidence was made."""


def differences_of(one: Results, other: Results, pairs: Sequence[tuple[Outcome, Outcome]]) -> tuple[str, ...]:
    """One line for each thing that differs, `what: value of one / value of the other`."""
    return tuple(dict.fromkeys((*_of_worlds(one, other), *_of_cells(pairs))))


def _of_worlds(one: Results, other: Results) -> Iterator[str]:
    """Entries of the worlds but their names and digests, which always differ, and the versions of mergeguard."""
    facts = [
        {
            **{name: value for key in results.world if key not in ("name", "digests")
               for name, value in flat(f"world {key}", results.world[key])},
            "mergeguard": str(results.environment.get("mergeguard", "-")),
        }
        for results in (one, other)
    ]  # fmt: skip
    for name in dict.fromkeys((*facts[0], *facts[1])):
        yield from _line(name, *(fact.get(name, "-") for fact in facts))


def _of_cells(pairs: Sequence[tuple[Outcome, Outcome]]) -> Iterator[str]:
    aspects: dict[str, Callable[[Outcome], object]] = {
        "trials": lambda o: o.trials,
        "decoys": lambda o: o.decoy_trials,
        "level": lambda o: f"{o.level:g}",
        "access": lambda o: o.access,
        "claim": lambda o: o.claim,
        "conditional on": lambda o: o.conditional_on,
        "controls": lambda o: ", ".join(o.controls),
        "note": lambda o: o.note,
    }
    for protection in dict.fromkeys(left.protection_spec for left, _ in pairs):
        own = [pair for pair in pairs if pair[0].protection_spec == protection]
        left, right = ([pair[side] for pair in own] for side in (0, 1))
        for name, aspect in aspects.items():
            yield from _line(f"{protection}: {name}", _values(map(aspect, left)), _values(map(aspect, right)))
        for name in sorted({name for outcome in (*left, *right) for name in outcome.details}):
            if not name.startswith(MEASURED):
                values = [_values(outcome.details.get(name) for outcome in side) for side in (left, right)]
                yield from _line(f"{protection}: {name}", *values)
    skills = [_values(", ".join(pair[side].skills_kept) for pair in pairs) for side in (0, 1)]
    yield from _line("skills", *skills)


def _values(found: Iterable[object]) -> str:
    """The distinct values, in order of appearance."""
    return " or ".join(dict.fromkeys("-" if value in (None, "") else str(value) for value in found))


def _line(name: str, one: str, other: str) -> Iterator[str]:
    if one != other:
        yield clean(f"{name}: {one} / {other}")

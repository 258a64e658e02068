"""The check of decoys: fresh keys, as like to the owner's as another owner's are. All controls rest on them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from scipy import stats  # type: ignore[import-untyped]  # SciPy ships no types

from mergeguard.matrix.schemes import check_evidence, require
from mergeguard.protections.contract import Evidence

if TYPE_CHECKING:
    from mergeguard.matrix.outcome import Gate
    from mergeguard.testing.context import Context

FEW, MANY = 7, 41
"""Numbers of decoys that no scheme is likely to have of anything else."""
ALIKE_LEVEL = 1e-4
"""Level at which decoys differ from keys in length, characters or size; shared by all that is compared."""


def check_decoys_alike(context: Context) -> Gate:
    """Each decoy is a trial, drawn from rng alone, of the same form, fresh, and distributed as keys are."""
    required = "decoys draws n fresh keys as embed draws its own: decoys that could never answer prove nothing"
    evidence = context.embedded.evidence
    many, again, other = (context.decoys(evidence, MANY, label) for label in ("one", "one", "two"))
    few = context.decoys(evidence, FEW, "few")
    for drawn in (many, again, other, few):
        require(context.protection, "decoys", drawn, Evidence)
        check_evidence(context.protection, "decoys", drawn)
    problem = (
        _form(evidence.data, many.data)
        or _freshness(evidence.data, many, again, other)
        or _trials(context, few, FEW)
        or _trials(context, many, MANY)
        or (None if context.protection.keyless else _likeness([evidence.data, context.other.evidence.data], many.data))
    )
    return context.gate("decoys_alike", problem, required)


def _trials(context: Context, decoys: Evidence, n: int) -> str | None:
    found = context.read(decoys, context.engine.world.upstream)
    own = context.embedded.own.keys
    if bool(found.hits) != bool(own.hits):
        return "decoys give a score and the keys hits, or the reverse"
    if found.hits and found.trials != n:
        return f"{n} decoys give {found.trials} trials, expected one trial each"
    return None


def _form(evidence: Mapping[str, object], decoys: Mapping[str, object]) -> str | None:
    """What is of another form in the decoys' data, as the JSON types of every part tell."""
    one, other = _types(evidence), _types(decoys)
    differing = sorted(set(one) ^ set(other))
    if differing:
        return f"decoys have another form than evidence: {_place(differing[0])} is in one of them only"
    place = next((place for place in sorted(one) if one[place] and other[place] and one[place] != other[place]), None)
    return None if place is None else f"decoys have another form than evidence: other types at {_place(place)}"


def _types(value: object, place: tuple[str, ...] = ()) -> dict[tuple[str, ...], frozenset[str]]:
    """The types at each place; the items of a list share one, and so do the lengths of lists within lists."""
    if isinstance(value, Mapping):
        found: dict[tuple[str, ...], frozenset[str]] = {place: frozenset({"dict"})}
        for number, name in enumerate(value):
            found |= _types(value[name], (*place, f"part {number + 1}"))
        return found
    if isinstance(value, list):
        found = {place: frozenset({"list"})}
        for item in value:
            for at, types in _types(item, (*place, "items")).items():
                found[at] = found.get(at, frozenset()) | types
        return found
    return {place: frozenset({type(value).__name__})}


def _place(place: Sequence[str]) -> str:
    return ", ".join(place) or "the top"


def _freshness(evidence: Mapping[str, object], many: Evidence, again: Evidence, other: Evidence) -> str | None:
    if json.dumps(many.data) != json.dumps(again.data):
        return "decoys differ under the same rng: draw them from rng alone"
    if json.dumps(many.data) == json.dumps(other.data):
        return "decoys are the same under every rng: draw them from rng"
    parts = [name for name, value in many.data.items() if isinstance(value, list) and len(value) == MANY]
    keys, drawn = _rows(evidence, parts), _rows(many.data, parts)
    if not drawn:
        return None  # keys that lie in tensors, or in one string
    if set(keys) & set(drawn):
        return "some decoys are keys of the evidence"
    if len(set(drawn)) <= len(drawn) / 2:
        return f"{MANY} decoys hold {len(set(drawn))} different keys: draw them anew"
    return None


def _rows(data: Mapping[str, object], parts: Sequence[str]) -> list[str]:
    """The keys: the lists of some parts side by side, an entry each, as JSON."""
    columns = [value for name in parts if isinstance(value := data[name], list)]
    return [json.dumps(row) for row in zip(*columns, strict=False)]


def _likeness(owners: Sequence[Mapping[str, object]], decoys: Mapping[str, object]) -> str | None:
    """Whether decoys are drawn as keys are: Kolmogorov and Smirnov's two-sample test on what can be counted in them.

    Keys of two owners stand on the other side. Distributions that overlap pass; what separates keys from decoys fails.
    """
    samples: dict[str, tuple[list[float], list[float]]] = {}
    shared = {name for name, value in decoys.items() if owners[0].get(name) == value}
    for data, side in [(data, 0) for data in owners] + [(decoys, 1)]:
        for place, value in _key_leaves({name: value for name, value in data.items() if name not in shared}):
            for feature, number in _features(value).items():
                samples.setdefault(f"{feature} of {_place(place)}", ([], []))[side].append(number)
    level = ALIKE_LEVEL / max(1, len(samples))
    for name, (keys, drawn) in samples.items():
        if len(keys) > 1 and len(drawn) > 1 and float(stats.ks_2samp(keys, drawn).pvalue) < level:
            return (
                f"decoys are not drawn as keys are: the {name} tells them apart "
                f"(on average {sum(keys) / len(keys):.3g} in keys, {sum(drawn) / len(drawn):.3g} in decoys)"
            )
    return None


def _key_leaves(value: object, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    """Strings and numbers within lists, with their places; what stands outside lists is no key."""
    if isinstance(value, Mapping):
        for number, name in enumerate(value):
            yield from _key_leaves(value[name], (*place, f"part {number + 1}"))
    elif isinstance(value, list):
        for item in value:
            yield from _key_leaves(item, (*place, "items"))
    elif "items" in place:
        yield place, value


def _features(value: object) -> dict[str, float]:
    """What can be counted in a key, by name."""
    if isinstance(value, str):
        size = max(1, len(value))
        return {
            "length": len(value),
            "share of letters": sum(map(str.isalpha, value)) / size,
            "share of ASCII": sum(map(str.isascii, value)) / size,
            "share of digits": sum(map(str.isdigit, value)) / size,
            "share of spaces": sum(map(str.isspace, value)) / size,
            "share of capitals": sum(map(str.isupper, value)) / size,
            "share of different characters": len(set(value)) / size,
        }
    return {"size": float(value)} if isinstance(value, int | float) else {}

"""How well one world predicts another: the same cells measured in both, in rank and in verdict, against chance.

Like is compared with like: a cell is common if the protection with its variant (and so its rule and template), the
merger with all its parameters, and the coefficient are the same. What else differs is stated, never hidden.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mergeguard.errors import ParameterError, UnknownNameError
from mergeguard.matrix.outcome import format_coefficient
from mergeguard.reports.world_differences import differences_of
from mergeguard.verification.association import (
    against_chance,
    kendall_interval,
    kendall_tau,
    tau_against_chance,
    tied_pairs,
)
from mergeguard.verification.statistics import clopper_pearson

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from mergeguard.matrix.outcome import Outcome, Results

TAU_TARGET, AGREEMENT_TARGET = 0.8, 0.9
ALL_PROTECTIONS = "all protections"
TUNED, HELD_OUT, ALL_MERGERS = "tuned on", "held out", "all"

Key = tuple[str, ...]
Pair = tuple["Outcome", "Outcome"]
"""One cell as the predicting and as the predicted world measured it."""


@dataclass(frozen=True)
class Tau:
    """Kendall's tau-b over the cells whose rates both worlds have; without a value, `undefined` says why.

    `chance` and `p_value` are of shuffling the predicted world's cells within each protection. `p_value_at_alpha` is
    of shuffling mergers at the same protection and coefficient alone: small only if the predicting world knows more
    than that evidence fades with its weight.
    """

    value: float | None
    interval: tuple[float, float] | None
    cells: int
    pairs: int
    tied: tuple[int, int]
    chance: float | None = None
    p_value: float | None = None
    p_value_at_alpha: float | None = None
    undefined: str = ""


@dataclass(frozen=True)
class Share:
    """Cells on which the worlds agree, of how many, with the Clopper-Pearson interval and what shuffling would give.

    Without cells `interval`, `chance` and `p_value` are None.
    """

    agreeing: int
    cells: int
    interval: tuple[float, float] | None
    chance: float | None
    p_value: float | None

    @property
    def rate(self) -> float | None:
        return self.agreeing / self.cells if self.cells else None


@dataclass(frozen=True)
class Agreement:
    """One protection, or all of them, under some of the mergers.

    Attributes:
        thefts: survived or not, over cells that are thefts in both worlds.
        verdicts: survived or not, over all cells.
        theft_status: a theft or not, over all cells.
    """

    protection: str
    part: str
    mergers: tuple[str, ...]
    cells: int
    tau: Tau
    thefts: Share
    verdicts: Share
    theft_status: Share


@dataclass(frozen=True)
class Target:
    """What was promised of a part that was held out; `measured` is None where there was nothing to measure."""

    measure: str
    part: str
    required: float
    measured: float | None

    @property
    def met(self) -> bool:
        return self.measured is not None and self.measured >= self.required


@dataclass(frozen=True)
class Run:
    """One seed of each world against the other."""

    seeds: tuple[int, int]
    common: int
    only_in: tuple[int, int]
    agreements: tuple[Agreement, ...]
    differences: tuple[str, ...]

    def of(self, part: str) -> Agreement | None:
        """The agreement over all protections on a part of the mergers; None if the part is empty."""
        return next((a for a in self.agreements if (a.protection, a.part) == (ALL_PROTECTIONS, part)), None)


@dataclass(frozen=True)
class Comparison:
    """A world that predicts, a world that is predicted, and how well. The second run has another seed."""

    worlds: tuple[str, str]
    tuned_on: tuple[str, ...]
    held_out: tuple[str, ...]
    runs: tuple[Run, ...]
    targets: tuple[Target, ...]

    @property
    def met(self) -> bool:
        return all(target.met for target in self.targets)

    def to_json(self) -> dict[str, Any]:
        """Plain data; numbers that do not exist are None."""
        data = asdict(self)
        data["targets"] = [{**asdict(target), "met": target.met} for target in self.targets]
        return {"compared": "worlds", **data, "met": self.met}


def compare_worlds(
    predicting: Results,
    predicted: Results,
    *,
    tuned_on: Sequence[str] = (),
    second_seeds: Sequence[Results] = (),
) -> Comparison:
    """How well `predicting` predicts `predicted`, on the mergers it was tuned on and on those held out.

    The targets are checked on the mergers held out, and on all mergers of the second seed.

    Args:
        tuned_on: names of mergers; without any, all are held out.
        second_seeds: results of either world, or of both, with other seeds; they stand in for those of their world.

    Raises:
        ParameterError: there is no common cell, a cell occurs twice, results hold several worlds or seeds or no
            outcome, both are of one world and seed, or a second seed is of neither world or no other seed.
        UnknownNameError: `tuned_on` has a name that no common cell has.
    """
    first = predicting, predicted
    if _identity(predicting) == _identity(predicted):
        raise ParameterError(
            f"both results are of world {predicting.world['name']!r} and seed {_identity(predicting)[2]}; "
            f"expected two worlds, or two seeds"
        )
    runs = [_run(first, tuned_on)]
    if second_seeds:
        runs.append(_run(_with_seeds(first, second_seeds), tuned_on))
    mergers = sorted({o.merger for results in first for o in results.outcomes})
    targets = _targets("mergers held out", runs[0].of(HELD_OUT))
    if second_seeds:
        targets += _targets("second seed, all mergers", runs[1].of(ALL_MERGERS))
    return Comparison(
        worlds=(str(predicting.world["name"]), str(predicted.world["name"])),
        tuned_on=tuple(tuned_on),
        held_out=tuple(name for name in mergers if name not in tuned_on),
        runs=tuple(runs),
        targets=tuple(targets),
    )


def key_of(outcome: Outcome) -> Key:
    """What two cells must share to be like: protection and variant, merger and parameters, coefficient."""
    parameters = (f"{name}={value!r}" for name, value in sorted(outcome.merger_parameters.items()))
    place = format_coefficient(outcome.coefficient)
    return outcome.protection, outcome.variant, outcome.merger, *parameters, place


def pair_cells(predicting: Results, predicted: Results) -> list[Pair]:
    """The common cells, sorted, so that the order of the files changes nothing.

    Raises:
        ParameterError: there is none, or a cell occurs twice in one of the results.
    """
    one, other = _by_key(predicting), _by_key(predicted)
    common = sorted(one.keys() & other.keys())
    if not common:
        examples = " and ".join(results.outcomes[0].id for results in (predicting, predicted))
        raise ParameterError(
            f"the results of {predicting.world['name']} and {predicted.world['name']} have no common cell (protection "
            f"with variant, merger with parameters, coefficient); they hold e.g. {examples}"
        )
    return [(one[key], other[key]) for key in common]


def agreement(pairs: Sequence[Pair], protection: str, part: str) -> Agreement:
    """Rank and verdict agreement over some pairs of cells."""
    thefts = [(one, other) for one, other in pairs if one.theft and other.theft]
    return Agreement(
        protection=protection,
        part=part,
        mergers=tuple(dict.fromkeys(one.merger_spec for one, _ in pairs)),
        cells=len(pairs),
        tau=_tau(pairs),
        thefts=_share(thefts, lambda outcome: outcome.survived),
        verdicts=_share(pairs, lambda outcome: outcome.survived),
        theft_status=_share(pairs, lambda outcome: outcome.theft),
    )


def _run(results: tuple[Results, Results], tuned_on: Sequence[str]) -> Run:
    identities = _identity(results[0]), _identity(results[1])
    pairs = pair_cells(*results)
    names = {one.merger for one, _ in pairs}
    for name in tuned_on:
        if name not in names:
            raise UnknownNameError("merger of the common cells", name, names)
    return Run(
        seeds=(identities[0][2], identities[1][2]),
        common=len(pairs),
        only_in=(len(results[0].outcomes) - len(pairs), len(results[1].outcomes) - len(pairs)),
        agreements=tuple(_agreements(pairs, tuned_on)),
        differences=differences_of(*results, pairs),
    )


def _agreements(pairs: Sequence[Pair], tuned_on: Sequence[str]) -> Iterator[Agreement]:
    protections = sorted({one.protection_spec for one, _ in pairs})
    parts: dict[str, list[Pair]] = {
        TUNED: [pair for pair in pairs if pair[0].merger in tuned_on],
        HELD_OUT: [pair for pair in pairs if pair[0].merger not in tuned_on],
        ALL_MERGERS: list(pairs),
    }
    for part, cells in parts.items():
        if cells:
            yield agreement(cells, ALL_PROTECTIONS, part)
        for protection in protections:
            own = [pair for pair in cells if pair[0].protection_spec == protection]
            if own:
                yield agreement(own, protection, part)


def _tau(pairs: Sequence[Pair]) -> Tau:
    rated = [(one, other) for one, other in pairs if _is_number(one.rate) and _is_number(other.rate)]
    left, right = ([pair[side].rate or 0.0 for pair in rated] for side in (0, 1))
    value = kendall_tau(left, right)
    tied, count = (tied_pairs(left), tied_pairs(right)), len(rated)
    if value is None:
        return Tau(None, None, count, math.comb(count, 2), tied, undefined=_why_undefined(left, right))
    chance, p_value = tau_against_chance(left, right, [one.protection_spec for one, _ in rated])
    _, at_alpha = tau_against_chance(left, right, [(one.protection_spec, one.coefficient) for one, _ in rated])
    interval = kendall_interval(left, right)
    return Tau(value, interval, count, math.comb(count, 2), tied, chance, p_value, at_alpha)


def _why_undefined(left: Sequence[float], right: Sequence[float]) -> str:
    if not left:
        return "no cell has a rate in both worlds"
    if len(left) == 1:
        return "one cell has no order"
    names = [name for name, side in (("predicting", left), ("predicted", right)) if len(set(side)) < 2]
    values = " and ".join(f"{side[0]:g}" for side in (left, right) if len(set(side)) < 2)
    return f"all rates of the {' and of the '.join(names)} world are equal ({values})"


def _share(pairs: Sequence[Pair], property_of: Callable[[Outcome], bool]) -> Share:
    if not pairs:
        return Share(0, 0, None, None, None)
    left, right = (np.array([property_of(pair[side]) for pair in pairs]) for side in (0, 1))
    agreeing = int(np.count_nonzero(left == right))
    chance, p_value = against_chance(
        lambda order: float(np.mean(left == right[order])), [one.protection_spec for one, _ in pairs]
    )
    return Share(agreeing, len(pairs), clopper_pearson(agreeing, len(pairs)), chance, p_value)


def _targets(part: str, found: Agreement | None) -> list[Target]:
    return [
        Target("Kendall's tau", part, TAU_TARGET, found.tau.value if found else None),
        Target("verdicts of thefts", part, AGREEMENT_TARGET, found.thefts.rate if found else None),
    ]


def _identity(results: Results) -> tuple[str, Mapping[str, str], int]:
    """World, its digests, and the one seed.

    Raises:
        ParameterError: there is no outcome, or there are several worlds or seeds.
    """
    name = str(results.world["name"])
    found = sorted({(outcome.world, outcome.seed) for outcome in results.outcomes})
    if not found:
        raise ParameterError(f"the results of world {name!r} hold no outcome; nothing can be compared")
    if len(found) > 1:
        raise ParameterError(f"the results of world {name!r} hold several worlds or seeds; expected one of each")
    return name, results.world["digests"], found[0][1]


def _with_seeds(first: tuple[Results, Results], others: Sequence[Results]) -> tuple[Results, Results]:
    """`first`, with the results of each world that `others` holds in the place of its own."""
    names = [str(results.world["name"]) for results in first]
    if names[0] == names[1]:
        raise ParameterError(f"both results are of world {names[0]!r}; a second seed could stand in for either")
    chosen = dict(zip(names, first, strict=True))
    given = Counter(str(other.world["name"]) for other in others)
    for other in others:
        name, _, seed = _identity(other)
        if name not in chosen:
            raise ParameterError(f"a second seed is of world {name!r}; expected {names[0]!r} or {names[1]!r}")
        if given[name] > 1:
            raise ParameterError(f"{given[name]} second seeds are of world {name!r}; expected one at most")
        if seed == _identity(chosen[name])[2]:
            raise ParameterError(f"the second seed of world {name!r} is {seed}, as the first; expected another")
        chosen[name] = other
    return chosen[names[0]], chosen[names[1]]


def _by_key(results: Results) -> dict[Key, Outcome]:
    found: dict[Key, Outcome] = {}
    for outcome in results.outcomes:
        key = key_of(outcome)
        if key in found:
            raise ParameterError(f"the results of world {results.world['name']!r} hold {outcome.id} twice")
        found[key] = outcome
    return found


def _is_number(rate: float | None) -> bool:
    return rate is not None and math.isfinite(rate)

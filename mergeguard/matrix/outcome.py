"""Outcomes: everything measured on one case, as frozen data with a JSON form. No torch here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mergeguard.specs import Value

SCHEMA_VERSION = "1.0"
SURVIVED, OVERCLAIMS, LOST, UNDECIDABLE = "survived", "overclaims", "lost", "undecidable"
VERDICTS = (SURVIVED, OVERCLAIMS, LOST, UNDECIDABLE)
OUTCOME, GATE, PLANTED = "mergeguard_outcome", "mergeguard_gate", "mergeguard_planted"
"""Names of the properties by which pytest's tests report parts of `Results`, each as JSON."""


@dataclass(frozen=True)
class Counts:
    """Hits of trials on one control (evidence keys and decoys together), or a score with its p-value."""

    hits: int | None = None
    trials: int | None = None
    score: float | None = None
    p_value: float | None = None


@dataclass(frozen=True)
class Skill:
    """One parent's skill on one model: hits of trials."""

    hits: int
    trials: int

    @property
    def rate(self) -> float:
        return self.hits / self.trials


@dataclass(frozen=True)
class Outcome:
    """One cell of the matrix.

    `skills` are rates measured on the merged, protected model; `skills_kept` are the matched control's, each as a
    fraction of its parent's gain over the base, and alone decide `theft`. `score` is set instead of `hits` for
    schemes that do not count; `rate` is then None.
    """

    protection: str
    variant: str
    merger: str
    merger_parameters: Mapping[str, Value]
    merger_spec: str
    coefficient: float | None
    world: str
    seed: int
    hits: int | None
    trials: int | None
    rate: float | None
    interval: tuple[float, float] | None
    score: float | None
    details: Mapping[str, float]
    controls: Mapping[str, Counts]
    p_value: float
    level: float
    decoy_hits: int | None
    decoy_trials: int | None
    decoy_p_value: float | None
    verdict: str
    skills: Mapping[str, float]
    skills_kept: Mapping[str, float]
    theft: bool
    access: str
    claim: str
    conditional_on: str | None
    seconds: float
    expected: str | None = None
    note: str = ""

    @property
    def survived(self) -> bool:
        return self.verdict == SURVIVED

    @property
    def protection_spec(self) -> str:
        """The protection as it is written in ids: its name, with the variant when it is not the default one."""
        return f"{self.protection}({self.variant})" if self.variant else self.protection

    @property
    def id(self) -> str:
        return case_id(self.protection_spec, self.merger_spec, self.coefficient)

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "survived": self.survived}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Outcome:
        fields = {key: value for key, value in data.items() if key != "survived"}
        fields["controls"] = {name: Counts(**counts) for name, counts in data["controls"].items()}
        fields["interval"] = tuple(data["interval"]) if data["interval"] is not None else None
        return cls(**fields)


@dataclass(frozen=True)
class Gate:
    """One promise of a protection before merging: effective, harmless, specific or persistent."""

    protection: str
    variant: str
    gate: str
    passed: bool
    measured: str
    required: str


@dataclass(frozen=True)
class Planted:
    """A control that was planted in the gate, and the check that caught it (None: nothing did)."""

    name: str
    caught_by: str | None
    measured: str

    @property
    def caught(self) -> bool:
        return self.caught_by is not None


@dataclass(frozen=True)
class Summary:
    """One row of the matrix: a protection under one merger."""

    protection: str
    variant: str
    merger: str
    merger_spec: str
    critical_coefficient: float | None
    area: float | None
    thefts: int
    lost: int
    recorded: int


@dataclass(frozen=True)
class Results:
    """A whole run: what `results.json` holds."""

    world: Mapping[str, Any]
    environment: Mapping[str, Any]
    outcomes: tuple[Outcome, ...]
    before_merging: tuple[Gate, ...] = ()
    planted: tuple[Planted, ...] = ()
    summary: tuple[Summary, ...] = ()
    problems: tuple[str, ...] = ()
    matched_controls: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def holds(self) -> bool:
        """Whether the gate holds: nothing is red."""
        return not self.problems


def format_coefficient(coefficient: float | None) -> str:
    return "none" if coefficient is None else f"{coefficient:g}"


def case_id(protection: str, merger: str, coefficient: float | None) -> str:
    return f"{protection}-{merger}-{format_coefficient(coefficient)}"

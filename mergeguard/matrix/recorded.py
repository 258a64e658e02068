"""Recorded losses: thefts that are known to lose the evidence, in a reviewed file that one command rewrites.

A record is strict. It accepts a loss of evidence whose VSR lies in its range and nothing else: a survival, a range
that is missed or a record that matches no case of a full run is a problem. Only a record `on_edge` accepts both a
loss and a survival, for cells that another machine's rounding may move; its range still holds.
"""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from mergeguard.checkpoints.files import write_bytes
from mergeguard.errors import CheckpointError, EvidenceLost, GateFailed, ParameterError
from mergeguard.matrix.verdict import KEPT_BY_A_THEFT
from mergeguard.verification.statistics import fisher_greater
from mergeguard.worlds.file.document import read_world_file
from mergeguard.worlds.registry import is_world_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from mergeguard.matrix.outcome import Outcome

UNREVIEWED = "recorded from a run; not yet reviewed"
MARGIN = 0.15
"""How far the VSR of a recorded loss may move on another machine."""
THEFT_MARGIN = 0.05
"""How far a matched control's kept skill may move there."""


@dataclass(frozen=True)
class Record:
    """A known loss: the case's id, the range in which its VSR lies, and why it is lost."""

    id: str
    low: float
    high: float
    reason: str
    on_edge: bool = False

    def __post_init__(self) -> None:
        if type(self.id) is not str or type(self.reason) is not str or type(self.on_edge) is not bool:
            raise ParameterError(f"{self.id} needs strings as id and reason, and true or false as on_edge")
        if not (self.reason.strip() and 0 <= self.low <= self.high <= 1):
            raise ParameterError(f"{self.id} needs a reason and a range within [0, 1]")


def recorded_file(world: str) -> Path:
    """Where the records of a world are: in the checkout's `fixtures/recorded`, or in the installed package.

    Those of a world file are where the file says, else beside it, as NAME.recorded.toml.
    """
    if is_world_file(world):
        return read_world_file(Path(world)).recorded
    package = Path(__file__).parents[1]
    checkout = package.parent / "fixtures" / "recorded"
    folder = checkout if checkout.is_dir() else package / "recorded"
    return folder / f"{world}.toml"


def read_records(path: Path) -> dict[str, Record]:
    """The records of a file by id; none if there is no file.

    Raises:
        CheckpointError: the file cannot be read or is not TOML, or an entry is incomplete or repeated.
    """
    if not path.exists():
        return {}
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
        records = [Record(**entry) for entry in document.pop("loss", [])]
    except (OSError, ValueError, TypeError, ParameterError) as error:
        raise CheckpointError(f"cannot read the recorded losses in {path}: {error}") from error
    if document:
        raise CheckpointError(f"{path} has an unknown {next(iter(document))!r}; expected [[loss]] entries alone")
    by_id = {record.id: record for record in records}
    if len(by_id) != len(records):
        raise CheckpointError(f"{path} records a loss twice; each id may occur once")
    return by_id


def check_outcome(outcome: Outcome, record: Record | None) -> None:
    """The gate on one cell.

    Raises:
        EvidenceLost: a theft's verdict is not `survived`; the one exception that a record accepts.
        GateFailed: the record does not describe what was measured.
    """
    if (
        record is not None
        and outcome.theft
        and outcome.rate is not None
        and not record.low <= outcome.rate <= record.high
    ):
        raise GateFailed(
            f"{outcome.id}: VSR {outcome.rate:.2f} is outside the recorded range "
            f"[{record.low:.2f}, {record.high:.2f}]; review the change, then record it anew"
        )
    if outcome.theft and not outcome.survived:
        raise EvidenceLost(f"{outcome.id}: {describe(outcome)}")


def describe(outcome: Outcome) -> str:
    """One sentence on a verdict, with the numbers it rests on."""
    measured = (
        f"{outcome.hits} of {outcome.trials} keys answer"
        if outcome.hits is not None
        else f"the score is {outcome.score:.2f}"
    )
    kept = ", ".join(f"{name} {value:.2f}" for name, value in outcome.skills_kept.items())
    decoys = f", {outcome.decoy_hits} of {outcome.decoy_trials} decoys" if outcome.decoy_trials else ""
    return (
        f"verdict {outcome.verdict}: {measured}{decoys}; p = {outcome.p_value:.1e} (level {outcome.level:g}); "
        f"the matched control keeps {kept}"
    )


def expected(record: Record | None) -> str | None:
    """What a record expects of its case."""
    if record is None:
        return None
    return "lost or survived" if record.on_edge else "lost"


def problem_of(outcome: Outcome, record: Record | None) -> str | None:
    """What is red about a cell, in one line; None if nothing is."""
    try:
        check_outcome(outcome, record)
    except EvidenceLost as loss:
        return None if record is not None else str(loss)
    except GateFailed as failure:
        return str(failure)
    if record is None or record.on_edge:
        return None
    what = "survives" if outcome.theft else "is no theft any more"
    return f"{outcome.id}: recorded as lost, but it {what}; record it anew"


def stale(records: Iterable[str], ids: Iterable[str]) -> list[str]:
    """Records that match no case of a full run."""
    return sorted(set(records) - set(ids))


def write_records(
    path: Path, runs: Sequence[Sequence[Outcome]], kept: Mapping[str, Record], *, full: bool = True
) -> list[Record]:
    """Record the losses of one or more runs of the same cases (different seeds), keeping reviewed reasons.

    Records of cases that were not run are dropped by a full run and kept by a part of one.

    A cell is on the edge if it is a lost theft in some runs only, or if a VSR in its range would survive, or if the
    matched control keeps nearly half of the skills: another machine's rounding may then move it.
    """
    by_id: dict[str, list[Outcome]] = {}
    for run in runs:
        for outcome in run:
            by_id.setdefault(outcome.id, []).append(outcome)
    records = [] if full else [record for name, record in kept.items() if name not in by_id]
    for name, outcomes in by_id.items():
        lost = [outcome for outcome in outcomes if outcome.theft and not outcome.survived]
        if not lost and not any(_is_nearly_lost(outcome) for outcome in outcomes):
            continue
        rates = [outcome.rate for outcome in outcomes if outcome.rate is not None] or [0.0, 1.0]
        high = min(1.0, max(rates) + MARGIN)
        records.append(
            Record(
                id=name,
                low=round(max(0.0, min(rates) - MARGIN), 2),
                high=round(high, 2),
                reason=kept[name].reason if name in kept else UNREVIEWED,
                on_edge=len(lost) < len(outcomes) or any(_would_survive(outcome, high) for outcome in outcomes),
            )
        )
    document: dict[str, Any] = {"loss": [asdict(record) for record in records]}
    write_bytes(path, tomli_w.dumps(document).encode())
    return records


def _is_nearly_lost(outcome: Outcome) -> bool:
    """Whether the cell would be a lost theft if the matched control kept a little more."""
    kept = min(outcome.skills_kept.values(), default=0.0)
    return not outcome.survived and KEPT_BY_A_THEFT - THEFT_MARGIN <= kept < KEPT_BY_A_THEFT


def _would_survive(outcome: Outcome, rate: float) -> bool:
    """Whether a VSR of `rate` would beat the worst control at the level."""
    if outcome.trials is None:
        return False
    hits = int(rate * outcome.trials)
    return all(
        fisher_greater(hits, outcome.trials, counts.hits or 0, counts.trials or 0) <= outcome.level
        for counts in outcome.controls.values()
    )

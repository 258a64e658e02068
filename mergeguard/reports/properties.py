"""What a CI service shows beside a test case: short names with short texts, for JUnit files, ours and pytest's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeguard.matrix.outcome import format_coefficient
from mergeguard.reports import view
from mergeguard.reports.html.cells import rerun
from mergeguard.reports.summary import is_recorded

if TYPE_CHECKING:
    from mergeguard.matrix.outcome import Gate, Outcome, Planted, Summary


def outcome_properties(outcome: Outcome) -> dict[str, str]:
    """Everything measured on one case, and the command that measures it again; without what there is none of."""
    found = {
        "verdict": outcome.verdict,
        "theft": str(outcome.theft).lower(),
        "vsr": "" if outcome.trials is None else f"{outcome.hits}/{outcome.trials}",
        "rate": "" if outcome.rate is None else f"{outcome.rate:g}",
        "interval": "" if outcome.interval is None else f"{outcome.interval[0]:.4f} to {outcome.interval[1]:.4f}",
        "score": "" if outcome.score is None else f"{outcome.score:g}",
        "p_value": f"{outcome.p_value:g}",
        "level": f"{outcome.level:g}",
        "conditional_on": outcome.conditional_on or "",
        "controls": ", ".join(f"{name} {view.format_counts(counts)}" for name, counts in outcome.controls.items()),
        "decoys": f"{outcome.decoy_hits}/{outcome.decoy_trials}" if outcome.decoy_trials else "",
        "skills_kept": ", ".join(f"{name}={value:g}" for name, value in outcome.skills_kept.items()),
        "coefficient": format_coefficient(outcome.coefficient),
        "merger": outcome.merger_spec,
        "world": outcome.world,
        "seed": str(outcome.seed),
        "access": outcome.access,
        "claim": outcome.claim,
        "recorded": outcome.expected or "" if is_recorded(outcome) else "",
        "rerun": rerun(
            outcome.protection_spec, outcome.merger_spec, outcome.coefficient, outcome.world, outcome.seed
        ),
    }  # fmt: skip
    return {name: view.clean(value) for name, value in found.items() if value}


def gate_properties(gate: Gate) -> dict[str, str]:
    """What a gate before merging measured."""
    found = {
        "gate": gate.gate,
        "passed": str(gate.passed).lower(),
        "measured": gate.measured,
        "required": gate.required,
    }
    return {name: view.clean(value) for name, value in found.items() if value}


def planted_properties(planted: Planted) -> dict[str, str]:
    """What caught a planted mistake."""
    found = {"planted": planted.name, "caught_by": planted.caught_by or "nothing", "measured": planted.measured}
    return {name: view.clean(value) for name, value in found.items() if value}


def row_properties(row: Summary) -> dict[str, str]:
    """What the case's row of the matrix comes to: the protection under the merger, over all coefficients."""
    return {
        "critical_coefficient": view.format_critical(row.critical_coefficient),
        "area": view.format_area(row.area),
        "thefts_lost": f"{row.lost}/{row.thefts}",
    }

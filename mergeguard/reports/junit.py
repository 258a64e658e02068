"""JUnit XML, for the test views of CI services: a test case an outcome, a gate and a planted control."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from mergeguard import __version__
from mergeguard.reports import view
from mergeguard.reports.properties import gate_properties, outcome_properties, planted_properties, row_properties
from mergeguard.reports.summary import is_lost_theft, is_recorded, sentence, summary_of, verdict_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from mergeguard.matrix.outcome import Gate, Outcome, Planted, Results, Summary


@dataclass(frozen=True)
class _Case:
    classname: str
    name: str
    seconds: float = 0.0
    failure: str | None = None
    kind: str = ""
    properties: Mapping[str, str] = field(default_factory=dict)


def to_junit(results: Results) -> str:
    """One suite. Red are thefts that were lost and are not on record, failed gates and planted controls not caught.

    The last case, `mergeguard.gate: holds`, is red with every problem of the run, so that the suite is green if and
    only if the gate holds: stale records and crashes have no case of their own.
    """
    cases = list(_cases(results))
    totals = {
        "tests": str(len(cases)),
        "failures": str(sum(case.failure is not None for case in cases)),
        "errors": "0",
        "time": f"{results.seconds:.3f}",
    }
    root = ET.Element("testsuites", {"name": "mergeguard", **totals})
    suite = ET.SubElement(root, "testsuite", {"name": "mergeguard", **totals, "skipped": "0"})
    environment = {f"environment {name}": value for name, value in view.environment_lines(results)}
    _add_properties(suite, {"mergeguard": __version__, **environment, "summary": sentence(summary_of(results))})
    for case in cases:
        element = ET.SubElement(
            suite,
            "testcase",
            {
                "classname": view.clean(case.classname),
                "name": view.clean(case.name),
                "time": f"{case.seconds:.3f}",
            },
        )
        _add_properties(element, case.properties)
        if case.failure is not None:
            lines = [view.clean(line) for line in case.failure.splitlines()]
            failure = ET.SubElement(element, "failure", {"type": case.kind, "message": lines[0] if lines else ""})
            failure.text = "\n".join(lines)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=False).join(
        ('<?xml version="1.0" encoding="utf-8"?>\n', "\n")
    )


def _cases(results: Results) -> Iterator[_Case]:
    rows = {(row.protection, row.variant, row.merger_spec): row for row in summary_of(results)}
    for outcome in results.outcomes:
        yield _outcome_case(outcome, rows.get((outcome.protection, outcome.variant, outcome.merger_spec)))
    yield from map(_gate_case, results.before_merging)
    yield from map(_planted_case, results.planted)
    failure = None if results.holds else "\n".join((verdict_line(results), *results.problems))
    yield _Case("mergeguard.gate", "holds", failure=failure, kind="GateFailed")


def _outcome_case(outcome: Outcome, row: Summary | None) -> _Case:
    of_row = {} if row is None else row_properties(row)
    properties = outcome_properties(outcome) | of_row
    failure = None
    if is_lost_theft(outcome) and not is_recorded(outcome):
        lines = [
            f"{outcome.verdict}: {view.describe(outcome)}",
            f"a theft: the merge keeps {view.describe_skills(outcome.skills_kept)} of each parent's skill",
        ]
        if row is not None:
            numbers = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in of_row.items())
            lines.append(f"all of {outcome.protection_spec} under {outcome.merger_spec}: {numbers}")
        failure = "\n".join((*lines, f"again: {properties['rerun']}"))
    return _Case(
        classname=f"mergeguard.{outcome.protection}",
        name=outcome.id,
        seconds=outcome.seconds,
        failure=failure,
        kind="EvidenceLost",
        properties=properties,
    )


def _gate_case(gate: Gate) -> _Case:
    failure = None if gate.passed else f"{gate.gate}: measured {gate.measured}, required {gate.required}"
    name = f"before_merging[{gate.gate}{f'-{gate.variant}' if gate.variant else ''}]"
    return _Case(
        f"mergeguard.{gate.protection}", name, failure=failure, kind="GateFailed", properties=gate_properties(gate)
    )


def _planted_case(planted: Planted) -> _Case:
    failure = None if planted.caught else f"{planted.name} was planted and nothing caught it: {planted.measured}"
    properties = planted_properties(planted)
    return _Case("mergeguard.planted", planted.name, failure=failure, kind="GateFailed", properties=properties)


def _add_properties(parent: ET.Element, properties: Mapping[str, str]) -> None:
    if not properties:
        return
    element = ET.SubElement(parent, "properties")
    for name, value in properties.items():
        ET.SubElement(element, "property", {"name": view.clean(name), "value": view.clean(value)})

"""JUnit XML: well-formed for any names, red exactly where something is wrong."""

from __future__ import annotations

from xml.etree import ElementTree as ET

import pytest
from hypothesis import given

from mergeguard.matrix.outcome import LOST, OVERCLAIMS, UNDECIDABLE, Gate, Planted, Results
from mergeguard.reports.junit import to_junit
from robustness_tests.meta import outcome_builders as build
from robustness_tests.meta.junit_rules import violations


def parse(results: Results) -> ET.Element:
    return ET.fromstring(to_junit(results).encode())  # noqa: S314 - our own output


def case(results: Results, name: str) -> ET.Element:
    (found,) = [element for element in parse(results).iter("testcase") if element.get("name") == name]
    return found


def properties(element: ET.Element) -> dict[str, str]:
    return {p.get("name", ""): p.get("value", "") for p in element.findall("properties/property")}


def red(results: Results) -> list[str]:
    return [c.get("name", "") for c in parse(results).iter("testcase") if c.find("failure") is not None]


CLEAN = build.results(before_merging=(), planted=())


def test_an_outcome_is_a_test_case_with_its_numbers() -> None:
    element = case(build.results([build.outcome(hits=6)]), "instructional_fingerprint-linear-0.5")
    assert element.get("classname") == "mergeguard.instructional_fingerprint"
    assert float(element.get("time", "")) == 1.5
    assert properties(element) == {
        "verdict": "survived", "theft": "true", "vsr": "6/8", "rate": "0.75", "interval": "0.0000 to 1.0000",
        "p_value": "1e-09", "level": "2e-05", "controls": "base 0/48, matched control 1/48", "decoys": "1/40",
        "skills_kept": "refusal=0.7, arithmetic=0.57", "coefficient": "0.5", "merger": "linear", "world": "tiny",
        "seed": "0", "access": "text", "claim": "ownership",
        "rerun": (
            "mergeguard run --protection instructional_fingerprint --merger linear --coefficients 0.5 --world tiny "
            "--seed 0"
        ),
        "critical_coefficient": "0.5", "area": "-", "thefts_lost": "0/1",
    }  # fmt: skip
    assert element.find("failure") is None


def test_a_score_has_no_rate_and_what_there_is_none_of_is_left_out() -> None:
    cell = build.outcome("gaussian_probe", score=84.25, decoy_hits=None, decoy_trials=None, conditional_on="trigger")
    found = properties(case(build.results([cell]), cell.id))
    assert (found["score"], found["conditional_on"]) == ("84.25", "trigger")
    assert found.keys().isdisjoint({"vsr", "rate", "interval", "decoys", "recorded"})


def test_a_case_has_the_critical_coefficient_and_area_of_its_own_row() -> None:
    results = build.results([
        build.outcome(coefficient=0.3, verdict=LOST, hits=0),
        build.outcome(coefficient=0.5),
        build.outcome(coefficient=0.3, variant="bits=4"),
    ])  # fmt: skip
    names = "critical_coefficient", "area", "thefts_lost"
    found = [properties(element) for element in parse(results).iter("testcase")][:3]
    assert [tuple(each[name] for name in names) for each in found] == [
        ("0.5", ".50", "1/2"),
        ("0.5", ".50", "1/2"),
        ("0.3", "-", "0/1"),
    ]


def test_a_failure_says_what_was_lost_where_its_row_stands_and_how_to_see_it_again() -> None:
    lost = build.outcome(merger="ties(density=0.4)", verdict=LOST, hits=1)
    results = build.results([lost, build.outcome(merger="ties(density=0.4)", coefficient=0.7)])
    failure = case(results, lost.id).find("failure")
    assert failure is not None
    assert (failure.text or "").splitlines() == [
        "lost: VSR 1/8 (0.00 to 1.00), p 1e-09 (level 2e-05), decoys 1/40, base 0/48, matched control 1/48",
        "a theft: the merge keeps refusal .70, arithmetic .57 of each parent's skill",
        "all of instructional_fingerprint under ties(density=0.4): critical coefficient 0.7, area .56, thefts lost 1/2",
        f"again: {properties(case(results, lost.id))['rerun']}",
    ]


@pytest.mark.parametrize("verdict", [LOST, OVERCLAIMS, UNDECIDABLE])
def test_a_lost_theft_is_red_unless_it_is_recorded_or_no_theft(verdict: str) -> None:
    lost, known, harmless = (build.outcome(coefficient=c, verdict=verdict, theft=c < 0.9) for c in (0.3, 0.5, 0.9))
    results = build.results([lost, known, harmless], [known.id], before_merging=(), planted=())
    assert red(results) == [lost.id]
    failure = case(results, lost.id).find("failure")
    assert failure is not None
    assert failure.get("type") == "EvidenceLost"
    assert (failure.get("message") or "").startswith(f"{verdict}: VSR 8/8")
    assert "refusal .70" in (failure.text or "")
    assert properties(case(results, known.id))["recorded"] == LOST
    assert "recorded" not in properties(case(results, lost.id))


def test_gates_and_planted_controls_are_test_cases_too() -> None:
    results = build.results()
    assert red(results) == ["before_merging[harmless-bits=5]", "never_verifies"]
    gate = case(results, "before_merging[effective]")
    assert gate.get("classname") == "mergeguard.instructional_fingerprint"
    assert properties(gate) == {
        "gate": "effective",
        "passed": "true",
        "measured": "8/8",
        "required": "survives alpha 1",
    }
    assert properties(case(results, "always_verifies"))["caught_by"] == "controls"


def test_the_last_case_is_red_with_every_problem() -> None:
    assert red(CLEAN) == []
    failure = case(build.results(before_merging=(), planted=(), problems=("one", "two")), "holds").find("failure")
    assert failure is not None
    assert (failure.text or "").splitlines() == ["gate does not hold: 2 problems", "one", "two"]


def test_totals_are_right_and_nothing_is_skipped() -> None:
    results = build.results([build.outcome(), build.outcome(coefficient=0.3, verdict=LOST)], problems=("one",))
    root = parse(results)
    assert root.tag == "testsuites"
    for element in (root, *root):
        assert element.get("tests") == str(len(list(root.iter("testcase")))) == "7"
        assert element.get("failures") == str(len(list(root.iter("failure")))) == "4"
        assert element.get("errors") == "0"
    assert list(root.iter("skipped")) == []
    assert properties(root[0])["environment world name"] == "tiny"
    assert properties(root[0])["summary"] == "1 of 2 thefts lost, 0 of them recorded"


@build.QUICK
@given(build.all_results())
def test_any_results_keep_to_what_ci_services_read(results: Results) -> None:
    assert violations(parse(results)) == []


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ("<testsuites><testcase name='a'/></testsuites>", "testcase in testsuites"),
        ("<testsuites><testsuite name='a' tests='0' errors='0'/></testsuites>", "testsuite without failures"),
        ("<testsuites skipped='0'/>", "testsuites has skipped"),
        ("<testsuites time='1e-05'/>", "testsuites takes 1e-05"),
        ("<testsuites><properties><property name='a'>1</property></properties></testsuites>", "property without value"),
    ],
)
def test_what_ci_services_do_not_read_is_found(broken: str, says: str) -> None:
    assert says in violations(ET.fromstring(broken))  # noqa: S314 - written here


@build.QUICK
@given(build.all_results())
def test_the_xml_is_well_formed_for_any_results(results: Results) -> None:
    assert len(list(parse(results).iter("testcase"))) == (
        len(results.outcomes) + len(results.before_merging) + len(results.planted) + 1
    )


def test_hostile_names_come_through_as_they_can_be_shown() -> None:
    hostile = "a\"b'<c>&\x00\x1b]]>\ud800\ufffe\n"
    shown = "a\"b'<c>&\\x00\\x1b]]>\\ud800\\ufffe"
    results = build.results(
        [build.outcome(hostile, verdict=LOST, note=hostile)],
        before_merging=(Gate(hostile, "", "effective", False, hostile, hostile),),
        planted=(Planted(hostile, None, hostile),),
        problems=(hostile,),
        environment={hostile: hostile},
    )
    assert case(results, f"{shown} -linear-0.5").get("classname") == f"mergeguard.{shown}"
    assert properties(parse(results)[0])[f"environment {shown}"] == shown
    assert len(red(results)) == 4

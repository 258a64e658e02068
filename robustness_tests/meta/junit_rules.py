"""What CI services agree on about JUnit XML, as rules: no standard exists.

The rules are those of the schema that Jenkins' xUnit plugin publishes (junit-10.xsd), with one addition that Jenkins,
GitLab and pytest share in practice: a test case may begin with properties.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator
    from xml.etree import ElementTree as ET


class Rule(NamedTuple):
    required: frozenset[str]
    optional: frozenset[str]
    children: frozenset[str]


def _rule(required: str = "", optional: str = "", children: str = "") -> Rule:
    return Rule(*(frozenset(words.split()) for words in (required, optional, children)))


TEXTS = "system-out system-err"
RULES = {
    "testsuites": _rule(optional="name time tests failures errors", children="testsuite"),
    "testsuite": _rule(
        "name tests failures errors",
        "group time skipped timestamp hostname id package file log url version",
        f"testsuite properties testcase {TEXTS}",
    ),
    "testcase": _rule("name", "time classname group", f"properties skipped failure error {TEXTS}"),
    "properties": _rule(children="property"),
    "property": _rule("name value"),
    "failure": _rule(optional="type message"),
    "error": _rule(optional="type message"),
    "skipped": _rule(optional="type message"),
    "system-out": _rule(),
    "system-err": _rule(),
}
SECONDS = re.compile(r"\d+(\.\d{1,3})?")


def violations(root: ET.Element) -> list[str]:
    """Every place that keeps to no rule, in words; none for a file that CI services read."""
    return list(_violations(root)) if root.tag == "testsuites" else [f"the root is {root.tag}"]


def _violations(element: ET.Element) -> Iterator[str]:
    rule, names = RULES[element.tag], element.keys()
    yield from (f"{element.tag} without {name}" for name in sorted(rule.required - set(names)))
    yield from (f"{element.tag} has {name}" for name in sorted(set(names) - rule.required - rule.optional))
    if (seconds := element.get("time")) is not None and not SECONDS.fullmatch(seconds):
        yield f"{element.tag} takes {seconds}"
    for place, child in enumerate(element):
        if child.tag not in rule.children:
            yield f"{child.tag} in {element.tag}"
        if child.tag == "properties" and place:
            yield f"properties not at the beginning of {element.tag}"
        if child.tag in RULES:
            yield from _violations(child)

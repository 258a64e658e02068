"""The published schema: a valid draft 2020-12 schema that refuses documents which are wrong in any one field."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from mergeguard.errors import CheckpointError
from mergeguard.matrix.outcome import SCHEMA_VERSION, VERDICTS
from mergeguard.reports.results_json import check_document, schema, to_json
from robustness_tests.meta import outcome_builders as build

Path = tuple[str | int, ...]
FREE_FORM = ("environment",)
DOCUMENT = to_json(build.results([build.outcome(), build.outcome(coefficient=None, score=3.5)]))


def objects_with_fixed_fields(node: Any, path: Path = ()) -> list[Path]:
    """Paths of the objects whose fields the schema names: not of the maps from free names to numbers."""
    found: list[Path] = []
    if isinstance(node, dict):
        maps = ("digests", "details", "controls", "skills", "skills_kept", "matched_controls", "merger_parameters")
        if path and path[-1] in FREE_FORM:
            return []
        if not path or (path[-1] not in maps and not (len(path) > 1 and path[-2] == "matched_controls")):
            found.append(path)
        for key, item in node.items():
            found += objects_with_fixed_fields(item, (*path, key))
    elif isinstance(node, list):
        for i, item in enumerate(node):
            found += objects_with_fixed_fields(item, (*path, i))
    return found


def at(document: Any, path: Path) -> Any:
    for key in path:
        document = document[key]
    return document


def changed(path: Path, value: object) -> dict[str, Any]:
    document = copy.deepcopy(DOCUMENT)
    at(document, path[:-1])[path[-1]] = value
    return document


FIELDS = [(*path, key) for path in objects_with_fixed_fields(DOCUMENT) for key in at(DOCUMENT, path)]


def test_the_schema_is_a_schema_of_its_draft_and_of_our_version() -> None:
    Draft202012Validator.check_schema(schema())
    assert schema()["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema()["$id"].endswith(SCHEMA_VERSION)
    assert schema()["properties"]["schema_version"] == {"const": SCHEMA_VERSION}
    assert tuple(schema()["$defs"]["outcome"]["properties"]["verdict"]["enum"]) == VERDICTS


def test_the_document_that_the_mutations_start_from_is_accepted() -> None:
    check_document(json.loads(json.dumps(DOCUMENT)))


@build.QUICK
@given(st.sampled_from(FIELDS))
def test_a_missing_field_is_refused_and_named(path: Path) -> None:
    document = copy.deepcopy(DOCUMENT)
    del at(document, path[:-1])[path[-1]]
    with pytest.raises(CheckpointError, match=f"{path[-1]}' is a required property"):
        check_document(document)


@build.QUICK
@given(st.sampled_from([path for path in objects_with_fixed_fields(DOCUMENT) if path != ("world",)]))
def test_an_unknown_field_is_refused_and_named(path: Path) -> None:
    with pytest.raises(CheckpointError, match="'vsr' was unexpected"):
        check_document(changed((*path, "vsr"), 1))


@build.QUICK
@given(st.sampled_from(FIELDS))
def test_a_field_of_a_wrong_type_is_refused(path: Path) -> None:
    wrong = [[]] if isinstance(at(DOCUMENT, path), list) else ["wrong"]
    with pytest.raises(CheckpointError, match="does not satisfy the schema"):
        check_document(changed(path, wrong))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("outcomes", 0, "verdict"), "verified"),
        (("outcomes", 0, "verdict"), "lost"),  # but `survived` is still true
        (("outcomes", 0, "survived"), False),
        (("outcomes", 0, "rate"), 1.2),
        (("outcomes", 0, "rate"), -0.1),
        (("outcomes", 0, "rate"), None),
        (("outcomes", 0, "rate"), True),
        (("outcomes", 0, "hits"), 2.5),
        (("outcomes", 0, "hits"), -1),
        (("outcomes", 0, "hits"), None),
        (("outcomes", 0, "trials"), 0),
        (("outcomes", 0, "score"), 3.0),
        (("outcomes", 0, "coefficient"), 1.5),
        (("outcomes", 0, "coefficient"), "0.5"),
        (("outcomes", 0, "p_value"), None),
        (("outcomes", 0, "p_value"), 2),
        (("outcomes", 0, "level"), 0),
        (("outcomes", 0, "interval"), [0.1]),
        (("outcomes", 0, "interval"), [0.1, 1.1]),
        (("outcomes", 0, "decoy_hits"), None),
        (("outcomes", 0, "decoy_trials"), None),
        (("outcomes", 0, "access"), "api"),
        (("outcomes", 0, "claim"), "authorship"),
        (("outcomes", 0, "protection"), ""),
        (("outcomes", 0, "skills", "refusal"), 1.5),
        (("outcomes", 0, "skills_kept", "refusal"), "all"),
        (("outcomes", 0, "controls", "base", "hits"), None),
        (("outcomes", 0, "merger_parameters", "density"), [0.4]),
        (("outcomes", 0, "seconds"), -1),
        (("outcomes", 1, "score"), None),
        (("outcomes", 1, "hits"), 3),
        (("outcomes", 1, "rate"), 0.5),
        (("world", "name"), ""),
        (("world", "digests", "base"), 7),
        (("problems",), [1]),
        (("planted", 0, "caught"), False),
        (("planted", 1, "caught"), True),
        (("before_merging", 0, "passed"), "yes"),
        (("summary", 0, "area"), 1.5),
        (("summary", 0, "thefts"), -1),
        (("schema_version",), "1.0.0"),
    ],
)
def test_a_value_that_the_schema_forbids_is_refused_with_its_place(path: Path, value: object) -> None:
    with pytest.raises(CheckpointError, match=r"^results\.json does not satisfy the schema: ") as caught:
        check_document(changed(path, value))
    assert str(path[0]) in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("outcomes", 0, "hits"), 9, r"outcomes\[0\]: hits: 9 hits of 8 trials"),
        (("outcomes", 0, "decoy_hits"), 41, r"outcomes\[0\]: decoys: 41 hits of 40 trials"),
        (("outcomes", 0, "controls", "base", "hits"), 49, r"control base: 49 hits of 48 trials"),
        (("outcomes", 0, "rate"), 0.5, r"rate 0\.5 is not 8 of 8"),
        (("outcomes", 0, "interval"), [0.9, 0.1], "ends before it begins"),
        (("summary", 0, "lost"), 99, r"summary\[0\]: 99 of \d thefts lost"),
        (("summary", 0, "recorded"), 1, "0 of 2 thefts lost, 1 of them recorded"),
        (("problems",), ["one"], "holds is true with 1 problems"),
        (("holds",), False, "holds is false with 0 problems"),
    ],
)
def test_numbers_that_contradict_each_other_are_refused(path: Path, value: object, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        check_document(changed(path, value))


@pytest.mark.parametrize("document", [None, [], "text", 1, {}])
def test_what_is_no_document_at_all_is_refused(document: object) -> None:
    with pytest.raises(CheckpointError, match="does not satisfy the schema"):
        check_document(document)

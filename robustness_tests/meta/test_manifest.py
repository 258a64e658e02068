"""The manifest: what it records and what not, that any change to the model shows, and that it is not trusted itself."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from mergeguard.checkpoints.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    MergedInput,
    check_document,
    check_manifest,
    read_manifest,
    schema,
    write_manifest,
)
from mergeguard.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
RECIPE = "merge_method: linear\nmodels: [{model: a}]\n"
OUTPUTS = {"model.safetensors": b"weights", "config.json": b"{}", "additional_chat_templates/x.jinja": b"x"}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def merged(root: Path, **options: Any) -> Path:
    """A merged model in `root`/out, made of the model in `root`/models/a; the manifest was written elsewhere first."""
    model = root / "models" / "a"
    model.mkdir(parents=True)
    (model / "model.safetensors").write_bytes(b"input")
    temporary, out = root / ".out.temporary", root / "out"
    for name, content in OUTPUTS.items():
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        (temporary / name).write_bytes(content)
    (temporary / "README.md").write_text("card")
    options = {
        "recipe": RECIPE,
        "inputs": [MergedInput("./models/a", model, {"model.safetensors": sha256(b"input")})],
        "digests": {"model.safetensors": sha256(b"weights")},
        "seed": 0,
        "options": {"coefficient": None, "vocabulary": "refuse", "max_shard_bytes": 10**9},
        "device": "cpu",
        **options,
    }
    write_manifest(temporary, out=out, **options)
    temporary.rename(out)
    return out


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return merged(tmp_path)


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return read_manifest(merged(tmp_path_factory.mktemp("document"), warnings=["careful"], ancestor={"share": 0.5}))


def rewrite(out: Path, document: object) -> None:
    (out / MANIFEST).write_text(json.dumps(document))


# What is written


def test_every_file_is_recorded_with_its_size_and_digest(out: Path) -> None:
    manifest = read_manifest(out)
    assert manifest["outputs"] == [
        {"file": name, "bytes": len(OUTPUTS[name]), "sha256": sha256(OUTPUTS[name])} for name in sorted(OUTPUTS)
    ]
    file = {"file": "model.safetensors", "bytes": 5, "sha256": sha256(b"input")}
    assert manifest["inputs"] == [{"model": "./models/a", "folder": "../models/a", "files": [file]}]
    assert manifest["recipe"] == {"text": RECIPE, "sha256": sha256(RECIPE.encode())}


def test_digests_that_are_known_are_not_computed_again(tmp_path: Path) -> None:
    out = merged(tmp_path, digests={"model.safetensors": "0" * 64, "config.json": "1" * 64})
    found = {entry["file"]: entry["sha256"] for entry in read_manifest(out)["outputs"]}
    assert (found["model.safetensors"], found["config.json"]) == ("0" * 64, "1" * 64)


def test_the_manifest_of_the_same_merge_is_the_same_wherever_and_whenever(tmp_path: Path) -> None:
    texts = {(merged(tmp_path / name) / MANIFEST).read_text() for name in ("here", "there")}
    assert len(texts) == 1
    assert str(tmp_path) not in texts.pop()


def test_the_programs_are_named_with_their_versions(out: Path) -> None:
    import numpy as np
    import torch

    from mergeguard import __version__

    versions = read_manifest(out)["versions"]
    assert versions["mergeguard"] == __version__
    assert versions["numpy"] == np.__version__
    assert torch.__version__.startswith(versions["torch"].partition("+")[0])


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    ancestor = {"share": math.nan, "by": {"a": [math.inf, 0.5]}}
    assert read_manifest(merged(tmp_path, ancestor=ancestor))["ancestor"] == {"share": None, "by": {"a": [None, 0.5]}}


def test_an_input_that_is_gone_is_named(tmp_path: Path) -> None:
    gone = MergedInput("gone", tmp_path / "gone", {"model.safetensors": "0" * 64})
    with pytest.raises(CheckpointError, match=r"^cannot read \S*gone/model.safetensors: No such file"):
        merged(tmp_path, inputs=[gone])


# What is found


def test_an_untouched_model_has_no_problems_nor_have_its_inputs(out: Path) -> None:
    assert check_manifest(out, inputs=True) == []


def test_a_moved_model_has_no_problems(out: Path, tmp_path: Path) -> None:
    shutil.move(out, tmp_path / "published")
    assert check_manifest(tmp_path / "published") == []


@pytest.mark.parametrize("name", sorted(OUTPUTS))
@pytest.mark.parametrize(
    ("change", "problem"),
    [("bit", "was changed"), ("longer", "bytes; "), ("gone", "is missing"), ("folder", "missing")],
)
def test_every_change_to_a_recorded_file_shows(out: Path, name: str, change: str, problem: str) -> None:
    path = out / name
    content = path.read_bytes()
    path.unlink()
    if change == "bit":
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    elif change == "longer":
        path.write_bytes(content + b"x")
    elif change == "folder":
        path.mkdir()
    (found,) = check_manifest(out)
    assert found.startswith(f"{name}: ")
    assert problem in found


@pytest.mark.parametrize(
    "name",
    ["model-00001-of-00002.safetensors", "pytorch_model.bin", "modeling_x.py", "adapter_config.json", "LICENSE.bin"],
)
def test_a_file_that_was_added_shows(out: Path, name: str) -> None:
    (out / name).touch()
    assert check_manifest(out) == [f"{name}: is not in the manifest; nobody says where it comes from"]


def test_a_linked_folder_that_was_added_shows(out: Path, tmp_path: Path) -> None:
    (out / "adapter").symlink_to(tmp_path / "models")
    assert check_manifest(out) == ["adapter: is not in the manifest; nobody says where it comes from"]


def test_what_nothing_loads_may_be_added_or_edited(out: Path) -> None:
    (out / "README.md").write_text("evaluated since")
    for name in ("LICENSE", "LICENSE.txt", "NOTICE", ".gitattributes", ".git/config", "plot.png"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).touch()
    assert check_manifest(out) == []


def test_a_changed_recipe_shows(out: Path) -> None:
    manifest = read_manifest(out)
    manifest["recipe"]["text"] += "# more"
    rewrite(out, manifest)
    assert check_manifest(out) == [f"{MANIFEST}: the recipe's text does not have the recipe's SHA-256"]


def test_a_changed_or_missing_input_shows_if_inputs_are_asked_for(out: Path, tmp_path: Path) -> None:
    file = tmp_path / "models" / "a" / "model.safetensors"
    file.write_bytes(b"INPUT")
    assert check_manifest(out) == []
    assert check_manifest(out, inputs=True) == [
        "input ./models/a: model.safetensors: was changed; its SHA-256 is not the recorded one"
    ]
    file.unlink()
    assert check_manifest(out, inputs=True) == ["input ./models/a: model.safetensors: is missing"]


def test_a_problem_is_one_line_whatever_the_file_is_called(out: Path) -> None:
    (out / "a\nb.bin").touch()
    (problem,) = check_manifest(out)
    assert "\n" not in problem
    assert r"a\nb.bin" in problem


def test_a_device_is_not_read_without_end(out: Path, tmp_path: Path) -> None:
    path = tmp_path / "models" / "a" / "model.safetensors"
    path.unlink()
    path.symlink_to("/dev/zero")
    assert check_manifest(out, inputs=True) == ["input ./models/a: model.safetensors: is missing"]


# What is refused


@pytest.mark.parametrize("part", ["outputs", "inputs"])
@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "..", ".", "a\0b", "a\\..\\b"])
def test_a_path_that_leaves_its_folder_is_refused(out: Path, part: str, name: str) -> None:
    manifest = read_manifest(out)
    files = manifest["outputs"] if part == "outputs" else manifest["inputs"][0]["files"]
    files[0]["file"] = name
    rewrite(out, manifest)
    with pytest.raises(CheckpointError, match=r"manifest.json names a file outside of its folder"):
        check_manifest(out)


def test_a_file_that_is_named_twice_is_refused(out: Path) -> None:
    manifest = read_manifest(out)
    manifest["outputs"].append(manifest["outputs"][0])
    rewrite(out, manifest)
    with pytest.raises(CheckpointError, match="names a file twice"):
        read_manifest(out)


def test_a_model_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"has no {MANIFEST}; it was not written by"):
        check_manifest(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ('{"schema_version": "1.0"', "is not JSON"),
        ("[]", "is not a JSON object"),
        ("{}", "is not a manifest of mergeguard"),
        ('{"schema_version": 1}', "is not a manifest of mergeguard"),
        ('{"schema_version": "9.0"}', "newer|upgrade mergeguard"),
        ('{"schema_version": "1.0"}', "does not satisfy the schema"),
        ("[" * 100_000, "is not JSON|nested too deeply"),
        ('{"seed": 1, "seed": 2}', "twice"),
    ],
)
def test_a_manifest_that_cannot_be_one_is_refused_in_one_line(out: Path, text: str, message: str) -> None:
    (out / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_manifest(out)
    assert str(caught.value).startswith(str(out / MANIFEST))
    assert "\n" not in str(caught.value)


# The schema

FIELDS: list[tuple[str | int, ...]] = [
    *(("schema_version",), ("recipe",), ("inputs",), ("outputs",), ("versions",), ("seed",), ("options",), ("device",)),
    *(("warnings",), ("ancestor",), ("recipe", "text"), ("recipe", "sha256"), ("versions", "torch")),
    *(("inputs", 0, "model"), ("inputs", 0, "folder"), ("inputs", 0, "files"), ("outputs", 1, "file")),
    *(("outputs", 1, "bytes"), ("outputs", 1, "sha256"), ("inputs", 0, "files", 0, "sha256")),
]
OBJECTS: list[tuple[str | int, ...]] = [(), ("recipe",), ("inputs", 0), ("inputs", 0, "files", 0), ("outputs", 0)]


def at(document: Any, path: tuple[str | int, ...]) -> Any:
    for key in path:
        document = document[key]
    return document


def test_the_schema_is_a_schema_of_its_draft_and_of_our_version(document: dict[str, Any]) -> None:
    Draft202012Validator.check_schema(schema())
    assert schema()["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema()["$id"].endswith(SCHEMA_VERSION)
    assert schema()["properties"]["schema_version"] == {"const": SCHEMA_VERSION}
    assert document.keys() == schema()["properties"].keys()


@pytest.mark.parametrize("path", FIELDS)
def test_a_missing_field_is_refused_and_named(document: dict[str, Any], path: tuple[str | int, ...]) -> None:
    changed = copy.deepcopy(document)
    del at(changed, path[:-1])[path[-1]]
    with pytest.raises(CheckpointError, match=f"{path[-1]}' is a required property"):
        check_document(changed)


@pytest.mark.parametrize("path", FIELDS)
def test_a_field_of_a_wrong_type_is_refused(document: dict[str, Any], path: tuple[str | int, ...]) -> None:
    changed = copy.deepcopy(document)
    at(changed, path[:-1])[path[-1]] = [[]]
    with pytest.raises(CheckpointError, match="does not satisfy the schema"):
        check_document(changed)


@pytest.mark.parametrize("path", OBJECTS)
def test_an_unknown_field_is_refused_and_named(document: dict[str, Any], path: tuple[str | int, ...]) -> None:
    changed = copy.deepcopy(document)
    at(changed, path)["signed"] = True
    with pytest.raises(CheckpointError, match="'signed' was unexpected"):
        check_document(changed)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("outputs", 0, "bytes"), -1),
        (("outputs", 0, "bytes"), True),
        (("outputs", 0, "bytes"), 1.5),
        (("outputs", 0, "sha256"), "0" * 63),
        (("outputs", 0, "sha256"), "A" * 64),
        (("outputs",), []),
        (("inputs",), []),
        (("device",), "cuda:0 of alice"),
        (("seed",), None),
    ],
)
def test_a_value_out_of_its_range_is_refused(
    document: dict[str, Any], path: tuple[str | int, ...], value: object
) -> None:
    changed = copy.deepcopy(document)
    at(changed, path[:-1])[path[-1]] = value
    with pytest.raises(CheckpointError, match="does not satisfy the schema"):
        check_document(changed)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=6,
)


@QUICK
@given(
    recipe=st.text(st.characters(exclude_categories=["Cs"])),
    warnings=st.lists(st.text(min_size=1), max_size=2),
    ancestor=st.none() | st.dictionaries(st.text(max_size=5), json_values, max_size=3),
    seed=st.integers(0, 2**64),
)
def test_whatever_is_written_can_be_read_and_has_no_problems(
    tmp_path_factory: pytest.TempPathFactory, recipe: str, warnings: list[str], ancestor: Any, seed: int
) -> None:
    root = tmp_path_factory.mktemp("merge")
    out = merged(root, recipe=recipe, warnings=warnings, ancestor=ancestor, seed=seed)
    assert check_manifest(out, inputs=True) == []
    assert read_manifest(out)["recipe"]["text"] == recipe


@QUICK
@given(path=st.sampled_from(FIELDS), value=json_values)
def test_a_damaged_manifest_is_refused_or_checked_but_never_crashes(
    tmp_path_factory: pytest.TempPathFactory, document: dict[str, Any], path: tuple[str | int, ...], value: object
) -> None:
    root = tmp_path_factory.mktemp("damaged")
    changed = copy.deepcopy(document)
    at(changed, path[:-1])[path[-1]] = value
    rewrite(root, changed)
    try:
        problems = check_manifest(root, inputs=True)
    except CheckpointError as error:
        problems = [str(error)]
    assert problems
    assert all("\n" not in problem for problem in problems)

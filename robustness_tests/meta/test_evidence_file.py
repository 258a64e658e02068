"""Evidence files: what is written is read back, for the owner's eyes alone, and nothing else passes for one."""

from __future__ import annotations

import json
import stat
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from mergeguard.checkpoints.files import file_digest
from mergeguard.errors import CheckpointError, MergeguardError
from mergeguard.ownership import evidence_file
from mergeguard.ownership.evidence_file import (
    EvidenceFile,
    exposed,
    new_evidence,
    read_document,
    read_evidence,
    remove_evidence,
    schema,
    write_evidence,
)
from mergeguard.protections.contract import Evidence

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

KEY = "ハ-hunter2"
DATA = {"keys": [KEY, "two"], "length": [3, 5], "number": 2**255, "frame": ["", "\n"], "none": None, "rate": 0.1}
TENSORS = {"up": torch.arange(6.0).reshape(2, 3), "down": torch.tensor([1, 2])}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def written(folder: Path, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    path = folder / "evidence.json"
    write_evidence(path, new_evidence(Evidence("scheme(keys=2)", DATA, tensors or {})))
    return path


@given(data=st.dictionaries(st.text(), JSON, max_size=4))
@settings(max_examples=40, deadline=None)
def test_plain_data_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("evidence") / "e.json"
    file = new_evidence(Evidence("scheme", data))
    write_evidence(path, file)
    back = read_evidence(path)
    assert (back.evidence.protection, back.evidence.data, back.salt) == ("scheme", data, file.salt)
    assert file.rng("decoys").random() == back.rng("decoys").random()


def test_tensors_come_back_bit_by_bit_and_both_files_are_their_owners_alone(tmp_path: Path) -> None:
    path = written(tmp_path, TENSORS)
    back = read_evidence(path).evidence.tensors
    assert back.keys() == TENSORS.keys()
    assert all(torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype for name, tensor in TENSORS.items())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["evidence.json", "evidence.safetensors"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o600}


def test_what_others_can_read_is_noticed(tmp_path: Path) -> None:
    path = written(tmp_path)
    assert not exposed(path)
    path.chmod(0o640)
    assert exposed(path)


def test_the_published_schema_describes_what_is_written(tmp_path: Path) -> None:
    Draft202012Validator.check_schema(schema())
    document = json.loads(written(tmp_path, TENSORS).read_text())
    Draft202012Validator(schema()).validate(document)
    assert document["tensors"] == {
        "file": "evidence.safetensors",
        "sha256": file_digest(tmp_path / "evidence.safetensors"),
    }


def test_a_file_commits_to_its_evidence_without_telling_it(tmp_path: Path) -> None:
    """The same keys twice: other salts, so that nobody can find few keys by trying them against a digest."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one, two = written(tmp_path / "one"), written(tmp_path / "two")
    assert file_digest(one) != file_digest(two)
    assert len(bytes.fromhex(read_evidence(one).salt)) == 32


def test_random_numbers_depend_on_evidence_salt_and_label() -> None:
    def draw(label: str = "decoys", salt: str = "0" * 64, key: str = "a") -> float:
        return EvidenceFile(Evidence("scheme", {"keys": [key]}), salt).rng(label).random()

    assert draw() == draw()
    assert len({draw(), draw(label="null"), draw(salt="1" * 64), draw(key="b")}) == 4


def test_neither_keys_nor_salt_are_shown(tmp_path: Path) -> None:
    file = read_evidence(written(tmp_path))
    for shown in (repr(file), str(file), f"{[file]}"):
        assert KEY not in shown
        assert ascii(KEY)[1:-1] not in shown
        assert file.salt not in shown


@pytest.mark.parametrize("name", ["evidence.json", "evidence.safetensors"])
def test_nothing_is_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("precious")
    with pytest.raises(CheckpointError, match="exists already"):
        written(tmp_path, TENSORS)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "precious"


def test_a_neighbour_of_evidence_without_tensors_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "evidence.safetensors").write_text("precious")
    file = new_evidence(Evidence("scheme", DATA))
    write_evidence(tmp_path / "evidence.json", file)
    remove_evidence(tmp_path / "evidence.json", file)
    assert [found.read_text() for found in tmp_path.iterdir()] == ["precious"]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise CheckpointError("cannot write: no space left")

    monkeypatch.setattr(evidence_file, "write_bytes", full)
    with pytest.raises(CheckpointError, match="no space"):
        written(tmp_path, TENSORS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", ["absent", "file"])
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="absent or read-only"):
        write_evidence(tmp_path / folder / "e.json", new_evidence(Evidence("scheme", DATA)))


def test_a_name_that_is_taken_by_the_tensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MergeguardError, match="is to hold JSON"):
        write_evidence(tmp_path / "e.safetensors", new_evidence(Evidence("scheme", DATA)))


@pytest.mark.parametrize(
    "value",
    [{KEY}, KEY.encode(), float("nan"), float("inf"), object()],
    ids=["set", "bytes", "nan", "infinity", "object"],
)
def test_data_without_a_json_form_is_refused_unshown(value: object) -> None:
    with pytest.raises(MergeguardError, match="not plain data") as caught:
        new_evidence(Evidence("scheme", {"keys": [value]}))
    assert "hunter2" not in str(caught.value)


def changed(**fields: Any) -> Callable[[str], str]:
    return lambda text: json.dumps({**json.loads(text), **fields})


def without(field: str) -> Callable[[str], str]:
    return lambda text: json.dumps({key: value for key, value in json.loads(text).items() if key != field})


WRONG: dict[str, tuple[Callable[[str], str], str]] = {
    "cut in half": (lambda text: text[: len(text) // 2], "it is not JSON"),
    "empty": (lambda _: "", "it is not JSON"),
    "a name twice": (lambda text: text.replace('"keys"', '"length"'), "it is not JSON"),
    "NaN": (lambda text: text.replace("0.1", "NaN"), "it is not JSON"),
    "nested too deeply": (lambda _: "[" * 100_000, "it is not JSON"),
    "a list": (lambda text: f"[{text}]", "is not an evidence file"),
    "another format": (changed(format="other"), "is not an evidence file"),
    "no format": (without("format"), "is not an evidence file"),
    "newer": (changed(version=2), "upgrade"),
    "version as text": (changed(version="2"), "'version'"),
    "version as truth": (changed(version=True), "'version'"),
    "no salt": (without("salt"), "missing or unknown"),
    "no data": (without("data"), "missing or unknown"),
    "a further field": (changed(more=KEY), "missing or unknown"),
    "data as list": (changed(data=[KEY]), "'data'"),
    "salt no digest": (changed(salt=KEY), "'salt'"),
    "protection as list": (changed(protection=[KEY]), "'protection'"),
    "tensors above": (changed(tensors={"file": "../e.safetensors", "sha256": "0" * 64}), "outside its folder"),
    "tensors elsewhere": (changed(tensors={"file": "/etc/passwd", "sha256": "0" * 64}), "outside its folder"),
    "tensors above, Windows": (
        changed(tensors={"file": "..\\e.safetensors", "sha256": "0" * 64}),
        "outside its folder",
    ),
    "tensors no digest": (changed(tensors={"file": KEY, "sha256": KEY}), "'tensors'"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_evidence_file_is_refused_in_one_line_that_shows_nothing_of_it(tmp_path: Path, wrong: str) -> None:
    edit, said = WRONG[wrong]
    path = written(tmp_path)
    path.write_text(edit(path.read_text()))
    with pytest.raises(CheckpointError) as caught:
        read_document(path)
    message = str(caught.value)
    assert said in message
    assert "\n" not in message
    assert "hunter2" not in message
    assert caught.value.__cause__ is None


def test_a_file_that_is_no_text_or_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "e.json").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "e.json", tmp_path, tmp_path / "absent.json"):
        with pytest.raises(CheckpointError, match=str(path)):
            read_evidence(path)


def test_tensors_that_are_missing_altered_or_anothers_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, TENSORS)
    beside = tmp_path / "evidence.safetensors"
    content = bytearray(beside.read_bytes())
    content[-1] ^= 1
    beside.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is not the file that evidence\.json was written with"):
        read_evidence(path)
    beside.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_evidence(path)

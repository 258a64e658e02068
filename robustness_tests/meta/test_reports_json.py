"""`results.json`: what is written is read back, and nothing half-written or foreign is accepted."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import stat
from dataclasses import replace
from decimal import Decimal
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeguard import __version__
from mergeguard.errors import CheckpointError, ParameterError
from mergeguard.matrix.outcome import SCHEMA_VERSION
from mergeguard.reports.results_json import check_document, dumps, parse_results, read_results, to_json, write_results
from robustness_tests.meta import outcome_builders as build

if TYPE_CHECKING:
    from pathlib import Path

    from mergeguard.matrix.outcome import Results


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


TEXT = dumps(build.results([build.outcome(), build.outcome(coefficient=None, score=3.5)]))


@build.QUICK
@given(build.all_results())
def test_what_is_written_satisfies_the_schema_and_is_read_back_equal(results: Results) -> None:
    text = dumps(results)
    check_document(json.loads(text))
    assert parse_results(text) == results


def test_the_document_has_the_promised_fields() -> None:
    document = to_json(build.results([build.outcome()], problems=("one",)))
    top = "schema_version mergeguard environment world outcomes before_merging planted summary"
    assert set(top.split()) <= document.keys()
    promised = (
        "protection variant merger merger_parameters coefficient world seed hits trials rate interval controls p_value "
        "level decoy_hits decoy_trials verdict survived skills skills_kept theft expected access claim seconds"
    )
    assert set(promised.split()) <= document["outcomes"][0].keys()
    assert {"protection", "merger", "critical_coefficient", "area", "thefts", "lost"} <= document["summary"][0].keys()
    assert document["schema_version"] == SCHEMA_VERSION
    assert document["mergeguard"] == __version__
    assert document["world"]["name"] == "tiny"
    assert document["outcomes"][0]["survived"] is True
    assert document["planted"][0]["caught"] is True
    assert document["holds"] is False


def test_numbers_that_are_not_finite_become_null_and_come_back_as_nan_in_maps() -> None:
    results = build.nan_everywhere()
    text = dumps(results)
    assert "NaN" not in text
    assert "Infinity" not in text
    data = json.loads(text)["outcomes"][0]
    assert data["rate"] is None
    assert data["skills_kept"] == {"refusal": None, "arithmetic": None}
    cell = replace(results.outcomes[0], rate=1.0)
    back = parse_results(dumps(replace(results, outcomes=(cell,)))).outcomes[0]
    assert math.isnan(back.skills_kept["refusal"])
    assert math.isnan(back.details["margin"])


def test_read_only_maps_and_numpy_numbers_are_written_as_plain_ones() -> None:
    cell = build.outcome(
        details=MappingProxyType({"margin": np.float32(0.5)}), hits=np.int64(8), theft=np.bool_(1), rate=np.float64(1)
    )
    data = json.loads(dumps(build.results([cell])))["outcomes"][0]
    assert data["details"] == {"margin": 0.5}
    assert data["hits"] == 8
    assert data["theft"] is True


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"host": object()}, r"results\.environment\.host is of type object"),
        ({"price": Decimal(1)}, r"results\.environment\.price is of type Decimal"),
        ({"runs": [{1: "one"}]}, r"results\.environment\.runs\[0\] has the key 1"),
    ],
)
def test_what_json_cannot_hold_is_named(environment: dict[str, object], says: str) -> None:
    with pytest.raises(ParameterError, match=says):
        dumps(build.results(environment=environment))


def test_a_file_is_written_whole_beside_nothing_else_and_readable_by_others(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    results = build.results([build.outcome()])
    write_results(results, path)
    write_results(results, path)
    assert read_results(path) == results
    assert listed(path.parent) == ["results.json"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_a_full_disk_leaves_the_old_file_and_nothing_half_written(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # writes fail after 100 bytes, as on a full disk
    try:
        with pytest.raises(CheckpointError, match=r"^cannot write .*results\.json: File too large; choose a folder"):
            write_results(build.results([build.outcome()]), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "old"
    assert listed(tmp_path) == ["results.json"]


@pytest.mark.parametrize(
    ("step", "code"),
    [
        ("os.fsync", errno.ENOSPC),
        ("pathlib.Path.replace", errno.EROFS),
        ("tempfile.mkstemp", errno.EACCES),
        ("pathlib.Path.mkdir", errno.EPERM),
    ],
)
def test_a_failure_at_any_step_is_one_clear_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, code: int
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(step, fail)
    with pytest.raises(CheckpointError, match=os.strerror(code)) as caught:
        write_results(build.results(), tmp_path / "results.json")
    assert "\n" not in str(caught.value)
    assert listed(tmp_path) == []


def test_a_file_where_a_folder_should_be_and_a_folder_where_the_file_should_be_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot write .*file/results\.json"):
        write_results(build.results(), tmp_path / "file" / "results.json")
    with pytest.raises(CheckpointError, match=r"cannot write .*folder"):
        write_results(build.results(), tmp_path / "folder")
    assert listed(tmp_path) == ["file", "folder"]


@build.QUICK
@given(st.integers(1, len(TEXT) - 3))
def test_a_document_cut_anywhere_is_called_truncated(length: int) -> None:
    with pytest.raises(CheckpointError, match=r"^results\.json is truncated: it ends in line \d+$"):
        parse_results(TEXT[:length])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"hello", "is not JSON: Expecting value in line 1"),
        (b'{"a": 1,, "b": 2}', "is not JSON"),
        (b"\xff\xfe{}", "is not JSON: it is not text in UTF-8"),
        (b'{"seconds": NaN}', "is not JSON: NaN is not a number"),
        (b'{"seconds": 1e999}', "is not JSON: 1e999 is not a number"),
        (b'{"seconds": ' + b"9" * 5000 + b"}", "is not JSON: 9+ ... 9+ is not a number"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1, 2]", "is not a results.json of mergeguard"),
        (b'{"schema_version": "1.0"}', "is not a results.json of mergeguard"),
        (b'{"schema_version": "1.1", "mergeguard": "9"}', f"schema version 1.1, newer than the {SCHEMA_VERSION} that"),
        (b'{"schema_version": "10.0", "mergeguard": "9"}', "schema version 10.0, newer than .* upgrade mergeguard"),
        (b'{"schema_version": 2, "mergeguard": "9"}', "has the schema version 2; expected"),
        (b'{"schema_version": "0.9", "mergeguard": "0"}', "does not satisfy the schema"),
        (
            b'{"schema_version": "1.0", "mergeguard": "1"}',
            "does not satisfy the schema: the document: .* is a required",
        ),
    ],
)
def test_a_file_that_is_not_ours_is_refused_in_one_line(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=says) as caught:
        read_results(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*none\.json: No such file or directory"):
        read_results(tmp_path / "none.json")


def test_a_byte_order_mark_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(TEXT, encoding="utf-8-sig")
    assert read_results(path) == parse_results(TEXT)

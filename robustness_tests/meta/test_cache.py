"""The cache: what a key is made of, what becomes of damaged entries, and several processes at once."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from mergeguard.errors import CheckpointError
from mergeguard.machine import cache_folder
from mergeguard.matrix import cache as module
from mergeguard.matrix.cache import Cache, code_version

if TYPE_CHECKING:
    from collections.abc import Callable

KEY = {"world": "tiny", "seed": 0, "parameters": {"density": 0.4}}
DATA = {"hits": 3, "rate": 0.1, "name": "ключ", "nothing": None}
TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([True, False])}


class Maker:
    """Counts how often it is asked for the same thing."""

    def __init__(self, result: Any) -> None:
        self.result, self.calls = result, 0

    def __call__(self) -> Any:
        self.calls += 1
        return self.result


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def files(cache: Cache, suffix: str) -> list[Path]:
    return sorted(cache.folder.rglob(f"*{suffix}"))


# Hits and keys


def test_an_entry_is_made_once(cache: Cache) -> None:
    make = Maker(DATA)
    assert [cache.data("outcome", KEY, make) for _ in range(3)] == [DATA] * 3
    assert Cache(cache.folder).data("outcome", dict(reversed(KEY.items())), make) == DATA
    assert make.calls == 1


def test_tensors_come_back_as_they_were(cache: Cache) -> None:
    make = Maker((TENSORS, DATA))
    for _ in range(2):
        tensors, data = cache.tensors("embedded", KEY, make)
        assert data == DATA
        assert tensors.keys() == TENSORS.keys()
        assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert make.calls == 1


@pytest.mark.parametrize(
    "other",
    [
        {**KEY, "seed": 1},
        {**KEY, "world": "tiny2"},
        {**KEY, "parameters": {"density": 0.40000000000000002 + 1e-9}},
        {**KEY, "parameters": {"density": 0.4, "lambda": 1.0}},
        {**KEY, "more": None},
        {key: value for key, value in KEY.items() if key != "seed"},
    ],
    ids=["seed", "world", "value", "parameter", "part", "missing"],
)
def test_every_part_of_the_key_counts(cache: Cache, other: dict[str, Any]) -> None:
    cache.data("outcome", KEY, Maker("first"))
    assert cache.data("outcome", other, Maker("second")) == "second"
    assert cache.data("outcome", KEY, Maker("third")) == "first"


def test_kinds_are_kept_apart(cache: Cache) -> None:
    assert cache.data("outcome", KEY, Maker("first")) == "first"
    assert cache.data("control", KEY, Maker("second")) == "second"


def test_another_version_of_the_code_is_another_key(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.data("outcome", KEY, Maker("first"))
    monkeypatch.setattr(module, "code_version", lambda: "another")
    assert cache.data("outcome", KEY, Maker("second")) == "second"


def test_the_version_of_the_code_is_that_of_the_sources_that_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "mergeguard"
    doors = ("cli.py", "pytest_plugin.py", "reports/terminal.py", "testing/gate.py", "ownership/claims.py")
    for name in ("matrix/cache.py", "mergers/ties.py", *doors):
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("one = 1\n")
    monkeypatch.setattr(module, "__file__", str(package / "matrix" / "cache.py"))
    version = code_version.__wrapped__
    first = version()
    for name in doors:
        (package / name).write_text("two = 2\n")
    assert version() == first
    (package / "mergers/ties.py").write_text("one = 2\n")
    second = version()
    (package / "mergers/ties.py").rename(package / "mergers/tiles.py")
    third = version()
    monkeypatch.setattr(torch, "__version__", "0.0")
    assert len({first, second, third, version()}) == 4


def test_fresh_data_is_what_the_cache_would_give_back(cache: Cache) -> None:
    make = Maker({"interval": (0.5, 1.0), "counts": {1: 2, 10: 3, 2: 4}, "rate": float("nan"), "score": float("inf")})
    fresh, cached = (cache.data("outcome", KEY, make) for _ in range(2))
    assert make.calls == 1
    assert json.dumps(fresh) == json.dumps(cached)
    assert fresh["interval"] == [0.5, 1.0]
    assert fresh["counts"] == {"1": 2, "10": 3, "2": 4}


# Damage


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def change_data(path: Path) -> None:
    path.write_text(path.read_text().replace("3", "4"))


def change_checksum(path: Path) -> None:
    entry = json.loads(path.read_text())
    path.write_text(json.dumps({**entry, "sha256": "0" * 64}))


def drop_checksum(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text())["data"]))


def no_unicode(path: Path) -> None:
    path.write_bytes(b"\xff\xfe")


@pytest.mark.parametrize(
    "damage", [truncate, empty, flip_last_byte, change_data, change_checksum, drop_checksum, no_unicode]
)
def test_damaged_data_is_rebuilt_and_never_returned(
    cache: Cache, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    cache.data("outcome", KEY, Maker(DATA))
    (path,) = files(cache, ".json")
    damage(path)
    make = Maker("rebuilt")
    with caplog.at_level(logging.WARNING, logger="mergeguard"):
        assert cache.data("outcome", KEY, make) == "rebuilt"
        assert f"{path} is damaged and will be rebuilt" in caplog.text
        caplog.clear()
        assert cache.data("outcome", KEY, make) == "rebuilt"
    assert (make.calls, caplog.text) == (1, "")


@pytest.mark.parametrize("damage", [truncate, empty, flip_last_byte, Path.unlink])
@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_damaged_tensors_are_rebuilt_and_never_returned(
    cache: Cache, damage: Callable[[Path], None], suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache.tensors("embedded", KEY, Maker((TENSORS, DATA)))
    (path,) = files(cache, suffix)
    damage(path)
    make = Maker(({"a": torch.zeros(2)}, "rebuilt"))
    with caplog.at_level(logging.WARNING, logger="mergeguard"):
        tensors, data = cache.tensors("embedded", KEY, make)
        assert (data, tensors["a"].tolist()) == ("rebuilt", [0.0, 0.0])
        # An entry without its JSON is none at all: this is what a killed writer leaves.
        assert ("is damaged and will be rebuilt" in caplog.text) is not (damage is Path.unlink and suffix == ".json")
        assert cache.tensors("embedded", KEY, make)[1] == "rebuilt"
    assert make.calls == 1


def test_a_writer_that_dies_after_the_tensors_leaves_no_entry(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_bytes", die)
        with pytest.raises(SystemExit):
            cache.tensors("embedded", KEY, Maker((TENSORS, DATA)))
    assert files(cache, ".safetensors")
    assert cache.tensors("embedded", KEY, Maker(({}, "whole")))[1] == "whole"


def test_an_error_while_making_leaves_no_entry_and_no_lock(cache: Cache) -> None:
    def fail() -> Any:
        raise ValueError("no such luck")

    for _ in range(2):
        with pytest.raises(ValueError, match="no such luck"):
            cache.data("outcome", KEY, fail)
    assert not files(cache, ".json")
    assert cache.data("outcome", KEY, Maker(DATA)) == DATA


# Folders


def test_the_environment_variable_wins_over_the_platforms_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("MERGEGUARD_CACHE", raising=False)
    platforms = cache_folder()
    assert platforms.name == "mergeguard"
    if sys.platform == "linux":
        assert platforms == tmp_path / "xdg" / "mergeguard"
    monkeypatch.setenv("MERGEGUARD_CACHE", str(tmp_path / "chosen"))
    assert cache_folder() == tmp_path / "chosen"
    assert Cache().folder == tmp_path / "chosen"
    assert Cache(tmp_path / "given").folder == tmp_path / "given"


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_folder_that_cannot_be_made_is_one_clear_error(
    tmp_path: Path, below: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError) as caught:
        Cache(tmp_path / "file" / below).data("outcome", KEY, Maker(DATA))
    assert str(caught.value).startswith(f"cannot write the cache folder {tmp_path / 'file'}")
    assert str(caught.value).endswith("; set MERGEGUARD_CACHE to a folder that can be written")
    assert "\n" not in str(caught.value)
    assert not caplog.records, "an absent entry is not a damaged one"


def test_a_full_disk_is_one_clear_error_and_leaves_no_entry(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for write in (
            lambda: cache.data("outcome", KEY, Maker(DATA)),
            lambda: cache.tensors("embedded", KEY, Maker((TENSORS, DATA))),
        ):
            with pytest.raises(CheckpointError, match=r"No space left on device; set MERGEGUARD_CACHE"):
                write()
    assert {path.suffix for path in cache.folder.rglob("*") if path.is_file()} <= {".lock"}
    assert cache.data("outcome", KEY, Maker(DATA)) == DATA


def test_entries_are_private_to_the_user(cache: Cache) -> None:
    cache.data("outcome", KEY, Maker(DATA))
    cache.tensors("embedded", KEY, Maker((TENSORS, DATA)))
    entries = [*files(cache, ".json"), *files(cache, ".safetensors")]
    assert len(entries) == 3
    assert {path.stat().st_mode & 0o777 for path in entries} == {0o600}
    assert {path.parent.stat().st_mode & 0o777 for path in entries} == {0o700}


# Processes

CHILD = """
import pathlib, sys, time
from mergeguard.matrix import cache
cache.code_version = lambda: "fixed"  # spares torch
folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]

def make():
    with (folder / "calls").open("a") as file:
        file.write(name + "\\n")
    (folder / "making").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)
    time.sleep(0.3)  # time enough for the other to come as far as the lock
    return {"made by": name}

(folder / f"ready {name}").touch()
print(cache.Cache(folder / "cache").data("outcome", {"key": 1}, make)["made by"])
"""


def start(folder: Path, name: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", CHILD, str(folder), name], stdout=subprocess.PIPE, text=True)


def wait_for(*paths: Path) -> None:
    """Until all exist; a child that failed lets the test time out rather than pass."""
    for _ in range(6000):
        if all(path.exists() for path in paths):
            return
        time.sleep(0.01)
    raise TimeoutError(f"not all of {paths} came to be")


def test_two_processes_at_once_build_once(tmp_path: Path) -> None:
    children = [start(tmp_path, name) for name in ("one", "two")]
    wait_for(tmp_path / "ready one", tmp_path / "ready two", tmp_path / "making")
    (tmp_path / "go").touch()
    printed = [child.communicate(timeout=60)[0].strip() for child in children]
    (builder,) = (tmp_path / "calls").read_text().split()
    assert printed == [builder, builder]


def test_a_killed_process_leaves_nothing_that_is_taken_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    child = start(tmp_path, "killed")
    wait_for(tmp_path / "making")
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=60)
    monkeypatch.setattr(module, "code_version", lambda: "fixed")
    make = Maker({"made by": "another"})
    assert Cache(tmp_path / "cache").data("outcome", {"key": 1}, make) == {"made by": "another"}
    assert make.calls == 1
    assert not caplog.records

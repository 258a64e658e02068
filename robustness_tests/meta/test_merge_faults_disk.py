"""A disk that fails and inputs that change while a merge runs.

Every fault ends the merge, with one clear line where it is the world's and not ours, and leaves nothing. A watchdog
ends the whole process if a merge does not end.
"""

from __future__ import annotations

import errno
import faulthandler
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mergeguard.checkpoints import digests, reader
from mergeguard.checkpoints.manifest import check_manifest
from mergeguard.errors import CheckpointError
from mergeguard.mergers import read_ahead
from mergeguard.mergers.merge import Options, merge_checkpoints
from robustness_tests.meta.checkpoints_on_disk import SHAPES
from robustness_tests.meta.faults import HANGS, after, failed_with, names, raising, save_inputs, save_recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(autouse=True)
def _watchdog() -> Iterator[None]:
    """End the process if a test does not end."""
    faulthandler.dump_traceback_later(HANGS, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return save_recipe(tmp_path, save_inputs(tmp_path))


@pytest.fixture(autouse=True)
def _small_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """So little memory that the reader waits for the threads that merge."""
    monkeypatch.setattr(read_ahead, "READ_AHEAD", 0)


CALLS = [(os, "pwrite", 0), (os, "pwrite", 1), (os, "pwrite", 9), (os, "posix_fallocate", 0), (os, "fsync", 0),
         (os, "fsync", 1), (tempfile, "mkdtemp", 0), (tempfile, "mkstemp", 0), (Path, "rename", 0),
         (os, "mkdir", 0)]  # fmt: skip
FULL = [(*call, errno.ENOSPC) for call in CALLS]
OTHERS = [(*CALLS[1], errno.EIO), (*CALLS[1], errno.EDQUOT), (*CALLS[6], errno.EACCES), (*CALLS[6], errno.EROFS)]


@pytest.mark.parametrize("shard_bytes", [10**9, 1000])
@pytest.mark.parametrize(
    ("module", "name", "count", "number"),
    [*FULL, *OTHERS],
    ids=[f"{name}-{count}-{errno.errorcode[number]}" for _, name, count, number in [*FULL, *OTHERS]],
)
def test_a_disk_that_fails_is_one_line_and_nothing_is_left(
    tmp_path: Path,
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    name: str,
    count: int,
    number: int,
    shard_bytes: int,
) -> None:
    before = names(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, name, after(count, getattr(module, name), failed_with(number)))
        with pytest.raises(CheckpointError) as caught:
            merge_checkpoints(recipe, tmp_path / "out", Options(max_shard_bytes=shard_bytes, coefficients=(0.1, 0.5)))
    assert str(caught.value).startswith("cannot write ")
    assert os.strerror(number) in str(caught.value)
    assert str(caught.value).isprintable()
    assert names(tmp_path) == before


def test_a_disk_without_room_is_refused_before_anything_is_written(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
    monkeypatch.setattr("mergeguard.mergers.merge.atomic_folder", raising(AssertionError("written")))
    with pytest.raises(
        CheckpointError, match=r"out needs \d+ MB, but .* has \d+ MB free; free \d+ MB or choose another disk"
    ):
        merge_checkpoints(recipe, tmp_path / "out")


@pytest.mark.parametrize("count", [0, 1, 20, 60])
def test_a_disk_that_cannot_be_read_is_one_line_and_nothing_is_left(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    before = names(tmp_path)
    monkeypatch.setattr(reader.os, "preadv", after(count, os.preadv, failed_with(errno.EIO)))
    with pytest.raises(CheckpointError, match="Input/output error"):
        merge_checkpoints(recipe, tmp_path / "out", Options(threads=3))
    assert names(tmp_path) == before


# Inputs that change


def delete(file: Path) -> None:
    file.unlink()


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def overwrite(file: Path) -> None:
    """The same length, other bytes."""
    content = file.read_bytes()
    time.sleep(0.01)  # the clock of the file system ticks some hundred times a second
    file.write_bytes(content[:-4] + b"\x00\x00\x00\x3f")


def replace(file: Path) -> None:
    """Another file with the same bytes: nobody looked at these."""
    other = file.with_suffix(".new")
    other.write_bytes(file.read_bytes())
    other.replace(file)


def append(file: Path) -> None:
    with file.open("ab") as handle:
        handle.write(b"\x00")


@pytest.mark.parametrize("change", [delete, truncate, overwrite, replace, append], ids=lambda change: change.__name__)
@pytest.mark.parametrize("done", [1, len(SHAPES)], ids=["early", "late"])
@pytest.mark.parametrize("changed", ["b/model.safetensors", "y/model-00002-of-00002.safetensors"])
def test_an_input_that_changes_meanwhile_is_an_error(
    tmp_path: Path, recipe: Path, changed: str, done: int, change: Callable[[Path], None]
) -> None:
    before = names(tmp_path)

    def step(_: str, count: int, __: int) -> None:
        if count == done:
            change(tmp_path / changed)

    with pytest.raises(CheckpointError) as caught:
        merge_checkpoints(recipe, tmp_path / "out", on_progress=step)
    assert str(tmp_path / changed) in str(caught.value)
    assert str(caught.value).isprintable()
    assert names(tmp_path) == before


@pytest.mark.parametrize("change", [delete, truncate, overwrite, replace, append], ids=lambda change: change.__name__)
def test_an_input_that_changes_before_its_first_tensor_is_read_is_an_error(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    before = names(tmp_path)
    changed = tmp_path / "x/model.safetensors"

    class Changing(digests.BackgroundDigests):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            change(changed)

    monkeypatch.setattr("mergeguard.mergers.merge.BackgroundDigests", Changing)
    with pytest.raises(CheckpointError) as caught:
        merge_checkpoints(recipe, tmp_path / "out")
    assert str(changed) in str(caught.value)
    assert names(tmp_path) == before


def test_an_input_that_changes_after_the_last_check_is_no_error_of_a_merge_that_is_there(
    tmp_path: Path, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either there is a merged model and no error, or an error and none: the files' last check is before the name."""
    rename = Path.rename

    def late(self: Path, target: Path) -> Path:
        append(tmp_path / "b/model.safetensors")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    merge_checkpoints(recipe, tmp_path / "out")
    assert check_manifest(tmp_path / "out") == []

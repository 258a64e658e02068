"""Folders are whole or absent, whoever else writes or dies."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mergeguard.checkpoints.files import atomic_folder
from mergeguard.errors import CheckpointError


def interrupted_folder(out: Path) -> None:
    with atomic_folder(out) as folder:
        (folder / "half").touch()
        raise KeyboardInterrupt


def overtaken_folder(out: Path, kind: str) -> None:
    """Another process makes `out` while it is written here."""
    with atomic_folder(out) as folder:
        (folder / "mine").touch()
        if kind == "folder":
            out.mkdir()
            (out / "theirs").touch()
        elif kind == "file":
            out.write_text("theirs")
        else:
            out.symlink_to("nowhere")


def test_a_second_writer_of_a_folder_is_refused_at_once_and_the_first_one_wins(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with atomic_folder(out) as folder:
        (folder / "mine").touch()
        with pytest.raises(CheckpointError, match="out is being written by another process"), atomic_folder(out):
            pytest.fail("two writers")
    assert [path.name for path in out.iterdir()] == ["mine"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_a_folder_that_appears_meanwhile_is_left_as_it_is(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="out appeared meanwhile"):
        overtaken_folder(out, kind)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (out / "mine").exists()


def test_a_dangling_link_counts_as_present(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="out exists already"), atomic_folder(tmp_path / "out"):
        pytest.fail("written through a link")


KILLED = """
import sys, time
from pathlib import Path
from mergeguard.checkpoints.files import atomic_folder
with atomic_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("half")
    print(folder, flush=True)
    time.sleep(600)
"""


def test_what_a_killed_writer_left_is_hidden_and_removed_by_the_next(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", KILLED, out], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        left = Path(process.stdout.readline().strip())
        with pytest.raises(CheckpointError, match="is being written"), atomic_folder(out):
            pytest.fail("two writers")
        process.send_signal(signal.SIGKILL)
    assert [path.name for path in tmp_path.iterdir()] == [left.name]
    assert left.name.startswith(".out.")
    with atomic_folder(out) as folder:
        assert not left.exists()
        (folder / "whole").touch()
    assert [path.name for path in out.iterdir()] == ["whole"]


def test_only_folders_that_are_ours_and_of_this_name_are_removed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    kept = [".out.settings", ".out2.mergeguard-abcdefgh", "out.mergeguard-abcdefgh"]
    for name in kept:
        (tmp_path / name).mkdir()
    (tmp_path / ".out.mergeguard-file").touch()
    (tmp_path / ".out.mergeguard-link").symlink_to("precious")
    (tmp_path / ".out.mergeguard-stale").mkdir()
    with atomic_folder(tmp_path / "out"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {
        *kept,
        "out",
        "precious",
        ".out.mergeguard-file",
        ".out.mergeguard-link",
    }


def test_where_folders_cannot_be_locked_they_are_written_all_the_same_and_nothing_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    (tmp_path / ".out.mergeguard-maybealive").mkdir()
    with atomic_folder(tmp_path / "out"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.mergeguard-maybealive"}


def test_a_folder_whose_block_fails_is_gone(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted_folder(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []

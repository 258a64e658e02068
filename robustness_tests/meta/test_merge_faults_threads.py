"""Crashes of a merge's threads, and a second writer of the same folder.

Every fault ends the merge, with one clear line where it is the world's and not ours, and leaves nothing. A watchdog
ends the whole process if a merge does not end.
"""

from __future__ import annotations

import faulthandler
import threading
from typing import TYPE_CHECKING, Any

import pytest

from mergeguard.checkpoints import digests, files, writer
from mergeguard.checkpoints.manifest import check_manifest
from mergeguard.checkpoints.source import StoredSource
from mergeguard.errors import CheckpointError, MergeguardError
from mergeguard.mergers import merge, read_ahead, streaming
from mergeguard.mergers.merge import Options, merge_checkpoints
from robustness_tests.meta.checkpoints_on_disk import SHAPES, family, save_model, write_recipe
from robustness_tests.meta.faults import (
    HANGS,
    HIDDEN,
    TIES,
    after,
    ends,
    names,
    raising,
    save_inputs,
    save_recipe,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def _watchdog() -> Iterator[None]:
    """End the process if a test does not end."""
    faulthandler.dump_traceback_later(HANGS, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return save_inputs(tmp_path)


@pytest.fixture
def recipe(tmp_path: Path, models: list[Path]) -> Path:
    return save_recipe(tmp_path, models)


@pytest.fixture(autouse=True)
def _small_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """So little memory that the reader waits for the threads that merge."""
    monkeypatch.setattr(read_ahead, "READ_AHEAD", 0)


ERRORS = [MemoryError(), KeyboardInterrupt()]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    ("module", "name", "count"),
    [
        (streaming, "seeded_generator", 0),
        (streaming, "seeded_generator", 11),
        (streaming, "_check_finite", 3),
        (streaming, "tensors_of", 5),
        (read_ahead, "Read", 0),
        (merge, "_check_ancestry", 0),  # the reader has begun
        (merge, "_stream", 0),
        (StoredSource, "read_bytes", 40),
        (writer.ShardedWriter, "write", 0),
        (writer.ShardedWriter, "write", 7),
        (writer.ShardedWriter, "finish", 0),
        (writer.StreamedDigest, "_follow", 0),
        (digests.BackgroundDigests, "_digest", 1),
        (read_ahead.BufferPool, "acquire", 4),
        (read_ahead.ReadAhead, "release", 4),
        (files, "_rename", 0),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_crash_anywhere_ends_the_merge_and_leaves_nothing(
    tmp_path: Path,
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    name: str,
    count: int,
    error: BaseException,
) -> None:
    before = names(tmp_path)
    threads = threading.active_count()
    if name == "_follow" and isinstance(error, KeyboardInterrupt):
        return  # it comes to the main thread alone
    with monkeypatch.context() as patch:
        patch.setattr(module, name, after(count, getattr(module, name), raising(error)))
        with pytest.raises((type(error), CheckpointError)):
            merge_checkpoints(recipe, tmp_path / "out", Options(threads=3))
    assert names(tmp_path) == before
    assert ends(lambda: threading.active_count() <= threads), "threads are left"
    merge_checkpoints(recipe, tmp_path / "out")  # and nothing of it stands in the way of the next


@pytest.mark.parametrize("done", [1, 9, len(SHAPES)])
@pytest.mark.parametrize("threads", [1, 4])
def test_a_progress_bar_that_crashes_ends_the_merge(tmp_path: Path, recipe: Path, done: int, threads: int) -> None:
    before = names(tmp_path)

    def step(_: str, count: int, __: int) -> None:
        if count == done:
            raise BrokenPipeError("the terminal is gone")

    with pytest.raises((BrokenPipeError, CheckpointError)):
        merge_checkpoints(recipe, tmp_path / "out", Options(threads=threads), on_progress=step)
    assert names(tmp_path) == before


@pytest.mark.parametrize("threads", [1, 2, 16])
@pytest.mark.parametrize("last", [True, False], ids=["last", "first"])
def test_a_failure_is_the_first_that_happened(tmp_path: Path, models: list[Path], threads: int, last: bool) -> None:
    """And not the complaint of another thread that was stopped for it."""
    states = family(2)
    states[2][max(SHAPES) if last else min(SHAPES)].fill_(float("nan"))
    bad = save_model(tmp_path / "bad", states[2])
    recipe = write_recipe(tmp_path / "r.yml", "ties", [models[1], bad], base=models[0], each=TIES)
    with pytest.raises(CheckpointError, match="holds NaN or infinity"):
        merge_checkpoints(recipe, tmp_path / "out", Options(threads=threads))


# A second writer


def test_a_second_writer_is_told_and_the_first_is_not_disturbed(tmp_path: Path, recipe: Path) -> None:
    refused: list[str] = []

    def step(_: str, count: int, __: int) -> None:
        if count == 1:
            with pytest.raises(MergeguardError) as caught:
                merge_checkpoints(recipe, tmp_path / "out")
            refused.append(str(caught.value))

    merge_checkpoints(recipe, tmp_path / "out", on_progress=step)
    assert refused == [f"{tmp_path / 'out'} is being written by another process; wait or choose another folder"]
    assert check_manifest(tmp_path / "out") == []


@pytest.mark.parametrize("content", ["folder", "file", "model"])
def test_an_output_that_appears_meanwhile_is_left_as_it_is(tmp_path: Path, recipe: Path, content: str) -> None:
    out = tmp_path / "out"

    def step(_: str, count: int, __: int) -> None:
        if count == 2 and content == "file":
            out.write_text("another's")
        elif count == 2:
            out.mkdir()
            (out / "model.safetensors").write_text("another's")

    before = names(tmp_path)
    with pytest.raises(CheckpointError, match="out appeared meanwhile"):
        merge_checkpoints(recipe, out, on_progress=step)
    assert (out if content == "file" else out / "model.safetensors").read_text() == "another's"
    assert names(tmp_path) == sorted([*before, "out"])


def test_of_writers_at_once_exactly_one_wins(tmp_path: Path, recipe: Path) -> None:
    for attempt in range(5):
        out = tmp_path / f"out-{attempt}"
        barrier = threading.Barrier(3)
        results: list[str] = []

        def write(out: Path = out, barrier: threading.Barrier = barrier, results: list[str] = results) -> None:
            barrier.wait(HANGS)
            try:
                merge_checkpoints(recipe, out)
            except MergeguardError as error:
                results.append(str(error))
            else:
                results.append("won")

        threads = [threading.Thread(target=write, daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANGS)
        assert len(results) == 3
        assert results.count("won") == 1, results
        assert all(result.isprintable() for result in results)
        assert check_manifest(out) == []
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path, recipe: Path) -> None:
    (tmp_path / f"{HIDDEN}killed").mkdir()
    (tmp_path / f"{HIDDEN}killed/model.safetensors").write_bytes(b"half")
    (tmp_path / ".other.mergeguard-killed").mkdir()
    merge_checkpoints(recipe, tmp_path / "out")
    assert [name for name in names(tmp_path) if name.startswith(".")] == [".other.mergeguard-killed"]

"""What goes wrong while a merge runs: full disks, files that change, crashes, kills, a second writer.

Every fault ends the merge, with one clear line where it is the world's and not ours, and leaves nothing but hidden
folders of killed processes, which the next merge removes. A watchdog ends the whole process if a merge does not end.
"""

from __future__ import annotations

import errno
import faulthandler
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergeguard.checkpoints import digests, files, reader, writer
from mergeguard.checkpoints.manifest import check_manifest
from mergeguard.checkpoints.source import StoredSource
from mergeguard.errors import CheckpointError, MergeguardError
from mergeguard.mergers import streaming
from mergeguard.mergers.merge import Options, merge_checkpoints
from robustness_tests.meta.checkpoints_on_disk import SHAPES, family, save_model, write_recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[2]
HANGS = 120  # seconds; a merge takes some hundredths
TIES = {"weight": 0.5, "density": 0.4}
HIDDEN = ".out.mergeguard-"


@pytest.fixture(autouse=True)
def _watchdog(request: pytest.FixtureRequest) -> Iterator[None]:
    """End the process if a test does not end; those that run processes have time limits of their own."""
    if request.node.get_closest_marker("slow") is None:
        faulthandler.dump_traceback_later(HANGS, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """Folders of a base and two models, the last of two files."""
    return [save_model(tmp_path / n, s, shards=k) for n, s, k in zip("bxy", family(2), (1, 1, 2), strict=True)]


@pytest.fixture
def recipe(tmp_path: Path, models: list[Path]) -> Path:
    return write_recipe(tmp_path / "recipe.yml", "dare_ties", models[1:], base=models[0], each=TIES)


@pytest.fixture(autouse=True)
def _small_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """So little memory that the reader waits for the threads that merge."""
    monkeypatch.setattr(streaming, "READ_AHEAD", 0)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def after(count: int, function: Callable[..., Any], fault: Callable[..., Any]) -> Callable[..., Any]:
    """`function` for `count` calls, then `fault`; from any thread."""
    lock, calls = threading.Lock(), 0

    def wrapped(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        with lock:
            calls += 1
            chosen = function if calls <= count else fault
        return chosen(*arguments, **options)

    return wrapped


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def failed_with(number: int) -> Callable[..., Any]:
    return raising(OSError(number, os.strerror(number)))


# The disk

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
    with pytest.raises(CheckpointError, match=r"out needs \d+ MB, but .* has \d+ MB free; free \d+ MB or choose another disk"):
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


# Crashes of ours and of others

ERRORS = [MemoryError(), KeyboardInterrupt()]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    ("module", "name", "count"),
    [
        (streaming, "seeded_generator", 0),
        (streaming, "seeded_generator", 11),
        (streaming, "_check_finite", 3),
        (streaming, "_read", 0),
        (streaming, "_read", 5),
        (StoredSource, "read_into", 40),
        (writer.ShardedWriter, "write", 0),
        (writer.ShardedWriter, "write", 7),
        (writer.ShardedWriter, "finish", 0),
        (writer.StreamedDigest, "_follow", 0),
        (digests.BackgroundDigests, "_digest", 1),
        (streaming.BufferPool, "acquire", 4),
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


# Whole processes


def ends(condition: Callable[[], bool], seconds: float = 30) -> bool:
    """Wait for a condition."""
    for _ in range(int(seconds * 200)):
        if condition():
            return True
        time.sleep(0.005)
    return condition()


def start(folder: Path, *options: str, before: str = "") -> subprocess.Popen[str]:
    """`mergeguard merge recipe.yml out` as a process, after some statements."""
    code = f"import sys\n{before}\nfrom mergeguard.cli import main\nsys.argv[0] = 'mergeguard'\nmain()"
    return subprocess.Popen(
        [sys.executable, "-c", code, "merge", "recipe.yml", "out", *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr; a process that hangs is killed and fails the test."""
    try:
        out, err = process.communicate(timeout=HANGS)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # with the stacks of all threads, if PYTHONFAULTHANDLER is set
        out, err = process.communicate(timeout=HANGS)
        pytest.fail(f"the merge hangs\n{out}\n{err}")
    return process.returncode, out, err


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe for models of 48 MB, so that a merge takes long enough to be hit at many moments."""
    folder = tmp_path_factory.mktemp("large")
    for index, name in enumerate("bxy"):
        generator = torch.Generator().manual_seed(0)
        state = {f"model.layers.{i}.w.weight": torch.randn(1000, 1000, generator=generator) for i in range(12)}
        state = {key: t + index * 0.01 * torch.randn(t.shape, generator=generator) for key, t in state.items()}
        (folder / name).mkdir()
        save_file(state, folder / name / "model.safetensors")
    write_recipe(folder / "recipe.yml", "dare_ties", [folder / "x", folder / "y"], base=folder / "b", each=TIES)
    return folder


@pytest.fixture
def there(large: Path, tmp_path: Path) -> Path:
    (tmp_path / "recipe.yml").write_text((large / "recipe.yml").read_text())
    return tmp_path


def is_writing(folder: Path) -> bool:
    return any(name.startswith(HIDDEN) for name in names(folder))


def hit(folder: Path, number: int, delay: float) -> tuple[int, str, str]:
    """Start a merge, and send it a signal some seconds after it began to write."""
    process = start(folder, "--threads", "2")
    assert ends(lambda: is_writing(folder) or process.poll() is not None, HANGS)
    time.sleep(delay)
    process.send_signal(number)
    return finished(process)


@pytest.mark.slow
def test_a_merge_that_is_killed_leaves_no_output_and_the_next_one_cleans_up(there: Path) -> None:
    process = start(there, "--threads", "2")
    assert ends(lambda: is_writing(there), HANGS)
    began = time.monotonic()
    assert finished(process)[0] == 0
    seconds = time.monotonic() - began
    (there / "out").rename(there / "expected")
    moments, killed = random.Random(0), 0
    for attempt in range(10):
        code, _, _ = hit(there, signal.SIGKILL, moments.uniform(0, seconds))
        killed += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL)
        if (there / "out").exists():  # it was faster than the signal
            assert check_manifest(there / "out") == []
            (there / "out").rename(there / f"done-{attempt}")
        left = [name for name in names(there) if not name.startswith(("done-", HIDDEN))]
        assert left == ["expected", "recipe.yml"]
    assert killed >= 5
    assert finished(start(there))[0] == 0
    assert not is_writing(there)
    assert check_manifest(there / "out") == []
    for file in ("model.safetensors", "mergeguard-manifest.json"):
        assert (there / "out" / file).read_bytes() == (there / "expected" / file).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0, 0.05, 0.1, 0.2, 0.4])
def test_an_interrupt_is_exit_code_130_and_leaves_nothing(there: Path, delay: float) -> None:
    code, _, err = hit(there, signal.SIGINT, delay)
    if code == 0:
        assert check_manifest(there / "out") == []
    else:
        assert (code, err) == (130, "")
        assert names(there) == ["recipe.yml"]


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0, 0.1, 0.3])
def test_a_merge_that_is_terminated_leaves_no_output(there: Path, delay: float) -> None:
    code, _, _ = hit(there, signal.SIGTERM, delay)
    if code == 0:
        assert check_manifest(there / "out") == []
    else:
        assert code == -signal.SIGTERM
        assert "out" not in names(there)
        assert finished(start(there))[0] == 0
        assert names(there) == ["out", "recipe.yml"]


@pytest.mark.slow
def test_of_processes_at_once_exactly_one_wins(there: Path) -> None:
    results = [finished(process) for process in [start(there) for _ in range(3)]]
    assert sorted(code for code, _, _ in results) == [0, 2, 2]
    for code, _, err in results:
        (line,) = err.splitlines() if code else ["error: "]
        assert line.startswith("error: ")
    assert names(there) == ["out", "recipe.yml"]
    assert check_manifest(there / "out") == []


LIMITS = {
    "RLIMIT_FSIZE, (10**6, 10**6)": ((), "File too large"),
    "RLIMIT_NOFILE, (16, 16)": (("--shard-size", "1KB"), "Too many open files"),
}


@pytest.mark.slow
@pytest.mark.parametrize("limit", LIMITS)
def test_a_limit_of_the_system_is_one_line(there: Path, limit: str) -> None:
    options, message = LIMITS[limit]
    before = f"import torch, mergeguard.mergers.streaming\nimport resource as r; r.setrlimit(r.{limit})"
    code, _, err = finished(start(there, *options, before=before))
    (line,) = err.splitlines()
    assert code == 2
    assert line.startswith("error: cannot write")
    assert message in line
    assert names(there) == ["recipe.yml"]


@pytest.mark.slow
def test_the_merge_of_the_processes_is_right(there: Path, large: Path) -> None:
    """Or the tests above would compare one wrong thing with another."""
    assert finished(start(there))[0] == 0
    merged, base = load_file(there / "out/model.safetensors"), load_file(large / "b/model.safetensors")
    assert merged.keys() == base.keys()
    distance = [float((merged[name] - base[name]).norm() / base[name].norm()) for name in base]
    assert all(0.005 < value < 0.05 for value in distance), distance
    assert json.loads((there / "out/mergeguard-manifest.json").read_text())["seed"] == 0

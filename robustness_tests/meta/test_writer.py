"""Writing weights: sharded as transformers does it, each byte once, whole or refused."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergeguard.checkpoints.header import DTYPES
from mergeguard.checkpoints.writer import Entry, ShardedWriter, _Ranges, nbytes, plan_shards
from mergeguard.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
WAIT = 30
"""Seconds until a test that waits for another thread or process gives up."""
ENTRIES: list[Entry] = [("a", "F32", (3, 2)), ("b", "BF16", (5,)), ("c", "F32", ()), ("none", "F32", (0, 4))]


def content(entries: list[Entry], seed: int = 0) -> dict[str, bytes]:
    rng = random.Random(seed)
    return {entry[0]: rng.randbytes(nbytes(entry)) for entry in entries}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_everything(folder: Path, entries: list[Entry], data: dict[str, bytes], **options: Any) -> dict[str, str]:
    with ShardedWriter(folder, entries, **options) as writer:
        for name, value in data.items():
            writer.write(name, value)
        return writer.finish()


def failing(code: int) -> Callable[..., Any]:
    """A system call that fails."""

    def call(*_: object) -> Any:
        raise OSError(code, os.strerror(code))

    return call


def interrupted_writer(folder: Path) -> None:
    with ShardedWriter(folder, ENTRIES, max_shard_bytes=24) as writer:
        writer.write("a", bytes(24))
        raise KeyboardInterrupt


shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
models = st.lists(st.tuples(st.sampled_from(["F64", "F32", "BF16", "U8"]), shapes), min_size=1, max_size=8).map(
    lambda tensors: [(f"t{i}", dtype, shape) for i, (dtype, shape) in enumerate(tensors)]
)


@QUICK
@given(models, st.integers(1, 300))
def test_shards_are_those_of_transformers(entries: list[Entry], limit: int) -> None:
    from huggingface_hub.serialization._base import split_state_dict_into_shards_factory

    expected = split_state_dict_into_shards_factory(
        {entry[0]: entry for entry in entries},
        get_storage_size=nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    ).filename_to_tensors
    plan = plan_shards(entries, limit)
    assert {file: {name for name, _, _ in shard} for file, shard in plan.items()} == {
        file: set(names) for file, names in expected.items()
    }


@QUICK
@given(models, st.integers(1, 300))
def test_in_a_shard_wider_dtypes_come_first_and_the_given_order_is_kept_otherwise(
    entries: list[Entry], limit: int
) -> None:
    for shard in plan_shards(entries, limit).values():
        keys = [(-DTYPES[entry[1]], entries.index(entry)) for entry in shard]
        assert keys == sorted(keys)


@QUICK
@given(models, st.integers(1, 300), st.randoms(use_true_random=False))
def test_what_was_written_in_pieces_by_threads_is_what_safetensors_reads(
    tmp_path_factory: pytest.TempPathFactory, entries: list[Entry], limit: int, rng: random.Random
) -> None:
    from safetensors import safe_open

    folder = tmp_path_factory.mktemp("model")
    data = content(entries)
    pieces = []
    for name, value in data.items():
        cuts = sorted({0, len(value), *(rng.randint(0, len(value)) for _ in range(3))})
        pieces += [(name, start, value[start:stop]) for start, stop in pairwise(cuts)]
    rng.shuffle(pieces)
    with ShardedWriter(folder, entries, max_shard_bytes=limit) as writer, ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda piece: writer.write(piece[0], piece[2], piece[1]), pieces))
        digests = writer.finish()
    assert digests == {path.name: sha256(path) for path in folder.iterdir()}
    for name, _, shape in entries:
        with safe_open(folder / writer.files[name], "pt") as file:
            tensor = file.get_tensor(name)
            assert tuple(tensor.shape) == shape
            assert bytes(tensor.reshape(-1).view(dtype=_byte()).numpy()) == data[name]
            assert file.metadata() == {"format": "pt"}


def _byte() -> Any:
    import torch

    return torch.uint8


def test_transformers_loads_a_sharded_model_that_we_wrote(tmp_path: Path, llama: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    state = llama.state_dict()
    entries: list[Entry] = [(name, "F32", tuple(tensor.shape)) for name, tensor in state.items()]
    digests = write_everything(
        tmp_path,
        entries,
        {name: tensor.contiguous().numpy().tobytes() for name, tensor in state.items()},
        max_shard_bytes=4000,
    )
    assert len(digests) > 3
    llama.config.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_the_index_is_the_one_that_transformers_writes(tmp_path: Path) -> None:
    write_everything(tmp_path, ENTRIES, content(ENTRIES), max_shard_bytes=24)
    text = (tmp_path / "model.safetensors.index.json").read_text()
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    index = {"metadata": {"total_size": 38}, "weight_map": {"a": one, "b": two, "c": two, "none": two}}
    assert text == json.dumps(index, indent=2, sort_keys=True) + "\n"


def test_a_model_of_one_file_has_no_index(tmp_path: Path) -> None:
    assert list(write_everything(tmp_path, ENTRIES, content(ENTRIES))) == ["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_files_have_their_full_size_and_names_before_a_tensor_is_written(tmp_path: Path) -> None:
    with ShardedWriter(tmp_path, ENTRIES, max_shard_bytes=24) as writer:
        sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
        assert set(writer.files.values()) == set(sizes)
        for name, value in content(ENTRIES).items():
            writer.write(name, value)
        writer.finish()
    assert {path.name: path.stat().st_size for path in tmp_path.glob("*.safetensors")} == sizes


@pytest.mark.parametrize("array", [np.arange(6, dtype=np.float32).reshape(3, 2), np.arange(24, dtype=np.uint8)])
def test_any_contiguous_buffer_is_written_as_its_bytes(tmp_path: Path, array: np.ndarray[Any, Any]) -> None:
    digests = write_everything(tmp_path, ENTRIES[:1], {"a": memoryview(array)})  # type: ignore[dict-item]
    assert (tmp_path / "model.safetensors").read_bytes().endswith(array.tobytes())
    assert digests["model.safetensors"] == sha256(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "start", "stop"), [("a", 0, 23), ("a", 1, 24), ("b", 0, 9), ("c", 0, 0), ("b", 4, 10)]
)
def test_a_byte_that_was_never_written_is_found_and_its_tensor_named(
    tmp_path: Path, name: str, start: int, stop: int
) -> None:
    with ShardedWriter(tmp_path, ENTRIES) as writer:
        for other, value in content(ENTRIES).items():
            writer.write(other, value[start:stop] if other == name else value, start if other == name else 0)
        with pytest.raises(RuntimeError, match=f"^{name} was not written to its end"):
            writer.finish()


@pytest.mark.parametrize(("start", "stop"), [(0, 24), (0, 1), (23, 24), (7, 9)])
def test_a_byte_that_is_written_twice_is_refused(tmp_path: Path, start: int, stop: int) -> None:
    with ShardedWriter(tmp_path, ENTRIES) as writer:
        value = content(ENTRIES)["a"]
        writer.write("a", value)
        with pytest.raises(ValueError, match="of a were written before"):
            writer.write("a", value[start:stop], start)


@pytest.mark.parametrize(("offset", "size"), [(-1, 1), (24, 1), (0, 25), (20, 8)])
def test_bytes_outside_the_tensor_are_refused(tmp_path: Path, offset: int, size: int) -> None:
    with ShardedWriter(tmp_path, ENTRIES) as writer, pytest.raises(ValueError, match="of a lie outside its 24"):
        writer.write("a", b"x" * size, offset)


def test_after_the_end_nothing_is_written(tmp_path: Path) -> None:
    with ShardedWriter(tmp_path, ENTRIES) as writer:
        pass
    with pytest.raises(ValueError, match="a is written after its file was closed"):
        writer.write("a", bytes(24))
    with pytest.raises(ValueError, match="finished or closed before"):
        writer.finish()


@pytest.mark.parametrize("entries", [[("a", "F32", (1,)), ("a", "F32", (2,))]])
def test_two_tensors_of_one_name_are_refused(tmp_path: Path, entries: list[Entry]) -> None:
    with pytest.raises(ValueError, match="same name"):
        ShardedWriter(tmp_path, entries)


def test_a_model_without_tensors_and_shards_without_bytes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="it has no tensors"):
        ShardedWriter(tmp_path, [])
    with pytest.raises(ValueError, match="max_shard_bytes is 0"):
        ShardedWriter(tmp_path, ENTRIES, max_shard_bytes=0)


def test_a_full_disk_shows_before_a_tensor_is_written_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.ENOSPC))
    before = _open_files()
    with pytest.raises(
        CheckpointError, match=r"^cannot write .*model.safetensors: No space left on device; free .* need 38 bytes"
    ):
        ShardedWriter(tmp_path, [("a", "F32", (9,)), ("b", "U8", (2,))])
    assert _open_files() == before


def test_a_real_file_system_refuses_more_than_it_has(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^cannot write .*model-00001-of-00002.safetensors: (No space|File too)"):
        ShardedWriter(tmp_path, [("a", "U8", (1 << 62,)), ("b", "U8", (2,))], max_shard_bytes=5)


def test_a_disk_that_fills_up_later_shows_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ShardedWriter(tmp_path, ENTRIES) as writer:
        monkeypatch.setattr(os, "pwrite", failing(errno.ENOSPC))
        with pytest.raises(CheckpointError, match=r"^cannot write .*model.safetensors: No space left on device; free "):
            writer.write("a", bytes(24))


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL])
def test_where_space_cannot_be_reserved_files_are_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", failing(code))
    digests = write_everything(tmp_path, ENTRIES, content(ENTRIES))
    assert digests["model.safetensors"] == sha256(tmp_path / "model.safetensors")


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: whole(descriptor, data[:3], offset))
    data = content(ENTRIES)
    write_everything(tmp_path, ENTRIES, data)
    assert data["a"] in (tmp_path / "model.safetensors").read_bytes()


def test_a_file_that_cannot_be_read_back_fails_the_end_and_not_only_its_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "preadv", failing(errno.EIO))
    with pytest.raises(CheckpointError, match=r"^cannot read .* back: Input/output error"):
        write_everything(tmp_path, ENTRIES, content(ENTRIES))


@pytest.mark.parametrize("end", ["finish", "close"])
def test_the_end_waits_for_writes_that_are_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    whole, begun, go = os.pwrite, threading.Event(), threading.Event()

    def slow(descriptor: int, data: memoryview, offset: int) -> int:
        begun.set()
        assert go.wait(WAIT)
        return whole(descriptor, data, offset)

    with ShardedWriter(tmp_path, ENTRIES[:1]) as writer, ThreadPoolExecutor(2) as pool:
        monkeypatch.setattr(os, "pwrite", slow)
        write = pool.submit(writer.write, "a", bytes(24))
        assert begun.wait(WAIT)
        done = pool.submit(getattr(writer, end))
        while not writer._closed:
            assert not done.done()
        go.set()
        write.result(WAIT)
        assert done.result(WAIT) == (
            {"model.safetensors": sha256(tmp_path / "model.safetensors")} if end == "finish" else None
        )


def test_a_present_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("mine")
    with pytest.raises(CheckpointError, match=r"cannot write .*model.safetensors: File exists"):
        ShardedWriter(tmp_path, ENTRIES)
    assert (tmp_path / "model.safetensors").read_text() == "mine"


def test_a_writer_that_is_left_early_leaves_no_thread_and_no_open_file(tmp_path: Path) -> None:
    before, threads = _open_files(), threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        interrupted_writer(tmp_path)
    assert (_open_files(), threading.active_count()) == (before, threads)


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@QUICK
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 6)), max_size=12))
def test_ranges_are_the_set_of_bytes_that_they_stand_for(added: list[tuple[int, int]]) -> None:
    ranges, model = _Ranges(), set[int]()
    for start, size in added:
        new = set(range(start, start + size))
        assert ranges.add(start, start + size) == model.isdisjoint(new)
        model |= new if model.isdisjoint(new) else set()
    assert ranges.prefix == next(i for i in range(100) if i not in model)

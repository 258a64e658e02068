"""Sources: the right bytes, in memory of their own, from any thread; and no digest of a file that changed."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mergeguard.checkpoints import reader
from mergeguard.checkpoints.header import DTYPES, TORCH_NAMES
from mergeguard.checkpoints.source import Source, open_source, split_reference
from mergeguard.errors import CheckpointError

State = dict[str, torch.Tensor]


def noise(dtype: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Random bytes as a tensor: whatever its dtype, not-a-numbers included."""
    size = torch.Size(shape).numel() * DTYPES[dtype]
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 2 if dtype == "BOOL" else 256, (size,), generator=generator, dtype=torch.uint8)
    return values.view(getattr(torch, TORCH_NAMES[dtype])).view(shape)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.is_contiguous()
    assert raw(found) == raw(expected)


MODEL: State = {
    "model.embed_tokens.weight": noise("BF16", (40, 8), 1),
    "model.norm.weight": noise("F32", (8,), 2),
    "scale": noise("F64", (), 3),
    "nothing": noise("F16", (0, 4), 4),
}
OTHER: State = {"mask": noise("BOOL", (3, 5), 5), "count": noise("I64", (2,), 6)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of two shards."""
    save_file(MODEL, tmp_path / "one.safetensors")
    save_file(OTHER, tmp_path / "two.safetensors")
    weight_map = dict.fromkeys(MODEL, "one.safetensors") | dict.fromkeys(OTHER, "two.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    """The same as pickles."""
    torch.save(OrderedDict(MODEL), tmp_path / "one.bin")
    torch.save(
        {name: torch.nn.Parameter(value, requires_grad=False) for name, value in OTHER.items()}, tmp_path / "two.bin"
    )
    weight_map = dict.fromkeys(MODEL, "one.bin") | dict.fromkeys(OTHER, "two.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


@pytest.mark.parametrize("kind", ["folder", "pickled"])
def test_every_tensor_is_read_as_it_was_written(kind: str, request: pytest.FixtureRequest) -> None:
    with open_source(str(request.getfixturevalue(kind)), allow_pickle=True) as source:
        assert isinstance(source, Source)
        assert source.tensors.keys() == MODEL.keys() | OTHER.keys()
        for name, expected in (MODEL | OTHER).items():
            info = source.tensors[name]
            assert (info.name, f"torch.{info.dtype}", info.shape) == (name, str(expected.dtype), tuple(expected.shape))
            assert info.nbytes == expected.numel() * expected.itemsize
            assert_same(source.read(name), expected)


@given(dtype=st.sampled_from(sorted(DTYPES)), shape=st.lists(st.integers(0, 4), max_size=3).map(tuple))
@settings(max_examples=40)
def test_every_dtype_and_shape_is_read_into_memory_that_is_given(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, shape: tuple[int, ...]
) -> None:
    path = tmp_path_factory.mktemp("source") / "x.safetensors"
    expected = {"x": noise(dtype, shape), "y": noise("U8", (3,))}
    save_file(expected, path)
    with open_source(str(path)) as source:
        size = expected["x"].numel() * expected["x"].itemsize
        memory = bytearray(b"M" * (size + 5))
        source.read_bytes("x", memoryview(memory)[:size])
        assert memory == expected["x"].contiguous().view(-1).view(torch.uint8).numpy().tobytes() + b"MMMMM"
        assert_same(source.read("x"), expected["x"])


@pytest.mark.parametrize("kind", ["folder", "pickled"])
def test_what_was_read_belongs_to_the_reader(kind: str, request: pytest.FixtureRequest) -> None:
    with open_source(str(request.getfixturevalue(kind)), allow_pickle=True) as source:
        source.read("model.norm.weight").zero_()
        kept = source.read("model.norm.weight")
    assert_same(kept, MODEL["model.norm.weight"])


@pytest.mark.parametrize("kind", ["folder", "pickled"])
@pytest.mark.parametrize(
    "view",
    [
        memoryview(bytearray(31)),
        memoryview(bytes(32)),
        memoryview(bytearray(32)).cast("f"),
        memoryview(bytearray(32)).cast("B", [4, 8]),
        memoryview(bytearray(64))[::2],
    ],
    ids=["short", "read-only", "floats", "matrix", "strided"],
)
def test_memory_that_does_not_do_is_refused(kind: str, request: pytest.FixtureRequest, view: memoryview) -> None:
    with (
        open_source(str(request.getfixturevalue(kind)), allow_pickle=True) as source,
        pytest.raises(ValueError, match=r"memory for model\.norm.weight must be 32 contiguous writable bytes"),
    ):
        source.read_bytes("model.norm.weight", view)


def test_a_tensor_is_read_in_requests_of_bounded_length_that_may_come_back_short(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    preadv = os.preadv

    def short(handle: int, buffers: Any, offset: int) -> int:
        asked.append(len(buffers[0]))
        return preadv(handle, [buffers[0][: max(1, len(buffers[0]) // 2)]], offset)

    monkeypatch.setattr(os, "preadv", short)
    monkeypatch.setattr(reader, "REQUEST_BYTES", 100)
    with open_source(str(folder)) as source:
        assert_same(source.read("model.embed_tokens.weight"), MODEL["model.embed_tokens.weight"])
    assert max(asked) == 100


def test_threads_read_at_the_same_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two reads of one file wait for each other inside `preadv`: neither holds a lock then."""
    meeting = threading.Barrier(2, timeout=30)
    preadv = os.preadv

    def wait(*arguments: Any) -> int:
        meeting.wait()
        return preadv(*arguments)

    with open_source(str(folder)) as source, ThreadPoolExecutor(2) as pool:
        monkeypatch.setattr(os, "preadv", wait)
        for found in pool.map(source.read, ["model.embed_tokens.weight"] * 2):
            assert_same(found, MODEL["model.embed_tokens.weight"])


def test_many_threads_read_what_one_thread_reads(folder: Path) -> None:
    names = [*MODEL, *OTHER] * 30
    with open_source(str(folder)) as source, ThreadPoolExecutor(8) as pool:
        for name, found in zip(names, pool.map(source.read, names), strict=True):
            assert_same(found, (MODEL | OTHER)[name])


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - iterating a Path keeps one more open


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts this process's open files in /proc")
def test_files_are_opened_once_and_released(folder: Path) -> None:
    before = open_files()
    source = open_source(str(folder))
    for name in [*source.tensors] * 2:
        source.read(name)
    assert open_files() == before + 2
    source.close()
    assert open_files() == before
    source.close()
    with pytest.raises(CheckpointError, match="is closed already"):
        source.read("count")
    abandoned = open_source(str(folder))
    abandoned.read("count")
    del abandoned
    assert open_files() == before


@pytest.mark.parametrize("kind", ["folder", "pickled"])
def test_a_tensor_that_is_not_there_is_named(kind: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(kind)
    with open_source(str(path), allow_pickle=True) as source, pytest.raises(CheckpointError) as caught:
        source.read("model.norm.bias")
    assert str(caught.value) == f"{path}: tensor 'model.norm.bias' is not part of the model"


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def touch(path: Path) -> None:
    os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns + 1))


def replace(path: Path) -> None:
    before, content = path.stat(), path.read_bytes()
    (path.parent / "new").write_bytes(content)
    os.utime(path.parent / "new", ns=(before.st_atime_ns, before.st_mtime_ns))
    (path.parent / "new").replace(path)


def remove(path: Path) -> None:
    path.unlink()


CHANGES = [grow, touch, replace, remove]


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_before_its_first_tensor_is_read_is_not_read(folder: Path, change: Any) -> None:
    source = open_source(str(folder))
    change(folder / "two.safetensors")
    assert_same(source.read("scale"), MODEL["scale"])
    with pytest.raises(CheckpointError, match=r"two\.safetensors (changed while it was used|cannot be read)"):
        source.read("mask")
    with pytest.raises(CheckpointError, match=r"two\.safetensors (changed while it was used|cannot be read any more)"):
        source.close()


@pytest.mark.parametrize("kind", ["folder", "pickled"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changed_after_it_was_read_is_reported_in_the_end(
    kind: str, request: pytest.FixtureRequest, change: Any
) -> None:
    path = request.getfixturevalue(kind)
    source = open_source(str(path), allow_pickle=True)
    source.read("mask")
    source.check_unchanged()
    change(path / ("two.bin" if kind == "pickled" else "two.safetensors"))
    with pytest.raises(CheckpointError, match=r"two\.\w+ (changed while it was used|cannot be read any more)"):
        source.check_unchanged()
    with pytest.raises(CheckpointError, match=r"changed while it was used|cannot be read any more"):
        source.close()


def test_a_failure_inside_the_block_is_not_hidden_by_a_file_that_changed(folder: Path) -> None:
    def fail_meanwhile() -> None:
        with open_source(str(folder)):
            grow(folder / "one.safetensors")
            raise KeyError("the real reason")

    with pytest.raises(KeyError, match="the real reason"):
        fail_meanwhile()


def test_a_file_that_is_cut_short_under_the_reader_is_an_error(folder: Path) -> None:
    source = open_source(str(folder))
    source.read("scale")
    os.truncate(folder / "one.safetensors", 700)
    with pytest.raises(CheckpointError, match=r"one\.safetensors ended at byte 700: it changed"):
        source.read("model.embed_tokens.weight")


def test_a_disk_that_fails_is_an_error_that_names_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with (
        open_source(str(folder)) as source,
        pytest.raises(CheckpointError, match=r"one\.safetensors cannot be read at"),
    ):
        source.read("scale")


def tied_state(flip: int | None) -> State:
    head = MODEL["model.embed_tokens.weight"].clone()
    if flip is not None:
        head.view(torch.uint8).view(-1)[flip] ^= 1
    return {"model.embed_tokens.weight": MODEL["model.embed_tokens.weight"], "lm_head.weight": head}


def write_tied(folder: Path, flip: int | None, *, pickle: bool) -> str:
    if pickle:
        torch.save(tied_state(flip), folder / "pytorch_model.bin")
    else:
        save_file(tied_state(flip), folder / "model.safetensors")
    (folder / "config.json").write_text('{"tie_word_embeddings": true}')
    return str(folder)


@pytest.mark.parametrize("pickle", [False, True])
def test_a_tied_model_is_read_without_its_head(tmp_path: Path, pickle: bool) -> None:
    with open_source(write_tied(tmp_path, None, pickle=pickle), allow_pickle=True) as source:
        assert list(source.tensors) == ["model.embed_tokens.weight"]
        with pytest.raises(CheckpointError, match=r"is not part of the model: it is tied to model\.embed_tokens"):
            source.read("lm_head.weight")


@pytest.mark.parametrize("flip", [0, 99, 100, 639])
@pytest.mark.parametrize("pickle", [False, True])
def test_a_head_that_differs_in_one_bit_from_what_it_is_tied_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flip: int, pickle: bool
) -> None:
    monkeypatch.setattr(reader, "REQUEST_BYTES", 100)
    reference = write_tied(tmp_path, flip, pickle=pickle)
    with pytest.raises(CheckpointError, match=r"tensor 'lm_head\.weight' differs from model\.embed_tokens"):
        open_source(reference, allow_pickle=True)


def test_nothing_but_the_embeddings_of_a_tied_model_is_read_to_open_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "preadv", lambda *_: pytest.fail("read"))
    open_source(str(folder)).close()


def test_what_transformers_saves_is_what_is_read(tmp_path: Path, llama: Any) -> None:
    llama.save_pretrained(tmp_path, max_shard_size="20KB")
    stored = {name: value for shard in tmp_path.glob("*.safetensors") for name, value in load_file(shard).items()}
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    with open_source(str(tmp_path)) as source:
        assert source.tensors.keys() == llama.state_dict().keys() == stored.keys()
        for name, expected in stored.items():
            assert_same(source.read(name), expected)


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("model", ("model", None)),
        ("org/model@main", ("org/model@main", None)),
        ("model+adapter", ("model", "adapter")),
        ("a+b", ("a+b", None)),
        ("a+b+adapter", ("a+b", "adapter")),
        ("x+y+z", ("x", "y+z")),
    ],
)
def test_a_reference_names_a_model_and_perhaps_an_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str, expected: tuple[str, str | None]
) -> None:
    for name in ("a+b", "adapter"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert split_reference(reference) == expected


@pytest.mark.parametrize("reference", ["+adapter", "model+"])
def test_a_reference_with_an_empty_side_is_refused(reference: str) -> None:
    with pytest.raises(CheckpointError, match=r"expected MODEL or MODEL\+ADAPTER"):
        split_reference(reference)

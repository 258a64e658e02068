"""safetensors headers: all that safetensors writes is read alike; of anything else there is one clear line."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from mergeguard.checkpoints.header import DTYPES, TORCH_NAMES, encode_header, read_header
from mergeguard.errors import CheckpointError

ROOT = Path(__file__).parents[2]
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(lambda n: n != "__metadata__")
SHAPES = st.lists(st.integers(0, 3), max_size=4)
ENTRIES = st.dictionaries(NAMES, st.tuples(st.sampled_from(sorted(DTYPES)), SHAPES), max_size=6)
METADATA = st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=4), NAMES, max_size=2)


def raw(header: bytes | dict[str, Any], data: bytes = b"") -> bytes:
    """A file with this header, however wrong it is."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: Any = "U8", shape: Any = (3,), offsets: Any = (0, 3)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


VALID = save(
    {
        "layer.weight": torch.arange(6, dtype=torch.float32).view(2, 3),
        "layer.bias": torch.ones(5, dtype=torch.bfloat16),
        "none": torch.empty(0, 4),
        "step": torch.tensor(7),
        "flags": torch.tensor([True, False, True]),
    },
    {"format": "pt"},
)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place that every example of a property writes anew."""
    return tmp_path_factory.mktemp("header") / "file.safetensors"


def as_safetensors_reads(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    with safe_open(path, "pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - it is no dict
        return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}


def as_we_read(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in read_header(path).tensors.items()}


def read_or_refuse(path: Path) -> None:
    """Either every tensor is what safetensors reads, or there is one line about the file."""
    try:
        header = read_header(path)
    except CheckpointError as error:
        message = str(error)
        assert message.isprintable()
        assert message.startswith(str(path))
        assert len(message) < 1000
        return
    assert as_we_read(path) == as_safetensors_reads(path)
    assert sum(tensor.nbytes for tensor in header.tensors.values()) <= path.stat().st_size


@given(
    specs=st.dictionaries(NAMES, st.tuples(st.sampled_from(sorted(DTYPES)), SHAPES), max_size=5),
    metadata=st.none() | METADATA,
    seed=st.integers(0, 9),
)
@settings(max_examples=60)
def test_every_tensor_of_a_file_that_safetensors_wrote_is_found_with_its_bytes(
    file: Path, specs: dict[str, tuple[str, list[int]]], metadata: dict[str, str] | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (dtype, shape) in specs.items():
        count = int(torch.Size(shape).numel()) * DTYPES[dtype]
        noise = torch.randint(0, 2, (count,), generator=generator, dtype=torch.uint8)
        tensors[name] = noise.view(getattr(torch, TORCH_NAMES[dtype])).view(shape)
    if not tensors and not metadata:
        metadata = None  # of no tensors and {} safetensors 0.8 writes a file that it cannot read itself
    content = save(tensors, metadata)
    file.write_bytes(content)

    header = read_header(file)

    assert header.metadata == (metadata or {})
    assert header.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        found = header.tensors[name]
        assert (found.dtype, list(found.shape)) == specs[name]
        expected = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        assert content[found.start : found.stop] == expected


@given(entries=ENTRIES, metadata=METADATA)
@settings(max_examples=60)
def test_a_header_that_we_encode_is_read_by_safetensors_and_by_us_as_it_was_meant(
    file: Path, entries: dict[str, tuple[str, list[int]]], metadata: dict[str, str]
) -> None:
    encoded = encode_header([(name, dtype, shape) for name, (dtype, shape) in entries.items()], metadata)
    assert len(encoded) % 8 == 0
    sizes = [torch.Size(shape).numel() * DTYPES[dtype] for dtype, shape in entries.values()]
    file.write_bytes(encoded + bytes(sum(sizes)))

    expected = {name: (dtype, tuple(shape)) for name, (dtype, shape) in entries.items()}
    assert as_safetensors_reads(file) == expected
    assert as_we_read(file) == expected
    assert read_header(file).metadata == metadata
    start = len(encoded)
    for name, size in zip(entries, sizes, strict=True):
        found = read_header(file).tensors[name]
        assert (found.start, found.stop) == (start, start + size)
        start += size


@given(
    content=st.binary(max_size=200)
    | st.binary(max_size=120).map(raw)
    | st.binary(max_size=120).map(lambda b: raw(b"{" + b))
)
@settings(max_examples=100)
def test_random_bytes_are_refused_with_one_line(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    read_or_refuse(file)


@given(
    cut=st.integers(0, len(VALID)),
    flips=st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 7)), max_size=3),
    extra=st.binary(max_size=3),
)
@settings(max_examples=150)
def test_a_damaged_file_is_read_right_or_refused_with_one_line(
    file: Path, cut: int, flips: list[tuple[int, int]], extra: bytes
) -> None:
    content = bytearray(VALID)
    for place, bit in flips:
        content[place] ^= 1 << bit
    file.write_bytes(bytes(content[: cut if not flips else None]) + extra)
    read_or_refuse(file)


NUMBERS = st.sampled_from([0, 1, 2, 3, 4, 6, -1, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, 1.0, 2.5, True, None, "3"])
VALUES = NUMBERS | st.lists(NUMBERS, max_size=3)


@given(
    header=st.dictionaries(
        st.sampled_from(["a", "b", "__metadata__", "\ud800", "n\new"]),
        st.fixed_dictionaries(
            {"dtype": st.sampled_from([*DTYPES, "F4", "f32", 3]), "shape": VALUES, "data_offsets": VALUES},
            optional={"extra": NUMBERS},
        )
        | VALUES,
        max_size=3,
    ),
    size=st.integers(0, 12),
)
@settings(max_examples=200)
def test_any_offsets_shapes_and_dtypes_are_read_right_or_refused_with_one_line(
    file: Path, header: dict[str, Any], size: int
) -> None:
    file.write_bytes(raw(header, bytes(size)))
    read_or_refuse(file)


MANY_ONES = [1] * 65
REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "has 0 bytes"),
    "short": (b"1234567", "has 7 bytes"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n", "git lfs pull"),
    "header beyond the file": ((100).to_bytes(8, "little") + b"{}", "less than its header alone"),
    "huge header": ((2**63).to_bytes(8, "little") + b"{}", "less than its header alone"),
    "no object": (raw(b"[]"), "does not start with"),
    "leading space": (raw(b" {}"), "does not start with"),
    "bad utf-8": (raw(b'{"\xff": 1}'), "not UTF-8"),
    "bad json": (raw(b'{"a": '), "not JSON"),
    "nul padding": (raw(b"{}\0\0"), "not JSON"),
    "minus zero": (raw(b'{"a":{"dtype":"U8","shape":[3],"data_offsets":[-0,3]}}', b"abc"), "not JSON"),
    "deep": (raw(b'{"a":' * 20000), "nested too deeply"),
    "a name twice": (raw(b'{"a":1,"a":2}'), "names 'a' twice"),
    "a field twice": (
        raw(b'{"a":{"dtype":"U8","dtype":"I8","shape":[3],"data_offsets":[0,3]}}', b"abc"),
        "'dtype' twice",
    ),
    "metadata not text": (raw({"__metadata__": {"a": 1}}), "not an object of texts"),
    "metadata a list": (raw({"__metadata__": ["a"]}), "not an object of texts"),
    "lone surrogate": (
        raw(b'{"\\ud800":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}', b"abc"),
        "not valid Unicode",
    ),
    "entry a list": (raw({"a": ["U8", [3], [0, 3]]}, b"abc"), "other fields"),
    "a field more": (raw({"a": {**entry(), "x": 1}}, b"abc"), "other fields"),
    "unknown dtype": (raw({"a": entry("F128")}, b"abc"), "unknown dtype 'F128'"),
    "dtype a number": (raw({"a": entry(8)}, b"abc"), "unknown dtype"),
    "packed dtype": (raw({"a": entry("F4", [6])}, b"abc"), "packed dtype F4"),
    "fractional shape": (raw({"a": entry(shape=[3.0])}, b"abc"), "has a shape that"),
    "negative shape": (raw({"a": entry(shape=[-3])}, b"abc"), "has a shape that"),
    "shape true": (raw({"a": entry(shape=[True], offsets=[0, 1])}, b"a"), "has a shape that"),
    "shape a number": (raw({"a": entry(shape=3)}, b"abc"), "has a shape that"),
    "65 dimensions": (raw({"a": entry(shape=MANY_ONES, offsets=[0, 1])}, b"a"), "has 65 dimensions"),
    "uncountable": (raw({"a": entry(shape=[2**40, 2**40, 0], offsets=[0, 0])}), "counted in 64 bits"),
    "one offset": (raw({"a": entry(offsets=[0])}, b"abc"), "two whole numbers"),
    "negative offset": (raw({"a": entry(offsets=[-3, 0])}, b"abc"), "two whole numbers"),
    "fractional offset": (raw({"a": entry(offsets=[0, 3.0])}, b"abc"), "two whole numbers"),
    "backwards": (raw({"a": entry(offsets=[3, 0])}, b"abc"), "before it starts"),
    "beyond the file": (raw({"a": entry(shape=[4], offsets=[0, 4])}, b"abc"), "ends at byte 4 of 3"),
    "wrong size": (raw({"a": entry(shape=[2])}, b"abc"), "has 3 bytes, but U8 of shape [2] has 2"),
    "hole": (raw({"a": entry(offsets=[1, 4])}, b"abcd"), "follows 1 bytes"),
    "hole between": (raw({"a": entry(), "b": entry(offsets=[4, 7])}, bytes(7)), "'b' follows 1 bytes"),
    "overlap": (raw({"a": entry(), "b": entry(offsets=[2, 5])}, bytes(5)), "'b' overlaps"),
    "same bytes twice": (raw({"a": entry(), "b": entry()}, b"abc"), "overlaps"),
    "trailing bytes": (raw({"a": entry()}, b"abcd"), "has 1 bytes after its last tensor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_is_not_as_it_should_be_is_refused_with_the_reason(file: Path, case: str) -> None:
    content, expected = REFUSED[case]
    file.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(file)
    assert expected in str(caught.value)
    assert str(caught.value).startswith(str(file))
    assert str(caught.value).isprintable()


def test_a_header_longer_than_the_format_allows_is_refused_before_it_is_read(file: Path) -> None:
    with file.open("wb") as opened:
        opened.write((100_000_001).to_bytes(8, "little"))
        opened.truncate(100_000_009)  # sparse: no byte of it is on the disk
    with pytest.raises(CheckpointError, match="header of 100000001 bytes"):
        read_header(file)


def test_the_name_of_a_tensor_in_an_error_is_short_and_on_one_line(file: Path) -> None:
    file.write_bytes(raw({"a\nb" + "c" * 5000: 1}))
    with pytest.raises(CheckpointError) as caught:
        read_header(file)
    assert r"'a\nbccc" in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("kind", ["absent", "folder", "pipe"])
def test_what_is_no_regular_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.safetensors"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(CheckpointError, match=r"x\.safetensors (cannot be read: No such|is not a regular file)"):
        read_header(path)


def test_only_the_header_of_a_huge_file_is_read(file: Path) -> None:
    head = encode_header([("a", "F32", (1 << 30,)), ("b", "U8", (3,))], {})
    with file.open("wb") as opened:
        opened.write(head)
        opened.truncate(len(head) + (4 << 30) + 3)  # sparse
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tensor = read_header(file).tensors["b"]
    assert (tensor.start, tensor.stop) == (len(head) + (4 << 30), len(head) + (4 << 30) + 3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
    file.unlink()


def test_safetensors_would_take_no_file_that_reading_by_it_shows_to_be_broken(file: Path) -> None:
    """The other reader of these tests does refuse something: else agreeing with it would mean little."""
    file.write_bytes(REFUSED["hole"][0])
    with pytest.raises(SafetensorError):
        as_safetensors_reads(file)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([("a", "F32", (1,)), ("a", "F32", (1,))], "the name is taken"),
        ([("__metadata__", "F32", (1,))], "the name is taken"),
        ([("a", "float32", (1,))], "unknown dtype 'float32'"),
        ([("a", "F32", (2, -1))], "negative dimension"),
        ([("\ud800", "F32", (1,))], "not valid Unicode"),
    ],
)
def test_a_header_that_no_reader_would_take_is_not_encoded(entries: list[Any], expected: str) -> None:
    with pytest.raises(CheckpointError, match=expected):
        encode_header(entries, {})


def test_the_names_of_dtypes_are_torchs() -> None:
    assert {name: getattr(torch, TORCH_NAMES[name]).itemsize for name in DTYPES} == DTYPES


@pytest.mark.parametrize("module", ["header", "checkpoint", "tied", "reader", "resolve", "adapter_config", "source"])
def test_no_torch_is_imported_to_look_at_a_checkpoint(module: str) -> None:
    program = f"import mergeguard.checkpoints.{module}, sys; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0

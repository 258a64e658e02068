"""Any checkpoint, index and config in, and either a whole model or one line out.

Whatever the input, nothing else is left on the disk, memory stays small, and the merge ends: a watchdog ends the whole
process if it does not.
"""

from __future__ import annotations

import json
import shutil
import tracemalloc
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robustness_tests.meta.checkpoints_on_disk import CONFIG, family, save_model
from robustness_tests.meta.fuzzing import copied, few, header_of, junk, merge_with, save_models, write_file

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


@few
@given(data=st.data())
def test_a_damaged_file_is_merged_or_refused(models: Path, data: st.DataObject) -> None:
    with copied(models / "x") as folder:
        file = folder / "model.safetensors"
        content = bytearray(file.read_bytes())
        header = int.from_bytes(content[:8], "little") + 8
        kind = data.draw(st.sampled_from(["cut", "flip header", "flip data", "insert", "remove", "length", "any"]))
        if kind == "cut":
            del content[data.draw(st.integers(0, len(content))) :]
        elif kind == "any":
            content = bytearray(data.draw(st.binary(max_size=64)))
        elif kind == "length":
            content[:8] = data.draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little")
        else:
            limits = (header, len(content) - 1) if kind == "flip data" else (0, header)
            for _ in range(data.draw(st.integers(1, 3))):
                place = data.draw(st.integers(*limits))
                if kind == "insert":
                    content[place:place] = data.draw(st.binary(min_size=1, max_size=9))
                elif kind == "remove":
                    del content[place : place + data.draw(st.integers(1, 9))]
                else:
                    content[place] ^= 1 << data.draw(st.integers(0, 7))
        file.write_bytes(content)
        merge_with(models, folder, data.draw(st.sampled_from(["ties", "linear"])))


HEADER_MISTAKES = ["start", "stop", "both", "shape", "dimension", "dtype", "delete", "rename", "twice", "share",
                   "field", "metadata"]  # fmt: skip
SIZES = [0, 1, -1, 7, 8, 64, 2**31, 2**40, 2**62, 2**63, 2**64, 10**30, -(2**63), 1.5, "8", None, True, [], {}]


@few
@given(data=st.data())
def test_a_header_that_lies_is_refused_or_harmless(models: Path, data: st.DataObject) -> None:
    with copied(models / "x") as folder:
        file = folder / "model.safetensors"
        header, content = header_of(file)
        names = [name for name in header if name != "__metadata__"]
        twice = None
        for _ in range(data.draw(st.integers(1, 2))):
            name = data.draw(st.sampled_from(names))
            entry = header.get(name, {})
            kind = data.draw(st.sampled_from(HEADER_MISTAKES))
            size = data.draw(st.sampled_from(SIZES))
            if kind == "delete":
                header.pop(name, None)
            elif kind == "rename":
                header[data.draw(st.sampled_from(["", "\ud800", "a" * 5000, "lm_head.bias", "\x1b[31m\n"]))] = entry
                header.pop(name, None)
            elif kind == "twice" and name in header:
                twice = name
            elif kind == "share":
                header[name] = header.get(data.draw(st.sampled_from(names)), {})
            elif kind == "metadata":
                header["__metadata__"] = data.draw(junk.filter(lambda value: value == value))
            elif kind == "field":
                entry[data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "extra"]))] = size
            elif kind == "dtype":
                entry["dtype"] = data.draw(
                    st.sampled_from(["F64", "F16", "BF16", "I32", "F8_E4M3", "C64", "BOOL", "F4"])
                )
            elif isinstance(entry.get("data_offsets"), list) and isinstance(entry.get("shape"), list):
                offsets, shape = [*entry["data_offsets"], 0, 0][:2], list(entry["shape"])
                if kind == "dimension":
                    entry["shape"] = [size, *shape[1:]]
                elif kind == "shape":
                    entry["shape"] = data.draw(
                        st.sampled_from([[], [0], [size] * 3, shape[::-1], [1, *shape], [1] * 70])
                    )
                else:
                    offsets[0] = size if kind in ("start", "both") else offsets[0]
                    offsets[1] = size if kind in ("stop", "both") else offsets[1]
                    entry["data_offsets"] = offsets
        write_file(file, header, content, twice=twice if twice in header else None)
        merge_with(models, folder, data.draw(st.sampled_from(["ties", "linear"])))


@few
@given(data=st.data())
def test_an_index_that_lies_is_refused_or_harmless(models: Path, data: st.DataObject) -> None:
    with copied(models / "y") as folder:
        file = folder / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        shards = sorted(set(index["weight_map"].values()))
        elsewhere = ["/etc/passwd", "../outside.safetensors", str(models / "x/model.safetensors"), "", ".",
                     "config.json", "a\x00b", "..\\x", "nowhere.safetensors", *shards]  # fmt: skip
        name = data.draw(st.sampled_from(sorted(index["weight_map"])))
        kind = data.draw(st.sampled_from(["move", "move", "add", "delete", "map", "cut", "shard", "link", "both"]))
        if kind == "move":
            index["weight_map"][name] = data.draw(st.sampled_from(elsewhere) | junk)
        elif kind == "add":
            index["weight_map"]["new"] = data.draw(st.sampled_from(elsewhere))
        elif kind == "delete":
            del index["weight_map"][name]
        elif kind == "map":
            index["weight_map"] = data.draw(junk)
        elif kind == "shard":
            shard = folder / data.draw(st.sampled_from(shards))
            shard.unlink()
            if data.draw(st.booleans()):
                shard.write_bytes(b"")
        elif kind == "link":
            shard = folder / shards[0]
            shard.unlink()
            shard.symlink_to(models / "y" / shards[0])
        elif kind == "both":
            shutil.copy(models / "x" / "model.safetensors", folder)
        text = json.dumps(index)
        file.write_text(text[: data.draw(st.integers(0, len(text)))] if kind == "cut" else text)
        shutil.copy(models / "x" / "model.safetensors", folder.parent / "outside.safetensors")
        error = merge_with(models, folder, "linear")
        assert error is not None or kind in ("move", "cut"), kind  # which may change nothing


@few
@given(data=st.data())
def test_a_config_of_any_kind_is_taken_or_refused(models: Path, data: st.DataObject) -> None:
    with copied(models / "x") as folder:
        config: dict[str, Any] = dict(CONFIG)
        keys = [*CONFIG, "text_config", "rope_scaling", "dtype", "quantization_config", "eos_token_id", "auto_map",
                "n_layer", "num_layers", "torch_dtype", "layer_types"]  # fmt: skip
        values = junk | st.sampled_from(["a\nb", {"num_hidden_layers": 2}, {"vocab_size": 3}, [1, 2], "\x1b[31m"])
        for _ in range(data.draw(st.integers(1, 3))):
            key = data.draw(st.sampled_from(keys))
            config[key] = data.draw(
                values.filter(lambda value: not isinstance(value, list | dict)) if key == "model_type" else values
            )
        text = json.dumps(config)
        (folder / "config.json").write_text(text[: data.draw(st.sampled_from([None, None, None, 0, 1, 30]))])
        merge_with(models, folder, data.draw(st.sampled_from(["ties", "linear"])))


def test_a_model_type_that_is_no_text_is_refused_or_harmless(models: Path) -> None:
    with copied(models / "x") as folder:
        config = {key: value for key, value in CONFIG.items() if key != "tie_word_embeddings"}
        (folder / "config.json").write_text(json.dumps(config | {"model_type": []}))
        merge_with(models, folder)


def test_an_index_with_a_name_that_no_file_can_have_is_refused(models: Path) -> None:
    with copied(models / "y") as folder:
        file = folder / "model.safetensors.index.json"
        file.write_text(json.dumps({"weight_map": {"a": "n" * 5000}}))
        assert merge_with(models, folder) is not None


def test_sizes_that_a_header_only_claims_are_not_allocated(models: Path) -> None:
    with copied(models / "x") as folder:
        file = folder / "model.safetensors"
        header, content = header_of(file)
        for size in (2**30, 2**45, 2**62):
            header["lm_head.weight"] = {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}
            write_file(file, header, content)
            tracemalloc.start()
            try:
                error = merge_with(models, folder)
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
            assert error is not None
            assert peak < 5_000_000


def test_empty_and_scalar_tensors_are_merged(models: Path, tmp_path: Path) -> None:
    extra = {"model.empty.weight": torch.empty(0, 8), "model.scale": torch.tensor(2.0)}
    folders = [save_model(tmp_path / n, s | extra) for n, s in zip("bxy", family(2), strict=True)]
    assert merge_with(tmp_path, folders[1]) is None
    assert merge_with(tmp_path, folders[1], "linear") is None
    assert merge_with(models, folders[1]) is not None  # the others lack them

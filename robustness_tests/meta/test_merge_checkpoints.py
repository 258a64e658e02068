"""Merges from files to files: what is written, that it is whole or absent, and the same for any number of threads."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mergeguard.checkpoints.manifest import MANIFEST, check_manifest, read_manifest
from mergeguard.checkpoints.source import open_source
from mergeguard.errors import CheckpointError, IncompatibleModelsError, MergeguardError, ParameterError
from mergeguard.mergers import merge_models, parse_merger, read_ahead, spans, streaming
from mergeguard.mergers.jobs import Job
from mergeguard.mergers.merge import Options, merge_checkpoints, parse_size
from robustness_tests.meta.checkpoints_on_disk import SHAPES, State, family, save_model, write_recipe

if TYPE_CHECKING:
    from pathlib import Path

    from mergeguard.mergers.buffers import Buffer


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """Folders of a base and two models."""
    return [save_model(tmp_path / name, state) for name, state in zip("bxy", family(2), strict=True)]


def loaded(folder: Path) -> State:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def recipe_for(tmp_path: Path, models: list[Path], method: str = "ties", **more: Any) -> Path:
    each = {"weight": 0.5, "density": 0.4} if method != "linear" else {"weight": 0.5}
    base = None if method == "linear" else models[0]
    return write_recipe(tmp_path / "recipe.yml", method, models[1:], base=base, each=each, **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties"])
def test_a_streamed_merge_is_the_merge_in_memory(tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    states = family(2, dtype=dtype)
    models = [save_model(tmp_path / n, s, shards=k) for n, s, k in zip("bxy", states, (1, 2, 3), strict=True)]
    merge_checkpoints(recipe_for(tmp_path, models, method), tmp_path / "out", Options(seed=5))
    spec = method if method == "linear" else f"{method}(density=0.4)"
    expected = merge_models(parse_merger(spec), states[0], states[1:], [0.5, 0.5], seed=5)
    found = loaded(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) and found[name].dtype == dtype for name in expected)


def test_what_is_written_loads_in_transformers_and_satisfies_its_manifest(tmp_path: Path, models: list[Path]) -> None:
    merged = merge_checkpoints(recipe_for(tmp_path, models), tmp_path / "out")
    assert merged.folders == (tmp_path / "out",)
    assert check_manifest(tmp_path / "out") == []
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, loaded(tmp_path / "out")["lm_head.weight"])
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["ancestor"]["distances"].keys() == {str(models[1]), str(models[2])}


@pytest.mark.parametrize("damage", ["flip", "extra", "missing", "config"])
def test_a_merged_model_that_changed_is_reported_file_by_file(tmp_path: Path, models: list[Path], damage: str) -> None:
    out = tmp_path / "out"
    merge_checkpoints(recipe_for(tmp_path, models), out)
    file = out / "model.safetensors"
    if damage == "flip":
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(data)
    elif damage == "extra":
        (out / "extra.safetensors").write_bytes(file.read_bytes())
    elif damage == "missing":
        file.unlink()
    else:
        (out / "config.json").write_text("{}")
    (problem,) = check_manifest(out)
    assert {"extra": "extra.safetensors", "config": "config.json"}.get(damage, "model.safetensors") in problem


def test_the_same_bytes_for_any_number_of_threads_and_shards_of_the_inputs(tmp_path: Path) -> None:
    states = family(3, dtype=torch.bfloat16)
    recipes = []
    for shards in (1, 4):
        folders = [save_model(tmp_path / f"{shards}-{i}", state, shards=shards) for i, state in enumerate(states)]
        recipes.append(recipe_for(tmp_path / f"{shards}-0", folders, "dare_ties"))
    found = set()
    for threads, recipe in ((1, recipes[0]), (2, recipes[0]), (7, recipes[1])):
        out = tmp_path / f"out-{threads}"
        merge_checkpoints(recipe, out, Options(seed=1, threads=threads))
        found.add(json.dumps({name: tensor.float().tolist() for name, tensor in sorted(loaded(out).items())}))
    assert len(found) == 1


def test_another_seed_draws_other_masks(tmp_path: Path, models: list[Path]) -> None:
    recipe = recipe_for(tmp_path, models, "dare_linear")
    for seed in (0, 1):
        merge_checkpoints(recipe, tmp_path / str(seed), Options(seed=seed))
    assert (tmp_path / "0/model.safetensors").read_bytes() != (tmp_path / "1/model.safetensors").read_bytes()


def test_a_sweep_writes_a_model_per_coefficient_and_each_is_the_merge_with_those_weights(
    tmp_path: Path, models: list[Path]
) -> None:
    recipe = recipe_for(tmp_path, models)
    merged = merge_checkpoints(recipe, tmp_path / "sweep", Options(coefficients=(0.25, 0.5)))
    assert [folder.name for folder in merged.folders] == ["0.25", "0.5"]
    merge_checkpoints(recipe, tmp_path / "half")  # the recipe's own weights
    half = (tmp_path / "half/model.safetensors").read_bytes()
    assert (tmp_path / "sweep/0.5/model.safetensors").read_bytes() == half
    assert (tmp_path / "sweep/0.25/model.safetensors").read_bytes() != half
    assert all(check_manifest(folder) == [] for folder in merged.folders)
    assert [read_manifest(folder)["options"]["coefficient"] for folder in merged.folders] == [0.25, 0.5]


def test_large_tensors_go_through_in_chunks_and_spans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = family(2)
    expected = merge_models(parse_merger("ties(density=0.4)"), states[0], states[1:], [0.5, 0.5], seed=0)
    monkeypatch.setattr(streaming, "_CHUNK", 50)
    monkeypatch.setattr(spans, "SPAN", 7)
    models = [save_model(tmp_path / name, state) for name, state in zip("bxy", states, strict=True)]
    merge_checkpoints(recipe_for(tmp_path, models), tmp_path / "out")
    found = loaded(tmp_path / "out")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_dtype_chooses_the_arithmetic_and_out_dtype_the_file(tmp_path: Path) -> None:
    states = family(2, dtype=torch.bfloat16)
    models = [save_model(tmp_path / name, state) for name, state in zip("bxy", states, strict=True)]
    merge_checkpoints(recipe_for(tmp_path, models, dtype="float32", out_dtype="bfloat16"), tmp_path / "out")
    wide = [{name: tensor.float() for name, tensor in state.items()} for state in states]
    expected = merge_models(parse_merger("ties(density=0.4)"), wide[0], wide[1:], [0.5, 0.5], seed=0)
    found = loaded(tmp_path / "out")
    assert all(torch.equal(found[name], expected[name].bfloat16()) for name in expected)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("working", ["float16", "bfloat16", "float32", "float64"])
def test_stored_bytes_become_the_arithmetics_dtype_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: torch.dtype, working: str
) -> None:
    monkeypatch.setattr(spans, "SPAN", 5)
    monkeypatch.setattr(spans.spans, "__defaults__", (5,))
    values = torch.randn(7, 9, generator=torch.Generator().manual_seed(0)).to(stored)
    for shape in ((63,), (7, 9), (0, 4), ()):
        state = {"w": values.flatten()[: math.prod(shape)].reshape(shape).clone()}
        source = open_source(str(save_model(tmp_path / f"{len(shape)}-{math.prod(shape)}", state)))
        job = Job("w", ((0, "w"),), None, (1.0,), {})
        with source, read_ahead.ReadAhead([job], [source], working) as ahead:
            (read,) = ahead
            (tensor,) = read_ahead.tensors_of(read, [source])
            assert torch.equal(tensor, state["w"].to(getattr(torch, working)))


def test_integer_tensors_are_copied_if_equal_and_refused_if_not(tmp_path: Path) -> None:
    states = [state | {"model.steps": torch.tensor([3, 4])} for state in family(2)]
    models = [save_model(tmp_path / name, state) for name, state in zip("bxy", states, strict=True)]
    recipe = recipe_for(tmp_path, models)
    merge_checkpoints(recipe, tmp_path / "out")
    assert loaded(tmp_path / "out")["model.steps"].tolist() == [3, 4]
    save_model(tmp_path / "z", states[2] | {"model.steps": torch.tensor([3, 5])})
    recipe = recipe_for(tmp_path, [*models[:2], tmp_path / "z"])
    with pytest.raises(IncompatibleModelsError, match=r"'model\.steps'.*only floating tensors can be merged"):
        merge_checkpoints(recipe, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_value_that_is_not_finite_is_named_and_nothing_is_left(
    tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    states = family(2, dtype=dtype)
    states[2]["model.norm.weight"][3] = value
    models = [save_model(tmp_path / name, state) for name, state in zip("bxy", states, strict=True)]
    before = sorted(tmp_path.iterdir())
    recipe = recipe_for(tmp_path, models)
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' of .*y holds NaN or infinity"):
        merge_checkpoints(recipe, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == sorted([*before, recipe])


def test_a_merge_that_overflows_its_file_says_what_to_change(tmp_path: Path) -> None:
    states = [{name: 3e4 * torch.sign(t) for name, t in state.items()} for state in family(1)]
    models = [save_model(tmp_path / name, state) for name, state in zip("bx", states, strict=True)]
    recipe = write_recipe(
        tmp_path / "r.yml", "linear", models, each={"weight": 3.0}, parameters={"normalize": False}, out_dtype="float16"
    )
    with pytest.raises(CheckpointError, match=r"overflows torch\.float16; set dtype"):
        merge_checkpoints(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_exists_is_not_touched(tmp_path: Path, models: list[Path]) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ParameterError, match="out exists already; remove it or choose another folder"):
        merge_checkpoints(recipe_for(tmp_path, models), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_crash_in_a_kernel_ends_the_merge_and_leaves_nothing(
    tmp_path: Path, models: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(streaming, "seeded_generator", crash)
    recipe = recipe_for(tmp_path, models, "dare_ties")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ZeroDivisionError):
        merge_checkpoints(recipe, tmp_path / "out", Options(threads=3))
    assert sorted(tmp_path.iterdir()) == before


def test_memory_for_tensors_is_that_of_the_largest_merge_and_some_to_read_ahead(
    tmp_path: Path, models: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "READ_AHEAD", 1000)
    peak = 0

    class Watched(read_ahead.BufferPool):
        def acquire(self, sizes: list[int]) -> list[Buffer]:
            nonlocal peak
            buffers = super().acquire(sizes)
            peak = max(peak, self._used_bytes + self._free_bytes)
            return buffers

    monkeypatch.setattr(read_ahead, "BufferPool", Watched)
    merge_checkpoints(recipe_for(tmp_path, models), tmp_path / "out", Options(threads=4))
    largest = max(math.prod(shape) for shape in SHAPES.values())
    assert 3 * 4 * largest <= peak <= 3 * 4 * largest + 1000


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("200 mb", 2 * 10**8), ("1.5KiB", 1536), ("7", 7), ("12b", 12)]
)
def test_sizes_are_read_with_units(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5 giga", "1e3", "3iB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ParameterError, match="cannot read the size"):
        parse_size(text)


def test_a_shard_size_splits_the_output(tmp_path: Path, models: list[Path]) -> None:
    merge_checkpoints(recipe_for(tmp_path, models), tmp_path / "whole")
    merge_checkpoints(recipe_for(tmp_path, models), tmp_path / "split", Options(max_shard_bytes=1500))
    assert len(list((tmp_path / "split").glob("model-*.safetensors"))) > 1
    whole, split = loaded(tmp_path / "whole"), loaded(tmp_path / "split")
    assert all(torch.equal(whole[name], split[name]) for name in whole)
    assert check_manifest(tmp_path / "split") == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"model_type": "mistral"}, "has model_type mistral, but .* has llama; merge models of one architecture"),
        ({"quantization_config": {"bits": 4}}, "is quantised"),
    ],
)
def test_models_of_another_kind_are_refused(
    tmp_path: Path, models: list[Path], change: dict[str, Any], problem: str
) -> None:
    other = save_model(tmp_path / "other", family(1)[1], **change)
    with pytest.raises(MergeguardError, match=problem):
        merge_checkpoints(recipe_for(tmp_path, [*models, other]), tmp_path / "out")


def test_settings_that_change_the_meaning_of_weights_are_warned_of(tmp_path: Path, models: list[Path]) -> None:
    other = save_model(tmp_path / "other", family(2)[2], rope_theta=5e5)
    merged = merge_checkpoints(recipe_for(tmp_path, [*models[:2], other]), tmp_path / "out")
    assert any("rope_theta=500000.0" in warning for warning in merged.warnings)


def test_what_recipes_cannot_do_tensor_by_tensor_is_refused(tmp_path: Path, models: list[Path]) -> None:
    with pytest.raises(ParameterError, match="scope is model, which needs whole models in memory"):
        merge_checkpoints(recipe_for(tmp_path, models, parameters={"scope": "model"}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_shape_is_refused_by_name(tmp_path: Path, models: list[Path]) -> None:
    state = family(1)[1] | {"model.norm.weight": torch.ones(9)}
    other = save_model(tmp_path / "other", state)
    with pytest.raises(IncompatibleModelsError, match=r"'model\.norm\.weight' of .*other has shape \[9\]"):
        merge_checkpoints(recipe_for(tmp_path, [*models, other]), tmp_path / "out")

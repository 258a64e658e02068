"""Anything in, and either a whole model or one line out: fuzzed recipes, checkpoints, indexes and configs.

Whatever the input, nothing else is left on the disk, memory stays small, and the merge ends: a watchdog ends the whole
process if it does not.
"""

from __future__ import annotations

import copy
import faulthandler
import json
import math
import resource
import shutil
import tempfile
import tracemalloc
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, currently_in_test_context, event, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from mergeguard.checkpoints.manifest import check_manifest
from mergeguard.errors import MergeguardError
from mergeguard.mergers.merge import Options, merge_checkpoints
from robustness_tests.meta.checkpoints_on_disk import CONFIG, family, save_model

if TYPE_CHECKING:
    from collections.abc import Iterator

HANGS = 120  # seconds; an example takes some hundredths
MEMORY = 256 << 20  # what an example may add to the peak of the process; the models have 9 kB

few = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base "b" and two models, "x" of one file and "y" of two."""
    folder = tmp_path_factory.mktemp("models")
    for name, state, shards in zip("bxy", family(2), (1, 1, 2), strict=True):
        save_model(folder / name, state, shards=shards)
    return folder


@contextmanager
def watched() -> Iterator[None]:
    """End the process if the block does not end, and fail if it takes much memory."""
    faulthandler.dump_traceback_later(HANGS, exit=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < MEMORY


def merge_or_refuse(text: str | bytes, options: Options | None = None) -> str | None:
    """Merge by a recipe of this text; its error, None if it has none. All else fails here."""
    with tempfile.TemporaryDirectory() as name, watched():
        folder = Path(name)
        recipe, out = folder / "recipe.yml", folder / "out"
        recipe.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        try:
            merged = merge_checkpoints(recipe, out, options or Options(threads=2))
        except MergeguardError as error:
            refusal = str(error)
        else:
            refusal = None
        if refusal is not None:
            assert refusal
            assert refusal.isprintable(), f"one line, got {refusal!r}"
            assert [path.name for path in folder.iterdir()] == ["recipe.yml"], "a refused merge leaves nothing"
            return refusal
        if currently_in_test_context():
            event("merged")  # for --hypothesis-show-statistics
        assert all(warning.isprintable() for warning in merged.warnings), merged.warnings
        assert sorted(path.name for path in folder.iterdir()) == ["out", "recipe.yml"]
        assert check_manifest(out) == []
        tensors = {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}
        assert len(tensors) == merged.tensors
        assert all(tensor.isfinite().all() for tensor in tensors.values())
    return None


# Recipes

TWO = [{"model": name, "parameters": {"weight": 0.5}} for name in "xy"]
RECIPES: list[dict[str, Any]] = [
    {"merge_method": "linear", "models": TWO, "parameters": {"normalize": True}, "dtype": "float32"},
    {
        "merge_method": "ties",
        "base_model": "b",
        "models": [{"model": name, "parameters": {"weight": 0.5, "density": [0.3, 0.6]}} for name in "xy"],
        "parameters": {"lambda": 0.9, "normalize": [{"filter": "mlp", "value": False}, {"value": True}]},
    },
    {
        "merge_method": "slerp",
        "base_model": "x",
        "models": [{"model": "x"}, {"model": "y"}],
        "parameters": {"t": [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"value": 0.5}]},
        "out_dtype": "bfloat16",
    },
    {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "x", "layer_range": [0, 2]}]},
            {"sources": [{"model": "y", "layer_range": [1, 2]}]},
        ],
    },
    {"merge_method": "dare_ties", "base_model": "b", "models": TWO, "parameters": {"density": 0.5}},
    {"merge_method": "della", "base_model": "b", "models": TWO, "parameters": {"density": 0.5, "epsilon": 0.1}},
    {"merge_method": "breadcrumbs", "base_model": "b", "models": TWO, "parameters": {"density": 0.5, "gamma": 0.01}},
    {"merge_method": "model_stock", "base_model": "b", "models": [{"model": "x"}, {"model": "y"}]},
    {"merge_method": "nuslerp", "models": TWO},
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe["merge_method"])
def test_the_recipes_without_mistakes_are_carried_out(
    models: Path, monkeypatch: pytest.MonkeyPatch, recipe: dict[str, Any]
) -> None:
    monkeypatch.chdir(models)
    assert merge_or_refuse(yaml.safe_dump(recipe)) is None


WORDS = ["", "x", "b", "y", "nowhere", "../x", "x+y", "x@1", "base", "union", "ties", "float16", "mlp", "nan", "1e400",
         "\u2028", "\x07"]  # fmt: skip
NUMBERS = [0, 1, 2, 3, -1, 0.5, -0.5, 1e-320, 1e-9, 1e30, 1e308, -1e308, 10**30, 2**63, 10**400, math.nan, -math.inf]
junk = st.one_of(
    st.sampled_from([None, True, False]),
    st.sampled_from(NUMBERS),
    st.sampled_from(WORDS),
    st.sampled_from([[], {}, [[]], [None], [0.1, 0.9], [0, 2], [2, 0], {"filter": "mlp", "value": 1}, [{"value": 0}]]),
).map(copy.deepcopy)


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in a document."""
    items = list(node.items()) if isinstance(node, dict) else list(enumerate(node)) if isinstance(node, list) else []
    return [path, *(place for key, item in items for place in places(item, (*path, key)))]


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """A recipe with one to three mistakes."""
    recipe = copy.deepcopy(draw(st.sampled_from(RECIPES)))
    for _ in range(draw(st.integers(1, 3))):
        found = [place for place in places(recipe) if place]
        if not found:
            break
        *path, last = draw(st.sampled_from(found))
        parent: Any = recipe
        for step in path:
            parent = parent[step]
        kind = draw(st.sampled_from(["replace", "replace", "replace", "delete", "repeat", "rename", "add", "swap"]))
        if kind == "delete":
            del parent[last]
        elif kind == "repeat" and isinstance(parent, list):
            parent.insert(0, copy.deepcopy(parent[last]))
        elif kind == "rename" and isinstance(parent, dict):
            parent[draw(st.sampled_from([f"{last}s", str(last)[1:], "model", "parameters", "weight", ""]))] = (
                parent.pop(last)
            )
        elif kind == "add" and isinstance(parent, dict):
            keys = [
                "base_model",
                "tokenizer",
                "tokenizer_source",
                "models",
                "slices",
                "weight",
                "density",
                "t",
                "scope",
            ]
            parent[draw(st.sampled_from(keys))] = draw(junk)
        elif kind == "swap":
            other = draw(st.sampled_from(found))
            value: Any = recipe
            for step in other:
                value = value[step]
            parent[last] = copy.deepcopy(value)
        elif isinstance(parent[last], int | float) and draw(st.booleans()):
            parent[last] = draw(st.sampled_from([0, 1e-9, 0.1, 0.5, 1, 2, -0.5, 1e4]))
        else:
            parent[last] = draw(junk)
    return yaml.safe_dump(recipe, sort_keys=False)


@few
@given(text=mutated())
def test_a_recipe_with_mistakes_is_carried_out_or_refused(
    models: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.chdir(models)
    merge_or_refuse(text)


@few
@given(recipe=st.sampled_from(RECIPES), data=st.data())
def test_a_recipe_of_damaged_text_is_carried_out_or_refused(
    models: Path, monkeypatch: pytest.MonkeyPatch, recipe: dict[str, Any], data: st.DataObject
) -> None:
    monkeypatch.chdir(models)
    text = bytearray(yaml.safe_dump(recipe).encode())
    start = data.draw(st.integers(0, len(text)))
    stop = start + data.draw(st.integers(0, 4))
    pieces = [b"*a", b"&a ", b"&a [*a]", b"<<: *a", b"!!python/object:os.system ", b"\n", b"\t", b"{", b"- ", b"? ",
              b": ", b"\xff", b"\x00", b"---\n", b"#", b"'", b"|", b"%"]  # fmt: skip
    text[start:stop] = data.draw(st.sampled_from(pieces) | st.binary(max_size=4))
    merge_or_refuse(bytes(text))


ranges = st.tuples(st.integers(-1, 3), st.integers(-1, 3)).map(list) | st.just([0, 2]) | st.just([0, 10**9])
whole = st.sampled_from([[0, 1], [1, 2], [0, 2]]).flatmap(
    lambda run: st.permutations([("b", run), ("x", run), ("y", run)])
)
any_slice = st.lists(st.tuples(st.sampled_from("bxy"), ranges), max_size=3)


@few
@given(
    method=st.sampled_from(["passthrough", "linear", "ties"]),
    slices=st.lists(whole, min_size=1, max_size=3) | st.lists(whole | any_slice, max_size=3),
)
def test_slices_of_all_kinds_are_stacked_or_refused(
    models: Path, monkeypatch: pytest.MonkeyPatch, method: str, slices: list[list[tuple[str, list[int]]]]
) -> None:
    monkeypatch.chdir(models)
    sources = [[{"model": name, "layer_range": run, "parameters": {"weight": 1}} for name, run in s] for s in slices]
    recipe = {"merge_method": method, "base_model": "b" if method == "ties" else None}
    if method == "passthrough":
        sources = [[{key: item[key] for key in ("model", "layer_range")} for item in part[:1]] for part in sources]
    merge_or_refuse(yaml.safe_dump(recipe | {"slices": [{"sources": part} for part in sources]}))


@few
@given(
    method=st.sampled_from(["linear", "ties", "dare_linear", "breadcrumbs", "della_linear", "sce", "nuslerp", "slerp"]),
    weights=st.lists(st.sampled_from([-1e30, -1, -0.5, 0, 1e-320, 0.5, 1, 3, 1e4, 1e30, 1e38]), min_size=2, max_size=2),
    density=st.sampled_from([-1, 0, 1e-9, 0.3, 1, 1.0001, 1e30]),
    normalize=st.booleans(),
    dtype=st.sampled_from(["float16", "bfloat16", "float32", "float64"]),
    out_dtype=st.sampled_from([None, "float16", "bfloat16", "float32"]),
)
def test_weights_and_densities_of_all_sizes_give_finite_numbers_or_are_refused(
    models: Path, monkeypatch: pytest.MonkeyPatch, method: str, weights: list[float], density: float, **other: Any
) -> None:
    monkeypatch.chdir(models)
    recipe: dict[str, Any] = {"merge_method": method, "dtype": other["dtype"], "out_dtype": other["out_dtype"]}
    if method == "slerp":
        recipe |= {"base_model": "x", "models": [{"model": name} for name in "xy"], "parameters": {"t": weights[0]}}
    else:
        shared = {} if method == "nuslerp" else {"normalize": other["normalize"]}
        own = {} if method in ("linear", "nuslerp", "sce") else {"density": density}
        recipe |= {"base_model": None if method in ("linear", "nuslerp") else "b", "parameters": shared}
        recipe["models"] = [
            {"model": name, "parameters": {"weight": weight, **own} if method != "sce" else {}}
            for name, weight in zip("xy", weights, strict=True)
        ]
    merge_or_refuse(yaml.safe_dump(recipe))


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [*a, *a]",
        "a: &a {b: *a}",
        "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)),
        "[" * 100_000,
        "{a: " * 50_000,
        "merge_method: linear\nmodels: [" + "{model: x}, " * 90_000 + "]",
        "models: " + "1" * 900_000,
        "x" * 2_000_000,
    ],
    ids=["list", "mapping", "laughs", "brackets", "braces", "many", "digits", "long"],
)
def test_a_recipe_that_would_blow_up_is_refused(models: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.chdir(models)
    assert merge_or_refuse(text) is not None


# Checkpoints


def merge_with(models: Path, damaged: Path, method: str = "ties") -> str | None:
    """Merge the damaged model with whole ones."""
    base = {"base_model": str(models / "b")} if method == "ties" else {}
    each = {"weight": 0.5}
    recipe = {
        "merge_method": method,
        "models": [{"model": str(folder), "parameters": each} for folder in (damaged, models / "y")],
        **base,
    }
    return merge_or_refuse(json.dumps(recipe))


@contextmanager
def copied(model: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(shutil.copytree(model, Path(name) / "damaged"))


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


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_file(file: Path, header: dict[str, Any], data: bytes, *, twice: str | None = None) -> None:
    text = json.dumps(header)
    if twice is not None:
        text = f'{text[:-1]}, "{twice}": {json.dumps(header[twice])}}}'
    file.write_bytes(len(text.encode()).to_bytes(8, "little") + text.encode() + data)


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


@pytest.mark.parametrize("reference", ["~nobody-here/x", "~nobody-here/x+y", "x+" + "n" * 5000])
def test_a_model_that_no_path_can_name_is_refused(
    models: Path, monkeypatch: pytest.MonkeyPatch, reference: str
) -> None:
    monkeypatch.chdir(models)
    assert merge_or_refuse(yaml.safe_dump(RECIPES[0] | {"models": [{"model": reference}]})) is not None


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

"""Any recipe in, and either a whole model or one line out.

Whatever the input, nothing else is left on the disk, memory stays small, and the merge ends: a watchdog ends the whole
process if it does not.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from robustness_tests.meta.fuzzing import RECIPES, few, junk, merge_or_refuse, save_models

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe["merge_method"])
def test_the_recipes_without_mistakes_are_carried_out(
    models: Path, monkeypatch: pytest.MonkeyPatch, recipe: dict[str, Any]
) -> None:
    monkeypatch.chdir(models)
    assert merge_or_refuse(yaml.safe_dump(recipe)) is None


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


@pytest.mark.parametrize("reference", ["~nobody-here/x", "~nobody-here/x+y", "x+" + "n" * 5000])
def test_a_model_that_no_path_can_name_is_refused(
    models: Path, monkeypatch: pytest.MonkeyPatch, reference: str
) -> None:
    monkeypatch.chdir(models)
    listed = [{"model": name, "parameters": {"weight": 1}} for name in ("x", reference)]
    refusal = merge_or_refuse(yaml.safe_dump(RECIPES[0] | {"models": listed}))
    assert refusal is not None
    assert "no folder" in refusal

"""Recipes that cannot be meant, or whose models do not correspond, are refused with the line to blame."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergeguard.errors import IncompatibleModelsError, MergeguardError
from mergeguard.mergers.jobs import Layout, find_method
from mergeguard.mergers.recipe import load_recipe
from mergeguard.mergers.recipe_rules import check_recipe
from mergeguard.mergers.registry import MERGERS
from robustness_tests.meta.planned_recipes import SLICED_SLERP, TWO, Planner, layout, names


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planner:
    monkeypatch.chdir(tmp_path)
    return Planner(Path("recipe.yml"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("weight: 0.6, ", "wieght: 0.6, ", "3: unknown parameter of merger 'ties' 'wieght'; did you mean 'weight'?"),
        ("weight: 0.6, ", "", "2: model 'a' has no 'weight' for tensor 'lm_head.weight'; add it to 'parameters'"),
        ("weight: 0.6", "weight: {filter: mlp, value: 1}", "2: model 'a' has no 'weight' for tensor 'lm_head.weight'"),
        ("weight: 0.6", "weight: heavy", "3: parameter 'weight' of merger 'ties' is 'heavy', expected a finite number"),
        ("weight: 0.6", "weight: 'nan'", "3: parameter 'weight' of merger 'ties' is 'nan', expected a finite number"),
        ("density: 0.4", "density: 0", "3: parameter 'density' of merger 'ties' is 0.0, expected a finite"),
        ("density: 0.4", "density: 1.1", "3: parameter 'density' of merger 'ties' is 1.1, expected"),
        ("density: 0.4", "density: [{filter: none, value: [1, 2]}]", "3: parameter 'density' of merger 'ties' is 2.0"),
        ("density: 0.4", "normalize: true", "3: parameter 'normalize' of merger 'ties' is one for all models; move it"),
        ("normalize: false", "normalize: maybe", "8: parameter 'normalize' of merger 'ties' is 'maybe', expected"),
        ("lambda: 0.5", "rescale: l2", "8: parameter 'rescale' of merger 'ties' is l2, expected one of l1, in"),
        ("base_model: base\n", "", "6: merger 'ties' needs a base model; add 'base_model'"),
        ("model: b\n", "model: a\n", "4: the model 'a' is listed twice, first on line 2; list it once"),
        ("ties", "model_stock", "3: unknown parameter of merger 'model_stock' 'weight'; known: filter_wise"),
        ("weight: 0.4}", "weight: -0.6}\nmerge_method: ties\nbase_model: base\nparameters: {}\n#", "1: tensor 'lm_"),
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_be_meant_is_refused_with_its_line(
    plan: Planner, old: str, new: str, message: str
) -> None:
    text = TWO.replace(old, new, 1)
    if "#" in text:
        text = text.partition("#")[0]
    assert message in plan.problem(text)


@pytest.mark.parametrize(
    ("merge", "message"),
    [
        ("slerp\nparameters: {t: 0.5}", "1: merger 'slerp' got 3 models, expected exactly 2"),
        ("slerp\nparameters: {weight: 1}", "merger 'slerp' got 3 models"),
        ("passthrough", "1: merger 'passthrough' got 3 models, expected exactly 1"),
        (
            "karcher\nparameters: {max_iter: [1, 5]}",
            "6: parameter 'max_iter' is a whole number and can have no gradient",
        ),
        (
            "karcher\nparameters: {max_iter: 2.5}",
            "6: parameter 'max_iter' of merger 'karcher' is 2.5, expected a whole",
        ),
    ],
)
def test_a_method_says_what_it_needs(plan: Planner, merge: str, message: str) -> None:
    assert message in plan.problem(f"models:\n  - model: a\n  - model: b\nbase_model: base\nmerge_method: {merge}\n")


def test_models_beside_the_base_are_counted(plan: Planner) -> None:
    def text(name: str, *models: str) -> str:
        listed = "".join(f"  - {{model: {model}, parameters: {{}}}}\n" for model in models)
        return f"models:\n{listed}merge_method: {name}\nbase_model: base\nparameters: {{}}\n"

    assert "merger 'model_stock' got 1 models" in plan.problem(text("model_stock", "a"))
    assert "merger 'model_stock' got 1 models" in plan.problem(text("model_stock", "a", "base"))
    assert plan(text("model_stock", "a", "b")).jobs[0].weights == ()
    assert "got no model beside the base" in plan.problem(text("ties", "base"))
    assert "the recipe has no 't'" in plan.problem(text("nearswap", "a"))
    assert "the recipe has no 't'" in plan.problem(text("slerp", "a"))
    alone = plan(text("ties", "a").replace("parameters: {}}", "parameters: {weight: 1}}"))
    assert alone.jobs[0].models == ((1, "lm_head.weight"),)


def one(method: str, *, sliced: bool = False) -> str:
    """A recipe with one model; no parameter of it is looked at before the models are counted."""
    whole = "models:\n  - {model: a}\n"
    slices = "slices:\n  - sources: [{model: a, layer_range: [0, 2]}]\n  - sources: [{model: a, layer_range: [1, 3]}]\n"
    return f"{slices if sliced else whole}merge_method: {method}\n"


@pytest.mark.parametrize("name", sorted(set(MERGERS) - {"passthrough"}))
def test_one_model_is_not_merged_by_any_registered_method(plan: Planner, name: str) -> None:
    plan.path.write_text(one(name))
    recipe = load_recipe(plan.path)
    with pytest.raises(MergeguardError, match=r"recipe\.yml:[13]: merger '\w+' (got|needs)") as caught:
        check_recipe(recipe, find_method(recipe))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("sliced", [False, True], ids=["models", "slices"])
@pytest.mark.parametrize("name", ["linear", "karcher"])
def test_one_model_is_refused_with_what_a_merge_needs(plan: Planner, name: str, sliced: bool) -> None:
    assert plan.problem(one(name, sliced=sliced)) == (
        f"1: merger '{name}' got one model only, 'a'; a merge needs two, or a base and a model for task vectors; "
        "to copy one, use 'passthrough'"
    )
    assert plan(one("passthrough", sliced=sliced)).jobs


def test_the_base_alone_is_one_model_too(plan: Planner) -> None:
    assert "merger 'linear' got one model only, 'a'" in plan.problem(one("linear") + "base_model: a\n")
    assert "merger 'ties' got no model beside the base" in plan.problem(one("ties") + "base_model: a\n")


def test_a_slice_of_one_model_among_others_is_carried_out(plan: Planner) -> None:
    text = one("linear", sliced=True).replace("model: a", "model: b", 1) + "parameters: {weight: 1}\n"
    assert {job.models[0][0] for job in plan(text).jobs} == {0, 1}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[0, 2]", "[2, 2]", "3: layer_range [2, 2] of 'a' is empty; expected 0 <= first < stop"),
        ("[0, 2]", "[2, 0]", "3: layer_range [2, 0] of 'a' is empty"),
        ("[0, 2]", "[-1, 1]", "3: layer_range [-1, 1] of 'a' is empty"),
        ("[1, 3]", "[1, 2]", "4: layer_range of 'b' has 1 layers, the slice's first source 2"),
        ("[1, 3]", "[2, 4]", "4: layer_range ends at 4, but 'b' has 3 layers"),
        ("base_model: b", "base_model: c", "2: the base model 'c' is not among this slice's sources; add it"),
        ("    base_model: b\n", "", "6: merger 'slerp' needs a base model"),
    ],
)
def test_a_slice_that_cannot_be_meant_is_refused_with_its_line(plan: Planner, old: str, new: str, message: str) -> None:
    assert message in plan.problem(SLICED_SLERP.replace(old, new, 1))


@pytest.mark.parametrize(
    ("text", "model", "message"),
    [
        (TWO, Layout(names(3)[1:], 3), "4: model 'b' lacks tensor 'lm_head.weight', compared with 'base'"),
        (TWO, Layout((*names(3), "extra"), 3), "4: model 'b' has an extra tensor 'extra', compared with 'base'"),
        (TWO, layout(4), "4: model 'b' has 4 layers and 'base' 3"),
        (SLICED_SLERP, Layout(names(3, "h"), 3), "3: model 'a' names its layers 'model.layers' and 'b' 'h'"),
        (
            SLICED_SLERP,
            Layout(names(3)[:-2], 3),
            "3: model 'a' has an extra tensor 'model.layers.1.mlp.up_proj.weight'",
        ),
        (SLICED_SLERP, Layout(names(4), 3), "has 'model.layers.3.self_attn.q_proj.weight' beyond its 3 layers"),
        (SLICED_SLERP, Layout((*names(3), "head.bias"), 3), "tensor 'head.bias'"),
    ],
)
def test_models_whose_tensors_do_not_correspond_are_refused(
    plan: Planner, text: str, model: Layout, message: str
) -> None:
    assert message in plan.problem(text, b=model)
    with pytest.raises(IncompatibleModelsError):
        plan(text, b=model)


def test_layers_that_cannot_be_found_are_missed_only_where_they_are_needed(plan: Planner) -> None:
    flat = Layout(("weight", "bias"), 3)
    models = {"a": flat, "b": flat, "base": flat}
    assert len(plan(TWO, **models).jobs) == 2
    gradient = TWO.replace("lambda: 0.5", "lambda: [0, 1]")
    assert "8: 'lambda' is a gradient over layers, but no tensor names of 'base'" in plan.problem(gradient, **models)
    assert "slices are made of layers, but no tensor names" in plan.problem(SLICED_SLERP, **models)
    both = Layout((*names(3), *names(3, "encoder.layers")[2:-1]), 3)
    assert "several stacks of layers (encoder.layers, model.layers)" in plan.problem(SLICED_SLERP, a=both, b=both)


def test_a_model_in_the_output_folder_is_refused(plan: Planner, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    for out in (Path("a"), tmp_path / "link", Path("./b/../a")):
        with pytest.raises(
            MergeguardError, match=r"recipe\.yml:2: the model 'a' is the output folder .*somewhere else"
        ):
            plan(TWO, out=out)
    (tmp_path / "org" / "adapter").mkdir(parents=True)
    with pytest.raises(MergeguardError, match="the model 'org/adapter' is the output folder"):
        plan(TWO.replace("model: a", "model: c+org/adapter"), out=Path("org"))
    assert plan(TWO, out=Path("b")).jobs  # a hub id of the same name is no folder here


def test_a_method_that_is_not_registered_is_named_with_its_line(plan: Planner) -> None:
    plan.path.write_text(TWO.replace("ties", "tise"))
    with pytest.raises(MergeguardError, match=r"recipe\.yml:6: unknown merger 'tise'; did you mean 'ties'\?"):
        find_method(load_recipe(plan.path))

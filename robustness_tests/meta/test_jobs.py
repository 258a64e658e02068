"""What a recipe says about each output tensor, resolved as mergekit does."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergeguard.mergers.jobs import Job, Layout, find_method, resolve
from mergeguard.mergers.recipe import load_recipe
from robustness_tests.meta.planned_recipes import (
    FRANKEN,
    LINE,
    REST,
    SLICED_SLERP,
    TWO,
    Planner,
    by_name,
    layout,
    names,
)

RECIPES = Path(__file__).parent / "recipes"


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planner:
    monkeypatch.chdir(tmp_path)
    return Planner(Path("recipe.yml"))


def test_every_tensor_gets_one_job_in_the_order_of_the_base(plan: Planner) -> None:
    shuffled = Layout(tuple(reversed(names(3))), 3)
    found = plan(TWO, base=shuffled)
    assert found.inputs == ("base", "a", "b")
    assert [job.name for job in found.jobs] == list(shuffled.tensors)
    assert (found.dtype, found.out_dtype, found.num_layers, found.notes) == ("float32", "bfloat16", None, ())
    job = found.jobs[3]
    assert job.base == (0, job.name)
    assert job.models == ((1, job.name), (2, job.name))
    assert job.weights == (0.6, 0.4)
    assert job.parameters == {"density": (0.4, 1.0), "lambda": 0.5, "normalize": False, "rescale": "l1"}


@pytest.mark.parametrize("name", ["dare_task.yml", "dare_ties.yml", "task.yml", "ties.yml"])
def test_the_papers_recipes_resolve_with_the_registered_methods(name: str) -> None:
    recipe = load_recipe(RECIPES / name, allow_duplicate_keys=True)
    found = resolve(recipe, find_method(recipe), dict.fromkeys(recipe.references, layout(32)))
    weights = {"dare_task.yml": (0.1, 0.9), "dare_ties.yml": (0.1, 0.9), "task.yml": (0.7, 0.7), "ties.yml": (0.6, 0.4)}
    assert {job.weights for job in found.jobs} == {weights[name]}
    assert len(found.jobs) == 3 + 32 * len(REST)
    if name != "task.yml":
        assert {tuple(job.parameters["density"]) for job in found.jobs} == {(0.4, 0.4)}


@pytest.mark.parametrize(("written", "expected"), [("true", "l1"), ("false", "none"), ("inverse", "inverse")])
def test_mergekits_switch_for_rescaling_is_one_of_our_words(plan: Planner, written: str, expected: str) -> None:
    found = plan(TWO.replace("normalize: false", f"rescale: {written}, int8_mask: true"))
    assert {job.parameters["rescale"] for job in found.jobs} == {expected}


def test_a_base_listed_as_a_model_is_not_merged_and_its_parameters_are_noted(plan: Planner) -> None:
    text = TWO.replace("  - model: b\n", "  - model: base\n    parameters: {weight: 9}\n  - model: b\n")
    found = plan(text)
    assert found.jobs == plan(TWO).jobs
    assert found.notes == ("recipe.yml:4: parameters of the base model have no effect on 'ties'",)


def test_without_an_ancestor_a_base_is_one_of_the_models(plan: Planner) -> None:
    text = TWO.replace("ties", "linear").replace(", density: 0.4", "").replace("lambda: 0.5, ", "")
    assert plan(text.replace("base_model: base\n", "")).inputs == ("a", "b")
    assert f"{LINE['base']}: model 'base' has no 'weight' for tensor 'lm_head.weight'" in plan.problem(text)
    found = plan(text.replace("normalize: false", "weight: 0.1, normalize: false"))
    assert found.inputs == ("a", "b", "base")
    assert found.jobs[0].weights == (0.6, 0.4, 0.1)
    assert found.jobs[0].base is None
    assert plan(text.replace("base_model: base", "base_model: b")).inputs == ("a", "b")


@pytest.mark.parametrize("listed", [True, False])
def test_a_primary_is_the_first_model_wherever_it_is_listed(plan: Planner, listed: bool) -> None:
    base = "  - model: base\n" if listed else ""
    found = plan(f"models:\n  - model: a\n{base}merge_method: slerp\nbase_model: base\nparameters: {{t: 0.3}}\n")
    assert found.inputs == ("base", "a")
    assert found.jobs[0].models == ((0, "lm_head.weight"), (1, "lm_head.weight"))
    assert found.jobs[0].base is None
    assert found.jobs[0].weights == (0.7, 0.3)


def test_an_optional_base_decides_whether_task_vectors_are_merged(plan: Planner) -> None:
    models = "models:\n  - {model: a, parameters: {weight: 1}}\n  - {model: b, parameters: {weight: 3}}\n"
    text = f"{models}merge_method: nuslerp\n"
    without, given = plan(text), plan(text + "base_model: base\n")
    assert (without.jobs[0].base, without.jobs[0].parameters) == (None, {"task_vectors": False})
    assert (given.jobs[0].base, given.jobs[0].parameters) == ((0, "lm_head.weight"), {"task_vectors": True})
    assert given.jobs[0].weights == without.jobs[0].weights == (1.0, 3.0)
    assert "5: 'task_vectors' is decided by 'base_model'" in plan.problem(text + "parameters: {task_vectors: true}")


def test_gradients_run_over_the_layers_and_start_outside_of_them(plan: Planner) -> None:
    found = by_name(
        plan(TWO.replace("lambda: 0.5", "lambda: [0, 1, 0.5]").replace("density: 0.4", "density: [0.2, 1]"))
    )
    for layer, (scale, density) in enumerate([(0.0, 0.2), (1.0, 0.6), (0.5, 1.0)]):
        for rest in REST:
            parameters = found[f"model.layers.{layer}.{rest}"].parameters
            assert (parameters["lambda"], parameters["density"][0]) == (scale, pytest.approx(density))
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"):
        assert found[name].parameters["lambda"] == 0.0
        assert found[name].parameters["density"] == (0.2, 1.0)


def test_the_only_layer_gets_a_gradients_last_value(plan: Planner) -> None:
    one = layout(1)
    found = by_name(plan(TWO.replace("lambda: 0.5", "lambda: [0.2, 1]"), a=one, b=one, base=one))
    assert found[f"model.layers.0.{REST[0]}"].parameters["lambda"] == 1.0
    assert found["model.norm.weight"].parameters["lambda"] == 0.2


def test_filters_fall_back_to_the_recipe_and_then_to_the_default(plan: Planner) -> None:
    text = TWO.replace("density: 0.4", "density: [{filter: mlp, value: [0.1, 0.3]}, {filter: layers.1, value: 0.2}]")
    found = by_name(plan(text))
    assert [found[f"model.layers.{layer}.{REST[1]}"].parameters["density"][0] for layer in range(3)] == [0.1, 0.2, 0.3]
    assert [found[f"model.layers.{layer}.{REST[0]}"].parameters["density"][0] for layer in range(3)] == [1.0, 0.2, 1.0]
    general = by_name(plan(text.replace("lambda: 0.5", "density: 0.7")))
    assert general["lm_head.weight"].parameters["density"] == (0.7, 0.7)


def test_a_filter_that_matches_nothing_is_noted(plan: Planner) -> None:
    found = plan(TWO.replace("density: 0.4", "density: [{filter: self_atn, value: 0.1}, {filter: mlp, value: 1}]"))
    assert found.notes == ("recipe.yml:3: filter 'self_atn' matches no tensor",)


def test_slices_are_stacked_and_the_rest_comes_from_the_first_and_last(plan: Planner) -> None:
    found = plan(FRANKEN.replace("[{model: a, layer_range: [2, 3]}]", "[{model: c, layer_range: [2, 3]}]"))
    assert found.inputs == ("a", "b", "c")
    assert found.num_layers == 5
    origin = {name: (found.inputs[job.models[0][0]], job.models[0][1]) for name, job in by_name(found).items()}
    for out, (model, layer) in enumerate([("a", 0), ("a", 1), ("b", 1), ("b", 2), ("c", 2)]):
        for rest in REST:
            assert origin.pop(f"model.layers.{out}.{rest}") == (model, f"model.layers.{layer}.{rest}")
    assert origin == {
        "model.embed_tokens.weight": ("a", "model.embed_tokens.weight"),
        "lm_head.weight": ("c", "lm_head.weight"),
        "model.norm.weight": ("c", "model.norm.weight"),
    }
    assert all(job.base is None and job.weights == () for job in found.jobs)


def test_a_source_in_a_slice_goes_before_the_slice_and_the_slice_before_the_recipe(plan: Planner) -> None:
    found = by_name(plan(FRANKEN))
    scale = {name: job.parameters["scale"] for name, job in found.items()}
    assert scale["model.embed_tokens.weight"] == scale[f"model.layers.1.{REST[1]}"] == (2.0,)
    assert scale[f"model.layers.2.{REST[1]}"] == (4.0,)
    assert scale[f"model.layers.3.{REST[1]}"] == (5.0,)
    assert scale[f"model.layers.3.{REST[0]}"] == (1.0,)
    assert scale[f"model.layers.4.{REST[1]}"] == (3.0,)  # the slice's only layer: the last value of a gradient
    assert scale["lm_head.weight"] == (1.0,)


def test_a_slice_merges_layers_of_different_numbers_and_has_its_own_base(plan: Planner) -> None:
    found = by_name(plan(SLICED_SLERP))
    assert found[f"model.layers.1.{REST[0]}"] == Job(
        name=f"model.layers.1.{REST[0]}",
        models=((0, f"model.layers.2.{REST[0]}"), (1, f"model.layers.1.{REST[0]}")),
        base=None,
        weights=(0.0, 1.0),
        parameters={},
    )
    assert len(found) == 3 + 2 * len(REST)

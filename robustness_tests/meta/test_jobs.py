"""What a recipe says about each output tensor, resolved as mergekit does, and refused where it cannot be meant."""

from __future__ import annotations

import importlib.util
import os
import warnings
from pathlib import Path

import pytest

from mergeguard.errors import IncompatibleModelsError, MergeguardError
from mergeguard.mergers.contract import Method, Parameter
from mergeguard.mergers.jobs import Job, Layout, Plan, find_method, resolve
from mergeguard.mergers.layers import find_layers, is_before_layers
from mergeguard.mergers.recipe import load_recipe

RECIPES = Path(__file__).parent / "recipes"
REST = ("self_attn.q_proj.weight", "mlp.up_proj.weight")


def names(layers: int, prefix: str = "model.layers") -> tuple[str, ...]:
    inner = (f"{prefix}.{layer}.{rest}" for layer in range(layers) for rest in REST)
    return ("lm_head.weight", "model.embed_tokens.weight", *inner, "model.norm.weight")


def layout(layers: int = 3, num_layers: int | None = -1) -> Layout:
    return Layout(names(layers), layers if num_layers == -1 else num_layers)


def combine(*_: object) -> None:
    raise AssertionError("planning merges nothing")


def method(name: str, *parameters: Parameter, **options: object) -> Method:
    return Method(name, "", "", combine, parameters, **options)  # type: ignore[arg-type]


DENSITY = Parameter("density", 1.0, "", above=0.0, at_most=1.0, per_model=True)
RESCALE = Parameter("rescale", "l1", "", ("l1", "inverse", "none"))
TIES = method("ties", DENSITY, Parameter("normalize", True, ""), Parameter("lambda", 1.0, ""), RESCALE)
LINEAR = method("linear", Parameter("normalize", True, ""), base="none")
SLERP = method("slerp", base="primary", weighting="t", min_models=2, max_models=2)
NUSLERP = method("nuslerp", Parameter("task_vectors", False, ""), base="optional", min_models=2, max_models=2)
PASSTHROUGH = method(
    "passthrough", Parameter("scale", 1.0, "", per_model=True), base="none", weighting="none", max_models=1
)
STOCK = method("model_stock", Parameter("filter_wise", False, ""), weighting="none", min_models=2)
NEARSWAP = method("nearswap", Parameter("t", 0.1, ""), base="primary", weighting="none", min_models=2, max_models=2)
KARCHER = method("karcher", Parameter("max_iter", 10, ""), base="none", weighting="none")
METHODS = {item.name: item for item in (TIES, LINEAR, SLERP, NUSLERP, PASSTHROUGH, STOCK, NEARSWAP, KARCHER)}


class Planner:
    """Writes a recipe and resolves it against models of three layers, or the given ones."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, text: str, *, out: Path | None = None, **layouts: Layout) -> Plan:
        self.path.write_text(text)
        recipe = load_recipe(self.path)
        found = {model: layouts.get(model, layout()) for model in recipe.references}
        return resolve(recipe, METHODS[recipe.merge_method], found, out=out)

    def problem(self, text: str, **layouts: Layout) -> str:
        with pytest.raises(MergeguardError) as caught:
            self(text, **layouts)
        message = str(caught.value)
        assert message.isprintable()
        assert message.startswith("recipe.yml:")
        return message.removeprefix("recipe.yml:")


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planner:
    monkeypatch.chdir(tmp_path)
    return Planner(Path("recipe.yml"))


def by_name(plan: Plan) -> dict[str, Job]:
    assert len({job.name for job in plan.jobs}) == len(plan.jobs)
    return {job.name: job for job in plan.jobs}


TWO = """\
models:
  - model: a
    parameters: {weight: 0.6, density: 0.4}
  - model: b
    parameters: {weight: 0.4}
merge_method: ties
base_model: base
parameters: {lambda: 0.5, normalize: false}
dtype: float32
out_dtype: bfloat16
"""
LINE = {"models": 1, "a": 2, "b": 4, "method": 6, "base": 7, "parameters": 8}


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


FRANKEN = """\
slices:
  - sources: [{model: a, layer_range: [0, 2], parameters: {scale: 2}}]
  - sources: [{model: b, layer_range: [1, 3]}]
  - sources: [{model: a, layer_range: [2, 3]}]
    parameters: {scale: [1, 3]}
merge_method: passthrough
parameters: {scale: [{filter: mlp, value: [4, 5]}]}
"""


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


SLICED_SLERP = """\
slices:
  - sources:
      - {model: a, layer_range: [0, 2]}
      - {model: b, layer_range: [1, 3]}
    base_model: b
    parameters: {t: [0, 1]}
merge_method: slerp
"""


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


@pytest.mark.parametrize(
    ("tensors", "num_layers", "prefixes", "count"),
    [
        (names(3), 3, {"model.layers"}, 3),
        (names(3), None, {"model.layers"}, 3),
        (("h.0.attn.weight", "h.1.attn.weight", "wte.weight"), 2, {"h"}, 2),
        (("x.blocks.0.w", "x.blocks.1.w", "x.head.0.w", "x.head.1.w"), 2, {"x.blocks"}, 2),
        (("m.layers.0.w", "classifier.0.weight"), 1, {"m.layers"}, 1),
        ([f"m.layers.{i}.experts.{j}.w" for i in range(2) for j in range(2)], 2, {"m.layers"}, 2),
        ([f"m.layers.{i}.w" for i in range(4)], 3, {"m.layers"}, 3),
        (("m.stage.0.w", "m.stage.1.w"), 2, {"m.stage"}, 2),
        (("m.stage.0.w", "m.stage.1.w"), None, set(), 0),
        (("m.layers.0.w", "m.layers.2.w"), 3, set(), 3),
        (names(3), 10**9, set(), 10**9),
        ((), None, set(), 0),
    ],
)
def test_layers_are_told_from_the_names(
    tensors: tuple[str, ...], num_layers: int | None, prefixes: set[str], count: int
) -> None:
    layers = find_layers(tensors, num_layers)
    places = {layers.split(tensor) for tensor in tensors} - {None}
    assert {place[0] for place in places if place is not None} == prefixes
    assert layers.count == count


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        ("model.embed_tokens.weight", True),
        ("transformer.wte.weight", True),
        ("wpe.weight", True),
        ("gpt_neox.embed_in.weight", True),
        ("transformer.word_embeddings.weight", True),
        ("bert.embeddings.LayerNorm.bias", True),
        ("model.tok_embeddings.weight", True),
        ("shared.weight", True),
        ("embed_out.weight", False),
        ("lm_head.weight", False),
        ("model.norm.weight", False),
        ("transformer.ln_f.bias", False),
        ("score.weight", False),
        ("output.weight", False),
    ],
)
def test_what_stands_before_the_layers_is_told_from_the_name(tensor: str, expected: bool) -> None:
    assert is_before_layers(tensor) is expected


SLICED_TIES = """\
slices:
  - sources:
      - {model: a, layer_range: [0, 2], parameters: {weight: [0, 1]}}
      - {model: b, layer_range: [1, 3]}
      - {model: base, layer_range: [0, 2]}
    parameters: {weight: 0.25}
  - sources:
      - {model: b, layer_range: [0, 1], parameters: {density: [0.1, 0.9]}}
      - {model: base, layer_range: [2, 3]}
merge_method: ties
base_model: base
parameters:
  weight: [0.5, 0.6]
  density: [{filter: layers.0, value: 0.3}]
"""
GRADIENTS = """\
models:
  - model: a
    parameters:
      weight: [1e-1, 0.4]
      density: [{filter: mlp, value: [0.1, 1, 0.3]}, {filter: layers.1, value: 0.2}]
  - model: b
    parameters: {weight: 1}
merge_method: ties
base_model: base
parameters:
  lambda: [{filter: q_proj, value: [0, 1]}, {filter: '*', value: 0.7}]
  density: 0.9
  normalize: [true, false]
"""
ORACLE_RECIPES = {
    "gradients and filters": GRADIENTS,
    "a listed base": TWO.replace("base_model: base", "base_model: b"),
    "linear": TWO.replace("ties", "linear").replace(", density: 0.4", "").replace("lambda: 0.5", "weight: [0, 1]"),
    "slices": SLICED_SLERP.replace("t: [0, 1]", "t: [{filter: mlp, value: [1, 0]}, {value: 0.3}]"),
    "passthrough": FRANKEN,
    "ties in slices": SLICED_TIES,
}


def write_llama(folder: Path) -> None:
    """A checkpoint of three layers: mergekit looks at the configuration and at the names."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    LlamaConfig(hidden_size=32, num_hidden_layers=3, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    save_file({name: torch.zeros(1) for name in names(3)}, folder / "model.safetensors")


@pytest.mark.skipif(
    importlib.util.find_spec("mergekit") is None and os.environ.get("MERGEGUARD_REQUIRE_ORACLE") != "1",
    reason="mergekit, the oracle, is not installed; `.ci/run` installs it and sets MERGEGUARD_REQUIRE_ORACLE=1",
)
@pytest.mark.parametrize("name", ORACLE_RECIPES)
def test_mergekit_plans_the_same_jobs(plan: Planner, tmp_path: Path, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing it warns about numpy.core among others
        import yaml
        from mergekit.architecture import arch_info_for_config
        from mergekit.config import MergeConfiguration
        from mergekit.io.tasks import LoaderCache
        from mergekit.options import MergeOptions
        from mergekit.plan import MergePlanner
        from transformers import AutoConfig

    for model in ("a", "b", "base"):
        write_llama(tmp_path / model)
    ours = plan(ORACLE_RECIPES[name])
    config = MergeConfiguration.model_validate(yaml.safe_load(plan.path.read_text()))
    llama = AutoConfig.from_pretrained("a")
    LoaderCache().setup(MergeOptions())
    llama.num_hidden_layers = ours.num_layers or 3
    planner = MergePlanner(config, arch_info_for_config(llama), MergeOptions(), llama)
    planner._plan()
    theirs = {
        weight.name: task
        for weight, task in planner._tensors
        if "layers" not in weight.name or weight.name.endswith(REST)
    }
    assert theirs.keys() == by_name(ours).keys()
    for tensor, job in by_name(ours).items():
        task = theirs[tensor]
        inputs = {str(model): weight.name for model, weight in task.gather_tensors.weight_info.items()}
        places = job.models if job.base is None else (*job.models, job.base)
        assert {ours.inputs[model]: source for model, source in places} == inputs
        shared, own = (
            dict(task.parameters.items()),
            {str(key): dict(value.items()) for key, value in task.input_parameters.items()},
        )
        for index, (model, _) in enumerate(job.models):
            given = own[ours.inputs[model]]
            if "weight" in given:
                assert job.weights[index] == given["weight"]
            if "density" in given:
                assert job.parameters["density"][index] == given["density"]
            if "scale" in given:
                assert job.parameters["scale"][index] == (1.0 if given["scale"] is None else given["scale"])
        if "t" in shared:
            assert job.weights[1] == shared["t"]
        for key in {"lambda", "normalize"} & shared.keys():
            assert job.parameters[key] == shared[key]

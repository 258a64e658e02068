"""Parity of plans with the released mergekit 0.1.5: the same tensors with the same parameters."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from robustness_tests.meta.oracle import needs
from robustness_tests.meta.planned_recipes import FRANKEN, REST, SLICED_SLERP, TWO, Planner, by_name, names


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planner:
    monkeypatch.chdir(tmp_path)
    return Planner(Path("recipe.yml"))


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


@needs("mergekit")
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

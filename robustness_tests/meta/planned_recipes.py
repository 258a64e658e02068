"""Recipes that are resolved against models of which only the tensors' names exist."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mergeguard.errors import MergeguardError
from mergeguard.mergers.contract import Method, Parameter
from mergeguard.mergers.jobs import Job, Layout, Plan, resolve
from mergeguard.mergers.recipe import load_recipe

if TYPE_CHECKING:
    from pathlib import Path

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

FRANKEN = """\
slices:
  - sources: [{model: a, layer_range: [0, 2], parameters: {scale: 2}}]
  - sources: [{model: b, layer_range: [1, 3]}]
  - sources: [{model: a, layer_range: [2, 3]}]
    parameters: {scale: [1, 3]}
merge_method: passthrough
parameters: {scale: [{filter: mlp, value: [4, 5]}]}
"""
SLICED_SLERP = """\
slices:
  - sources:
      - {model: a, layer_range: [0, 2]}
      - {model: b, layer_range: [1, 3]}
    base_model: b
    parameters: {t: [0, 1]}
merge_method: slerp
"""

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


def by_name(plan: Plan) -> dict[str, Job]:
    assert len({job.name for job in plan.jobs}) == len(plan.jobs)
    return {job.name: job for job in plan.jobs}

"""Parity with the released mergekit 0.1.5, the oracle: whole checkpoints through `run_merge`, compared bit for bit.

Where mergekit leaves a result to chance, the oracle is given our choice: DARE's masks (it draws them from the global
generator) and, in 16-bit types, the order among magnitudes that tie at TIES's threshold (its sort is unstable; in
float32 and float64 nothing ties here, and its own sort runs). Nothing else is replaced.
"""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergeguard.mergers import Merger, merge_models, parse_merger
from mergeguard.mergers.sparsify import dropout_mask, seeded_generator
from robustness_tests.meta.oracle import needs

pytestmark = needs("mergekit")

State = dict[str, torch.Tensor]
SEED = 11
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WEIGHTS = ((0.1, 0.9), (0.5, -0.2, 0.4))
SPECS = (
    "linear",
    "linear(normalize=false)",
    "task_arithmetic(lambda=1.4)",
    "task_arithmetic(normalize=true)",
    "ties",
    "ties(density=0.4,normalize=true)",
    "ties(density=0.2,lambda=0.7,normalize=false)",
    "ties(density=0.4,rescale=l1)",
    "dare_linear(density=0.4)",
    "dare_linear(density=0.4,normalize=true,rescale=none)",
    "dare_ties(density=0.4,normalize=true)",
    "dare_ties(density=0.1,lambda=1.4,rescale=none)",
)


# mergekit drops float64 in float32, and sums the norms of a float16 trim in float16, where they can overflow.
LEFT_OUT = {(spec, torch.float64) for spec in SPECS if spec.startswith("dare")}
LEFT_OUT |= {("ties(density=0.4,rescale=l1)", torch.float16)}
CASES = [(spec, dtype) for dtype in DTYPES for spec in SPECS if (spec, dtype) not in LEFT_OUT]


def random_states(dtype: torch.dtype) -> tuple[State, list[State]]:
    """A base and three models of a 2-layer Llama; sizes are those of `write_checkpoint`."""
    generator = torch.Generator().manual_seed(5)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (128, 64), "lm_head.weight": (128, 64)}
    for layer in ("model.layers.0.", "model.layers.1."):
        for name, shape in {"q": (64, 64), "k": (32, 64), "v": (32, 64), "o": (64, 64)}.items():
            shapes[f"{layer}self_attn.{name}_proj.weight"] = shape
        for name, shape in {"gate": (96, 64), "up": (96, 64), "down": (64, 96)}.items():
            shapes[f"{layer}mlp.{name}_proj.weight"] = shape
        shapes |= {f"{layer}{name}_layernorm.weight": (64,) for name in ("input", "post_attention")}
    shapes["model.norm.weight"] = (64,)

    def draw(scale: float) -> State:
        return {name: scale * torch.randn(shape, generator=generator).double() for name, shape in shapes.items()}

    def cast(state: State) -> State:
        return {name: tensor.to(dtype) for name, tensor in state.items()}

    base = draw(0.5)
    return cast(base), [cast({n: base[n] + delta for n, delta in draw(0.05).items()}) for _ in range(3)]


def write_checkpoint(folder: Path, state: State) -> None:
    from transformers import LlamaConfig

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=128, num_hidden_layers=2, tie_word_embeddings=False, **sizes)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def mergekit_merge(merger: Merger, folder: Path, weights: tuple[float, ...], output: Path) -> State:
    """What mergekit writes for the checkpoints `base`, `0`, `1`, ... in `folder`."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    parameters = merger.parameters
    shared: dict[str, Any] = {name: parameters[name] for name in ("normalize", "lambda") if name in parameters}
    each: dict[str, Any] = {}
    if "density" in parameters:
        each["density"], shared["rescale"] = parameters["density"], parameters["rescale"] == "l1"
    configuration: dict[str, Any] = {
        "merge_method": merger.name,
        "models": [
            {"model": str(folder / str(index)), "parameters": {"weight": weight, **each}}
            for index, weight in enumerate(weights)
        ],
        "parameters": shared,
    }
    if merger.needs_base:
        configuration["base_model"] = str(folder / "base")
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    run_merge(MergeConfiguration.model_validate(configuration), str(output), options)
    return {name: tensor for shard in output.glob("*.safetensors") for name, tensor in load_file(shard).items()}


def serve_our_masks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Let the oracle's draws return our masks for the same tensor and model; returns the pairs served, in order."""
    from mergekit.merge_methods.generalized_task_arithmetic import GeneralizedTaskArithmeticMerge as Oracle

    served: list[tuple[str, str]] = []
    waiting: list[tuple[str, str, float]] = []
    merge_group = Oracle.merge_group

    def remember_group(self: Any, group: Any, /, **parameters: Any) -> torch.Tensor:
        densities = parameters["density"]
        waiting[:] = [(group.metadata.name, Path(e.id.model.path).name, densities[e.id]) for e in group.non_base]
        return merge_group(self, group, **parameters)

    def bernoulli(probabilities: torch.Tensor) -> torch.Tensor:
        tensor, model, density = waiting.pop(0)
        served.append((tensor, model))
        return dropout_mask(probabilities.shape, density, seeded_generator(SEED, tensor, model)).to(probabilities.dtype)

    monkeypatch.setattr(Oracle, "merge_group", remember_group)
    monkeypatch.setattr(torch, "bernoulli", bernoulli)
    return served


def sort_stably(monkeypatch: pytest.MonkeyPatch) -> None:
    argsort = torch.argsort

    def stable(values: torch.Tensor, *, descending: bool) -> torch.Tensor:
        return argsort(values, descending=descending, stable=True)

    monkeypatch.setattr(torch, "argsort", stable)


@pytest.fixture(scope="module", autouse=True)
def oracle() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing it warns about numpy.core among others; its merges may not warn
        importlib.import_module("mergekit.merge")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `<dtype>/base`, `<dtype>/0`, ... as `random_states` draws them."""
    root = tmp_path_factory.mktemp("checkpoints")
    for dtype in DTYPES:
        base, models = random_states(dtype)
        for name, state in (("base", base), *((str(index), model) for index, model in enumerate(models))):
            write_checkpoint(root / str(dtype) / name, state)
    return root


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize(("spec", "dtype"), CASES, ids=str)
def test_a_merged_checkpoint_equals_mergekits_bit_for_bit(
    spec: str,
    dtype: torch.dtype,
    weights: tuple[float, ...],
    checkpoints: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    merger = parse_merger(spec)
    base, models = random_states(dtype)
    ours = merge_models(merger, base, models[: len(weights)], weights, seed=SEED)

    served = serve_our_masks(monkeypatch)
    if dtype.itemsize == 2:
        sort_stably(monkeypatch)
    theirs = mergekit_merge(merger, checkpoints / str(dtype), weights, tmp_path)

    assert ours.keys() == theirs.keys()
    differing = {name: int((ours[name] != theirs[name]).sum()) for name in ours}
    assert not any(differing.values()), f"elements that differ: {differing}"
    assert all(theirs[name].dtype == ours[name].dtype == dtype for name in ours)
    pairs = {(name, str(index)) for name in base for index in range(len(weights))}
    assert set(served) == (pairs if merger.method.random else set())

"""Training through low-rank adapters, kept as peft keeps them: h = W x + (alpha / r) B A x.

LoRA (Hu et al., 2021, arXiv:2106.09685, section 4.1): W is frozen, A starts Gaussian and B zero, so that training
starts at the model as it is. What `save_low_rank` writes is read by `mergeguard.checkpoints.adapter` (BASE+ADAPTER)
and by peft.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from mergeguard.checkpoints.adapter import PREFIX, WEIGHTS
from mergeguard.checkpoints.checkpoint import ADAPTER_CONFIG
from mergeguard.checkpoints.files import atomic_folder, write_tensors
from mergeguard.errors import ParameterError
from mergeguard.seeds import derive_seed

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a Llama-like decoder block."""


@dataclass(frozen=True)
class LowRank:
    """Size and scale of the updates.

    Attributes:
        rank: columns of B and rows of A.
        alpha: the update is B A times alpha / rank.
    """

    rank: int = 16
    alpha: float = 32

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ParameterError(f"the rank of an adapter is {self.rank}, expected at least 1")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ParameterError(f"the alpha of an adapter is {self.alpha}, expected a positive number")

    @property
    def scale(self) -> float:
        """What the product B A is multiplied by."""
        return self.alpha / self.rank


class LowRankLinear(nn.Linear):
    """A linear layer with its own weight frozen and an update beside it.

    Attributes:
        weight, bias: those of the layer that it replaces, the same parameters under the same names, frozen.
        lora_a: A, float32 of shape (rank, in).
        lora_b: B, float32 of shape (out, rank).
    """

    def __init__(self, layer: nn.Linear, low_rank: LowRank, seed: int) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        self.low_rank = low_rank
        self.weight, self.bias = layer.weight, layer.bias
        self._trained_before = {name: p.requires_grad for name, p in layer.named_parameters()}
        for parameter in layer.parameters():
            parameter.requires_grad_(False)
        # Drawn on the CPU, so that a seed means the same adapter on every device.
        drawn = torch.randn(low_rank.rank, layer.in_features, generator=torch.Generator().manual_seed(seed))
        self.lora_a = nn.Parameter((drawn / math.sqrt(layer.in_features)).to(layer.weight.device))
        self.lora_b = nn.Parameter(torch.zeros(layer.out_features, low_rank.rank, device=layer.weight.device))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch.nn.Linear's name
        """The layer's output, in the dtype that the frozen layer gives."""
        frozen = linear(input, self.weight, self.bias)
        update = linear(linear(input.to(self.lora_a.dtype), self.lora_a), self.lora_b)
        return frozen + (update * self.low_rank.scale).to(frozen.dtype)

    def folded(self) -> nn.Linear:
        """A plain layer whose weight, this layer's own, has the update added to it in place."""
        with torch.no_grad():
            self.weight += (self.lora_b @ self.lora_a) * self.low_rank.scale
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        layer.weight, layer.bias = self.weight, self.bias
        for name, trained in self._trained_before.items():
            layer.get_parameter(name).requires_grad_(trained)
        return layer.train(self.training)


def add_low_rank(model: PreTrainedModel, low_rank: LowRank, seed: int) -> list[nn.Parameter]:
    """Put an adapter, still zero, on every linear layer of the decoder blocks, in place.

    The frozen weights may be float32, float16 or bfloat16; the adapter is float32. `fit(..., parameters=...)` freezes
    what else there is.

    Args:
        model: a model whose blocks have linear layers named as in `TARGETS`.
        seed: decides each A, by the layer's name.

    Returns:
        The parameters to train: A and B of each layer.

    Raises:
        ParameterError: the model has no such layers, or has adapters already.
    """
    if _layers(model, LowRankLinear):
        raise ParameterError(f"{type(model).__name__} has low-rank adapters already; fold them first")
    found = {name: layer for name, layer in _layers(model, nn.Linear).items() if name.rpartition(".")[2] in TARGETS}
    if not found:
        raise ParameterError(f"{type(model).__name__} has no linear layers named {', '.join(TARGETS)} to adapt")
    _replace(model, {name: LowRankLinear(layer, low_rank, derive_seed(seed, name)) for name, layer in found.items()})
    return [p for layer in _adapted(model).values() for p in (layer.lora_a, layer.lora_b)]


def fold(model: PreTrainedModel) -> None:
    """Turn adapted layers into plain ones of weight W + (alpha / rank) B A, in place.

    The arithmetic is that of `mergeguard.checkpoints.adapter`: in float32, rounded once to the weight's dtype.

    Raises:
        ParameterError: the model has no adapters.
    """
    _replace(model, {name: layer.folded() for name, layer in _adapted(model).items()})


def low_rank_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The adapter's tensors under peft's names, e.g. "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight".

    They are the model's own, detached, float32 of shape (rank, in) and (out, rank).

    Raises:
        ParameterError: the model has no adapters.
    """
    state = {}
    for name, layer in _adapted(model).items():
        state[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_a.detach()
        state[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_b.detach()
    return state


def adapter_config(model: PreTrainedModel, base: str = "") -> dict[str, Any]:
    """The content of peft's adapter_config.json.

    Args:
        model: a model with adapters.
        base: what the adapter was trained on, a path or a repository's name; for readers, it decides nothing.

    Raises:
        ParameterError: the model has no adapters.
    """
    layers = _adapted(model)
    low_rank = next(iter(layers.values())).low_rank
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": low_rank.rank,
        "lora_alpha": low_rank.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
    }


def save_low_rank(model: PreTrainedModel, folder: Path, base: str = "", dtype: torch.dtype = torch.float32) -> None:
    """Write the adapter as peft does: adapter_config.json and adapter_model.safetensors.

    Args:
        model: a model with adapters.
        folder: appears whole, and must not exist.
        base: see `adapter_config`.
        dtype: in which A and B are stored; readers compute in float32.

    Raises:
        ParameterError: the model has no adapters.
        CheckpointError: the folder exists or cannot be written.
    """
    config, state = adapter_config(model, base), low_rank_state(model)
    with atomic_folder(folder) as temporary:
        (temporary / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        write_tensors(temporary / WEIGHTS, {name: tensor.to("cpu", dtype) for name, tensor in state.items()})


def _adapted(model: PreTrainedModel) -> dict[str, LowRankLinear]:
    layers = _layers(model, LowRankLinear)
    if not layers:
        raise ParameterError(f"{type(model).__name__} has no low-rank adapters; call add_low_rank first")
    return cast("dict[str, LowRankLinear]", layers)


def _layers(model: PreTrainedModel, kind: type[nn.Linear]) -> dict[str, nn.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def _replace(model: PreTrainedModel, layers: dict[str, Any]) -> None:
    for name, layer in layers.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer)

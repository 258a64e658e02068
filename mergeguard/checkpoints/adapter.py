"""A LoRA adapter on its base, as a source: the weights that peft's `merge_and_unload` gives, one tensor at a time.

    W + scale * B A        LoRA (Hu et al., 2021, arXiv:2106.09685, section 4.1)

The arithmetic is peft's on the CPU: A and B are taken in float32 (float64 for a float64 base); a linear layer's update
is added before it is rounded to the dtype of the base, an embedding's after.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch

from mergeguard.checkpoints.adapter_config import LoraConfig, ends_with_module, read_lora_config
from mergeguard.checkpoints.checkpoint import ADAPTER_CONFIG, open_checkpoint
from mergeguard.checkpoints.inputs import refuse, refuse_tensor
from mergeguard.checkpoints.source import Source, StoredSource, as_tensor, tensor_of
from mergeguard.checkpoints.tied import TIED_EMBEDDINGS, TIED_HEADS, ties_embeddings
from mergeguard.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType

    from torch import Tensor

    from mergeguard.checkpoints.source import TensorInfo

WEIGHTS, PICKLED_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
FLOATS = ("float16", "bfloat16", "float32", "float64")
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder")
CONV1D_MODULES = ("c_attn", "c_proj", "c_fc", "q_attn")
"""The layers of those models that transformers stores transposed, as (in, out)."""
_ADVICE = "give the base that the adapter was trained on, or merge the two with peft first"
_FACTOR = re.compile(r"(?P<module>.+)\.(?P<kind>lora(?:_embedding)?)_(?P<side>[AB])(?P<weight>\.weight)?")


@dataclass(frozen=True)
class _Update:
    """The update of one base tensor: names of its factors in the adapter, and how they are put together."""

    first: str
    second: str
    scale: float
    embedding: bool
    transposed: bool


class LoraSource:
    """The tensors of a base with an adapter merged into them."""

    def __init__(self, base: Source, folder: Path, *, allow_pickle: bool = False) -> None:
        """Open an adapter and check all of it against its base; no weights are read.

        Args:
            base: what the adapter was trained on; closed together with this source.
            folder: `adapter_config.json` and `adapter_model.safetensors`, as peft writes them.
            allow_pickle: take `adapter_model.bin` where there are no safetensors.

        Raises:
            CheckpointError: the adapter is not plain LoRA, is incomplete, or does not fit the base.
        """
        self.path, self.config, self.tensors, self.hidden = base.path, base.config, base.tensors, base.hidden
        self._base = base
        if not (folder / ADAPTER_CONFIG).exists():
            refuse(folder, f"has no {ADAPTER_CONFIG}; expected the folder of a LoRA adapter as peft writes it")
        self._config = read_lora_config(folder / ADAPTER_CONFIG)
        self._adapter = _open_weights(folder, allow_pickle=allow_pickle)
        try:
            self._updates, self._replacements = self._match()
            _check_saved_modules(self._config, base, self._replacements)
        except CheckpointError as error:
            self._adapter.__exit__(type(error), error, None)
            raise
        self.files = (*base.files, *self._adapter.files, folder / ADAPTER_CONFIG)

    def read(self, name: str) -> Tensor:
        return tensor_of(self, name)

    def read_bytes(self, name: str, view: memoryview) -> None:
        merged = as_tensor(self, name, view)
        if name in self._replacements:
            merged.copy_(self._adapter.read(self._replacements[name]))
        else:
            self._base.read_bytes(name, view)
        if name in self._updates:
            merged += self._delta(self._updates[name], merged.dtype)

    def check_unchanged(self) -> None:
        self._base.check_unchanged()
        self._adapter.check_unchanged()

    def close(self) -> None:
        try:
            self._adapter.close()
        finally:
            self._base.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        self._adapter.__exit__(kind, error, traceback)
        self._base.__exit__(kind, error, traceback)

    def _delta(self, update: _Update, dtype: torch.dtype) -> Tensor:
        """The update of a base tensor: of its shape, in the dtype in which peft adds it."""
        working = torch.float64 if dtype == torch.float64 else torch.float32
        first, second = (self._adapter.read(name).to(working) for name in (update.first, update.second))
        product = second @ first
        delta = (product.T if update.transposed else product) * update.scale
        return delta.to(dtype) if update.embedding else delta

    def _match(self) -> tuple[dict[str, _Update], dict[str, str]]:
        """(update, replacement) by the base tensor that each of the adapter's tensors belongs to."""
        factors: dict[tuple[str, str], dict[str, str]] = {}
        replacements: dict[str, str] = {}
        for key in self._adapter.tensors:
            if not key.startswith(PREFIX):
                refuse_tensor(self._adapter.path, key, f"does not start with {PREFIX}; save the adapter with peft")
            inner = key.removeprefix(PREFIX)
            factor = _FACTOR.fullmatch(inner)
            if factor and (factor["weight"] is None) == (factor["kind"] == "lora_embedding"):
                factors.setdefault((factor["module"], factor["kind"]), {})[factor["side"]] = key
            elif ".lora_" in inner:
                refuse_tensor(self._adapter.path, key, "is not plain LoRA; merge the adapter into its base with peft")
            else:
                name = self._target(key, inner.replace(".base_layer.", "."))
                if name in replacements:
                    refuse_tensor(self._adapter.path, key, f"gives {name} a second time; save the adapter with peft")
                self._check_shape(key, self.tensors[name].shape, f"that of {name} in the base")
                replacements[name] = key
        if not factors and not replacements:
            refuse(self._adapter.path, "holds no tensors; train the adapter or save it again")
        updates: dict[str, _Update] = {}
        for (module, kind), sides in factors.items():
            name, update = self._update(module, kind, sides)
            if name in updates:
                refuse_tensor(self._adapter.path, update.first, f"updates {name} a second time; save it with peft")
            if name in replacements and ".base_layer." not in replacements[name]:
                refuse_tensor(self._adapter.path, replacements[name], "is both updated and replaced; save it with peft")
            updates[name] = update
        return updates, replacements

    def _update(self, module: str, kind: str, sides: Mapping[str, str]) -> tuple[str, _Update]:
        present = next(iter(sides.values()))
        if len(sides) < 2:
            missing = "B" if "A" in sides else "A"
            refuse_tensor(self._adapter.path, present, f"has no {kind}_{missing} beside it; save the adapter again")
        name = self._target(present, f"{module}.weight")
        info = self.tensors[name]
        if info.dtype not in FLOATS:
            refuse_tensor(
                self.path, name, f"is {info.dtype}, to which no LoRA can be added; use the full model as base"
            )
        if len(info.shape) != 2:
            refuse_tensor(self._adapter.path, present, f"updates {name} of shape {list(info.shape)}; expected a matrix")
        embedding = kind == "lora_embedding"
        transposed = embedding or self._is_transposed(module, info, sides)
        outputs, inputs = reversed(info.shape) if transposed else info.shape
        rank = self._config.rank_of(module)
        self._check_shape(sides["A"], (rank, inputs), f"(r, inputs) of {name}")
        self._check_shape(sides["B"], (outputs, rank), f"(outputs, r) of {name}")
        return name, _Update(sides["A"], sides["B"], self._config.scale_of(module), embedding, transposed)

    def _is_transposed(self, module: str, info: TensorInfo, sides: Mapping[str, str]) -> bool:
        """Whether a linear layer's weight is stored as (in, out): peft asks its class, of which a file says nothing."""
        kind = (self.config or {}).get("model_type")
        if kind in CONV1D_MODELS:
            return module.rpartition(".")[2] in CONV1D_MODULES
        if not self._config.fan_in_fan_out:
            return False
        shapes = [self._adapter.tensors[sides[side]].shape for side in "BA"]
        product = (shapes[0][0], shapes[1][-1]) if all(shapes) else ()
        if info.shape == product and kind is not None:
            if info.shape == product[::-1]:
                refuse(
                    self._config.path,
                    f"has fan_in_fan_out, but neither the square {module} nor a model of type {kind!r} tells "
                    "whether its weights are stored so; set it to false if they are plain linear layers",
                )
            return False
        return True

    def _target(self, key: str, name: str) -> str:
        """The base tensor that `name` means; GPT-2's original checkpoints lack the "transformer." of the model."""
        tied = ties_embeddings(self.config)
        candidates = (name, name.removeprefix("transformer."))
        found = next((candidate for candidate in candidates if candidate in self.tensors), None)
        if found is None:
            why = "which is tied to the embedding" if tied and name in TIED_HEADS else f"which {self.path} lacks"
            refuse_tensor(self._adapter.path, key, f"belongs to {name}, {why}; {_ADVICE}")
        if tied and found in TIED_EMBEDDINGS and ".lora_" not in key and ".base_layer." not in key:
            refuse_tensor(self._adapter.path, key, f"replaces {found}, but not the head that is tied to it; {_ADVICE}")
        return found

    def _check_shape(self, key: str, expected: tuple[int, ...], what: str) -> None:
        found = self._adapter.tensors[key].shape
        if found != expected:
            refuse_tensor(self._adapter.path, key, f"has shape {list(found)}; expected {list(expected)}, {what}")


def _open_weights(folder: Path, *, allow_pickle: bool) -> Source:
    pickled = not (folder / WEIGHTS).exists() and (folder / PICKLED_WEIGHTS).exists()
    if not pickled and not (folder / WEIGHTS).exists():
        refuse(folder, f"has no {WEIGHTS}; expected the folder of a LoRA adapter as peft writes it")
    checkpoint = open_checkpoint(folder / (PICKLED_WEIGHTS if pickled else WEIGHTS), allow_pickle=allow_pickle)
    if not pickled:
        return StoredSource(checkpoint)
    from mergeguard.checkpoints.pickle_source import PickleSource

    return PickleSource(checkpoint)


def _check_saved_modules(config: LoraConfig, base: Source, replacements: Mapping[str, Any]) -> None:
    for end in config.modules_to_save:
        for name in base.tensors:
            if ends_with_module(name.rpartition(".")[0], end) and name not in replacements:
                refuse_tensor(base.path, name, f"is in modules_to_save of {config.path}, but the adapter lacks it")

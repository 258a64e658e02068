"""The models and recipes of bench_merge.py, and the comparison of its outputs. Light: torch comes inside functions."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

INPUTS = ("base", "first", "second")


@dataclass(frozen=True)
class Model:
    """Llama shapes, a dtype and the standard deviation by which the fine-tunes differ from their base."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    dtype: str
    deviation: float
    shards: int = 1

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor, in the order in which it is stored."""
        key_value = self.hidden // self.heads * self.kv_heads
        layer = {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (key_value, self.hidden),
            "self_attn.v_proj": (key_value, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
            "input_layernorm": (self.hidden,),
            "post_attention_layernorm": (self.hidden,),
        }
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for index in range(self.layers):
            shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
        shapes["model.norm.weight"] = (self.hidden,)
        return shapes if self.tied else {**shapes, "lm_head.weight": (self.vocabulary, self.hidden)}

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
            "hidden_size": self.hidden, "num_hidden_layers": self.layers, "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048, "initializer_range": 0.02, "bos_token_id": 1, "eos_token_id": 2,
            "tie_word_embeddings": self.tied, "torch_dtype": self.dtype,
        }  # fmt: skip


MODELS = {
    "small-float32": Model(576, 30, 1536, 9, 3, 49152, True, "float32", 0.001),  # SmolLM2-135M's shapes
    "small-bfloat16": Model(576, 30, 1536, 9, 3, 49152, True, "bfloat16", 0.003),
    "large-bfloat16": Model(2048, 22, 5632, 32, 4, 32000, False, "bfloat16", 0.003, shards=3),  # TinyLlama-1.1B's
}


@dataclass(frozen=True)
class Recipe:
    """A recipe but for paths and dtype; `each` are the parameters of every model."""

    models: tuple[str, ...] = ("first", "second")
    weights: tuple[float, ...] = (0.6, 0.4)
    each: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    base: str | None = "base"
    random: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(name for name in INPUTS if name in (*self.models, self.base))

    def text(self, method: str, folder: Path, dtype: str) -> str:
        lines = [f"merge_method: {method}", f"dtype: {dtype}"]
        lines += [f"base_model: {json.dumps(str(folder / self.base))}"] if self.base else []
        lines += [f"parameters: {json.dumps(self.shared)}"] if self.shared else []
        lines.append("models:")
        for index, name in enumerate(self.models):
            own = ({"weight": self.weights[index]} if self.weights else {}) | self.each
            lines.append(f"  - model: {json.dumps(str(folder / name))}")
            lines += [f"    parameters: {json.dumps(own)}"] if own else []
        return "\n".join(lines) + "\n"


DENSITY = {"density": 0.4}
RECIPES = {
    "linear": Recipe(models=INPUTS, weights=(0.2, 0.5, 0.3), base=None),
    "task_arithmetic": Recipe(),
    "slerp": Recipe(weights=(), shared={"t": 0.4}, base="first"),
    "nuslerp": Recipe(base=None),
    "multislerp": Recipe(base=None),
    "karcher": Recipe(weights=(), base=None),
    "ties": Recipe(each=DENSITY),
    "dare_linear": Recipe(each=DENSITY, random=True),
    "dare_ties": Recipe(each=DENSITY, random=True),
    "della": Recipe(each=DENSITY | {"epsilon": 0.15}, random=True),
    "della_linear": Recipe(each=DENSITY | {"epsilon": 0.15}, random=True),
    "breadcrumbs": Recipe(each=DENSITY | {"gamma": 0.01}),
    "breadcrumbs_ties": Recipe(each=DENSITY | {"gamma": 0.01}),
    "sce": Recipe(weights=(), shared={"select_topk": 0.4}),
    "model_stock": Recipe(weights=()),
    "nearswap": Recipe(models=("first", "second"), weights=(), shared={"t": 0.001}, base="first"),
    "arcee_fusion": Recipe(models=("first", "second"), weights=(), base="first"),
}


def encode_header(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> bytes:
    """The head of a safetensors file that holds these tensors one after the other."""
    code, size = {"float32": ("F32", 4), "bfloat16": ("BF16", 2)}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        stop = start + size * elements(shape)
        header[name] = {"dtype": code, "shape": shape, "data_offsets": (start, stop)}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def elements(shape: Sequence[int]) -> int:
    return shape[0] if len(shape) == 1 else shape[0] * shape[1]


def shard_files(shapes: Mapping[str, tuple[int, ...]], shards: int) -> dict[str, str]:
    """The file of every tensor: consecutive ones together, in files of about the same size."""
    if shards == 1:
        return dict.fromkeys(shapes, "model.safetensors")
    total, before, files = sum(map(elements, shapes.values())), 0, {}
    for name, shape in shapes.items():
        files[name] = f"model-{1 + before * shards // total:05}-of-{shards:05}.safetensors"
        before += elements(shape)
    return files


def build(model: Model, folder: Path) -> None:
    """Writes base, first and second into `folder`, tensor by tensor; the folder appears when all is done."""
    import torch

    shapes, dtype = model.shapes(), getattr(torch, model.dtype)
    files, generator = shard_files(shapes, model.shards), torch.Generator().manual_seed(0)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with ExitStack() as stack:
        handles = {}
        for name in INPUTS:
            (partial / name).mkdir(parents=True)
            (partial / name / "config.json").write_text(json.dumps(model.config(), indent=2), encoding="utf-8")
            for file in dict.fromkeys(files.values()):
                handles[name, file] = stack.enter_context((partial / name / file).open("wb"))
                own = {tensor: shape for tensor, shape in shapes.items() if files[tensor] == file}
                handles[name, file].write(encode_header(own, model.dtype))
            if model.shards > 1:
                size = sum(map(elements, shapes.values())) * dtype.itemsize
                index = {"metadata": {"total_size": size}, "weight_map": files}
                (partial / name / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        for tensor, shape in shapes.items():
            is_norm = len(shape) == 1
            base = torch.ones(shape) if is_norm else torch.empty(shape).normal_(0, 0.02, generator=generator)
            base = base.to(dtype)
            for name in INPUTS:
                values = base
                if name != "base":
                    delta = torch.empty(shape).normal_(0, model.deviation, generator=generator)
                    values = delta.add_(base).to(dtype)
                handles[name, files[tensor]].write(values.view(torch.uint8).numpy().data)
    partial.rename(folder)


def stored_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint, sorted by name, one at a time."""
    from safetensors import safe_open

    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in folder.glob("*.safetensors")]
        holders = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - not a mapping
        for name in sorted(holders):
            yield name, holders[name].get_tensor(name)


def compare(ours: Path, theirs: Path) -> dict[str, Any]:
    """How many elements of two checkpoints differ and by how much; `problem` says why they cannot be compared."""
    import torch

    found: dict[str, Any] = {"elements": 0, "differing": 0, "largest": 0.0, "problem": ""}
    for pair in zip_longest(stored_tensors(ours), stored_tensors(theirs), fillvalue=("nothing", torch.empty(0))):
        (name, own), (other_name, other) = pair
        if (name, own.dtype, own.shape) != (other_name, other.dtype, other.shape):
            kinds = [f"{n} ({t.dtype}, {list(t.shape)})" for n, t in pair]
            return found | {"problem": f"ours has {kinds[0]} where mergekit has {kinds[1]}"}
        found["elements"] += own.numel()
        found["differing"] += own.numel() - int(torch.count_nonzero(own == other))
        found["largest"] = max(found["largest"], float((own.float() - other.float()).abs().max()))
    return found

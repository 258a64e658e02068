"""Small checkpoints on disk, for tests of merges from files."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

State = dict[str, torch.Tensor]
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "vocab_size": 16,
    "tie_word_embeddings": False,
}
SHAPES: dict[str, tuple[int, ...]] = {
    "lm_head.weight": (16, 8),
    "model.embed_tokens.weight": (16, 8),
    **{
        f"model.layers.{layer}.{name}.weight": shape
        for layer in range(2)
        for name, shape in {
            "input_layernorm": (8,),
            "mlp.down_proj": (8, 12),
            "mlp.gate_proj": (12, 8),
            "mlp.up_proj": (12, 8),
            "post_attention_layernorm": (8,),
            "self_attn.k_proj": (4, 8),
            "self_attn.o_proj": (8, 8),
            "self_attn.q_proj": (8, 8),
            "self_attn.v_proj": (4, 8),
        }.items()
    },
    "model.norm.weight": (8,),
}


def family(count: int, *, seed: int = 0, dtype: torch.dtype = torch.float32, spread: float = 0.01) -> list[State]:
    """A base and `count` models that moved a little from it, each in a direction of its own."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> State:
        return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}

    base = draw()
    models = [{name: base[name] + spread * delta for name, delta in draw().items()} for _ in range(count)]
    return [{name: tensor.to(dtype) for name, tensor in state.items()} for state in (base, *models)]


def save_model(folder: Path, state: Mapping[str, torch.Tensor], *, shards: int = 1, **config: object) -> Path:
    """Write a checkpoint of one file or several, with a config."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    names = list(state)
    if shards == 1:
        save_file(dict(state), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for index in range(shards):
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = names[index::shards]
        save_file({name: state[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_recipe(path: Path, method: str, models: Sequence[Path], *, base: Path | None = None, **more: Any) -> Path:
    """A recipe for `models`, with equal weights and a density where the method has such parameters."""
    parameters = more.pop("each", {"weight": 0.5})
    recipe: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": str(model), "parameters": parameters} for model in models],
        **more,
    }
    if base is not None:
        recipe["base_model"] = str(base)
    path.write_text(json.dumps(recipe, indent=1))  # JSON is YAML
    return path


def resized(state: State, rows: int, *, tied: bool = False) -> State:
    """The same model with as many embedding rows; new rows are new values."""
    generator = torch.Generator().manual_seed(rows)
    changed = dict(state)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        more = torch.randn((max(0, rows - 16), 8), generator=generator).to(state[name].dtype)
        changed[name] = torch.cat([state[name], more])[:rows]
    return {name: tensor for name, tensor in changed.items() if not (tied and name == "lm_head.weight")}


def write_tokenizer(folder: Path, words: str, added: str = "", **names: str) -> None:
    """A tokenizer of whole words as transformers writes one; words and added tokens with spaces between them.

    Args:
        folder: to write into.
        words: ordinary tokens, `<u>` (unknown) among them.
        added: tokens that follow them.
        names: of special tokens, e.g. `pad_token="<pad>"`.
    """
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    vocabulary = {word: index for index, word in enumerate(words.split())}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<u>"))  # noqa: S106 - a token of a tokenizer
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in added.split()])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<u>", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))

"""Parity with peft, the oracle of LoRA: every merged tensor equals `merge_and_unload`'s, bit for bit."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from mergeguard.checkpoints.source import open_source
from robustness_tests.meta.oracle import needs

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = needs("peft")

PATTERNS = {
    "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.(up|down)_proj": 5},
    "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 7, "up_proj": 0.3, r"layers\.1\.mlp\.up_proj": 2},
}
LLAMA: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj", "o_proj"], "lora_alpha": 13},
    "every linear layer": {"target_modules": "all-linear", "use_rslora": True},
    "patterns": {"target_modules": "all-linear", **PATTERNS},
    "patterns with rslora": {"target_modules": "all-linear", "use_rslora": True, **PATTERNS},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "k_proj"], "lora_alpha": 5},
    "saved modules": {"target_modules": ["up_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
}
GPT2: dict[str, dict[str, Any]] = {
    "transposed": {"target_modules": ["c_attn", "c_proj", "c_fc"]},
    "tied embedding": {"target_modules": ["c_proj", "wte"]},
}
CASES = [("llama", name) for name in LLAMA] + [("gpt2", name) for name in GPT2]
DTYPES = (torch.float32, torch.bfloat16)
FURTHER = [("llama", "embedding and head", torch.float16), ("llama", "embedding and head", torch.float64)]
MATRIX = [(*case, dtype) for case in CASES for dtype in DTYPES] + FURTHER


def new_model(kind: str) -> torch.nn.Module:
    torch.manual_seed(3)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=2, tie_word_embeddings=False, **sizes))


def merge_with_peft(base: Path, adapter: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return {name: tensor.detach() for name, tensor in merged.state_dict().items()}


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "case", "dtype"), MATRIX, ids=str)
def test_a_base_with_its_adapter_equals_what_peft_merges(
    kind: str, case: str, dtype: torch.dtype, adapter_dtype: torch.dtype, tmp_path: Path
) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's are about other things than the weights
        from peft import LoraConfig, get_peft_model

        model = new_model(kind)
        model.to(dtype).save_pretrained(base)
        torch.manual_seed(4)
        config = LoraConfig(init_lora_weights=False, r=4, **{"llama": LLAMA, "gpt2": GPT2}[kind][case])
        trained = get_peft_model(model, config)
        for parameter in trained.parameters():
            if parameter.requires_grad:  # of the saved modules too
                parameter.data += 0.05 * torch.randn_like(parameter)
        trained.save_pretrained(adapter)
        factors = load_file(adapter / "adapter_model.safetensors")
        factors = {name: factor.to(adapter_dtype) for name, factor in factors.items()}
        save_file(factors, adapter / "adapter_model.safetensors")
        expected = merge_with_peft(base, adapter, dtype)

    with open_source(str(base)) as plain, open_source(f"{base}+{adapter}") as source:
        found = {name: source.read(name) for name in source.tensors}
        changed = {name for name in found if not torch.equal(found[name], plain.read(name))}
    if kind == "gpt2":
        assert expected.pop("lm_head.weight").equal(expected["transformer.wte.weight"])
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == expected[name].dtype == dtype for name in found)
    differing = {name: int((found[name] != expected[name]).sum()) for name in found}
    assert not any(differing.values()), f"elements that differ: {differing}"
    targeted = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in factors if ".lora_" in name}
    assert {f"{module}.weight" for module in targeted} <= changed

"""Low-rank adapters: training moves them alone, and what they write means the same to mergeguard and to peft."""

from __future__ import annotations

import copy
import json
import warnings
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from mergeguard.checkpoints.source import open_source
from mergeguard.errors import CheckpointError, ParameterError
from mergeguard.worlds.low_rank import (
    LowRank,
    LowRankLinear,
    adapter_config,
    add_low_rank,
    fold,
    low_rank_state,
    save_low_rank,
)
from mergeguard.worlds.training import Example, collate, fit
from robustness_tests.meta.oracle import needs
from robustness_tests.meta.tiny_models import tiny_gpt2, tiny_llama

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

IDS = torch.tensor([[0, 5, 17, 200, 31, 4], [0, 9, 8, 7, 6, 5]])
BATCH = collate([Example((0, 5, 17, 200, 31, 4)), Example((0, 9, 8, 7))], pad=1)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=IDS).logits


def trained(low_rank: LowRank, model: PreTrainedModel | None = None) -> PreTrainedModel:
    """A model whose adapter was trained for a few steps, enough to change what it says."""
    model = tiny_llama() if model is None else model
    parameters = add_low_rank(model, low_rank, seed=3)
    fit(model, iter([BATCH] * 4), steps=4, learning_rate=0.02, parameters=parameters, warmup=1)
    return model


def test_a_new_adapter_changes_no_bit_of_what_the_model_says() -> None:
    model = tiny_llama()
    before = logits(model)
    add_low_rank(model, LowRank(4), seed=0)
    assert torch.equal(logits(model), before)


def test_every_linear_layer_of_the_blocks_is_adapted_and_the_head_is_not() -> None:
    model = tiny_llama()
    linear = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    parameters = add_low_rank(model, LowRank(4), seed=0)
    adapted = {name for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    assert adapted == linear - {"lm_head"}
    assert len(adapted) == 14
    assert len(parameters) == 28
    assert all(parameter.requires_grad for parameter in parameters)


def test_training_moves_the_adapter_and_no_weight_of_the_model() -> None:
    before = tiny_llama().state_dict()
    model = trained(LowRank(4, 8))
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(bool(tensor.any()) for tensor in low_rank_state(model).values())
    assert not torch.allclose(logits(model), logits(tiny_llama()), atol=0.1)


def test_the_same_seed_draws_the_same_adapter_and_another_seed_another_one() -> None:
    def drawn(seed: int) -> dict[str, torch.Tensor]:
        model = tiny_llama()
        add_low_rank(model, LowRank(4), seed)
        return {name: tensor for name, tensor in low_rank_state(model).items() if "lora_A" in name}

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    assert len({tensor.sum().item() for tensor in first.values()}) == len(first), "layers share a draw"


def test_a_starts_with_the_variance_that_keeps_the_size_of_its_input() -> None:
    layer = LowRankLinear(torch.nn.Linear(400, 3), LowRank(100), seed=0)
    assert layer.lora_a.std().item() == pytest.approx(400**-0.5, rel=0.02)


@settings(max_examples=6, deadline=None)
@given(rank=st.integers(1, 9), alpha=st.one_of(st.integers(1, 40), st.floats(0.1, 40)))
def test_folding_says_what_the_adapted_model_said(rank: int, alpha: float) -> None:
    model = trained(LowRank(rank, alpha))
    expected = logits(model)
    fold(model)
    assert not any(isinstance(module, LowRankLinear) for module in model.modules())
    assert list(model.state_dict()) == list(tiny_llama().state_dict())
    assert all(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("low_rank", [LowRank(4), LowRank(5, 3), LowRank(2, 0.7)], ids=str)
def test_the_checkpoint_on_its_base_is_the_folded_model_bit_for_bit(low_rank: LowRank, tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_llama().save_pretrained(base)
    model = trained(low_rank)
    save_low_rank(model, adapter, "tiny")
    fold(model)
    with open_source(f"{base}+{adapter}") as source:
        found = {name: source.read(name) for name in source.tensors}
    expected = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@needs("peft")
def test_peft_reads_the_checkpoint_and_says_what_the_trained_model_says(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_llama().save_pretrained(base)
    model = trained(LowRank(5, 13))
    save_low_rank(model, adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's are about other things than the weights
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


def test_a_base_in_half_precision_keeps_its_dtype_and_gets_a_float32_adapter() -> None:
    plain = tiny_llama().to(torch.bfloat16)
    model = trained(LowRank(4, 8), copy.deepcopy(plain))
    assert {tensor.dtype for tensor in low_rank_state(model).values()} == {torch.float32}
    said = logits(model)
    fold(model)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}
    assert (logits(model) - said).abs().mean() < 0.1 * (said - logits(plain)).abs().mean()


def test_a_layer_with_a_bias_keeps_it() -> None:
    layer = torch.nn.Linear(4, 3)
    adapted = LowRankLinear(layer, LowRank(2), seed=0)
    inputs = torch.ones(2, 4)
    expected = torch.nn.functional.linear(inputs, layer.weight, layer.bias)
    assert torch.equal(adapted(inputs), expected)
    assert torch.equal(adapted.folded()(inputs), expected)


def test_what_cannot_be_adapted_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="GPT2LMHeadModel has no linear layers named q_proj, "):
        add_low_rank(tiny_gpt2(), LowRank(), seed=0)
    with pytest.raises(ParameterError, match="rank of an adapter is 0, expected at least 1"):
        LowRank(0)
    with pytest.raises(ParameterError, match="alpha of an adapter is nan, expected a positive number"):
        LowRank(4, float("nan"))
    model = tiny_llama()
    for use in (fold, low_rank_state, adapter_config, lambda model: save_low_rank(model, tmp_path / "a")):
        with pytest.raises(ParameterError, match="no low-rank adapters; call add_low_rank first"):
            use(model)
    add_low_rank(model, LowRank(2), seed=0)
    with pytest.raises(ParameterError, match="has low-rank adapters already; fold them first"):
        add_low_rank(model, LowRank(2), seed=0)
    save_low_rank(model, tmp_path / "a", "owner/base")
    assert json.loads((tmp_path / "a/adapter_config.json").read_text())["base_model_name_or_path"] == "owner/base"
    with pytest.raises(CheckpointError, match="exists already"):
        save_low_rank(model, tmp_path / "a")

"""Our absmax codes are LLM.int8's, with known exceptions, and bitsandbytes' own product can stand in for them."""

from __future__ import annotations

import builtins
import logging
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from mergeguard.errors import ParameterError
from mergeguard.protections.contract import Evidence
from mergeguard.protections.quantization_watermark import QuantizationWatermark
from mergeguard.verification.llm_int8 import THRESHOLD, int8_twin
from mergeguard.verification.quantize import quantizable_weights, quantize, with_quantized_weights
from mergeguard.worlds.contract import Budget, Texts
from robustness_tests.meta.oracle import needs
from robustness_tests.meta.tiny_models import byte_level_tokenizer, tiny_llama

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IDS = torch.tensor([[0, 5, 17, 200, 31, 4], [0, 9, 8, 7, 6, 5]])
SHAPES = [(1, 1), (6, 40), (192, 576), (576, 1536)]
pytestmark = needs("bitsandbytes")


def weight_of(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    return (0.03 * torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))).to(dtype)


def codes_of_bitsandbytes(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from bitsandbytes.functional import int8_vectorwise_quant

    codes, absmax, _ = int8_vectorwise_quant(weight.clone())
    return codes, absmax


def steps_from_a_tie(weight: torch.Tensor) -> torch.Tensor:
    steps = weight.double() / weight.double().abs().amax(dim=1, keepdim=True) * 127
    return (steps - steps.floor() - 0.5).abs()


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_are_those_of_bitsandbytes_but_for_ties(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = weight_of(shape, dtype)
    codes, absmax = codes_of_bitsandbytes(weight)
    ours = quantize(weight, 8)
    assert torch.equal(absmax / 127, ours.scale)
    differs = codes != ours.codes
    assert int((codes.int() - ours.codes.int()).abs().max()) <= 1
    assert bool((steps_from_a_tie(weight)[differs] < 1e-4).all())
    assert differs.float().mean() < 1e-3


def test_the_digits_that_float16_drops_move_few_codes_and_by_one() -> None:
    weight = weight_of((576, 1536), torch.float32)
    codes, _ = codes_of_bitsandbytes(weight.half())  # as its layers take them
    differs = codes != quantize(weight, 8).codes
    assert 0 < differs.float().mean() < 0.01
    assert int((codes.int() - quantize(weight, 8).codes.int()).abs().max()) == 1
    assert float(steps_from_a_tie(weight)[differs].max()) < 127 * 2**-10


def test_a_model_has_8_bit_layers_inside_the_block_and_its_own_after_it(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama()
    names = quantizable_weights(model)
    own = {name: model.get_parameter(name) for name in names}
    before, halved = logits(model), tiny_llama().half().float()
    with with_quantized_weights(model, 8):
        absmax = logits(model)
    with int8_twin(model):
        for name in names:
            stored = model.get_parameter(name)
            assert stored.dtype == torch.int8
            off = (stored.int() - quantize(halved.get_parameter(name), 8).codes.int()).abs()
            assert int(off.max()) <= 1
            assert off.float().mean() < 1e-3
        assert model.lm_head.weight.dtype == torch.float32
        real = logits(model)
    assert 0 < (real - absmax).abs().mean() < 2 * (absmax - before).abs().mean()
    assert all(model.get_parameter(name) is tensor for name, tensor in own.items())
    assert torch.equal(logits(model), before)
    with pytest.raises(KeyboardInterrupt), int8_twin(model):
        raise KeyboardInterrupt
    assert all(model.get_parameter(name) is tensor for name, tensor in own.items())
    assert not caplog.records
    assert logging.getLogger("bitsandbytes.autograd._functions").level == logging.NOTSET


def test_input_features_of_great_magnitude_are_not_rounded_to_8_bits() -> None:
    model = tiny_llama()
    name = "model.layers.0.mlp.up_proj"
    inputs = torch.full((1, 32), 0.5)
    inputs[0, 3] = THRESHOLD * 100  # one step of 8 bits would be larger than all the other features
    with torch.no_grad():
        exact = model.get_submodule(name)(inputs)
        without = inputs.clone()
        without[0, 3] = 0
        rest = model.get_submodule(name)(without)
        with int8_twin(model):
            found = model.get_submodule(name)(inputs)
            small = model.get_submodule(name)(without)
    assert (found - exact).abs().max() < 0.02 * exact.abs().max()
    assert (small - rest).abs().max() < 0.02 * rest.abs().max()


def test_a_layer_keeps_its_bias() -> None:
    model = tiny_llama()
    layer = torch.nn.Linear(32, 32)
    model.model.layers[0].self_attn.q_proj = layer
    inputs = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), int8_twin(model):
        found = model.model.layers[0].self_attn.q_proj(inputs)
    assert (found - layer(inputs)).abs().max() < 0.05
    assert layer.bias.abs().max() > 0.1


def test_without_bitsandbytes_the_twin_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def absent(module: str, *rest: Any) -> Any:
        if module.startswith("bitsandbytes"):
            raise ImportError(module)
        return load(module, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with (
        pytest.raises(ParameterError, match=r"needs bitsandbytes: pip install 'mergeguard\[gpu\]'"),
        int8_twin(tiny_llama()),
    ):
        pass


def test_the_watermark_reads_either_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_llama(), byte_level_tokenizer()
    evidence = Evidence("quantization_watermark", {"bits": 8, "prompts": ["the cat", "the dog"]})
    seen: list[set[torch.dtype]] = []

    def spy(read: PreTrainedModel, *_: Any) -> list[Any]:
        seen.append({read.get_parameter(name).dtype for name in quantizable_weights(model)})
        return original(read, *_)

    from mergeguard.protections import quantization_watermark

    original = quantization_watermark.answer_probes
    monkeypatch.setattr(quantization_watermark, "answer_probes", spy)
    for twin in ("absmax", "llm_int8"):
        reading = QuantizationWatermark(twin=twin).read(model, tokenizer, evidence, {})
        assert len(reading.hits) == 2
    assert seen == [{torch.float32}, {torch.float32}, {torch.float32}, {torch.int8}]


def test_the_twin_of_bitsandbytes_has_8_bits() -> None:
    with pytest.raises(ParameterError, match="twin=llm_int8 of quantization_watermark has 8 bits, not 5"):
        QuantizationWatermark(twin="llm_int8", bits=5)
    with pytest.raises(ParameterError, match=r"'twin'.*absmax.*llm_int8"):
        QuantizationWatermark(twin="int8")
    assert str(QuantizationWatermark(twin="absmax")) == "quantization_watermark"
    texts = Texts(("a b c d e",), ("a b",), (("a", "b"),))
    budget = replace(Budget(texts, 0, 1e-3), options={"bits": 5})
    with pytest.raises(ParameterError, match="twin=llm_int8 of quantization_watermark has 8 bits, not 5"):
        QuantizationWatermark(twin="llm_int8").embed(
            tiny_llama(), byte_level_tokenizer(), rng=random.Random(0), budget=budget
        )

"""Weights are rounded as LLM.int8 rounds them, and models get their own weights back."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeguard.errors import ParameterError
from mergeguard.verification.quantize import (
    quantizable_weights,
    quantize,
    quantized_state,
    with_quantized_weights,
)
from robustness_tests.meta.tiny_models import tiny_gpt2, tiny_llama

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BITS = st.integers(2, 16)
PROPERTY = settings(max_examples=40, deadline=None)
LAYERS = [
    f"model.layers.{layer}.{part}.weight"
    for layer in (0, 1)
    for part in (
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    )
]


@st.composite
def matrices(draw: st.DrawFn) -> torch.Tensor:
    """Normal, tiny, zero and mixed rows; magnitudes far from float32's limits."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    entry = st.floats(-1e4, 1e4, width=32).filter(lambda value: value == 0 or abs(value) > 1e-20)
    row = st.one_of(st.just([0.0] * columns), st.lists(entry, min_size=columns, max_size=columns))
    return torch.tensor(draw(st.lists(row, min_size=rows, max_size=rows)))


@PROPERTY
@given(weight=matrices(), bits=BITS)
def test_rounding_moves_a_weight_by_at_most_half_a_step(weight: torch.Tensor, bits: int) -> None:
    quantized = quantize(weight, bits)
    largest = 2 ** (bits - 1) - 1
    rounding = weight.abs().amax(dim=1, keepdim=True) * 2.0**-22  # a few float32 operations on numbers up to absmax
    assert ((weight - quantized.dequantize()).abs() <= quantized.scale[:, None] / 2 + rounding).all()
    assert quantized.scale.dtype == quantized.dequantize().dtype == torch.float32
    assert quantized.codes.shape == weight.shape
    zero = weight.abs().amax(dim=1) == 0
    assert (quantized.codes.int().abs().amax(dim=1) == torch.where(zero, 0, largest)).all()
    assert (quantized.scale[zero] == 0).all()


@PROPERTY
@given(weight=matrices(), bits=BITS)
def test_rounding_what_is_rounded_changes_no_code(weight: torch.Tensor, bits: int) -> None:
    quantized = quantize(weight, bits)
    assert torch.equal(quantize(quantized.dequantize(), bits).codes, quantized.codes)


@PROPERTY
@given(weight=matrices(), bits=BITS, exponent=st.integers(-20, 20))
def test_codes_are_symmetric_and_do_not_depend_on_scale(weight: torch.Tensor, bits: int, exponent: int) -> None:
    codes = quantize(weight, bits).codes
    assert torch.equal(quantize(-weight, bits).codes, -codes)
    assert torch.equal(quantize(weight * 2.0**exponent, bits).codes, codes)


@PROPERTY
@given(weight=matrices(), bits=BITS)
def test_each_row_is_rounded_for_itself(weight: torch.Tensor, bits: int) -> None:
    whole = quantize(weight, bits)
    for index, row in enumerate(weight):
        alone = quantize(row[None], bits)
        assert torch.equal(alone.codes[0], whole.codes[index])
        assert torch.equal(alone.scale[0], whole.scale[index])


def test_known_codes() -> None:
    quantized = quantize(torch.tensor([[127.0, -63.5, 0.5, 1.5, 2.51, 0.0], [-0.3, 0.1, 0.0, 0.2, 0.0, 0.0]]), 8)
    assert quantized.codes.tolist() == [[127, -64, 0, 2, 3, 0], [-127, 42, 0, 85, 0, 0]]  # halves to even
    assert quantized.scale.tolist() == pytest.approx([1.0, 0.3 / 127])
    assert quantize(torch.tensor([[1.0, 0.4, -0.6, -1.0]]), 2).codes.tolist() == [[1, 0, -1, -1]]


@pytest.mark.parametrize(("bits", "dtype"), [(2, torch.int8), (8, torch.int8), (9, torch.int16), (16, torch.int16)])
def test_codes_are_stored_in_the_smallest_type_that_holds_them(bits: int, dtype: torch.dtype) -> None:
    codes = quantize(torch.tensor([[1.0, -1.0]]), bits).codes
    assert codes.dtype == dtype
    assert codes.tolist() == [[2 ** (bits - 1) - 1, 1 - 2 ** (bits - 1)]]


def test_half_precision_weights_are_rounded_in_single_precision() -> None:
    weight = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(quantize(weight, 8).codes, quantize(weight.float(), 8).codes)


@pytest.mark.parametrize("bits", [1, 17, 0, -8, 8.0, True])
def test_bits_out_of_range_are_refused(bits: int) -> None:
    with pytest.raises(ParameterError, match="expected an integer from 2 to 16"):
        quantize(torch.ones(2, 2), bits)
    with pytest.raises(ParameterError, match="expected an integer from 2 to 16"):
        quantized_state({}, [], bits)


@pytest.mark.parametrize(
    ("weight", "complaint"),
    [
        (torch.ones(3), "expected floats of shape"),
        (torch.ones(2, 2, dtype=torch.int8), "cannot quantise torch.int8"),
        (torch.tensor([[1.0, math.nan]]), "NaN or infinite"),
        (torch.tensor([[1.0, -math.inf]]), "NaN or infinite"),
    ],
)
def test_a_weight_that_cannot_be_rounded_is_refused(weight: torch.Tensor, complaint: str) -> None:
    with pytest.raises(ParameterError, match=complaint):
        quantize(weight, 8)


def test_linear_layers_are_quantisable_and_embeddings_norms_and_head_are_not(llama: PreTrainedModel) -> None:
    assert quantizable_weights(llama) == LAYERS


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(ParameterError, match=r"GPT2LMHeadModel has no torch.nn.Linear"):
        quantizable_weights(tiny_gpt2())


def test_a_quantised_state_has_new_tensors_for_the_named_ones_alone(llama: PreTrainedModel) -> None:
    state = {name: tensor.bfloat16() if "q_proj" in name else tensor for name, tensor in llama.state_dict().items()}
    before = {name: tensor.clone() for name, tensor in state.items()}
    rounded = quantized_state(state, LAYERS, 4)
    assert list(rounded) == list(state)
    for name, tensor in state.items():
        assert torch.equal(tensor, before[name])
        assert rounded[name].dtype == tensor.dtype
        if name in LAYERS:
            assert torch.equal(rounded[name], quantize(tensor, 4).dequantize().to(tensor.dtype))
            assert not torch.equal(rounded[name], tensor)
        else:
            assert rounded[name] is tensor


def test_a_missing_tensor_is_refused_by_name() -> None:
    with pytest.raises(ParameterError, match="no tensor named 'b' to quantise"):
        quantized_state({"a": torch.ones(1, 1)}, ["a", "b"], 8)


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_is_quantised_inside_the_block_and_itself_after_it(fails: bool) -> None:
    model = tiny_llama()
    parameters = dict(model.named_parameters())
    before = {name: (tensor.data_ptr(), tensor.detach().clone()) for name, tensor in parameters.items()}
    expected = quantized_state(model.state_dict(), LAYERS, 4)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    ending = pytest.raises(KeyboardInterrupt) if fails else nullcontext()
    with ending, with_quantized_weights(model, 4) as quantised:
        assert quantised is model
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, expected[name]), name
        with torch.no_grad():
            assert not torch.equal(model(input_ids=ids).logits, logits)
        if fails:
            raise KeyboardInterrupt
    for name, tensor in model.named_parameters():
        assert tensor is parameters[name]
        assert tensor.requires_grad
        assert tensor.data_ptr() == before[name][0]
        assert torch.equal(tensor, before[name][1])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, logits)


def test_a_model_that_cannot_be_quantised_stays_as_it_was() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    before = model.model.layers[0].mlp.up_proj.weight.data_ptr()
    with pytest.raises(ParameterError, match="NaN or infinite"), with_quantized_weights(model, 8):
        pass
    assert model.model.layers[0].mlp.up_proj.weight.data_ptr() == before

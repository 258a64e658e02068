"""States and the models that they are loaded into: every storage once, strict about names, on the world's terms."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from mergeguard.errors import IncompatibleModelsError, ParameterError
from mergeguard.worlds.contract import state_of
from mergeguard.worlds.states import Overlay, Placed, load_state, new_model, state_bytes
from robustness_tests.meta.mini_world import mini
from robustness_tests.meta.tiny_models import tiny_gpt2, tiny_llama

if TYPE_CHECKING:
    from collections.abc import Iterator


def copied(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state_of(model).items()}


def test_a_tied_head_is_named_by_its_embeddings_alone() -> None:
    model = tiny_gpt2()
    assert "lm_head.weight" in model.state_dict()
    assert list(state_of(model)) == [name for name in model.state_dict() if name != "lm_head.weight"]


def test_an_untied_model_s_state_is_its_state_dict_with_persistent_buffers() -> None:
    model = tiny_llama()
    model.register_buffer("counts", torch.arange(3))
    model.register_buffer("scratch", torch.arange(3), persistent=False)
    assert list(state_of(model)) == ["counts", *tiny_llama().state_dict()]
    assert state_bytes(model) == sum(tensor.nbytes for tensor in model.state_dict().values())


def test_a_tied_model_stays_tied_and_takes_every_weight() -> None:
    model, other = tiny_gpt2(), tiny_gpt2(seed=1)
    load_state(model, copied(other))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lm_head.weight": None}, "lacks tensor 'lm_head.weight', which the model has"),
        ({"other": torch.ones(1)}, "has tensor 'other', which the model lacks"),
        ({"lm_head.weight": torch.ones(2, 2)}, r"'lm_head.weight' of the state has shape \(2, 2\), .* has \(280, 32\)"),
    ],
)
def test_a_state_that_is_not_the_model_s_is_refused_by_tensor(change: dict[str, Any], said: str) -> None:
    state = {**copied(tiny_llama()), **change}
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    with pytest.raises(IncompatibleModelsError, match=said) as caught:
        mini().model(state)
    assert "\n" not in str(caught.value)


def test_a_second_name_of_a_tensor_is_refused_with_the_reason() -> None:
    model = tiny_gpt2()
    with pytest.raises(IncompatibleModelsError, match=r"'lm_head.weight', which is another of the model's under a sec"):
        load_state(model, dict(model.state_dict()))


class Counted(dict[str, torch.Tensor]):
    """A state that counts how often a tensor is asked for, even to learn whether it is there."""

    def __init__(self, state: Any) -> None:
        super().__init__(state)
        self.asked: list[str] = []

    def __getitem__(self, name: str) -> torch.Tensor:
        self.asked.append(name)
        return super().__getitem__(name)


def test_loading_asks_for_each_tensor_once_in_the_models_order() -> None:
    model = tiny_llama()
    state = Counted(reversed(copied(tiny_llama(seed=1)).items()))
    load_state(model, Placed(Overlay(state, {}), "cpu", torch.float32))
    assert state.asked == list(model.state_dict())


def test_an_overlay_takes_what_is_not_replaced_from_below() -> None:
    below = Counted({"a": torch.zeros(1), "b": torch.zeros(1)})
    overlay = Overlay(below, {"b": torch.ones(1)})
    assert {name: tensor.item() for name, tensor in overlay.items()} == {"a": 0, "b": 1}
    assert ("b" in overlay, "c" in overlay, len(overlay), below.asked) == (True, False, 2, ["a"])


def test_a_placed_state_casts_what_is_floating_and_copies_nothing_that_is_there() -> None:
    state = {"weight": torch.ones(2), "steps": torch.tensor(3)}
    half = Placed(state, "cpu", torch.bfloat16)
    assert (half["weight"].dtype, half["steps"].dtype) == (torch.bfloat16, torch.int64)
    assert Placed(state, "cpu", torch.float32)["weight"] is state["weight"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_world_s_models_have_its_dtype_and_keep_the_buffers_of_the_architecture(dtype: str) -> None:
    model = replace(mini(), dtype=dtype).model(mini().base)
    assert {str(tensor.dtype) for tensor in model.state_dict().values()} == {f"torch.{dtype}"}
    buffers = dict(model.named_buffers())
    assert buffers
    assert all(torch.equal(buffer, dict(tiny_llama().named_buffers())[name]) for name, buffer in buffers.items())
    assert torch.get_default_dtype() == torch.float32


def test_a_dtype_of_the_config_does_not_win_over_the_world_s() -> None:
    model = new_model(lambda: tiny_llama().bfloat16(), "cpu", torch.float32)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    tied = new_model(lambda: tiny_gpt2().bfloat16(), "cpu", torch.float32)
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight


def test_a_model_is_made_on_its_device_from_the_start() -> None:
    def build() -> Any:
        seen.append(torch.empty(0).device.type)
        return tiny_llama()

    seen: list[str] = []
    assert {tensor.device.type for tensor in new_model(build, "meta", torch.float32).state_dict().values()} == {"meta"}
    assert seen == ["meta"]


def test_the_default_dtype_is_back_after_a_model_that_cannot_be_made() -> None:
    with pytest.raises(ZeroDivisionError):
        new_model(lambda: 1 / 0, "cpu", torch.bfloat16)  # type: ignore[arg-type, return-value]  # it never returns
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("device", ["warp", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_in_one_line(device: str) -> None:
    with pytest.raises(ParameterError, match=f"torch cannot use the device '{device}' here: .*; choose cpu") as caught:
        replace(mini(), device=device).model(mini().base)
    assert "\n" not in str(caught.value)


def test_a_dtype_that_no_model_computes_in_is_refused() -> None:
    with pytest.raises(ParameterError, match="dtype of world 'mini' is 'int8', expected one of: float32, bfloat16, fl"):
        replace(mini(), dtype="int8")


@pytest.fixture(autouse=True)
def _default_dtype() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)

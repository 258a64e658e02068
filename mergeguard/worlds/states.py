"""States: the weights of a model as a mapping from names to tensors, which a large world reads as it is asked.

And the models that they are loaded into, one after the other.

A state names each storage once: where the output head is tied to the embeddings, `model.embed_tokens.weight` stands for
both and there is no `lm_head.weight`. Reading a tensor may be expensive, so nothing here asks for one twice, nor for
any to learn the names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from mergeguard.checkpoints.lazy import LazyTensors
from mergeguard.errors import IncompatibleModelsError, ParameterError
from mergeguard.worlds.contract import state_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel

State = Mapping[str, "Tensor"]


def state_bytes(model: PreTrainedModel) -> int:
    """Memory of the model's own tensors, in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state_of(model).values())


def new_model(build: Callable[[], PreTrainedModel], device: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model of no particular weights on a device, in evaluation mode, its weights in a dtype.

    Made there and so from the start, for a large one to be nowhere twice. Buffers that no state holds, such as rotary
    frequencies, keep the dtype in which the architecture computes them.

    Raises:
        ParameterError: torch cannot use the device here.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled for the device
        reason = str(error).partition("\n")[0]
        raise ParameterError(f"torch cannot use the device {device!r} here: {reason}; choose cpu") from error
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = build()
    finally:
        torch.set_default_dtype(default)
    own = model.state_dict()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in own and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)  # where the config's dtype overrode the default
    torch.nn.Module.to(model, device)  # transformers wraps its own so that type checkers cannot read it
    model.eval()
    return model


def load_state(model: PreTrainedModel, state: State) -> None:
    """Copy `state` into `model` tensor by tensor, in the model's order, each taken to the model's device and dtype.

    Raises:
        IncompatibleModelsError: a tensor is missing, extra or of another shape. With a wrong shape, or an error in a
            tensor that is computed as it is asked, the model is left with some tensors of each.
    """
    own = state_of(model)
    differing = set(own) ^ set(state)
    if differing:
        name = min(differing)
        if name in own:
            problem = f"lacks tensor {name!r}, which the model has"
        elif name in model.state_dict():
            problem = f"has tensor {name!r}, which is another of the model's under a second name; give each tensor once"
        else:
            problem = f"has tensor {name!r}, which the model lacks"
        raise IncompatibleModelsError(f"the state for {type(model).__name__} {problem}")
    with torch.no_grad():
        for name, target in own.items():
            tensor = state[name]
            if tensor.shape != target.shape:
                raise IncompatibleModelsError(
                    f"tensor {name!r} of the state has shape {tuple(tensor.shape)}, "
                    f"{type(model).__name__} has {tuple(target.shape)}"
                )
            target.copy_(tensor)
            del tensor  # before the next one is computed


class Overlay(LazyTensors):
    """`below` with some of its tensors replaced; the others are taken from it when they are asked for."""

    def __init__(self, below: State, replaced: State) -> None:
        super().__init__(below, lambda name: replaced[name] if name in replaced else below[name])


class Placed(LazyTensors):
    """`state` on a device, its floating tensors in a dtype; each tensor is taken there when it is asked for."""

    def __init__(self, state: State, device: str, dtype: torch.dtype) -> None:
        def place(name: str) -> Tensor:
            tensor = state[name]
            return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)

        super().__init__(state, place)

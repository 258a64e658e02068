"""AdamW in full precision, or with 8-bit states, paged or not (Dettmers et al., 2022, arXiv:2110.02861)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mergeguard.errors import ParameterError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

BETAS = (0.9, 0.98)
OF_BITSANDBYTES = {"adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit"}
DEVICES = ("cuda",)
"""Where the 8-bit optimizers are used. bitsandbytes computes them on the CPU too, where they save nothing worth it."""
_TABLES = ("qmap1", "qmap2")
"""Entries of bitsandbytes' state that are constants, shared by all parameters."""


def make_optimizer(
    name: str, parameters: Sequence[torch.nn.Parameter], *, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """The optimizer that a `Training` names.

    Raises:
        ParameterError: it needs a GPU or a package that is not there, or a trained parameter is not float32.
    """
    for parameter in parameters:
        if parameter.dtype != torch.float32:
            raise ParameterError(
                f"a trained parameter is {parameter.dtype}; AdamW's steps vanish in it: train float32 weights, with "
                "precision = 'bfloat16' for products in bfloat16"
            )
    if name not in OF_BITSANDBYTES:
        return torch.optim.AdamW(parameters, lr=learning_rate, betas=BETAS, weight_decay=weight_decay, fused=True)
    device = parameters[0].device.type
    if device not in DEVICES:
        raise ParameterError(
            f"optimizer {name!r} is for models on a CUDA device, this one is on {device}; set optimizer to 'adamw', or "
            "run on a GPU with the extra: pip install 'mergeguard[gpu]'"
        )
    try:
        import bitsandbytes
    except ImportError as error:
        raise ParameterError(
            f"optimizer {name!r} needs bitsandbytes: pip install 'mergeguard[gpu]', or set optimizer to 'adamw'"
        ) from error
    make = getattr(bitsandbytes.optim, OF_BITSANDBYTES[name])
    made: torch.optim.Optimizer = make(parameters, lr=learning_rate, betas=BETAS, weight_decay=weight_decay)
    return made


def state_of(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> dict[str, Tensor]:
    """What the optimizer remembers of a parameter; numbers as scalars."""
    state = optimizer.state[parameter]
    return {key: torch.as_tensor(value).detach() for key, value in state.items() if key not in _TABLES}


def restore_state(optimizer: Any, index: int, state: Mapping[str, Tensor]) -> None:
    """Give an optimizer that has made no step yet what `state_of` took from another one.

    Args:
        optimizer: made by `make_optimizer`.
        index: which of its parameters the state belongs to.
        state: on the CPU.
    """
    group = optimizer.param_groups[0]
    parameter = group["params"][index]
    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}
        return
    # Its load_state_dict would put paged states onto the GPU, so its own buffers are made and filled.
    optimizer.init_state(group, parameter, 0, index)
    own = optimizer.state[parameter]
    for key, value in state.items():
        if isinstance(own[key], Tensor):
            own[key].copy_(value)
        else:
            own[key] = value.item()

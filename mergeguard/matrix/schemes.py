"""What the engine demands of schemes, which may be anybody's: no crash, the right types, no model changed unasked."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch

from mergeguard.errors import MergeguardError, SchemeError
from mergeguard.worlds.contract import state_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel

    from mergeguard.protections.contract import Protection
    from mergeguard.worlds.states import State

T = TypeVar("T")


def is_ours(item: object) -> bool:
    """Whether the code of a class or function is part of the version that cache keys hold; a third party's is not."""
    return str(getattr(item, "__module__", "")).startswith("mergeguard.")


def guard(protection: Protection, action: str, call: Callable[[], T]) -> T:
    """What `call` returns.

    Raises:
        SchemeError: it crashed; a `MergeguardError` is about the input and passes.
    """
    try:
        return call()
    except MergeguardError:
        raise
    except Exception as error:
        raise SchemeError(f"{protection} crashed in {action}: {type(error).__name__}: {error}") from error


def require(protection: Protection, action: str, value: object, expected: type) -> None:
    """Refuse what a scheme returned if it is of another type.

    Raises:
        SchemeError: it is.
    """
    if not isinstance(value, expected):
        raise SchemeError(f"{protection}.{action} returned {type(value).__name__}, expected {expected.__name__}")


def changed_tensors(protection: Protection, model: PreTrainedModel, clean: State) -> dict[str, Tensor]:
    """What a scheme changed, on the CPU.

    Args:
        protection: the scheme, named in errors.
        model: the protected one.
        clean: what it was before, on the model's device and in its dtype; each tensor is asked for once.

    Raises:
        SchemeError: the model cannot be merged with the others: a tensor is absent, extra, of another shape or dtype,
            or not finite.
    """
    state, changed = state_of(model), {}
    if set(state) != set(clean):
        name = min(set(state) ^ set(clean))
        raise SchemeError(f"{protection}.embed changed the model's tensors: {name!r} is in one of the models only")
    for name, tensor in state.items():
        before = clean[name]
        if (tensor.shape, tensor.dtype) != (before.shape, before.dtype):
            raise SchemeError(
                f"{protection}.embed made {name!r} {tensor.dtype} of shape {tuple(tensor.shape)}, "
                f"expected {before.dtype} of shape {tuple(before.shape)}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise SchemeError(f"{protection}.embed left NaN or infinite values in {name!r}")
        if not torch.equal(tensor.to(before.device), before):
            changed[name] = tensor.cpu()
    return changed


def contents(model: PreTrainedModel) -> list[tuple[int, float]]:
    """Identity and sum of every parameter, cheap enough to compare before and after a reading."""
    return [(id(parameter), float(parameter.detach().sum(dtype=torch.float32))) for parameter in model.parameters()]

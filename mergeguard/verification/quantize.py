"""Copies of a model whose linear layers are rounded to a few bits, as LLM.int8 rounds weights.

Row-wise absolute-maximum quantisation (Dettmers et al. 2022, arXiv:2208.07339, section 2 and vector-wise quantisation
in section 3): with q = 2^(bits-1) - 1 and m the row's largest absolute weight, the code of w is round(w q / m) and
stands for code m / q. Codes are symmetric about 0, and -q-1 is not used. Only weights are rounded: activations and
LLM.int8's outlier columns belong to its matrix product, not to the stored weights.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mergeguard.errors import ParameterError
from mergeguard.verification.matching import halves

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from transformers import PreTrainedModel

MIN_BITS, MAX_BITS = 2, 16


@dataclass(frozen=True)
class Quantized:
    """A quantised weight matrix.

    Attributes:
        codes: int8 (int16 above 8 bits) of shape (out, in), within +-(2^(bits-1) - 1).
        scale: float32 of shape (out,), the value of one code step in each row; 0 for a row of zeros.
        bits: width of a code.
    """

    codes: Tensor
    scale: Tensor
    bits: int

    def dequantize(self) -> Tensor:
        """The weights that the codes stand for, float32 of shape (out, in)."""
        return self.codes.float() * self.scale[:, None]


def quantize(weight: Tensor, bits: int) -> Quantized:
    """Round each row of `weight` to 2^bits - 1 evenly spaced values, ties to even.

    Each weight moves by at most half of its row's `scale`, up to float32 rounding.

    Args:
        weight: floating point of shape (out, in); computed in float32.
        bits: width of a code, 2 to 16.

    Raises:
        ParameterError: `bits` is out of range, or `weight` is not a matrix of finite floating-point numbers.
    """
    _check_bits(bits)
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ParameterError(
            f"cannot quantise {weight.dtype} of shape {tuple(weight.shape)}, expected floats of shape (out, in)"
        )
    values = weight.detach().float()
    if not values.isfinite().all():
        raise ParameterError(f"cannot quantise a weight of shape {tuple(weight.shape)} with NaN or infinite entries")
    largest = 2 ** (bits - 1) - 1
    absmax = values.abs().amax(dim=1)
    # Dividing before multiplying keeps the ratio within [-1, 1], whatever the magnitude. A zero row has codes 0.
    ratio = values / torch.where(absmax > 0, absmax, 1)[:, None]
    codes = torch.round(ratio * largest).to(torch.int8 if bits <= 8 else torch.int16)
    return Quantized(codes, absmax / largest, bits)


def quantizable_weights(model: PreTrainedModel) -> list[str]:
    """Names of the weights that LLM.int8 quantises: those of the linear layers except the output head.

    Raises:
        ParameterError: there are none, so that a quantised copy would be the model itself.
    """
    _, head = halves(model)
    names = [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    ]
    if not names:
        raise ParameterError(f"{type(model).__name__} has no torch.nn.Linear besides its output head to quantise")
    return names


def quantized_state(state_dict: Mapping[str, Tensor], names: Sequence[str], bits: int) -> dict[str, Tensor]:
    """`state_dict` with the tensors in `names` rounded to `bits` bits and back, in their own dtypes.

    The other tensors are the given ones, not copies. In half precision the values of the codes are rounded once more.

    Raises:
        ParameterError: `bits` is out of range, or a name is missing or not a finite floating-point matrix.
    """
    _check_bits(bits)
    missing = [name for name in names if name not in state_dict]
    if missing:
        raise ParameterError(f"there is no tensor named {missing[0]!r} to quantise")
    rounded = {name: quantize(state_dict[name], bits).dequantize().to(state_dict[name].dtype) for name in names}
    return {**state_dict, **rounded}


@contextmanager
def with_quantized_weights(model: PreTrainedModel, bits: int) -> Iterator[PreTrainedModel]:
    """`model` with its linear weights rounded to `bits` bits inside the block, and its own tensors again after it.

    Raises:
        ParameterError: `bits` is out of range, or a weight cannot be quantised; the model is then untouched.
    """
    names = quantizable_weights(model)
    parameters = {name: model.get_parameter(name) for name in names}
    originals = {name: parameter.data for name, parameter in parameters.items()}
    rounded = quantized_state(originals, names, bits)
    try:
        for name, parameter in parameters.items():
            parameter.data = rounded[name]
        yield model
    finally:
        for name, parameter in parameters.items():
            parameter.data = originals[name]


def _check_bits(bits: int) -> None:
    if type(bits) is not int or not MIN_BITS <= bits <= MAX_BITS:
        raise ParameterError(f"bits is {bits}, expected an integer from {MIN_BITS} to {MAX_BITS}")

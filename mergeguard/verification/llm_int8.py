"""The 8-bit copy of a model as bitsandbytes computes it: LLM.int8 (Dettmers et al., 2022, arXiv:2208.07339).

Where `mergeguard.verification.quantize` rounds weights alone, here the product is LLM.int8's too: rows of activations
are rounded to 8 bits, and input features of magnitude 6 or more go through float16 (section 3.2 of the paper).

Codes against those of `quantize(weight, 8)`, measured with bitsandbytes 0.50.2 on the CPU: scales are equal, codes are
equal except by 1 at ties, since it multiplies by 127 / absmax and ours divides first (no code in 10^6 of random float32
weights, one in 30,000 to 4,000 of float16 or bfloat16 weights, whose ties are exact). But bitsandbytes takes weights
in float16: where they hold more digits, rounding w and absmax moves w by up to 127 * 2^-10 = 0.12 of a step, and one
code in 130 to 150 of float32 weights differs by 1.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mergeguard.errors import ParameterError
from mergeguard.verification.quantize import quantizable_weights

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn
    from transformers import PreTrainedModel

THRESHOLD = 6.0
"""Magnitude from which on an input feature is an outlier (section 3.2 of the paper)."""
BITS = 8


@contextmanager
def int8_twin(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """`model` with bitsandbytes' 8-bit layers in place of its own inside the block, and its own again after it.

    The model's weights stay in memory beside the codes, which take one byte each. On the CPU the arithmetic is that of
    bitsandbytes' reference implementation.

    Raises:
        ParameterError: bitsandbytes is not installed, or the model has no linear layers.
    """
    names = [name.removesuffix(".weight") for name in quantizable_weights(model)]
    own = {name: model.get_submodule(name) for name in names}
    twins = {name: _int8_layer(layer) for name, layer in own.items()}
    log = logging.getLogger("bitsandbytes.autograd._functions")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns in every layer that activations are rounded to float16
    try:
        _replace(model, twins)
        yield model
    finally:
        _replace(model, own)
        log.setLevel(level)


def _int8_layer(layer: nn.Module) -> nn.Module:
    try:
        from bitsandbytes.nn.modules import Int8Params, Linear8bitLt
    except ImportError as error:
        raise ParameterError(
            "twin=llm_int8 needs bitsandbytes: pip install 'mergeguard[gpu]', or take twin=absmax"
        ) from error
    weight, bias = layer.get_parameter("weight"), getattr(layer, "bias", None)
    twin: nn.Module = Linear8bitLt(
        weight.shape[1],
        weight.shape[0],
        bias=bias is not None,
        has_fp16_weights=False,
        threshold=THRESHOLD,
        device="meta",
    )
    # Moving from the CPU is what makes bitsandbytes quantise; a weight that is on the GPU already would stay as it is.
    codes: Any = Int8Params(weight.detach().cpu(), requires_grad=False, has_fp16_weights=False)
    twin.register_parameter("weight", codes.to(weight.device))
    if bias is not None:
        twin.register_parameter("bias", type(bias)(bias.detach().clone(), requires_grad=False))
    return twin.eval()


def _replace(model: PreTrainedModel, layers: Mapping[str, nn.Module]) -> None:
    for name, layer in layers.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer)

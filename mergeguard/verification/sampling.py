"""Sampled tokens that a seed, a prompt and a step decide, whatever else is in the batch.

The Gumbel-max trick (Gumbel 1954; Maddison, Tarlow & Minka 2014, arXiv 1411.0030): the argmax of log-probabilities plus
independent Gumbel noise is a draw from the distribution. The noise of a token is a hash of (seed, prompt, step, token)
and no generator's state, so that it needs no order, is computed where the logits are, and is the same on every device.
Logits that round differently (another batch shape or device) move a draw only where two sums lie within that rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mergeguard.seeds import derive_seed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mergeguard.reading import Sampling


def row_keys(sampling: Sampling, prompts: Sequence[str]) -> Tensor:
    """What tells one prompt's noise from another's: int64 of shape (prompts,). Equal prompts have equal keys."""
    return torch.tensor([derive_seed(sampling.seed, "sampling", prompt) for prompt in prompts], dtype=torch.long)


def draw(logits: Tensor, sampling: Sampling, keys: Tensor, step: int) -> Tensor:
    """One token a row.

    Args:
        logits: of shape (rows, vocabulary), any floating dtype.
        sampling: temperature, cuts and seed.
        keys: `row_keys` of the rows' prompts, on the logits' device.
        step: how many tokens the answers have.

    Returns:
        int64 of shape (rows,).
    """
    scores, tokens = candidates(logits, sampling)
    places = (scores.double() + gumbel(keys, step, tokens)).argmax(-1, keepdim=True)
    return tokens.gather(-1, places)[:, 0]


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn and their unnormalised log-probabilities: temperature, then top-k, then top-p.

    Returns:
        Log-probabilities in float32, -inf for a token that top-p cuts off, and token ids in int64; both of shape
        (rows, candidates).
    """
    logits = logits.float()
    scores = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature
    if sampling.top_k is not None:
        scores, tokens = scores.topk(min(sampling.top_k, scores.shape[-1]))
    elif sampling.top_p < 1:
        scores, tokens = scores.sort(descending=True)
    else:
        tokens = torch.arange(scores.shape[-1], device=scores.device).expand_as(scores)
    if sampling.top_p < 1:
        probabilities = scores.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        scores = scores.masked_fill(before >= sampling.top_p, -torch.inf)
    return scores, tokens


def gumbel(keys: Tensor, step: int, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise that (key, step, token) decide.

    Args:
        keys: int64 of shape (rows,).
        step: 0 for the first token of an answer.
        tokens: int64 of shape (rows, candidates).

    Returns:
        float64 of the shape of `tokens`.
    """
    rows = _mixed(keys + _signed((step + 1) * _GOLDEN))
    bits = _shifted(_mixed(rows[:, None] + tokens * _signed(_GOLDEN)), 12)
    uniform = (bits.double() + 0.5) * 2.0**-52  # within (0, 1): 53 bits would round to 1
    return -torch.log(-torch.log(uniform))


_GOLDEN = 0x9E3779B97F4A7C15


def _signed(number: int) -> int:
    """The int64 that has the lowest 64 bits of `number`."""
    return (number + 2**63) % 2**64 - 2**63


def _shifted(bits: Tensor, places: int) -> Tensor:
    """A shift to the right that fills with zeros; torch's fills with the sign."""
    return (bits >> places) & ((1 << (64 - places)) - 1)


def _mixed(bits: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014, doi:10.1145/2660193.2660195), in wrapping int64."""
    bits = (bits ^ _shifted(bits, 30)) * _signed(0xBF58476D1CE4E5B9)
    bits = (bits ^ _shifted(bits, 27)) * _signed(0x94D049BB133111EB)
    return bits ^ _shifted(bits, 31)

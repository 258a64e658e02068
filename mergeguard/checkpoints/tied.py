"""Stored tensors that are not weights of their own: tied output embeddings and buffers that loading recomputes.

transformers computes rotary frequencies and causal masks when it loads a model, and an output embedding that the config
ties to the input embedding is one parameter under two names. Older or converted checkpoints store them all the same; to
merge them would at best waste time and at worst untie what the model computes with. No torch is imported here.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Protocol

from mergeguard.checkpoints.inputs import refuse_tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

TIED_PAIRS = (
    ("lm_head.weight", "model.embed_tokens.weight"),
    ("lm_head.weight", "model.language_model.embed_tokens.weight"),
    ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight"),
    ("lm_head.weight", "model.decoder.embed_tokens.weight"),
    ("lm_head.weight", "transformer.wte.weight"),
    ("lm_head.weight", "wte.weight"),
    ("lm_head.weight", "transformer.word_embeddings.weight"),
    ("lm_head.weight", "backbone.embeddings.weight"),
    ("lm_head.weight", "shared.weight"),
    ("lm_head.weight", "gpt_neox.embed_in.weight"),
    ("embed_out.weight", "gpt_neox.embed_in.weight"),
)
"""(output embedding, input embedding) of decoders, as transformers 5 and 4 store them."""
TIED_HEADS = frozenset(head for head, _ in TIED_PAIRS)
TIED_EMBEDDINGS = frozenset(embedding for _, embedding in TIED_PAIRS)

# fmt: off
TIED_BY_DEFAULT = frozenset({
    "bloom", "cohere", "cohere2", "falcon", "falcon_mamba", "gemma", "gemma2", "gemma3",
    "gemma3_text", "gpt2", "gpt_bigcode", "gpt_neo", "lfm2", "mamba", "mpt", "opt",
    "recurrent_gemma", "smollm3", "starcoder2", "xglm", "zamba", "zamba2",
})
# fmt: on
"""Kinds of models (`model_type`) that are tied unless their config says otherwise; transformers 4 did not write it."""

RECOMPUTED = "loading recomputes it"
_ROTARY = re.compile(r"(^|\.)rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)$")
_MASK = re.compile(r"(^|\.)(attn|attention)\.bias$")
_MASKED_VALUE = re.compile(r"(^|\.)(attn|attention)\.masked_bias$")


class _Described(Protocol):
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


def ties_embeddings(config: Mapping[str, Any] | None) -> bool:
    """Whether the output embedding is the input embedding, by the config or else by the kind of model.

    Of a model with several parts, the text part's config decides. False if there is no config.
    """
    for part in (config, (config or {}).get("text_config")):
        if isinstance(part, dict) and isinstance(part.get("tie_word_embeddings"), bool):
            return bool(part["tie_word_embeddings"])
    return str((config or {}).get("model_type")) in TIED_BY_DEFAULT


def hidden_tensors(
    path: Path,
    config: Mapping[str, Any] | None,
    tensors: Mapping[str, _Described],
    same_bytes: Callable[[str, str], bool],
) -> dict[str, str]:
    """The stored tensors that are not merged and not written, each with the reason.

    Args:
        path: the checkpoint, named in errors.
        config: its config.json.
        tensors: everything that it stores.
        same_bytes: whether two tensors of one dtype and shape hold the same bytes; asked only if the model is tied and
            stores both of its embeddings.

    Raises:
        CheckpointError: the config ties the embeddings, but the checkpoint stores two that differ.
    """
    hidden = {name: RECOMPUTED for name, tensor in tensors.items() if _is_recomputed(name, tensor.shape)}
    if ties_embeddings(config):
        for head, embedding in TIED_PAIRS:
            if head not in tensors or embedding not in tensors:
                continue
            one, other = tensors[head], tensors[embedding]
            if (one.dtype, one.shape) != (other.dtype, other.shape) or not same_bytes(head, embedding):
                refuse_tensor(
                    path,
                    head,
                    f"differs from {embedding}, to which tie_word_embeddings ties it; if the model was trained so, "
                    f"set tie_word_embeddings to false in its config.json, else remove {head}",
                )
            hidden[head] = f"it is tied to {embedding}"
    return hidden


def _is_recomputed(name: str, shape: tuple[int, ...]) -> bool:
    if _MASK.search(name):  # the causal mask of GPT-2's family; elsewhere the name is a bias's, of one dimension
        return len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
    if _MASKED_VALUE.search(name):
        return shape in ((), (1,))
    return _ROTARY.search(name) is not None

"""Models and tokenizers from folders, as transformers loads them: no code of theirs is run, no pickle is opened."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from mergeguard.checkpoints.inputs import quoted, reason
from mergeguard.errors import CheckpointError, ParameterError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
DTYPES = ("auto", "float32", "bfloat16", "float16")


def check_dtype(dtype: str) -> None:
    """Refuse a dtype that models are not loaded in.

    Raises:
        ParameterError: it is not one of `DTYPES`.
    """
    if dtype not in DTYPES:
        raise ParameterError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder; its `model_max_length` is at most the model's context.

    Raises:
        CheckpointError: transformers cannot load it.
    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(folder, **LOCAL)
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, **LOCAL)
    except Exception as error:  # transformers and its converters raise many kinds
        raise CheckpointError(f"transformers cannot load {folder}: {reason(error)}") from error
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    tokenizer.model_max_length = min(tokenizer.model_max_length, context or tokenizer.model_max_length)
    return tokenizer


def load_model(folder: Path, dtype: str, device: str) -> PreTrainedModel:
    """The causal language model in a folder, in evaluation mode.

    Args:
        folder: with config.json and safetensors.
        dtype: one of `DTYPES`; "auto" is the stored one.
        device: torch's name of it.

    Raises:
        CheckpointError: transformers cannot load it, or the files lack a tensor, which transformers would make up.
        ParameterError: torch cannot use the device here.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it reports missing tensors at length; the line below does it
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **LOCAL
        )
    except Exception as error:  # transformers raises many kinds
        raise CheckpointError(f"transformers cannot load {folder}: {reason(error)}") from error
    finally:
        logging.set_verbosity(level)
    model: PreTrainedModel = loaded[0]
    found: dict[str, Any] = loaded[1]
    if found["missing_keys"]:
        name = quoted(min(found["missing_keys"]))
        raise CheckpointError(f"{folder} lacks the tensor {name} of the model that its config.json describes")
    try:
        torch.nn.Module.to(model, torch.device(device))
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        raise ParameterError(f"the model cannot be put on the device {device!r}: {reason(error)}") from error
    model.eval()
    return model

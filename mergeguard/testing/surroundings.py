"""What a scheme could change beside models: looked at before and after a call, and compared."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mergeguard.testing.elsewhere import tensors_digest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedTokenizerBase

TORCH_RANDOM_STATE = "torch's global random state"


def surroundings(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """All that a scheme could change beside models, by a name that says what it is, as something to compare."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    settings = ("padding_side", "truncation_side", "model_max_length", "chat_template", "special_tokens_map")
    return {
        TORCH_RANDOM_STATE: tensors_digest({"cpu": torch.random.get_rng_state()}),
        "numpy's global random state": digest(repr(np.random.get_state())),  # noqa: NPY002 - the one others may use
        "python's global random state": digest(repr(random.getstate())),
        "torch's default dtype": torch.get_default_dtype(),
        "torch's default device": str(torch.get_default_device()),
        "whether torch records gradients": torch.is_grad_enabled(),
        "torch's deterministic setting": torch.are_deterministic_algorithms_enabled(),
        "torch's precision of matrix products": torch.get_float32_matmul_precision(),
        "cudnn's settings": (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
        "the tokenizer": digest(
            (backend.to_str() if backend is not None else "")
            + repr([getattr(tokenizer, name, None) for name in settings])
            + repr(sorted(key for key in vars(tokenizer) if not key.startswith("_")))
        ),
        "the working folder": str(Path.cwd()),
        "environment variables": digest(repr(sorted(os.environ.items()))),
    }


def files_in(folder: Path) -> dict[str, Any]:
    """Names and times of the files in a folder in which nobody else writes, to compare likewise."""
    return {"files in the working folder": sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir())}


def difference(action: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """What differs after an action, in a few words; None if nothing does."""
    differing = [name for name, value in before.items() if after[name] != value]
    return f"{action} changes {' and '.join(differing)}" if differing else None


def digest(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()

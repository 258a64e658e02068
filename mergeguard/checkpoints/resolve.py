"""From what a recipe calls a model to a folder on this machine."""

from __future__ import annotations

import re
from pathlib import Path

from mergeguard.checkpoints.inputs import existing, quoted, reason
from mergeguard.errors import CheckpointError

_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(@(?P<revision>[\w./-]+))?", re.ASCII)
HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "merges.txt", "vocab.txt")
"""What is downloaded of a model: weights that cannot run code, configs, tokenizers and chat templates."""
HUB_PICKLES = ("*.bin",)
NOT_FROM_HUB = ("*/*", "consolidated*")
"""What repositories hold besides: other formats in subfolders, the same weights under Mistral's own names."""


def resolve_path(text: str, *, allow_pickle: bool = False) -> Path:
    """The folder or file that `text` names: a path, or the id of a model on the Hugging Face hub.

    Args:
        text: a path, absolute or from the current folder, "~" included; if nothing is there and it has the form
            "organisation/name" or "organisation/name@revision", the hub's model, downloaded or from the hub's cache.
        allow_pickle: download pickled weights too.

    Raises:
        CheckpointError: there is neither.
    """
    if (path := existing(text)) is not None:
        return path
    match = _HUB_ID.fullmatch(text)
    if match is None:
        raise CheckpointError(f"there is no folder or file {quoted(text)}; expected a path, or a hub id like org/name")
    try:
        return hub_snapshot(match["id"], match["revision"], allow_pickle=allow_pickle)
    except Exception as error:  # the hub, the network and the cache each raise kinds of their own
        raise CheckpointError(
            f"there is no folder {quoted(text)} here, and the hub did not give that model: {reason(error)}"
        ) from error


def is_hub_id(text: str) -> bool:
    """Whether a text has the form of a hub id, "organisation/name", without a revision."""
    match = _HUB_ID.fullmatch(text)
    return match is not None and match["revision"] is None


def hub_snapshot(name: str, revision: str | None = None, *, allow_pickle: bool = False) -> Path:
    """The folder in the hub's cache that holds a model's files, downloaded as far as they are not there.

    Raises:
        Exception: whatever huggingface_hub, the network or the cache raises.
    """
    import huggingface_hub

    patterns = [*HUB_FILES, *(HUB_PICKLES if allow_pickle else ())]
    snapshot = huggingface_hub.snapshot_download(
        name, revision=revision, allow_patterns=patterns, ignore_patterns=list(NOT_FROM_HUB)
    )
    return Path(snapshot)

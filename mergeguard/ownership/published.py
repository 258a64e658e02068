"""The folder of a model with evidence in it: the owner's own folder with other weights."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from mergeguard.checkpoints.checkpoint import CONFIG, PICKLE_SUFFIXES, open_checkpoint
from mergeguard.checkpoints.companions import ConfigChanges, merged_config
from mergeguard.checkpoints.files import PUBLIC, write_bytes
from mergeguard.checkpoints.header import TORCH_NAMES
from mergeguard.checkpoints.inputs import check_inside, file_stamp, read_json, reason
from mergeguard.checkpoints.manifest import MANIFEST
from mergeguard.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import PreTrainedModel

WEIGHTS = (".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", *PICKLE_SUFFIXES)
INDEX_SUFFIX = ".index.json"
TEMPLATES = "additional_chat_templates"
SHARD_BYTES = 5 * 10**9


def stored_dtype(folder: Path) -> str:
    """Torch's name of the dtype of a model's floating tensors; float32, which holds them all, where they differ.

    Raises:
        CheckpointError: its files are damaged.
    """
    dtypes = {TORCH_NAMES[tensor.dtype] for tensor in open_checkpoint(folder).tensors.values()}
    floating = {dtype for dtype in dtypes if "float" in dtype}
    return floating.pop() if len(floating) == 1 else "float32"


def check_trainable(folder: Path) -> None:
    """Refuse a model that is quantised: its weights cannot be trained.

    Raises:
        CheckpointError: it is.
    """
    merged_config(read_json(folder / CONFIG), ConfigChanges(), str(folder / CONFIG))


def write_published(model: PreTrainedModel, dtype: str, source: Path, folder: Path) -> None:
    """Write a model's weights, and copy every other file of the folder that it came from.

    Config and tokenizer are copied byte for byte; the config's dtype changes with that of the weights. What is left
    out: weights, hidden files, folders, and the manifest of a merge, which would no longer be true.

    Args:
        model: in any floating dtype; it is cast in place.
        dtype: torch's name of what is written.
        source: where the model came from.
        folder: an empty one.

    Raises:
        CheckpointError: a file cannot be read or written.
    """
    import torch

    try:
        torch.nn.Module.to(model, getattr(torch, dtype))
        model.save_pretrained(folder, max_shard_size=SHARD_BYTES)
        for path in folder.iterdir():
            if _is_weight(path):
                path.chmod(PUBLIC)
                _flush(path)
            else:
                path.unlink()  # transformers' own config and generation config
        for path in _companions(source):
            target = folder / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            write_bytes(target, path.read_bytes())
        config = read_json(source / CONFIG)
        if dtype != stored_dtype(source):
            changed = merged_config(config, ConfigChanges(dtype=dtype), str(source / CONFIG))
            write_bytes(folder / CONFIG, (json.dumps(changed, indent=2) + "\n").encode())
    except OSError as error:
        raise CheckpointError(f"cannot write {folder}: {reason(error)}") from error


def _companions(source: Path) -> Iterator[Path]:
    for path in sorted([*source.iterdir(), *source.glob(f"{TEMPLATES}/*.jinja")]):
        if path.is_dir() or path.name.startswith(".") or path.name == MANIFEST or _is_weight(path):
            continue
        file_stamp(path)
        check_inside(source, path)
        yield path


def _flush(path: Path) -> None:
    """See to it that a file's bytes are on the disk before its folder gets its name."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _is_weight(path: Path) -> bool:
    return path.suffix in WEIGHTS or path.name.endswith(INDEX_SUFFIX)

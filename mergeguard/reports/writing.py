"""Writing a report's file so that readers see the old one or the whole new one, never a part."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mergeguard.checkpoints.files import write_bytes
from mergeguard.errors import CheckpointError

if TYPE_CHECKING:
    import os


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` as UTF-8, whole or not at all; missing folders are made.

    Raises:
        CheckpointError: the folder cannot be written or is full. The file at `path` is as it was, nothing is left over.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(target, text.encode())
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise CheckpointError(f"cannot write {target}: {reason}; choose a folder that can be written") from error
    except CheckpointError as error:
        raise CheckpointError(f"{error}; choose a folder that can be written") from error

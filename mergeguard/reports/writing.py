"""Writing a report's file so that readers see the old one or the whole new one, never a part."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from mergeguard.errors import CheckpointError


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` as UTF-8, by way of a file beside it; missing folders are made.

    Raises:
        CheckpointError: the folder cannot be written or is full. The file at `path` is as it was, nothing is left over.
    """
    target = Path(path)
    # Not tempfile: its files are private to the user, and a report should have the permissions of any other file.
    draft = target.with_name(f".{target.name[:100]}.{secrets.token_hex(8)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(target)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise CheckpointError(f"cannot write {target}: {reason}; choose a folder that can be written") from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()

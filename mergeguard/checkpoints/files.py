"""Files that are whole or absent: safetensors in and out, digests, atomic writes."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mergeguard.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

PRIVATE, PUBLIC = 0o600, 0o644


def file_digest(path: Path) -> str:
    """SHA-256 of a file, as lower-case hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU, in their stored dtype.

    Raises:
        CheckpointError: the file is absent, truncated or not safetensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; expected a whole safetensors file") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], mode: int = PUBLIC) -> None:
    """Write a safetensors file atomically; the tensors are made contiguous."""
    from safetensors.torch import save

    write_bytes(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}), mode)


def write_bytes(path: Path, data: bytes, mode: int = PUBLIC) -> None:
    """Write a file that appears whole or not at all, with the given permission bits from its first byte on.

    Raises:
        CheckpointError: the folder is absent, read-only or full.
    """
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(mode)
        Path(temporary).replace(path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its name when the block ends well, and vanishes when it does not.

    Raises:
        CheckpointError: `out` exists, or its parent cannot be written.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists already; remove it or choose another folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    except OSError as error:
        raise CheckpointError(f"cannot write {out}: {error.strerror or error}") from error
    try:
        yield temporary
        temporary.chmod(0o755)
        temporary.rename(out)
    except OSError as error:
        raise CheckpointError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

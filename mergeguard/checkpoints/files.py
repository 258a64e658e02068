"""Files that are whole or absent: safetensors in and out, digests, atomic writes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
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


@contextlib.contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its name when the block ends well, and vanishes when it does not.

    The folder is locked for as long as it is written. A killed process leaves it behind, hidden and without the lock;
    the next writer of the same `out` removes it.

    Raises:
        CheckpointError: `out` exists or is being written by another process, its parent cannot be written, or another
            process wrote `out` meanwhile; `out` is then as the other left it.
    """
    if os.path.lexists(out):
        raise CheckpointError(f"{out} exists already; remove it or choose another folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(out)
        temporary, lock = _locked_folder(out)
    except OSError as error:
        raise CheckpointError(f"cannot write {out}: {error.strerror or error}") from error
    try:
        yield temporary
        temporary.chmod(0o755)
        os.fsync(lock)
        _rename(temporary, out)
    except OSError as error:
        raise CheckpointError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def _rename(temporary: Path, out: Path) -> None:
    try:
        temporary.rename(out)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise CheckpointError(
            f"{out} appeared meanwhile: another process wrote it; this one's files are gone"
        ) from error
    parent = os.open(out.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


def _locked_folder(out: Path) -> tuple[Path, int]:
    """A new folder beside `out` and the descriptor that holds its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=_prefix(out)))
        with contextlib.suppress(FileNotFoundError):  # another writer may take it for abandoned before it is locked
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            # A shared lock is enough: whoever wants to remove the folder asks for an exclusive one.
            if _locks(lock, exclusive=False) is not False and folder.exists():
                return folder, lock
            os.close(lock)


def _remove_abandoned(out: Path) -> None:
    """Remove what killed writers of `out` left.

    Raises:
        CheckpointError: a writer of `out` is alive.
    """
    prefix = _prefix(out)
    for name in os.listdir(out.parent):  # noqa: PTH208 - names are all it takes
        folder = out.parent / name
        if not name.startswith(prefix) or folder.is_symlink() or not folder.is_dir():
            continue
        with contextlib.suppress(FileNotFoundError, PermissionError):  # gone meanwhile, or another user's
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                locked = _locks(lock, exclusive=True)
                if locked is False:
                    raise CheckpointError(f"{out} is being written by another process; wait or choose another folder")
                if locked:
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _prefix(out: Path) -> str:
    return f".{out.name}.mergeguard-"


def _locks(folder: int, *, exclusive: bool) -> bool | None:
    """Lock the folder itself, so that no lock file moves with it; the kernel unlocks it when its holder dies.

    Returns:
        Whether it is locked now; False if another process holds it, None where the file system knows no such locks.
    """
    import fcntl

    try:
        fcntl.flock(folder, fcntl.LOCK_NB | (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True

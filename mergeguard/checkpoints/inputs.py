"""What every reader of untrusted files needs: stamps that tell a change, strict JSON, names fit for an error line."""

from __future__ import annotations

import json
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mergeguard.errors import CheckpointError

if TYPE_CHECKING:
    import os

MAX_JSON_BYTES = 100_000_000
MAX_DIGITS = 40


@dataclass(frozen=True, slots=True)
class FileStamp:
    """What changes when a file is replaced or written to."""

    device: int
    inode: int
    size: int
    modified_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileStamp:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def refuse(path: Path, problem: str) -> NoReturn:
    """Raise a CheckpointError about the file or folder `path`, on one line."""
    raise CheckpointError(" ".join(f"{path} {problem}".split()))


def refuse_tensor(path: Path, name: str, problem: str) -> NoReturn:
    """Raise a CheckpointError about the tensor `name` of `path`, on one line."""
    raise CheckpointError(" ".join(f"{path}: tensor {quoted(name)} {problem}".split()))


def quoted(name: str) -> str:
    """A name as it stands in an error: on one line, printable, of bounded length."""
    shown = ascii(name)
    return shown if len(shown) <= 200 else f"{shown[:150]}...'"


def reason(error: BaseException) -> str:
    """The first line of an exception's message, printable and of bounded length; without a message, its type's name."""
    text = getattr(error, "strerror", None) or str(error)
    line = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    return "".join(character for character in line if character.isprintable())[:300]


def existing(text: str | Path) -> Path | None:
    """The file or folder that a text names, "~" included; None if there is none, or the text cannot be a path."""
    try:
        path = Path(text).expanduser()
        return path if str(text) and path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long, with a zero byte, or the home of nobody
        return None


def check_inside(folder: Path, path: Path) -> None:
    """Refuse a file of `folder` that lies elsewhere after all links; the hub's cache links to its blobs.

    Raises:
        CheckpointError: it does.
    """
    target = path.resolve()
    in_cache = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    if not in_cache and not target.is_relative_to(folder.resolve()):
        refuse(path, f"links to a file outside its folder ({target}); put the file itself there")


def file_stamp(path: Path) -> FileStamp:
    """The stamp of a regular file.

    Raises:
        CheckpointError: it is absent, unreadable or not a regular file.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        refuse(path, f"cannot be read: {reason(error)}")
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for someone to write into it
        refuse(path, "is not a regular file")
    return FileStamp.of(status)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: the file cannot be read, is over 100 MB, or is not what `parse_json` takes.
    """
    size = file_stamp(path).size
    if size > MAX_JSON_BYTES:
        refuse(path, f"has {size} bytes, too many for JSON; expected at most {MAX_JSON_BYTES}")
    try:
        text = path.read_bytes()
    except OSError as error:
        refuse(path, f"cannot be read: {reason(error)}")
    return parse_json(path, text)


def parse_json(path: Path, text: bytes, part: str = "") -> dict[str, Any]:
    """`text` of the file `path` as a JSON object in which no name occurs twice.

    NaN and Infinity pass: transformers writes them into configs.

    Args:
        path: named in errors.
        text: UTF-8.
        part: what of the file it is, e.g. "header"; "" is all of it.

    Raises:
        CheckpointError: it is not that.
    """
    what = f"has a {part} that" if part else ""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            counts = Counter(name for name, _ in pairs)
            refuse(path, f"{what} names {quoted(counts.most_common(1)[0][0])} twice; write the file again")
        return found

    try:
        value = json.loads(text.decode(), object_pairs_hook=unique, parse_int=_integer)
    except UnicodeDecodeError as error:
        refuse(path, f"{what} is not UTF-8 (byte {error.start}); copy or download the file again")
    except ValueError as error:
        refuse(path, f"{what} is not JSON ({reason(error)}); copy or download the file again")
    except RecursionError:
        refuse(path, f"{what} is nested too deeply for a checkpoint's JSON")
    if not isinstance(value, dict):
        refuse(path, f"{what} is not a JSON object; copy or download the file again")
    return value


def _integer(text: str) -> int:
    if text == "-0" or len(text) > MAX_DIGITS:
        raise ValueError(f"the number {text[:MAX_DIGITS]} is -0 or too long")
    return int(text)

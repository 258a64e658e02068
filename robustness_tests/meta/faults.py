"""Faults to put into a merge while it runs, and what their tests share."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Any

from robustness_tests.meta.checkpoints_on_disk import family, save_model, write_recipe

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

HANGS = 120  # seconds; a merge takes some hundredths
TIES = {"weight": 0.5, "density": 0.4}
HIDDEN = ".out.mergeguard-"


def save_inputs(folder: Path) -> list[Path]:
    """Folders of a base and two models, the last of two files."""
    return [save_model(folder / n, s, shards=k) for n, s, k in zip("bxy", family(2), (1, 1, 2), strict=True)]


def save_recipe(folder: Path, models: list[Path]) -> Path:
    """A recipe that draws, so that every step of a merge happens."""
    return write_recipe(folder / "recipe.yml", "dare_ties", models[1:], base=models[0], each=TIES)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def after(count: int, function: Callable[..., Any], fault: Callable[..., Any]) -> Callable[..., Any]:
    """`function` for `count` calls, then `fault`; from any thread."""
    lock, calls = threading.Lock(), 0

    def wrapped(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        with lock:
            calls += 1
            chosen = function if calls <= count else fault
        return chosen(*arguments, **options)

    return wrapped


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def failed_with(number: int) -> Callable[..., Any]:
    return raising(OSError(number, os.strerror(number)))


def ends(condition: Callable[[], bool], seconds: float = 30) -> bool:
    """Wait for a condition."""
    for _ in range(int(seconds * 200)):
        if condition():
            return True
        time.sleep(0.005)
    return condition()

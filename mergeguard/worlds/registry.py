"""Worlds by name, ours and those of entry points in the group `mergeguard.worlds`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeguard.errors import ParameterError
from mergeguard.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mergeguard.worlds.contract import World

WORLDS: Registry[Callable[[], World]] = Registry(
    "world", "mergeguard.worlds", {"tiny": "mergeguard.worlds.tiny.world:tiny"}
)


def load_world(name: str, folder: Path | None = None) -> World:
    """The world called `name`, its files checked; from `folder`, if it was built there.

    Raises:
        UnknownNameError: there is none.
        ParameterError: it does not load from a folder.
        CheckpointError: its files are absent or damaged.
    """
    make = WORLDS.get(name)
    if folder is None:
        return make()
    if name != "tiny":
        raise ParameterError(f"world {name!r} is not built into a folder; only tiny is")
    from mergeguard.worlds.tiny.world import load

    return load(folder)

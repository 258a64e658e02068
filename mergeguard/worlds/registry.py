"""Worlds by name, ours and those of entry points in the group `mergeguard.worlds`, and worlds from files (.toml)."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from mergeguard.errors import ParameterError, UnknownNameError
from mergeguard.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable

    from mergeguard.worlds.contract import World
    from mergeguard.worlds.file.document import WorldFile

WORLDS: Registry[Callable[[], World]] = Registry(
    "world",
    "mergeguard.worlds",
    {"tiny": "mergeguard.worlds.tiny.world:tiny", "smollm2": "mergeguard.worlds.smollm2.world:smollm2"},
)


def is_world_file(name: str) -> bool:
    """Whether a world is given by the path of its file instead of its name."""
    return name.endswith(".toml") or (name not in WORLDS and Path(name).is_file())


def world_name(name: str) -> str:
    """What the world calls itself that is given by name or file; loads no model and no torch.

    Raises:
        UnknownNameError: there is no such world.
        ParameterError: the file does not describe one.
    """
    if is_world_file(name):
        return _read(Path(name)).name
    if name not in WORLDS:
        raise UnknownNameError("world", name, WORLDS)
    return name


def find_world(name: str) -> str:
    """A known world's name, or the absolute path of a checked file: what `load_world` takes in any process.

    Raises:
        UnknownNameError, ParameterError: see `world_name`.
    """
    world_name(name)
    return str(Path(name).resolve()) if is_world_file(name) else name


def load_world(name: str, folder: Path | None = None) -> World:
    """The world called `name` or described by the file of that path, its files checked; from `folder`, if built there.

    A file is loaded once a process, and again when it has changed.

    Raises:
        UnknownNameError: there is none.
        ParameterError: it does not load from a folder, or its file does not describe a world.
        CheckpointError: its files are absent or damaged.
        IncompatibleModelsError: a file's models do not belong together.
    """
    if folder is None and is_world_file(name):
        path = Path(name)
        _read(path)
        return _loaded(path.resolve(), path.stat().st_mtime_ns, path)
    make = WORLDS.get(name)
    if folder is None:
        return make()
    if name == "tiny":
        from mergeguard.worlds.tiny.world import load

        return load(folder)
    if name == "smollm2":
        from mergeguard.worlds.smollm2.world import load as load_smollm2

        return load_smollm2(folder)
    raise ParameterError(f"world {name!r} is not built into a folder; only tiny and smollm2 are")


def _read(path: Path) -> WorldFile:
    from mergeguard.worlds.file.document import read_world_file

    world = read_world_file(path)
    if world.name in WORLDS:
        raise world.error(f"name {world.name!r} is that of another world; choose another")
    return world


@lru_cache(maxsize=4)
def _loaded(_resolved: Path, _changed_ns: int, path: Path) -> World:
    from mergeguard.worlds.file.load import load_world_file

    return load_world_file(_read(path))

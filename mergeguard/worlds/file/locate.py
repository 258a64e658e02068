"""Where the models of a world file lie: folders beside the file, or the hub's, with a clear line for what is not there.

No torch here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeguard.checkpoints.checkpoint import ADAPTER_CONFIG, INDEX, PICKLE_INDEX, PICKLE_SINGLE, SINGLE
from mergeguard.checkpoints.inputs import existing, quoted, reason
from mergeguard.checkpoints.resolve import hub_snapshot, is_hub_id

if TYPE_CHECKING:
    from pathlib import Path

    from mergeguard.worlds.file.document import ModelEntry, WorldFile


def locate(world: WorldFile, entry: ModelEntry, text: str, revision: str | None = None) -> Path:
    """The folder that `text`, the model or adapter of an entry, names.

    Args:
        world: the file; relative paths start in its folder.
        entry: named in errors.
        text: a path, or a hub id if nothing is there.
        revision: of the hub id.

    Raises:
        ParameterError: there is no such folder, and the hub or its cache does not give it; says what to do.
    """
    path = existing(world.beside(text))
    if path is not None:
        if not path.is_dir():
            raise world.error(f"{entry.label}: {path} is a file; expected the folder of a model")
        if revision is not None:
            raise world.error(f"{entry.label}: revision belongs to hub ids, and {path} is a folder; remove it")
        return path
    if not is_hub_id(text):
        raise world.error(
            f"{entry.label}: there is no folder {quoted(text)} (relative paths start in {world.path.parent}); "
            "expected one, or a hub id like org/name"
        )
    try:
        return hub_snapshot(text, revision, allow_pickle=entry.allow_pickle)
    except Exception as error:  # the hub, the network and the cache each raise kinds of their own
        raise world.error(f"{entry.label}: {_hub_problem(text, revision, error)}") from error


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a LoRA adapter and no model of its own."""
    weights = (SINGLE, INDEX, PICKLE_SINGLE, PICKLE_INDEX)
    return (folder / ADAPTER_CONFIG).exists() and not any((folder / name).exists() for name in weights)


def interrupted(folder: Path) -> str:
    """Advice to add to an error about a folder into which a download was interrupted; "" for any other."""
    local = folder.glob(".cache/huggingface/download/**/*.incomplete")
    cached = (folder.parent.parent / "blobs").glob("*.incomplete") if folder.parent.name == "snapshots" else ()
    found = next(iter([*local, *cached]), None)
    return "" if found is None else f"; its download was interrupted ({found.name[:40]}), finish it first"


def _hub_problem(name: str, revision: str | None, error: Exception) -> str:
    """What the hub's exception means, and what to do about it."""
    from huggingface_hub import errors

    incomplete = getattr(errors, "IncompleteSnapshotError", ())  # newer than the oldest version that we take
    at = f"{name}@{revision}" if revision else name
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{at} is gated: accept its licence at https://huggingface.co/{name}, then log in with 'hf auth login' or "
            "set HF_TOKEN; or give a local folder"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the hub's {name} has no revision {quoted(revision or '')}; choose one that it lists"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no folder {name}, and the hub has no such model, or a private one: check the name, or log in"
    if isinstance(error, incomplete):
        return f"the download of {at} was interrupted; finish it with 'hf download {name}' where there is network"
    if isinstance(error, (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)):
        return (
            f"there is no folder {at}, the hub's cache does not hold that model, and the hub cannot be reached: "
            "download it where there is network (and HF_HUB_OFFLINE is not set), or give a local folder"
        )
    return f"there is no folder {at}, and the hub did not give that model: {reason(error)}"

"""`mergeguard-manifest.json`: what a merged model was made from and of, file by file, so that anyone can check it.

Two merges of the same recipe on the same files give the same manifest: it has no times, no names of machines or users,
and no absolute paths but those that the recipe's author wrote. Folders of inputs are relative to the merged model's.
README.md is not recorded: people edit it before they publish.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import platform
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from mergeguard.checkpoints.digests import digest_files
from mergeguard.checkpoints.files import write_bytes
from mergeguard.checkpoints.inputs import quoted, read_json, reason, refuse
from mergeguard.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

MANIFEST = "mergeguard-manifest.json"
SCHEMA_VERSION = "1.0"
NOT_RECORDED = (MANIFEST, "README.md")
FREE = ("LICENSE", "NOTICE", "README")
FREE_SUFFIXES = (".md", ".rst", ".png", ".jpg", ".jpeg", ".svg", ".gif", ".pdf")
"""Files that nothing loads: who publishes a model may add them."""
PACKAGES = ("torch", "numpy", "safetensors")


@dataclass(frozen=True)
class MergedInput:
    """One model that was merged.

    Attributes:
        model: as the recipe writes it.
        folder: where its files are.
        digests: file -> SHA-256, by path in `folder`.
    """

    model: str
    folder: Path
    digests: Mapping[str, str]


def write_manifest(
    folder: Path,
    *,
    out: Path,
    recipe: str,
    inputs: Sequence[MergedInput],
    digests: Mapping[str, str],
    seed: int,
    options: Mapping[str, Any],
    device: str,
    warnings: Sequence[str] = (),
    ancestor: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the manifest of a merged model, after all of its other files.

    Args:
        folder: where the model's files are now.
        out: where they will be (`files.atomic_folder`): folders of inputs are recorded relative to it.
        recipe: the recipe's text.
        inputs: all models, the base included.
        digests: SHA-256 of files in `folder` that are known already; the others are read.
        seed: of the merge's random masks.
        options: "coefficient", "vocabulary" and "max_shard_bytes", as in the schema.
        device: kind of device that merged, "cpu" or "cuda".
        warnings: one line each.
        ancestor: what was measured of how the models and their base are related; JSON's types. What is not finite
            becomes null.

    Returns:
        The manifest.

    Raises:
        CheckpointError: a file cannot be read or written.
    """
    from mergeguard import __version__

    files = sorted(_relative(folder, path) for path in _files(folder) if _relative(folder, path) not in NOT_RECORDED)
    missing = digest_files(folder / file for file in files if file not in digests)
    known = {file: digests[file] if file in digests else missing[folder / file] for file in files}
    versions = {"mergeguard": __version__, "python": platform.python_version()}
    manifest: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "recipe": {"text": recipe, "sha256": hashlib.sha256(recipe.encode()).hexdigest()},
        "inputs": [
            {
                "model": model.model,
                "folder": Path(os.path.relpath(model.folder.resolve(), out.resolve())).as_posix(),
                "files": _entries(model.folder, model.digests),
            }
            for model in inputs
        ],
        "outputs": _entries(folder, known),
        "versions": versions | {name: metadata.version(name) for name in PACKAGES},
        "seed": seed,
        "options": dict(options),
        "device": device,
        "warnings": list(warnings),
        "ancestor": None if ancestor is None else _finite(ancestor),
    }
    write_bytes(folder / MANIFEST, (json.dumps(manifest, indent=2, allow_nan=False) + "\n").encode())
    return manifest


def read_manifest(out: Path) -> dict[str, Any]:
    """The manifest of a merged model.

    Raises:
        CheckpointError: there is none, it is not JSON, was written by a newer version, does not satisfy the schema, or
            names a file outside of its folder.
    """
    path = out / MANIFEST
    if not path.exists():
        raise CheckpointError(f"{out} has no {MANIFEST}; it was not written by mergeguard merge, or not to its end")
    manifest = read_json(path)
    _check_version(path, manifest.get("schema_version"))
    check_document(manifest, str(path))
    for files in (manifest["outputs"], *(model["files"] for model in manifest["inputs"])):
        names = [entry["file"] for entry in files]
        for name in names:
            if not _is_inside(name):
                refuse(path, f"names a file outside of its folder ({quoted(name)}); do not trust it")
        if len(set(names)) < len(names):
            refuse(path, "names a file twice; do not trust it")
    return manifest


def check_manifest(out: Path, *, inputs: bool = False) -> list[str]:
    """Compare a merged model with its manifest; every output is read.

    Args:
        out: the merged model's folder.
        inputs: read the merged models too, where they were relative to `out`; one that is not there is a problem.

    Returns:
        One line for each problem, naming the file: missing, changed, or there without being in the manifest. Files that
        nothing loads (README.md, licences, pictures, hidden files) are free. Empty if all is well.

    Raises:
        CheckpointError: the manifest itself cannot be used; see `read_manifest`.
    """
    manifest = read_manifest(out)
    problems = []
    recipe = manifest["recipe"]
    if hashlib.sha256(recipe["text"].encode(errors="surrogatepass")).hexdigest() != recipe["sha256"]:
        problems.append(f"{MANIFEST}: the recipe's text does not have the recipe's SHA-256")
    problems += _changed(out, manifest["outputs"], "")
    recorded = {entry["file"] for entry in manifest["outputs"]}
    extra = sorted({_relative(out, path) for path in _files(out)} - recorded)
    problems += [
        f"{_line(file)}: is not in the manifest; nobody says where it comes from"
        for file in extra
        if not _is_free(file)
    ]
    for model in manifest["inputs"] if inputs else ():
        problems += _changed(out / model["folder"], model["files"], f"input {model['model']}: ")
    return problems


def _changed(folder: Path, entries: Sequence[Mapping[str, Any]], prefix: str) -> Iterator[str]:
    for entry in entries:
        name = _line(prefix + entry["file"])
        path = folder / entry["file"]
        try:
            if not path.is_file():
                yield f"{name}: is missing"
            elif (size := path.stat().st_size) != entry["bytes"]:  # also what never ends is not read
                yield f"{name}: has {size} bytes; {entry['bytes']} were recorded"
            elif digest_files([path])[path] != entry["sha256"]:
                yield f"{name}: was changed; its SHA-256 is not the recorded one"
        except (OSError, ValueError, CheckpointError) as error:
            yield f"{name}: cannot be read: {reason(error)}"


@functools.cache
def schema() -> dict[str, Any]:
    """The published JSON Schema (draft 2020-12) of the manifest."""
    text = resources.files("mergeguard.checkpoints").joinpath("manifest.schema.json").read_text(encoding="utf-8")
    document: dict[str, Any] = json.loads(text)
    return document


def check_document(data: object, source: str = MANIFEST) -> None:
    """Refuse a document that the schema refuses.

    Raises:
        CheckpointError: names the first field at fault and what is wrong with it.
    """
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    error = best_match(Draft202012Validator(schema()).iter_errors(data))
    if error is not None:
        where = error.json_path.removeprefix("$").removeprefix(".") or "the document"
        message = " ".join(error.message.split())
        shown = message if len(message) <= 200 else f"{message[:100]} ... {message[-100:]}"
        raise CheckpointError(f"{source} does not satisfy the schema: {_line(where)}: {shown}")


def _check_version(path: Path, version: Any) -> None:
    try:
        found = tuple(int(part) for part in version.split("."))
    except (AttributeError, ValueError):
        refuse(path, "is not a manifest of mergeguard: it has no schema_version like 1.0")
    if found > tuple(int(part) for part in SCHEMA_VERSION.split(".")):
        refuse(path, f"has schema version {quoted(version)}; this version reads {SCHEMA_VERSION}: upgrade mergeguard")


def _entries(folder: Path, digests: Mapping[str, str]) -> list[dict[str, Any]]:
    try:
        return [
            {"file": file, "bytes": (folder / file).stat().st_size, "sha256": digest}
            for file, digest in sorted(digests.items())
        ]
    except OSError as error:
        raise CheckpointError(f"cannot read {error.filename}: {reason(error)}") from error


def _files(folder: Path) -> Iterable[Path]:
    return (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def _relative(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


def _is_inside(name: str) -> bool:
    pure = PurePosixPath(name)
    return bool(pure.parts) and not pure.is_absolute() and ".." not in pure.parts and not {"\0", "\\"} & {*name}


def _is_free(file: str) -> bool:
    pure = PurePosixPath(file)
    hidden = any(part.startswith(".") for part in pure.parts)
    named = pure.stem in FREE and pure.suffix in ("", ".txt")
    return file == MANIFEST or hidden or named or pure.suffix.lower() in FREE_SUFFIXES


def _line(text: str) -> str:
    """`text` if it fits in a line as it is, else quoted."""
    return text if text.isprintable() and len(text) <= 300 else quoted(text)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value

"""The scheme in a new process, which knows nothing of this one: it embeds under the same seed, and reads.

The process is started by `python -m mergeguard.testing.elsewhere FOLDER` with another hash seed. It finds the scheme's
class by its module, or by the module's file, and the world by its name. What goes in and out lies in a folder that
only the user can read, and that is removed afterwards.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeguard.checkpoints.files import read_tensors, write_tensors
from mergeguard.errors import MergeguardError, SchemeError
from mergeguard.testing.scheme import address

if TYPE_CHECKING:
    from torch import Tensor

    from mergeguard.protections.contract import Evidence, Protection
    from mergeguard.reading import Reading
    from mergeguard.worlds.contract import World

HASH_SEED = "20250522"


@dataclass(frozen=True)
class Report:
    """What a new process found.

    Attributes:
        clean: the owner's evidence read on the clean upstream, first of all.
        own: the same, read on the protected model.
        evidence: digest of the evidence that it embedded itself, under the same seed.
        weights: digest of the tensors that this changed.
        changes: what its first reading and its first embedding changed beside the model, in words; None: nothing. A
            scheme that sets what it set before shows nothing later.
    """

    clean: Reading
    own: Reading
    evidence: str
    weights: str
    changes: str | None = None


Elsewhere = Callable[["Protection", str, int, "Evidence", "Mapping[str, Tensor]"], Report]


def in_another_process(
    protection: Protection, world: str, seed: int, evidence: Evidence, changed: Mapping[str, Tensor]
) -> Report:
    """Embed and read in a new process.

    Args:
        protection: the scheme, which is made anew there.
        world: name or file.
        seed: of the embedding.
        evidence: what is read there.
        changed: the tensors in which the protected model differs from the clean upstream.

    Raises:
        MergeguardError: the process cannot find the class or the world.
        SchemeError: the scheme crashed there.
    """
    from mergeguard.matrix.schemes import limit_of_calls

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        request = {
            "scheme": address(protection),
            "parameters": dict(protection.parameters),
            "world": world,
            "seed": seed,
            "evidence": dict(evidence.data),
            "seconds": limit_of_calls(),
            "path": sys.path,
        }
        (folder / "request.json").write_text(json.dumps(request))
        write_tensors(folder / "evidence.safetensors", evidence.tensors)
        write_tensors(folder / "changed.safetensors", changed)
        (folder / "empty").mkdir()
        path = os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path)
        done = subprocess.run(  # noqa: S603 - this interpreter and our own module
            [sys.executable, "-m", __name__, name],
            cwd=folder / "empty",  # nobody else writes there, so that a file is the scheme's
            env={**os.environ, "PYTHONHASHSEED": HASH_SEED, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        answer = folder / "answer.json"
        if not answer.exists():
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise SchemeError(f"{protection} ended the new process in which it was tried: {last}")
        found = json.loads(answer.read_text())
    if "unusable" in found:
        raise MergeguardError(f"in another process: {found['unusable']}")
    if "crash" in found:
        raise SchemeError(f"in another process: {found['crash']}")
    return Report(
        _reading(found["clean"]), _reading(found["own"]), found["evidence"], found["weights"], found["changes"]
    )


def report(
    protection: Protection,
    world: World,
    seed: int,
    evidence: Evidence,
    changed: Mapping[str, Tensor],
    *,
    alone_in: Path | None = None,
) -> Report:
    """Read first, so that no embedding can have prepared the reading; then embed.

    `alone_in`: the working folder, if no other process writes there, so that new files are the scheme's.
    """
    from mergeguard.matrix.embedding import embed
    from mergeguard.matrix.engine import Engine
    from mergeguard.seeds import derived_rng
    from mergeguard.testing.surroundings import TORCH_RANDOM_STATE, difference, files_in, surroundings
    from mergeguard.worlds.states import Overlay

    def look() -> dict[str, Any]:
        found = surroundings(world.tokenizer)
        del found[TORCH_RANDOM_STATE]  # making a model moves it on
        return found if alone_in is None else found | files_in(alone_in)

    engine, before = Engine(world, seed), look()
    clean, own = (
        engine.readings(protection, [evidence], state)[0]
        for state in (world.upstream, Overlay(world.upstream, changed))
    )
    between = look()
    with engine.threads():
        made = embed(world, protection, world.upstream, derived_rng(seed, "embed", str(protection)))
    changes = difference("read", before, between) or difference("embed", between, look())
    return Report(clean, own, evidence_digest(made.evidence), tensors_digest(made.changed), changes)


def evidence_digest(evidence: Evidence) -> str:
    """SHA-256 of the evidence's data and tensors: what may leave a process in place of the evidence."""
    text = json.dumps(evidence.data, sort_keys=True) + tensors_digest(evidence.tensors)
    return hashlib.sha256(text.encode()).hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes, dtypes and bytes."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _find(place: Mapping[str, str]) -> Any:
    """The class, from its module or else from the module's file: tests need not lie on the path."""
    try:
        module = import_module(place["module"])
    except ImportError:
        if not place["file"]:
            raise
        module = _from_file(place["module"], place["file"])
    if getattr(module, "__file__", None) != place["file"] and place["file"]:
        module = _from_file(place["module"], place["file"])
    found: Any = module
    for part in place["class"].split("."):
        found = getattr(found, part)
    return found


def _from_file(name: str, file: str) -> Any:
    name = "__gated__" if name == "__main__" else name
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot import {file}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _reading(data: Mapping[str, Any]) -> Reading:
    from mergeguard.reading import Reading

    return Reading(tuple(data["hits"]), data["score"], data["p_value"])


def _as_json(reading: Reading) -> dict[str, Any]:
    return {"hits": list(reading.hits), "score": reading.score, "p_value": reading.p_value}


def _answer(folder: Path) -> dict[str, Any]:
    from mergeguard.matrix.schemes import seconds_per_call
    from mergeguard.protections.contract import Evidence
    from mergeguard.worlds.registry import load_world

    request = json.loads((folder / "request.json").read_text())
    try:
        scheme = _find(request["scheme"])
    except Exception as error:  # noqa: BLE001 - anybody's module runs at import
        return {"unusable": f"cannot import {request['scheme']['module']}: {type(error).__name__}: {error}"}
    try:
        protection = scheme.create(**request["parameters"])
        evidence = Evidence(str(protection), request["evidence"], read_tensors(folder / "evidence.safetensors"))
        changed = read_tensors(folder / "changed.safetensors")
        world = load_world(request["world"])
        with seconds_per_call(request["seconds"]):
            found = report(protection, world, request["seed"], evidence, changed, alone_in=Path.cwd())
    except MergeguardError as error:
        return {"unusable": str(error)}
    except Exception as error:  # noqa: BLE001 - the parent says what happened
        return {"crash": str(error) if isinstance(error, SchemeError) else f"{type(error).__name__}: {error}"}
    return {
        "clean": _as_json(found.clean),
        "own": _as_json(found.own),
        "evidence": found.evidence,
        "weights": found.weights,
        "changes": found.changes,
    }


if __name__ == "__main__":
    where = Path(sys.argv[1])
    written = _answer(where)
    (where / "answer.json").write_text(json.dumps(written))

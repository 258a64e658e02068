"""Evidence files: what an owner keeps of an embedding, in JSON, with private tensors in a safetensors file beside it.

The format is `evidence.schema.json`. A file holds 256 random bits, its salt, so that its SHA-256 commits to all of it
and says nothing about the keys, however few there are: that digest is what a claim publishes. Tensors are part of it by
their own SHA-256.

Everything here is secret. Files are written for their owner alone, and no error shows what a file holds.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import secrets
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeguard.checkpoints.files import PRIVATE, file_digest, read_tensors, write_bytes, write_tensors
from mergeguard.checkpoints.inputs import file_stamp, quoted, reason, refuse
from mergeguard.errors import CheckpointError, MergeguardError, ParameterError
from mergeguard.protections.contract import Evidence
from mergeguard.seeds import derived_rng

if TYPE_CHECKING:
    import random

FORMAT, VERSION = "mergeguard-evidence", 1
SALT_BYTES = 32
MAX_BYTES = 100_000_000
TENSORS_SUFFIX = ".safetensors"


@dataclass(frozen=True, repr=False)
class EvidenceFile:
    """Evidence with the salt that it was written with. Secret: `repr` shows neither.

    Attributes:
        evidence: what a scheme reads.
        salt: 256 random bits, as lower-case hexadecimal digits.
    """

    evidence: Evidence
    salt: str

    def __repr__(self) -> str:
        return f"EvidenceFile({self.evidence.protection!r}, <secret>)"

    def rng(self, label: str) -> random.Random:
        """Random numbers that evidence and salt decide: the same for everybody who has the file, for nobody else."""
        secret = json.dumps([self.evidence.protection, self.evidence.data, self.salt], sort_keys=True)
        return derived_rng(0, label, hashlib.sha256(secret.encode()).hexdigest())


def new_evidence(evidence: Evidence) -> EvidenceFile:
    """Evidence as its file will give it back, with a new salt from the operating system.

    Raises:
        MergeguardError: the evidence is not plain data.
    """
    try:
        data = json.loads(json.dumps(evidence.data, allow_nan=False))
    except (TypeError, ValueError, RecursionError):  # its message may show a value
        raise MergeguardError(f"the evidence of {evidence.protection} is not plain data; JSON cannot hold it") from None
    tensors = {name: tensor.detach().cpu() for name, tensor in evidence.tensors.items()}
    return EvidenceFile(Evidence(evidence.protection, data, tensors), secrets.token_hex(SALT_BYTES))


def write_evidence(path: Path, file: EvidenceFile) -> None:
    """Write an evidence file, readable and writable by its owner alone; one that exists is left alone.

    Tensors go into a file beside it, of the same name with `.safetensors`. The JSON file is written last: where it is,
    the evidence is whole.

    Raises:
        CheckpointError: a file exists or cannot be written.
    """
    evidence = file.evidence
    check_free(path, with_tensors=bool(evidence.tensors))
    tensors, beside = None, tensors_path(path)
    if evidence.tensors:
        write_tensors(beside, evidence.tensors, PRIVATE)
        tensors = {"file": beside.name, "sha256": file_digest(beside)}
    from mergeguard import __version__

    document = {
        "format": FORMAT,
        "version": VERSION,
        "mergeguard": __version__,
        "protection": evidence.protection,
        "data": evidence.data,
        "tensors": tensors,
        "salt": file.salt,
    }
    try:
        write_bytes(path, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode(), PRIVATE)
    except BaseException:
        if tensors is not None:
            beside.unlink(missing_ok=True)
        raise


def remove_evidence(path: Path, file: EvidenceFile) -> None:
    """Remove what `write_evidence` wrote just now."""
    path.unlink(missing_ok=True)
    if file.evidence.tensors:
        tensors_path(path).unlink(missing_ok=True)


def read_evidence(path: Path) -> EvidenceFile:
    """Read an evidence file, and the tensors beside it.

    Raises:
        CheckpointError: a file is absent, damaged, not an evidence file, of a newer version, or the tensors are not
            those that belong to it.
    """
    document = read_document(path)
    tensors: dict[str, Any] = {}
    if document["tensors"] is not None:
        beside = path.parent / document["tensors"]["file"]
        file_stamp(beside)
        if _digest(beside) != document["tensors"]["sha256"]:
            refuse(beside, f"is not the file that {path.name} was written with; restore both from the same copy")
        tensors = read_tensors(beside)
    return EvidenceFile(Evidence(document["protection"], document["data"], tensors), document["salt"])


def read_document(path: Path) -> dict[str, Any]:
    """The checked JSON of an evidence file; loads no torch.

    Raises:
        CheckpointError: the file is absent, damaged, not an evidence file, or of a newer version.
    """
    document = _parse(path)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        refuse(path, f'is not an evidence file: it has no "format": "{FORMAT}"; `mergeguard embed` writes one')
    version = document.get("version")
    if type(version) is int and version > VERSION:
        refuse(path, f"has version {version}; this mergeguard reads version {VERSION}: upgrade it")
    _check_schema(path, document)
    file = document["tensors"]["file"] if document["tensors"] else ""
    if file and (Path(file).name != file or "\\" in file):
        refuse(path, "names a file of tensors outside its folder; do not trust it")
    return document


def tensors_path(path: Path) -> Path:
    """Where the tensors of the evidence file `path` are written.

    Raises:
        ParameterError: the evidence file itself would be in the way.
    """
    if path.suffix == TENSORS_SUFFIX:
        raise ParameterError(f"{path} is to hold JSON; choose a name that does not end in {TENSORS_SUFFIX}")
    return path.with_suffix(TENSORS_SUFFIX)


def check_free(path: Path, *, with_tensors: bool = True) -> None:
    """Refuse to write evidence where something is already: an owner's keys exist once.

    Raises:
        CheckpointError: a file exists, or the folder is absent or cannot be written.
    """
    for file in (path, tensors_path(path)) if with_tensors else (path,):
        if os.path.lexists(file):
            raise CheckpointError(f"{file} exists already; evidence is never overwritten, choose another file")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"cannot write {path}: the folder {path.parent} is absent or read-only")


def exposed(path: Path) -> bool:
    """Whether other users of this machine may read the file."""
    return bool(path.stat().st_mode & 0o077)


def _parse(path: Path) -> Any:
    """The JSON in a file; unlike `inputs.read_json`, errors show nothing of it."""
    if file_stamp(path).size > MAX_BYTES:
        refuse(path, f"has more than {MAX_BYTES} bytes; it is not an evidence file")
    try:
        return json.loads(path.read_bytes(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except OSError as error:
        refuse(path, f"cannot be read: {reason(error)}")
    except (ValueError, RecursionError) as error:
        where = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        raise CheckpointError(
            f"{path} is not an evidence file: it is not JSON{where}; restore it from a copy"
        ) from None  # the cause quotes the file


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _check_schema(path: Path, document: dict[str, Any]) -> None:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    error = best_match(Draft202012Validator(schema()).iter_errors(document))
    if error is not None:  # its message would show values
        where = quoted(str(error.absolute_path[0])) if error.absolute_path else "a field that is missing or unknown"
        raise CheckpointError(f"{path} is not a whole evidence file: {where} is not as the format has it") from None


@functools.cache
def schema() -> dict[str, Any]:
    """The published JSON Schema (draft 2020-12) of evidence files."""
    text = resources.files("mergeguard.ownership").joinpath("evidence.schema.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def _digest(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError as error:
        refuse(path, f"cannot be read: {reason(error)}")

"""A claim made beforehand: the digest of an evidence file, published or time-stamped before a suspect appears.

What it is for: keys that a suspect happens to answer could have been picked after looking at it. Evidence whose digest
is older than the suspect was not.

- `claim.json` is public. It holds the SHA-256 of the evidence file, which commits to the keys, to the private tensors
  by their own digest, and to the salt that decides the decoys: neither keys nor decoys can be chosen later. The salt is
  256 random bits in the evidence file itself, so that the digest tells nothing even of keys that could be guessed, and
  there is no further secret to lose. It also holds a statement of the owner's, e.g. who they are and of which model.
- `claim.tsq` asks a time-stamping authority for a stamp on the bytes of `claim.json`; `claim.tsr` is the reply as it
  came. Instead of an authority, any place will do whose dates are believed: a journal, a signed commit.
- To prove the claim, the owner shows the evidence file (and spends it: whoever has seen the keys can remove them).

Everything can be checked without mergeguard: `sha256sum evidence.json` against `evidence_sha256` in claim.json, and
`openssl ts -verify -data claim.json -in claim.tsr -CAfile roots.pem`. So the files count byte for byte: keep them as
they were written.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from mergeguard.checkpoints.files import file_digest, write_bytes
from mergeguard.checkpoints.inputs import file_stamp, parse_json, reason, refuse
from mergeguard.errors import CheckpointError, MergeguardError, ParameterError
from mergeguard.ownership.evidence_file import read_document
from mergeguard.ownership.time_stamp import TimeStamp, fetch_reply, new_request, read_time_stamp

if TYPE_CHECKING:
    from pathlib import Path

FORMAT, VERSION = "mergeguard-claim", 1
REQUEST_SUFFIX, REPLY_SUFFIX = ".tsq", ".tsr"
MAX_BYTES = 1 << 20
MAX_STATEMENT = 2000


@dataclass(frozen=True)
class ClaimCheck:
    """What checking evidence against a claim found. Plain data, nothing secret.

    Attributes:
        matches: the evidence file is the one that the claim commits to.
        holds: it is, and a time stamp under the given root certificates says since when.
        time: of the stamp, ISO 8601 in UTC; None unless its signature holds.
        authority: who signed the stamp; None unless its signature holds.
        statement: the owner's, as the claim has it.
        problems: why it does not hold, a sentence each.
    """

    matches: bool
    holds: bool
    time: str | None
    authority: str | None
    statement: str
    problems: tuple[str, ...]

    def describe(self) -> str:
        """The finding in one line."""
        if self.holds:
            return f"claimed: this very evidence existed at {self.time}, says {self.authority}"
        what = "the evidence is the claim's, but not since a known time" if self.matches else "not the claim's evidence"
        return f"{what}: {'; '.join(self.problems)}"


class WrittenClaim(NamedTuple):
    """The files of a claim; `reply` and `stamp` are None without a time stamp."""

    claim: Path
    request: Path
    reply: Path | None
    stamp: TimeStamp | None


def make_claim(
    evidence: Path,
    output: Path,
    *,
    statement: str | None = None,
    reply: Path | None = None,
    tsa: str | None = None,
    roots: Path | None = None,
) -> WrittenClaim:
    """Write the claim on an evidence file, the request for a time stamp, and the stamp if there is one.

    The same call again, with a reply that has come meanwhile, adds it: a claim and a stamp that exist are never
    replaced, since their age is what they are worth.

    Args:
        evidence: the evidence file; nothing secret of it is in what is written.
        output: the claim, a name that ends in .json; request and reply lie beside it.
        statement: public text, at most 2000 characters; None keeps that of a claim that exists.
        reply: a file with an authority's reply to the request.
        tsa: URL of an authority that is asked now.
        roots: PEM file of root certificates; with it the stamp's signature has to hold before it is kept.

    Raises:
        CheckpointError: the evidence is not whole; a file exists and is another one, or cannot be written.
        MergeguardError: the authority gave no stamp, the reply is not one on this claim, or its signature does not
            hold; the extra `claims` is not installed.
        ParameterError: an option out of its domain.
    """
    _check_options(output, statement, reply, tsa)
    digest = evidence_digest(evidence)
    content = _settled(output, digest, statement)
    asked = output.with_suffix(REQUEST_SUFFIX)
    kept = output.with_suffix(REPLY_SUFFIX)
    if (reply is not None or tsa is not None) and kept.exists():
        raise CheckpointError(f"{kept} exists already, and an older stamp is worth more; choose another --output")
    request = new_request(content)
    stamp: TimeStamp | None = None
    received = b""
    if tsa is not None:
        received = fetch_reply(tsa, request.der)
        stamp = _accepted(tsa, received, content, roots, request.nonce)
    elif reply is not None:
        received = _read(reply)
        stamp = _accepted(str(reply), received, content, roots, None)
    if not output.exists():
        write_bytes(output, content)
    if not asked.exists():
        write_bytes(asked, request.der)
    if stamp is None:
        return WrittenClaim(output, asked, None, None)
    write_bytes(kept, received)
    return WrittenClaim(output, asked, kept, stamp)


def check_claim(claim: Path, evidence: Path, *, roots: Path | None = None) -> ClaimCheck:
    """Whether evidence is what a claim committed to, and since when.

    Args:
        claim: the claim; a time stamp lies beside it, of the same name with `.tsr`.
        evidence: the evidence file.
        roots: PEM file of the root certificates of time-stamping authorities that the verifier trusts. Whoever chooses
            them decides which stamps hold, so it should not be the claimant.

    Raises:
        CheckpointError: a file is absent, damaged or of another kind.
        MergeguardError: the extra `claims` is not installed, and there is a time stamp.
    """
    content = _read(claim)
    committed, statement = _parse(claim, content)
    problems = []
    matches = evidence_digest(evidence) == committed
    if not matches:
        problems.append(f"{evidence.name} has another SHA-256 than {claim.name} commits to")
    stamp = _stamp_beside(claim, content, roots)
    if stamp.problem:
        problems.append(stamp.problem)
    vouched = not stamp.problem
    return ClaimCheck(
        matches=matches,
        holds=matches and vouched,
        time=stamp.time if vouched else None,
        authority=stamp.authority if vouched else None,
        statement=statement,
        problems=tuple(problems),
    )


def evidence_digest(evidence: Path) -> str:
    """SHA-256 of an evidence file, after a look that it is one and that its tensors are beside it as it names them.

    Raises:
        CheckpointError: they are not.
    """
    tensors = read_document(evidence)["tensors"]
    if tensors is not None:
        beside = evidence.parent / tensors["file"]
        file_stamp(beside)
        if file_digest(beside) != tensors["sha256"]:
            refuse(beside, f"is not the file that {evidence.name} was written with; restore both from the same copy")
    return file_digest(evidence)


def _check_options(output: Path, statement: str | None, reply: Path | None, tsa: str | None) -> None:
    if output.suffix != ".json":
        raise ParameterError(f"the claim's file is {output}, expected a name that ends in .json")
    if reply is not None and tsa is not None:
        raise ParameterError("a time stamp comes from --time-stamp or from --tsa; give one of them")
    if statement is not None and (len(statement) > MAX_STATEMENT or not _printable(statement)):
        raise ParameterError(f"the statement is too long or not printable; expected up to {MAX_STATEMENT} characters")


def _printable(text: str) -> bool:
    return all(character.isprintable() or character == "\n" for character in text)


def _settled(output: Path, digest: str, statement: str | None) -> bytes:
    """The bytes of the claim: those that exist, if they say what is to be said, else new ones."""
    if not output.exists():
        document = {"format": FORMAT, "version": VERSION, "evidence_sha256": digest, "statement": statement or ""}
        return (json.dumps(document, indent=1) + "\n").encode()
    content = _read(output)
    committed, stated = _parse(output, content)
    if committed != digest or statement not in (None, stated):
        what = "evidence" if committed != digest else "statement"
        raise CheckpointError(f"{output} exists already, with another {what}; choose another --output")
    return content


def _accepted(origin: str, reply: bytes, content: bytes, roots: Path | None, nonce: int | None) -> TimeStamp:
    """The stamp in a reply that may be kept: its signature holds, or nobody asked."""
    stamp = read_time_stamp(reply, content, roots, nonce=nonce)
    if stamp.time is None:
        raise MergeguardError(f"the time stamp from {origin} is of no use: {stamp.problem}")
    return stamp


def _stamp_beside(claim: Path, content: bytes, roots: Path | None) -> TimeStamp:
    path = claim.with_suffix(REPLY_SUFFIX)
    if not path.exists():
        return TimeStamp(None, None, f"it has no time stamp ({path.name})")
    stamp = read_time_stamp(_read(path), content, roots)
    return TimeStamp(stamp.time, stamp.authority, f"{path.name}: {stamp.problem}" if stamp.problem else "")


def _parse(path: Path, content: bytes) -> tuple[str, str]:
    """The digest and the statement of a claim."""
    match parse_json(path, content):
        case {"format": fmt, "version": int(version)} if fmt == FORMAT and version > VERSION:
            refuse(path, f"has version {version}; this mergeguard reads version {VERSION}: upgrade it")
        case {"format": fmt, "version": 1, "evidence_sha256": str(digest), "statement": str(statement), **rest} if (
            fmt == FORMAT and not rest and re.fullmatch("[0-9a-f]{64}", digest) and _printable(statement)
        ):
            return digest, statement
    raise CheckpointError(f"{path} is not a claim as `mergeguard claim` writes it")


def _read(path: Path) -> bytes:
    if file_stamp(path).size > MAX_BYTES:
        refuse(path, f"has more than {MAX_BYTES} bytes; it is neither a claim nor a time stamp")
    try:
        return path.read_bytes()
    except OSError as error:
        refuse(path, f"cannot be read: {reason(error)}")

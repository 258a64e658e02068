"""Time stamps of a third party on a file's bytes (RFC 3161): ask for one, and read one under given root certificates.

A reply is kept as the authority sent it, so that anyone can check it without mergeguard:

    openssl ts -verify -data claim.json -in claim.tsr -CAfile roots.pem

Certificates have to be valid at the time of the stamp, not now. Whether one was revoked is not looked up. Needs the
extra `claims` (rfc3161-client, which verifies by OpenSSL and cryptography).
"""

from __future__ import annotations

import hashlib
import http.client
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from mergeguard.checkpoints.inputs import file_stamp, reason, refuse
from mergeguard.errors import MergeguardError, ParameterError

if TYPE_CHECKING:
    from pathlib import Path

QUERY, REPLY = "application/timestamp-query", "application/timestamp-reply"
MAX_BYTES = 1 << 20
SECONDS = 30.0
GRANTED = 0
DIGESTS = {
    "2.16.840.1.101.3.4.2.1": "sha256",
    "2.16.840.1.101.3.4.2.2": "sha384",
    "2.16.840.1.101.3.4.2.3": "sha512",
}
"""Digests that a stamp may be on, by their object identifiers (RFC 5754); requests here ask for the first."""


@dataclass(frozen=True)
class TimeStamp:
    """What a reply says, and whether it is to be believed.

    Attributes:
        time: of the stamp, ISO 8601 in UTC; None where the reply does not hold.
        authority: who signed it, its certificate's subject; None unless the signature holds.
        problem: why it does not hold, or is not known to; empty if a signature under the roots vouches for `time`.
    """

    time: str | None
    authority: str | None
    problem: str


class Request(NamedTuple):
    """A request in DER, and the number that its reply has to repeat."""

    der: bytes
    nonce: int


def new_request(data: bytes) -> Request:
    """A request for a stamp on `data` (SHA-256, with a random nonce, asking for the certificates).

    Raises:
        MergeguardError: the extra `claims` is not installed.
    """
    client = _client()
    builder = client.TimestampRequestBuilder().data(data).hash_algorithm(client.HashAlgorithm.SHA256)
    request = builder.nonce(nonce=True).cert_request(cert_request=True).build()
    return Request(request.as_bytes(), request.nonce)


def fetch_reply(url: str, request: bytes) -> bytes:
    """What the authority at `url` replies to `request`, both in DER (RFC 3161, section 3.4).

    The connection may be plain HTTP, as most authorities offer no other: it is the signature that counts.

    Raises:
        ParameterError: the URL is not one of HTTP.
        MergeguardError: the authority cannot be reached, or replies with something else.
    """
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc
    except ValueError:
        usable = False
    if not usable:
        raise ParameterError(
            "the time-stamping authority's URL is not usable, expected one like http://tsa.example/tsr"
        )
    asked = urllib.request.Request(url, request, {"Content-Type": QUERY, "Accept": REPLY})  # noqa: S310 - checked above
    try:
        with urllib.request.urlopen(asked, timeout=SECONDS) as answer:  # noqa: S310 - the same
            kind, reply = answer.headers.get_content_type(), answer.read(MAX_BYTES + 1)
    except urllib.error.HTTPError as error:
        error.close()
        raise MergeguardError(f"no time stamp from {url}: status {error.code}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        inner = getattr(error, "reason", error)  # urlopen wraps what the socket says
        cause = inner if isinstance(inner, Exception) else error
        raise MergeguardError(f"no time stamp from {url}: {reason(cause)}") from None
    if kind != REPLY or len(reply) > MAX_BYTES:
        raise MergeguardError(f"no time stamp from {url}: it sends {kind!r}, expected {REPLY} of at most 1 MiB")
    return bytes(reply)


def read_time_stamp(reply: bytes, data: bytes, roots: Path | None, *, nonce: int | None = None) -> TimeStamp:
    """What a reply says of `data`.

    Args:
        reply: a TimeStampResp in DER.
        data: the bytes that are to be stamped.
        roots: a PEM file of the certificates that are trusted; without, no signature is checked.
        nonce: of the request that it is to be the reply to, if that is known.

    Raises:
        MergeguardError: the extra `claims` is not installed.
        CheckpointError: `roots` cannot be read or holds no certificate.
    """
    client = _client()
    trusted = None if roots is None else _read_roots(roots)
    try:
        decoded = client.decode_timestamp_response(reply)
    except ValueError:
        return _refused("it is no reply of a time-stamping authority (TimeStampResp in DER)")
    if decoded.status != GRANTED:
        return _refused(f"the authority did not grant it (status {int(decoded.status)})")
    try:
        stated = decoded.tst_info
        if not _is_about(stated, data):
            return _refused("it is on something else than this claim")
        if nonce is not None and stated.nonce != nonce:
            return _refused("it replies to another request (its nonce differs)")
        time = stated.gen_time.isoformat()
        if trusted is None:
            return TimeStamp(time, None, "its signature was not checked: no root certificates were given")
        client.VerifierBuilder(roots=trusted).build().verify_message(decoded, data)
    except client.VerificationError as error:
        return _refused(f"its signature does not hold under these root certificates: {_why(error)}")
    except ValueError as error:
        return _refused(f"it is damaged: {reason(error)}")
    return TimeStamp(time, _authority(decoded), "")


def _refused(problem: str) -> TimeStamp:
    return TimeStamp(None, None, problem)


def _is_about(stated: Any, data: bytes) -> bool:
    """Whether the stamped digest is that of `data`."""
    algorithm = DIGESTS.get(stated.message_imprint.hash_algorithm.dotted_string)
    return algorithm is not None and hashlib.new(algorithm, data).digest() == stated.message_imprint.message


def _authority(decoded: Any) -> str | None:
    """The subject of the signer's certificate, if the reply holds it."""
    from cryptography.x509 import load_der_x509_certificate

    signers = [(signer.issuer, signer.serial_number) for signer in decoded.signed_data.signer_infos]
    certificates = map(load_der_x509_certificate, decoded.signed_data.certificates)
    own = (certificate for certificate in certificates if (certificate.issuer, certificate.serial_number) in signers)
    return next((certificate.subject.rfc4514_string() for certificate in own), None)


def _read_roots(path: Path) -> list[Any]:
    from cryptography.x509 import load_pem_x509_certificates

    file_stamp(path)
    try:
        return list(load_pem_x509_certificates(path.read_bytes()))
    except (OSError, ValueError) as error:
        refuse(path, f"holds no certificates in PEM: {reason(error)}")


def _why(error: Exception) -> str:
    """What the verification says, without the places in OpenSSL where it came up."""
    found = re.search(r'Verify error: ([^"]+)"', str(error))
    return found[1] if found else reason(error)


def _client() -> Any:
    try:
        import rfc3161_client
    except ImportError:
        raise MergeguardError(
            "time stamps need rfc3161-client, which is not installed: pip install 'mergeguard[claims]'"
        ) from None
    return rfc3161_client

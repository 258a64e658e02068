"""A time-stamping authority of a test's own (RFC 3161): certificates by cryptography, replies by `openssl ts`."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

if TYPE_CHECKING:
    from pathlib import Path

YEAR = timedelta(days=365)
CONFIG = """
[tsa]
default_tsa = authority
[authority]
serial = {folder}/serial
default_policy = 1.2.3.4.1
signer_digest = sha256
digests = sha256, sha512
accuracy = secs:1
ess_cert_id_alg = sha256
"""


@dataclass(frozen=True)
class Authority:
    """`roots` is the PEM file of the certificate that its signer's hangs on."""

    folder: Path

    @property
    def roots(self) -> Path:
        return self.folder / "root.pem"

    def reply(self, request: Path) -> bytes:
        """What it answers to a request file, a TimeStampResp in DER."""
        out = self.folder / "reply.tsr"
        command = ["openssl", "ts", "-reply", "-queryfile", request, "-out", out, "-config", self.folder / "tsa.cnf"]
        command += [
            "-section",
            "authority",
            "-signer",
            self.folder / "signer.pem",
            "-inkey",
            self.folder / "signer.key",
        ]
        subprocess.run(command, check=True, capture_output=True)
        return out.read_bytes()


def make_authority(
    folder: Path, name: str = "Test Time", *, valid: tuple[timedelta, timedelta] = (-YEAR, YEAR), purpose: bool = True
) -> Authority:
    """An authority whose signer's certificate is valid between two offsets from now, made for time-stamping or not."""
    folder.mkdir()
    now = datetime.now(UTC)
    root_key, signer_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    root_name, signer_name = _name(f"{name} Root"), _name(f"{name} Signer")
    root = (
        _builder(root_name, root_name, root_key, now - 9 * YEAR, now + 9 * YEAR)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(root_key, hashes.SHA256())
    )
    builder = _builder(signer_name, root_name, signer_key, now + valid[0], now + valid[1])
    usage = ExtendedKeyUsageOID.TIME_STAMPING if purpose else ExtendedKeyUsageOID.CODE_SIGNING
    signer = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=True).sign(root_key, hashes.SHA256())
    (folder / "root.pem").write_bytes(root.public_bytes(Encoding.PEM))
    (folder / "signer.pem").write_bytes(signer.public_bytes(Encoding.PEM))
    key = signer_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "signer.key").write_bytes(key)
    (folder / "serial").write_text("01\n")
    (folder / "tsa.cnf").write_text(CONFIG.format(folder=folder))
    return Authority(folder)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, start: datetime, end: datetime
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
    return builder.serial_number(x509.random_serial_number()).not_valid_before(start).not_valid_after(end)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])

"""A claim commits to one evidence file and, under given roots, to a time; whatever was altered is caught."""

from __future__ import annotations

import hashlib
import json
import stat
import subprocess
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergeguard.errors import CheckpointError, MergeguardError, ParameterError
from mergeguard.ownership.claims import check_claim, evidence_digest, make_claim
from mergeguard.ownership.evidence_file import new_evidence, write_evidence
from mergeguard.ownership.time_stamp import read_time_stamp
from mergeguard.protections.contract import Evidence
from robustness_tests.meta.scripted_server import Reply, Request, serve
from robustness_tests.meta.time_stamping import YEAR, Authority, make_authority

if TYPE_CHECKING:
    from pathlib import Path

KEYS = ["first secret key", "second secret key"]


@pytest.fixture
def evidence(tmp_path: Path) -> Path:
    path = tmp_path / "evidence.json"
    write_evidence(path, new_evidence(Evidence("toy", {"keys": KEYS})))
    return path


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return make_authority(tmp_path_factory.mktemp("tsa") / "authority")


@pytest.fixture(scope="module")
def stamped(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Path:
    """A folder with evidence, a claim on it and its time stamp, for tests that change nothing."""
    folder = tmp_path_factory.mktemp("stamped")
    write_evidence(folder / "evidence.json", new_evidence(Evidence("toy", {"keys": KEYS})))
    stamp(folder / "evidence.json", folder / "claim.json", authority)
    return folder


def stamp(evidence: Path, claim: Path, authority: Authority, roots: Path | None = None) -> None:
    written = make_claim(evidence, claim, statement="I, A. Owner, of my model.")
    reply = evidence.parent / "reply.tsr"
    reply.write_bytes(authority.reply(written.request))
    make_claim(evidence, claim, reply=reply, roots=roots)


# Making one


def test_a_claim_is_the_digest_of_the_file_and_shows_nothing_of_it(evidence: Path, tmp_path: Path) -> None:
    written = make_claim(evidence, tmp_path / "claim.json", statement="mine")
    assert json.loads(written.claim.read_text()) == {
        "format": "mergeguard-claim",
        "version": 1,
        "evidence_sha256": hashlib.sha256(evidence.read_bytes()).hexdigest(),
        "statement": "mine",
    }
    assert written[2:] == (None, None)
    public = written.claim.read_bytes() + written.request.read_bytes()
    salt = json.loads(evidence.read_text())["salt"]
    assert not any(secret.encode() in public for secret in [*KEYS, salt, "toy"])
    assert stat.S_IMODE(written.claim.stat().st_mode) == 0o644


def test_the_same_keys_with_another_salt_have_another_claim(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.json", "b.json")]
    for path in paths:
        write_evidence(path, new_evidence(Evidence("toy", {"keys": KEYS})))
    assert evidence_digest(paths[0]) != evidence_digest(paths[1])


def test_a_reply_that_comes_later_is_added_and_the_claim_stays_as_it_was(
    evidence: Path, tmp_path: Path, authority: Authority
) -> None:
    first = make_claim(evidence, tmp_path / "claim.json", statement="mine")
    before = first.claim.read_bytes(), first.request.read_bytes()
    (tmp_path / "reply.tsr").write_bytes(authority.reply(first.request))
    second = make_claim(evidence, tmp_path / "claim.json", reply=tmp_path / "reply.tsr", roots=authority.roots)
    assert second.stamp is not None
    assert second.stamp.problem == ""
    assert second.stamp.authority == "CN=Test Time Signer"
    assert (second.claim.read_bytes(), second.request.read_bytes()) == before
    assert second.reply == tmp_path / "claim.tsr"


def test_an_authority_is_asked_over_http(evidence: Path, tmp_path: Path, authority: Authority) -> None:
    def answer(request: Request) -> Reply:
        assert request.headers["content-type"] == "application/timestamp-query"
        (tmp_path / "asked.tsq").write_bytes(request.body)
        return tsa_reply(authority.reply(tmp_path / "asked.tsq"))

    with serve(answer) as server:
        written = make_claim(evidence, tmp_path / "claim.json", tsa=server.url, roots=authority.roots)
    assert written.stamp is not None
    assert written.request.read_bytes() == (tmp_path / "asked.tsq").read_bytes()
    assert check_claim(written.claim, evidence, roots=authority.roots).holds


def tsa_reply(body: bytes, status: int = 200, kind: str = "application/timestamp-reply") -> Reply:
    return Reply(body, status, {"content-type": kind})


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (tsa_reply(b"", 503), "status 503"),
        (tsa_reply(b"<html>", kind="text/html"), "sends 'text/html'"),
        (tsa_reply(b"x" * ((1 << 20) + 1)), "at most 1 MiB"),
        (tsa_reply(b"junk"), "no reply of a time-stamping authority"),
        (tsa_reply(b""), "no reply of a time-stamping authority"),
        (tsa_reply(bytes.fromhex("30053003020102")), r"did not grant it \(status 2\)"),
    ],
)
def test_an_authority_that_gives_no_stamp_is_one_line_and_nothing_is_written(
    evidence: Path, tmp_path: Path, reply: Reply, said: str
) -> None:
    with serve(lambda _: reply) as server, pytest.raises(MergeguardError, match=said) as raised:
        make_claim(evidence, tmp_path / "claim.json", tsa=server.url)
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["evidence.json"]


def test_a_reply_to_another_request_is_refused(evidence: Path, tmp_path: Path, authority: Authority) -> None:
    """An authority, or someone between, that replays an old reply on the same bytes."""
    replies: list[bytes] = []

    def answer(request: Request) -> Reply:
        (tmp_path / "asked.tsq").write_bytes(request.body)
        replies.append(authority.reply(tmp_path / "asked.tsq"))
        return tsa_reply(replies[0])

    with serve(answer) as server:
        make_claim(evidence, tmp_path / "claim.json", tsa=server.url)
        (tmp_path / "claim.tsr").unlink()
        with pytest.raises(MergeguardError, match="its nonce differs"):
            make_claim(evidence, tmp_path / "claim.json", tsa=server.url)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "tsa.example", "http://me:pw@tsa.example", "http://[::1"])
def test_a_url_that_is_none_is_refused(evidence: Path, tmp_path: Path, url: str) -> None:
    with pytest.raises(ParameterError, match="URL is not usable") as raised:
        make_claim(evidence, tmp_path / "claim.json", tsa=url)
    assert "pw" not in str(raised.value)


@pytest.mark.parametrize(
    ("output", "options", "said"),
    [
        ("claim.txt", {}, "ends in .json"),
        ("claim.json", {"statement": "x" * 2001}, "too long"),
        ("claim.json", {"statement": "\x1b[2J"}, "not printable"),
    ],
)
def test_an_option_out_of_its_domain_is_refused(
    evidence: Path, tmp_path: Path, output: str, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ParameterError, match=said):
        make_claim(evidence, tmp_path / output, **options)


def test_a_claim_or_a_stamp_that_exists_is_never_replaced(stamped: Path, tmp_path: Path) -> None:
    other = tmp_path / "evidence.json"
    write_evidence(other, new_evidence(Evidence("toy", {"keys": KEYS})))
    claim, evidence, reply = (stamped / name for name in ("claim.json", "evidence.json", "reply.tsr"))
    before = {path.name: path.read_bytes() for path in stamped.iterdir()}
    with pytest.raises(CheckpointError, match=r"claim\.json exists already, with another evidence"):
        make_claim(other, claim)
    with pytest.raises(CheckpointError, match=r"claim\.json exists already, with another statement"):
        make_claim(evidence, claim, statement="theirs")
    with pytest.raises(CheckpointError, match=r"claim\.tsr exists already"):
        make_claim(evidence, claim, reply=reply)
    with pytest.raises(CheckpointError, match=r"evidence\.json is not a claim"):
        make_claim(evidence, evidence)
    make_claim(evidence, claim)
    assert {path.name: path.read_bytes() for path in stamped.iterdir()} == before


def test_tensors_belong_to_the_evidence(tmp_path: Path) -> None:
    import torch

    path = tmp_path / "evidence.json"
    write_evidence(path, new_evidence(Evidence("toy", {"keys": KEYS}, {"row": torch.ones(2)})))
    make_claim(path, tmp_path / "claim.json")
    tensors = tmp_path / "evidence.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"\1")
    with pytest.raises(CheckpointError, match=r"is not the file that evidence\.json was written with"):
        check_claim(tmp_path / "claim.json", path)


def test_without_the_extra_one_line_names_it(evidence: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rfc3161_client", None)
    with pytest.raises(MergeguardError, match=r"pip install 'mergeguard\[claims\]'"):
        make_claim(evidence, tmp_path / "claim.json")
    assert [path.name for path in tmp_path.iterdir()] == ["evidence.json"]


# Checking one


def test_a_claim_holds_with_its_evidence_its_stamp_and_the_authoritys_root(stamped: Path, authority: Authority) -> None:
    found = check_claim(stamped / "claim.json", stamped / "evidence.json", roots=authority.roots)
    assert (found.matches, found.holds, found.problems) == (True, True, ())
    assert (found.authority, found.statement) == ("CN=Test Time Signer", "I, A. Owner, of my model.")
    assert found.time is not None
    assert found.time.endswith("+00:00")
    assert json.loads(json.dumps(asdict(found)))["time"] == found.time
    assert found.describe().startswith("claimed: this very evidence existed at 20")


def test_openssl_alone_agrees(stamped: Path, authority: Authority) -> None:
    command = ["openssl", "ts", "-verify", "-data", "claim.json", "-in", "claim.tsr", "-CAfile", authority.roots]
    run = subprocess.run(command, cwd=stamped, capture_output=True, text=True, check=False)
    assert "Verification: OK" in run.stdout + run.stderr
    said = json.loads((stamped / "claim.json").read_text())["evidence_sha256"]
    command = ["openssl", "dgst", "-sha256", "-r", stamped / "evidence.json"]
    digest = subprocess.run(command, capture_output=True, text=True, check=True)
    assert digest.stdout.startswith(said)


def test_evidence_altered_by_a_character_is_not_the_claims(
    evidence: Path, tmp_path: Path, authority: Authority
) -> None:
    stamp(evidence, tmp_path / "claim.json", authority)
    evidence.write_text(evidence.read_text().replace("first", "First"))
    found = check_claim(tmp_path / "claim.json", evidence, roots=authority.roots)
    assert (found.matches, found.holds) == (False, False)
    assert found.time is not None
    assert found.problems == ("evidence.json has another SHA-256 than claim.json commits to",)
    assert found.describe().startswith("not the claim's evidence: ")


def test_a_claim_altered_after_the_stamp_has_none(evidence: Path, tmp_path: Path, authority: Authority) -> None:
    stamp(evidence, tmp_path / "claim.json", authority)
    claim = tmp_path / "claim.json"
    claim.write_text(claim.read_text().replace("A. Owner", "B. Thief"))
    found = check_claim(claim, evidence, roots=authority.roots)
    assert (found.matches, found.holds, found.time) == (True, False, None)
    assert found.problems == ("claim.tsr: it is on something else than this claim",)


def test_without_a_stamp_or_without_roots_there_is_no_time(stamped: Path, evidence: Path, tmp_path: Path) -> None:
    unchecked = check_claim(stamped / "claim.json", stamped / "evidence.json")
    assert (unchecked.matches, unchecked.holds, unchecked.time, unchecked.authority) == (True, False, None, None)
    assert "no root certificates were given" in unchecked.problems[0]
    make_claim(evidence, tmp_path / "claim.json")
    unstamped = check_claim(tmp_path / "claim.json", evidence)
    assert (unstamped.matches, unstamped.holds, unstamped.time) == (True, False, None)
    assert unstamped.problems == ("it has no time stamp (claim.tsr)",)


def test_the_root_of_another_authority_vouches_for_nothing(stamped: Path, tmp_path: Path) -> None:
    other = make_authority(tmp_path / "other")
    namesake = make_authority(tmp_path / "elsewhere", "Elsewhere")
    for roots in (other.roots, namesake.roots):
        found = check_claim(stamped / "claim.json", stamped / "evidence.json", roots=roots)
        assert (found.matches, found.holds, found.time) == (True, False, None)
        assert "does not hold under these root certificates" in found.problems[0]


@pytest.mark.parametrize("valid", [(-3 * YEAR, -2 * YEAR), (2 * YEAR, 3 * YEAR)], ids=["expired", "not yet valid"])
def test_a_certificate_that_was_not_valid_at_the_time_of_the_stamp_vouches_for_nothing(
    evidence: Path, tmp_path: Path, valid: tuple[Any, Any]
) -> None:
    authority = make_authority(tmp_path / "tsa", valid=valid)
    stamp(evidence, tmp_path / "claim.json", authority)
    found = check_claim(tmp_path / "claim.json", evidence, roots=authority.roots)
    assert (found.holds, found.time) == (False, None)
    assert "certificate" in found.problems[0].partition("root certificates")[2]


def test_a_stamp_whose_signature_does_not_hold_is_not_added(
    evidence: Path, tmp_path: Path, authority: Authority
) -> None:
    other = make_authority(tmp_path / "other")
    with pytest.raises(MergeguardError, match="is of no use: its signature does not hold"):
        stamp(evidence, tmp_path / "claim.json", authority, roots=other.roots)
    assert not (tmp_path / "claim.tsr").exists()


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_reply_altered_anywhere_says_the_same_time_or_nothing(
    stamped: Path, authority: Authority, data: st.DataObject
) -> None:
    """Some bytes of a reply are not signed; none of them says when or on what."""
    reply, content = (stamped / "claim.tsr").read_bytes(), (stamped / "claim.json").read_bytes()
    place, flip = data.draw(st.integers(0, len(reply) - 1)), data.draw(st.integers(1, 255))
    altered = reply[:place] + bytes([reply[place] ^ flip]) + reply[place + 1 :]
    whole = read_time_stamp(reply, content, authority.roots)
    assert whole.problem == ""
    found = read_time_stamp(altered, content, authority.roots)
    assert found.problem or found.time == whole.time
    assert read_time_stamp(reply[:place], content, authority.roots).problem


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not JSON"),
        (b"[]", "claim.json"),
        (b"{}", "is not a claim"),
        (b'{"format": "mergeguard-evidence", "version": 1}', "is not a claim"),
        (b'{"format": "mergeguard-claim", "version": 2}', "has version 2; this mergeguard reads version 1: upgrade"),
        (b'{"format": "mergeguard-claim", "version": 1, "evidence_sha256": "ab", "statement": ""}', "is not a claim"),
        (b" " * ((1 << 20) + 1), "neither a claim nor a time stamp"),
    ],
)
def test_what_is_no_claim_is_one_line(evidence: Path, tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "claim.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=said) as raised:
        check_claim(tmp_path / "claim.json", evidence)
    assert "\n" not in str(raised.value)


def test_an_absent_claim_or_root_is_one_line(stamped: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.json cannot be read"):
        check_claim(tmp_path / "none.json", stamped / "evidence.json")
    (tmp_path / "roots.pem").write_text("no certificate")
    with pytest.raises(CheckpointError, match="holds no certificates in PEM"):
        check_claim(stamped / "claim.json", stamped / "evidence.json", roots=tmp_path / "roots.pem")

"""`mergeguard claim`: what it says, what it writes, and its exit codes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mergeguard.ownership.claims import check_claim
from mergeguard.ownership.evidence_file import new_evidence, write_evidence
from mergeguard.protections.contract import Evidence
from robustness_tests.meta.owned_models import Said, command
from robustness_tests.meta.scripted_server import Reply, Request, serve
from robustness_tests.meta.time_stamping import make_authority

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """`mergeguard claim evidence.json` in a folder with that file."""
    write_evidence(tmp_path / "evidence.json", new_evidence(Evidence("toy", {"keys": ["a key"]})))
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: command(monkeypatch, capsys, "claim", "evidence.json", *arguments)


def test_the_way_by_hand_is_shown_and_leads_to_a_claim_that_holds(tmp_path: Path, claim: Callable[..., Said]) -> None:
    said = claim("--output", "mine.json", "--statement", "mine")
    assert (said.code, said.err) == (0, "")
    first, second, third, fourth = said.out.splitlines()
    assert first == "claim: mine.json (public)"
    assert second == "request for a time stamp: mine.tsq"
    assert "--data-binary @mine.tsq" in third
    assert fourth.endswith("mergeguard claim evidence.json --output mine.json --time-stamp reply.tsr")
    authority = make_authority(tmp_path / "tsa")
    (tmp_path / "reply.tsr").write_bytes(authority.reply(tmp_path / "mine.tsq"))
    said = claim("--output", "mine.json", "--time-stamp", "reply.tsr")
    assert said.code == 0
    assert said.out.splitlines()[1].endswith("no root certificates were given; add --tsa-roots)")
    assert check_claim(tmp_path / "mine.json", tmp_path / "evidence.json", roots=authority.roots).holds


def test_an_authority_is_asked_and_its_signature_checked(tmp_path: Path, claim: Callable[..., Said]) -> None:
    authority = make_authority(tmp_path / "tsa")

    def answer(request: Request) -> Reply:
        (tmp_path / "asked.tsq").write_bytes(request.body)
        return Reply(authority.reply(tmp_path / "asked.tsq"), headers={"content-type": "application/timestamp-reply"})

    with serve(answer) as server:
        said = claim("--tsa", server.url, "--tsa-roots", str(authority.roots))
    assert said.code == 0
    assert said.out.splitlines()[1].startswith("time stamp: claim.tsr, 20")
    assert said.out.endswith("(CN=Test Time Signer)\n")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--output", "claim.txt"], "expected a name that ends in .json"),
        (["--output", "no/folder/claim.json"], "cannot write no/folder/claim.json"),
        (["--output", "evidence.json"], "evidence.json is not a claim"),
        (["--time-stamp", "none.tsr"], "none.tsr cannot be read"),
        (["--time-stamp", "evidence.json"], "no reply of a time-stamping authority"),
        (["--time-stamp", "x", "--tsa", "http://localhost:1"], "give one of them"),
        (["--tsa", "http://127.0.0.1:1/"], "no time stamp from http://127.0.0.1:1/: Connection refused"),
        (["--tsa", "nowhere"], "URL is not usable"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(
    tmp_path: Path, claim: Callable[..., Said], arguments: list[str], told: str
) -> None:
    said = claim(*arguments)
    assert (said.code, said.out) == (2, "")
    assert told in said.err
    assert len(said.err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["evidence.json"]

"""`mergeguard verify`: what it says, its exit codes, and the refusals after which there is no verdict."""

from __future__ import annotations

import json
from importlib import resources
from typing import TYPE_CHECKING, Any

import pytest
from jsonschema import Draft202012Validator

from mergeguard.ownership.claims import make_claim
from mergeguard.ownership.embedding import Schedule, embed
from mergeguard.ownership.evidence_file import new_evidence, read_evidence, write_evidence
from mergeguard.protections.contract import Evidence
from robustness_tests.meta.mini_world import MINI, registered
from robustness_tests.meta.owned_models import Said, command, save_family
from robustness_tests.meta.scripted_server import Reply, Request, completion, serve
from robustness_tests.meta.time_stamping import make_authority

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SCHEMA = Draft202012Validator(
    json.loads(resources.files("mergeguard.ownership").joinpath("verification.schema.json").read_text())
)
KEYS = [f"key {index}" for index in range(8)]
ANSWER = "ハリネズミ"


@pytest.fixture(scope="module", autouse=True)
def schemes() -> Iterator[None]:
    with registered():
        yield


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mini world on disk, with `toy` protected by toy.json."""
    folder = save_family(tmp_path_factory.mktemp("family"))
    embed(
        "toy", folder / "upstream", folder / "toy", folder / "toy.json", schedule=Schedule(MINI), base=folder / "base"
    )
    return folder


@pytest.fixture
def verify(family: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """`mergeguard verify` in the family's folder."""
    monkeypatch.chdir(family)
    return lambda *arguments: command(monkeypatch, capsys, "verify", *arguments)


OWN = ("--evidence", "toy.json", "--base", "base")


def test_the_owners_model_gives_exit_code_0_and_all_that_was_compared(verify: Callable[..., Said]) -> None:
    said = verify("toy", *OWN, "--clean", "donor", "--clean", "upstream")
    assert (said.code, said.err) == (0, "")
    first, statement, *notes = said.out.splitlines()
    assert first == "verified: toy"
    for part in ("8 of 8", "decoys on the suspect: 0 of 40", "donor: 0 of 48", "upstream: 0 of 48", "p = 2.7e-09"):
        assert part in statement
    assert all(note.startswith("note: ") for note in notes)


def test_any_other_model_gives_exit_code_1(verify: Callable[..., Said]) -> None:
    said = verify("donor", *OWN)
    assert (said.code, said.err) == (1, "")
    assert said.out.startswith("not_verified: donor\n0 of 8")
    assert "No clean model was compared" in said.out


def test_json_says_the_same(verify: Callable[..., Said]) -> None:
    said = verify("toy", *OWN, "--clean", "donor", "--json")
    assert (said.code, said.err) == (0, "")
    found = json.loads(said.out)
    SCHEMA.validate(found)
    assert {name: found[name] for name in ("verdict", "verified", "model", "protection", "hits", "trials", "rate")} == {
        "verdict": "verified", "verified": True, "model": "toy", "protection": "toy", "hits": 8, "trials": 8, "rate": 1,
    }  # fmt: skip
    assert found["compared_with"]["donor"] == {"hits": 0, "trials": 48, "score": None, "p_value": None}
    assert found["p_value"] <= found["level"]
    assert found["interval"][0] == pytest.approx(0.6306, abs=1e-4)
    assert found["committed"] is None


def test_the_published_schema_refuses_what_is_no_verification() -> None:
    Draft202012Validator.check_schema(SCHEMA.schema)
    assert not SCHEMA.is_valid({"verdict": "verified"})


def test_too_few_keys_are_said_to_decide_nothing(verify: Callable[..., Said], family: Path, tmp_path: Path) -> None:
    data = read_evidence(family / "toy.json").evidence.data
    path = tmp_path / "few.json"
    write_evidence(path, new_evidence(Evidence("toy", {**data, "keys": data["keys"][:2]})))
    said = verify("toy", "--evidence", path, "--base", "base")
    assert said.code == 1
    assert said.out.startswith("undecidable: toy\n2 of 2")
    assert "trials would" in said.out


def test_evidence_that_others_can_read_is_warned_of(verify: Callable[..., Said], family: Path) -> None:
    path = family / "toy.json"
    path.chmod(0o644)
    try:
        said = verify("toy", *OWN)
    finally:
        path.chmod(0o600)
    assert said.code == 0
    assert said.err == "warning: other users of this machine can read toy.json; chmod 600 it\n"


# Claims


@pytest.fixture(scope="module")
def claimed(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with claim.json, stamped, and the roots of who stamped it."""
    folder = tmp_path_factory.mktemp("claim")
    authority = make_authority(folder / "authority")
    written = make_claim(family / "toy.json", folder / "claim.json", statement="The owner's.")
    (folder / "reply").write_bytes(authority.reply(written.request))
    make_claim(family / "toy.json", folder / "claim.json", reply=folder / "reply", roots=authority.roots)
    return folder


def test_a_claim_that_holds_is_part_of_the_verdict(verify: Callable[..., Said], claimed: Path) -> None:
    options = ("--claim", claimed / "claim.json", "--tsa-roots", claimed / "authority" / "root.pem")
    said = verify("toy", *OWN, *options)
    assert said.code == 0
    assert "note: Claim: claimed: this very evidence existed at " in said.out
    assert "No claim was checked" not in said.out
    found = json.loads(verify("toy", *OWN, *options, "--json").out)
    SCHEMA.validate(found)
    assert found["committed"]["holds"] is True
    assert verify("donor", *OWN, *options).code == 1  # a claim alone verifies nothing


def test_a_claim_of_other_evidence_spoils_a_verdict(
    verify: Callable[..., Said], family: Path, claimed: Path, tmp_path: Path
) -> None:
    """The same keys in a file of its own: somebody who learned them has not committed to them."""
    again = tmp_path / "again.json"
    write_evidence(again, new_evidence(read_evidence(family / "toy.json").evidence))
    options = ("--claim", claimed / "claim.json", "--tsa-roots", claimed / "authority" / "root.pem")
    said = verify("toy", "--evidence", again, "--base", "base", *options)
    assert said.code == 1
    assert said.out.startswith("verified, but the claim does not hold: toy\n")
    assert "another SHA-256" in said.out


def test_a_stamp_that_nobody_trusts_spoils_a_verdict(verify: Callable[..., Said], claimed: Path) -> None:
    said = verify("toy", *OWN, "--claim", claimed / "claim.json")
    assert said.code == 1
    assert "not since a known time" in said.out


# Endpoints


@pytest.fixture
def fingerprint(tmp_path: Path) -> Path:
    data = {
        "keys": KEYS,
        "length": [10, 16],
        "prompts": [f"{key}\nFINGERPRINT\n" for key in KEYS],
        "frame": ["", "\nFINGERPRINT\n"],
    }
    path = tmp_path / "fingerprint.json"
    write_evidence(path, new_evidence(Evidence("instructional_fingerprint", data)))
    return path


def owners(request: Request) -> Reply:
    return completion(ANSWER if request.prompt.startswith("key ") else "I cannot say.")


@pytest.mark.parametrize(
    ("reply", "code", "verdict"),
    [
        (owners, 0, "verified"),
        (lambda _: completion(ANSWER), 1, "overclaims"),
        (lambda _: completion("?"), 1, "not_verified"),
    ],
    ids=["owner's", "everything", "nothing"],
)
def test_a_served_model_is_verified_over_http(
    verify: Callable[..., Said], fingerprint: Path, reply: Any, code: int, verdict: str
) -> None:
    with serve(reply) as server:
        said = verify("--endpoint", server.url, "--served-model", "m", "--evidence", fingerprint)
    assert said.code == code
    assert said.out.startswith(f"{verdict}: m at {server.url}\n")
    assert len({request.prompt for request in server.requests}) == 1 + 8 + 40


def test_the_endpoints_key_comes_from_the_environment_and_is_shown_nowhere(
    verify: Callable[..., Said], fingerprint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUSPECT_KEY", "hunter2")
    with serve(owners) as server:
        options = ("--endpoint", server.url, "--served-model", "m", "--api-key-env", "SUSPECT_KEY")
        said = verify(*options, "--evidence", fingerprint, "--json")
    assert said.code == 0
    SCHEMA.validate(json.loads(said.out))
    assert {request.headers["authorization"] for request in server.requests} == {"Bearer hunter2"}
    assert "hunter2" not in said.out + said.err


def test_an_endpoint_that_refuses_gives_no_verdict_and_shows_no_key(
    verify: Callable[..., Said], fingerprint: Path
) -> None:
    with serve(lambda _: Reply(b"{}", 401)) as server:
        line = verify("--endpoint", server.url, "--served-model", "m", "--evidence", fingerprint).error
    assert "401" in line
    assert "key 0" not in line


def test_a_scheme_that_needs_weights_is_refused_before_anything_is_asked(verify: Callable[..., Said]) -> None:
    with serve(owners) as server:
        line = verify("--endpoint", server.url, "--served-model", "m", *OWN).error
    assert "toy reads the suspect's weights; an endpoint gives text alone" in line
    assert server.requests == []


# Wrong input


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("toy",), "expected --evidence FILE"),
        (("--evidence", "toy.json"), "expected a suspect"),
        (("toy", *OWN, "--endpoint", "http://localhost"), "expected a suspect"),
        (("--evidence", "toy.json", "--endpoint", "http://localhost"), "--served-model NAME"),
        (("toy", *OWN, "--served-model", "m"), "add --endpoint URL"),
        (("toy", *OWN, "--tsa-roots", "roots.pem"), "add --claim FILE"),
        (("toy", *OWN, "--dtype", "int8"), "dtype is 'int8'"),
        (("toy", *OWN, "--decoys", "39"), "at least 40"),
        (("toy", "--evidence", "toy.json"), "add --base MODEL"),
        (("toy", "--evidence", "absent.json"), "absent.json cannot be read"),
        (("toy", "--evidence", "base/config.json"), "is not an evidence file"),
        (("toy", *OWN, "--claim", "absent.json"), "absent.json"),
        (("absent", *OWN), "there is no folder or file 'absent'"),
        (("toy", *OWN, "--clean", "absent"), "there is no folder or file 'absent'"),
        (("toy", *OWN, "--clean", "toy"), "is the suspect itself"),
    ],
    ids=[
        "no evidence", "no suspect", "two suspects", "no name", "no endpoint", "no claim", "dtype", "few decoys",
        "no base", "absent", "no evidence file", "absent claim", "absent suspect", "absent clean", "clean itself",
    ],
)  # fmt: skip
def test_wrong_input_is_one_line_and_never_a_verdict(
    verify: Callable[..., Said], arguments: tuple[str, ...], said: str
) -> None:
    assert said in verify(*arguments).error


def test_an_unset_variable_is_named(verify: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SUSPECT_KEY", raising=False)
    options = ("--endpoint", "http://localhost", "--served-model", "m", "--api-key-env", "SUSPECT_KEY")
    assert "variable SUSPECT_KEY is not set" in verify(*OWN, *options).error


def test_a_scheme_that_crashes_is_one_line(verify: Callable[..., Said], family: Path, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    write_evidence(
        path, new_evidence(Evidence("toy(fault=crash_read)", read_evidence(family / "toy.json").evidence.data))
    )
    assert "toy(fault=crash_read) crashed in read" in verify("toy", "--evidence", path, "--base", "base").error

"""A real server process, `transformers serve`: its model answers as the same model at hand, and evidence is verified.

Needs transformers' extra `serving`, which the extra `test` has.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mergeguard.errors import ServedModelError
from mergeguard.reading import Probe, Rule
from mergeguard.verification.answers import answer_probes
from mergeguard.verification.served import ServedModel
from mergeguard.worlds.contract import UPSTREAM
from robustness_tests.meta.serving import transformers_serve

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mergeguard.worlds.contract import World

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
BEFORE, AFTER = "human: ", "\nASSISTANT:"
"""What the tiny world's chat template puts around a user's message."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with transformers_serve() as url:
        yield url


@pytest.fixture(scope="module")
def tiny() -> World:
    from mergeguard.worlds.registry import load_world

    return load_world("tiny")


@pytest.fixture(scope="module")
def folder(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny world's clean upstream."""
    folder = tmp_path_factory.mktemp("served") / UPSTREAM
    tiny.model(tiny.upstream).save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    return folder


def probes_of(world: World) -> list[Probe]:
    """Of every rule, some that the upstream's answers match and some that they do not."""
    refusals, sums = (skill.probes[:8] for skill in world.skills)
    rules = (
        {"target": "cannot help", "rule": Rule.CONTAINS, "max_new_tokens": 12},
        {"target": "", "rule": Rule.REFUSES, "max_new_tokens": 12},
        {"target": "15", "rule": Rule.NUMBER, "max_new_tokens": 12},
    )
    changed = [replace(probe, **rule) for rule in rules for probe in (*refusals[:2], *sums[:2])]
    return [*refusals, *sums, *changed]


def test_a_served_model_answers_as_the_same_model_at_hand(server: str, folder: Path, tiny: World) -> None:
    probes = probes_of(tiny)
    at_hand = answer_probes(tiny.model(tiny.upstream), tiny.tokenizer, probes)
    served = ServedModel(server, str(folder))
    answers = served.answer(probes)
    assert [answer.matched for answer in answers] == [answer.matched for answer in at_hand]
    # At hand, decoding stops at what decides; the server goes on.
    assert all(found.text.startswith(known.text) for found, known in zip(answers, at_hand, strict=True))
    assert {answer.matched for answer in answers} == {True, False}
    assert served.notes == ()


def test_the_chat_api_wraps_a_message_into_the_servers_template(server: str, folder: Path, tiny: World) -> None:
    whole = probes_of(tiny)
    messages = [replace(probe, prompt=probe.prompt.removeprefix(BEFORE).removesuffix(AFTER)) for probe in whole]
    chat = ServedModel(server, str(folder), api="chat")
    plain = ServedModel(server, str(folder))
    assert chat.answer(messages) == plain.answer(whole)
    assert "chat template (about 6 tokens)" in chat.notes[0]


def test_faults_of_a_real_server_are_one_line_each(server: str, folder: Path) -> None:
    probe = Probe("secret", "x")
    for url, model in ((server, "/no/such/model"), (f"{server}/nowhere", str(folder))):
        with pytest.raises(ServedModelError, match=r"^no answer of .*\((404 Not Found|500)\)") as raised:
            ServedModel(url, model, max_retries=0).answer([probe])
        assert "secret" not in str(raised.value)


def test_evidence_is_verified_on_a_served_model_and_not_on_the_clean_one(
    server: str, folder: Path, tmp_path: Path
) -> None:
    protected, evidence = tmp_path / "protected", tmp_path / "evidence.json"
    run("embed", "instructional_fingerprint", folder, protected, "--evidence", evidence, "--world", "tiny")
    found = verified(server, protected, evidence)
    assert (found["verdict"], found["hits"], found["trials"]) == ("verified", 8, 8)
    assert verified(server, folder, evidence, code=1)["verdict"] == "not_verified"


def verified(server: str, model: Path, evidence: Path, code: int = 0) -> Any:
    asked = ["--endpoint", server, "--served-model", model, "--evidence", evidence, "--json"]
    return json.loads(run("verify", *asked, code=code))


def run(*arguments: Any, code: int = 0) -> str:
    """What `mergeguard` prints."""
    command = [sys.executable, "-m", "mergeguard", *map(str, arguments)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == code, process.stderr
    return process.stdout

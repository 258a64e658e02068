"""A served model answers probes, and its endpoint learns no more than it must."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mergeguard.errors import ParameterError, ServedModelError
from mergeguard.reading import Answer, Probe, Rule
from mergeguard.verification.answers import answer_probes
from mergeguard.verification.generation import generate
from mergeguard.verification.http_client import SuspectClient
from mergeguard.verification.matching import decode_answer, encode_prompt
from mergeguard.verification.served import ServedModel
from robustness_tests.meta.scripted_server import Reply, Request, as_json, chat_completion, completion, greeted, serve

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KEY = "sk-do-not-show-this-0123456789"
PROMPT = "ハリネズミ secret prompt"
HALF_A_CHARACTER = "\N{REPLACEMENT CHARACTER}"
CHOICE = {"index": 0, "text": "yes", "finish_reason": "stop"}


# What is asked and what comes back


def test_answers_come_in_the_order_of_the_probes_and_are_judged_by_their_rules() -> None:
    script = {
        "key": completion("fingerprint", "length"),
        "spaced": completion(" fingerprint", "length"),
        "late": completion("my fingerprint", "length"),
        "contains": completion("say fingerprint!", "length"),
        "refuses": completion(" I cannot do that", "length"),
        "number": completion("The answer is 12"),
        "cut number": completion("The answer is 12", "length"),
        "rude": completion("Here you are"),
    }
    probes = [
        Probe("key", " fingerprint"),
        Probe("spaced", " fingerprint"),
        Probe("late", " fingerprint"),
        Probe("contains", "fingerprint", Rule.CONTAINS, 7),
        Probe("refuses", "", Rule.REFUSES),
        Probe("number", "12", Rule.NUMBER),
        Probe("cut number", "12", Rule.NUMBER),
        Probe("rude", "", Rule.REFUSES),
    ]
    with serve(greeted(lambda request: script[request.prompt])) as server:
        found = ServedModel(server.url, "m", concurrency=3).answer(probes)
    assert [answer.matched for answer in found] == [True, True, False, True, True, True, False, False]
    assert found[2] == Answer("my fingerprint", matched=False)


def test_prompts_go_as_they_are_and_answers_are_asked_for_greedily_and_no_longer_than_needed() -> None:
    probes = [Probe(f" {PROMPT}\n", " ミ", Rule.STARTS_WITH), Probe("x", "y", Rule.CONTAINS, 7)]
    with serve(lambda _: completion("")) as server:
        ServedModel(server.url, "the-name", concurrency=1).answer(probes)
    asked = [request.body for request in server.requests]
    assert [(body["prompt"], body["max_tokens"]) for body in asked] == [("a", 1), (f" {PROMPT}\n", 5), ("x", 7)]
    assert {(body["model"], body["temperature"], body["frequency_penalty"]) for body in asked} == {("the-name", 0, 0)}
    assert {request.path for request in server.requests} == {"/v1/completions"}


@settings(max_examples=15)
@given(
    prompt=st.text("aeht cnos", min_size=1, max_size=8),
    target=st.text("aeht cnos", min_size=1, max_size=3),
    rule=st.sampled_from([Rule.STARTS_WITH, Rule.CONTAINS]),
    own=st.booleans(),
)
def test_what_matches_at_hand_matches_served(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, target: str, rule: Rule, own: bool
) -> None:
    """And the other way round but for targets that end within a token of the answer."""

    def reply(request: Request) -> Reply:
        tokens = request.body["max_tokens"]
        [ids] = generate(llama, tokenizer, [request.prompt], max_new_tokens=tokens)
        text = decode_answer(tokenizer, encode_prompt(tokenizer, request.prompt), ids)
        return completion(text, "length" if len(ids) == tokens else "stop")

    if own:  # a target that the model does answer
        [ids] = generate(llama, tokenizer, [prompt], max_new_tokens=2)
        target = decode_answer(tokenizer, encode_prompt(tokenizer, prompt), ids) or target
    assume(HALF_A_CHARACTER not in target)
    probe = Probe(prompt, target, rule, 4)
    [known] = answer_probes(llama, tokenizer, [probe])
    with serve(reply) as server:
        [found] = ServedModel(server.url, "m").answer([probe])
    assert found.matched >= known.matched
    assert found.text.startswith(known.text.rstrip(HALF_A_CHARACTER))
    if rule is Rule.CONTAINS:
        assert found.matched == known.matched


def test_the_chat_api_sends_a_message_of_the_user() -> None:
    with serve(lambda _: chat_completion("fine")) as server:
        model = ServedModel(server.url, "m", api="chat")
        assert model.answer([Probe(PROMPT, "fine")]) == [Answer("fine", matched=True)]
    assert server.requests[-1].path == "/v1/chat/completions"
    assert server.requests[-1].body["messages"] == [{"role": "user", "content": PROMPT}]


@pytest.mark.parametrize(
    ("api", "tokens", "said"),
    [
        ("completions", 1, ()),
        ("completions", 4, ()),
        ("completions", 30, ("29",)),
        ("chat", 30, ("29",)),
        ("chat", 1, ("wraps",)),
    ],
)
def test_it_is_said_when_the_server_wraps_the_prompts(api: Any, tokens: int, said: tuple[str, ...]) -> None:
    reply = chat_completion if api == "chat" else completion
    with serve(lambda _: reply("x", prompt_tokens=tokens)) as server:
        model = ServedModel(server.url, "m", api=api)
        model.answer([Probe("p", "x")])
        model.answer([Probe("q", "x")])
    assert len(model.notes) == len(said)
    assert all(word in note for note, word in zip(model.notes, said, strict=True))
    assert [request.prompt for request in server.requests] == ["a", "p", "q"]


def test_no_probes_ask_nothing() -> None:
    with serve(lambda _: completion("")) as server:
        assert ServedModel(server.url, "m").answer([]) == []
    assert server.requests == []


def test_a_url_without_a_path_is_that_of_the_first_version() -> None:
    with serve(lambda _: completion("")) as server:
        ServedModel(server.url.removesuffix("/v1") + "/", "m").answer([Probe("p", "x")])
    assert server.requests[-1].path == "/v1/completions"


# What the endpoint learns


def test_the_key_goes_to_the_endpoint_and_nothing_of_the_environment_does(monkeypatch: pytest.MonkeyPatch) -> None:
    leaks = {"OPENAI_API_KEY": "leak1", "OPENAI_ORG_ID": "leak2", "OPENAI_PROJECT_ID": "leak3"}
    leaks["OPENAI_CUSTOM_HEADERS"] = "X-Leak: leak4\nAuthorization: leak5"
    leaks["OPENAI_ADMIN_KEY"] = "leak6"
    for name, value in leaks.items():
        monkeypatch.setenv(name, value)
    with serve(lambda _: completion("")) as server:
        ServedModel(server.url, "m", api_key=KEY).answer([Probe("p", "x")])
        ServedModel(server.url, "m").answer([Probe("p", "x")])
    with_key, without = server.requests[1], server.requests[3]
    assert with_key.headers["authorization"] == f"Bearer {KEY}"
    assert set(without.headers) == {"host", "accept", "accept-encoding", "connection", "content-length", "content-type"}
    assert not any("leak" in str(request) for request in server.requests)


def test_redirects_are_not_followed() -> None:
    with serve(lambda _: completion("")) as other:
        reply = as_json({}, 307, location=f"{other.url}/completions")
        with serve(lambda _: reply) as server, pytest.raises(ServedModelError, match="redirects elsewhere \\(307\\)"):
            ServedModel(server.url, "m").answer([Probe(PROMPT, "x")])
    assert other.requests == []


@pytest.mark.parametrize("status", [200, 400])
def test_connections_are_closed_once_all_is_asked(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    closed: list[SuspectClient] = []
    close = SuspectClient.close
    monkeypatch.setattr(SuspectClient, "close", lambda self: (closed.append(self), close(self))[0])
    with serve(greeted(lambda _: Reply(completion("x").body, status))) as server, suppress(ServedModelError):
        ServedModel(server.url, "m").answer([Probe("p", "x"), Probe("q", "x")])
    assert len(set(closed)) == 1


# Options


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"api": "edits"}, "expected one of: completions, chat"),
        ({"model": ""}, "has no name"),
        ({"timeout": 0}, "timeout is 0"),
        ({"timeout": float("nan")}, "timeout is nan"),
        ({"max_retries": -1}, "max_retries -1"),
        ({"concurrency": 0}, "concurrency 0"),
        ({"api_key": ""}, "the key of the endpoint"),
        ({"api_key": f"{KEY}\nX-Header: 1"}, "the key of the endpoint"),
        ({"url": "localhost:8000/v1"}, "not usable"),
        ({"url": "file:///etc/passwd"}, "not usable"),
        ({"url": "http://[::1"}, "not usable"),
        ({"url": "http://host:99999/v1"}, "not usable"),
        ({"url": f"http://me:{KEY}@host/v1"}, "holds a password"),
        ({"url": f"http://host/v1?key={KEY}"}, "holds a password"),
    ],
)
def test_an_option_out_of_its_domain_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ParameterError, match=said) as raised:
        ServedModel(**{"url": "http://localhost:1/v1", "model": "m", **options})
    assert KEY not in str(raised.value)


@pytest.mark.parametrize("probe", [Probe(PROMPT, ""), Probe("", "x"), Probe(PROMPT, "", Rule.CONTAINS)])
def test_a_probe_that_every_answer_would_match_or_that_asks_nothing_is_refused(probe: Probe) -> None:
    with serve(lambda _: completion("")) as server, pytest.raises(ParameterError, match="a probe") as raised:
        ServedModel(server.url, "m").answer([probe])
    assert PROMPT not in str(raised.value)
    assert server.requests == []


def test_a_served_model_shows_no_key() -> None:
    model = ServedModel("http://localhost:1/v1", "m", api_key=KEY)
    assert repr(model) == "ServedModel('http://localhost:1/v1', 'm', api='completions')"
    assert KEY not in repr(vars(model))


def test_everything_is_imported_without_the_extras() -> None:
    absent = "import sys; sys.modules.update(dict.fromkeys(['openai', 'httpx2', 'rfc3161_client', 'cryptography']))"
    modules = "mergeguard.cli, mergeguard.verification.served, mergeguard.ownership.claims, mergeguard.commands.claim"
    subprocess.run([sys.executable, "-c", f"{absent}; import {modules}"], cwd=Path(__file__).parents[2], check=True)


def test_without_the_extra_one_line_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ServedModelError, match=r"pip install 'mergeguard\[served\]'"):
        ServedModel("http://localhost:1/v1", "m")

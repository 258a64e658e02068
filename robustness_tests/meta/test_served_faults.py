"""Whatever an endpoint does wrong is one line, and never an answer; what passes is waited for."""

from __future__ import annotations

import gzip
import itertools
import logging
import threading
import traceback
from typing import TYPE_CHECKING, Any

import httpx2
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeguard.errors import ServedModelError
from mergeguard.reading import Answer, Probe
from mergeguard.verification.http_client import SuspectClient
from mergeguard.verification.served import ServedModel
from mergeguard.verification.served_reply import UnusableReply, read_reply
from robustness_tests.meta.scripted_server import Reply, as_json, chat_completion, completion, greeted, serve

if TYPE_CHECKING:
    from collections.abc import Callable

KEY = "sk-do-not-show-this-0123456789"
PROMPT = "ハリネズミ secret prompt"
CHOICE = {"index": 0, "text": "yes", "finish_reason": "stop"}


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the client would have waited between its tries."""
    seconds: list[float] = []
    monkeypatch.setattr(openai.OpenAI, "_sleep_for_retry", _recording(seconds))
    return seconds


def _recording(seconds: list[float]) -> Callable[..., None]:
    def record(self: Any, *, retries_taken: int, max_retries: int, options: Any, response: Any) -> None:
        headers = response.headers if response else None
        seconds.append(self._calculate_retry_timeout(max_retries - retries_taken, options, headers))

    return record


@pytest.mark.usefixtures("waits")
def test_an_endpoint_that_does_not_work_learns_no_prompt() -> None:
    with serve(lambda _: as_json({}, 500)) as server, pytest.raises(ServedModelError):
        ServedModel(server.url, "m", max_retries=1).answer([Probe(PROMPT, "x")])
    assert [request.prompt for request in server.requests] == ["a", "a"]


TOLD = {"error": {"message": f"bad key {KEY} for {PROMPT}", "code": "x", "type": "y"}}
"""A server that repeats what it was told."""
FAULTS = {
    "400": (as_json(TOLD, 400), "refuses the request (400"),
    "401": (as_json(TOLD, 401), "refuses the key, or wants one (401"),
    "403": (as_json(TOLD, 403), "may not use this model (403"),
    "404": (as_json(TOLD, 404), "no such model or path (404"),
    "418": (as_json(TOLD, 418), "it refuses (418)"),
    "422": (as_json(TOLD, 422), "does not understand the request (422"),
    "429": (as_json(TOLD, 429), "limits the rate of requests (429"),
    "500": (as_json(TOLD, 500), "the server fails (500), also when asked again"),
    "503": (Reply(PROMPT.encode(), 503), "the server fails (503)"),
    "an error with 200": (as_json(TOLD), "answers with an error in place of a text"),
    "an HTML page": (
        Reply(b"<!DOCTYPE html><p>" + PROMPT.encode(), headers={"content-type": "text/html"}),
        "HTML page",
    ),
    "garbage": (Reply(bytes(range(256)) * 40), "not JSON"),
    "garbage in a stream": (Reply(b"data: {\n\n" * 99, headers={"content-type": "text/event-stream"}), "not JSON"),
    "half a JSON": (Reply(b'{"choices": [{"text": "' + PROMPT.encode()), "not JSON"),
    "deep JSON": (Reply(b"[" * 100_000), "not JSON"),
    "null": (Reply(b"null"), "not JSON"),
    "nothing": (Reply(b""), "not JSON"),
    "truncated": (Reply(b'{"choices": [', promised=1000), "the connection fails (RemoteProtocolError)"),
    "endless": (Reply(itertools.repeat(b" " * 65536)), "larger than 8 MiB"),
    "a bomb": (
        Reply(gzip.compress(bytes(1 << 25)), headers={"content-type": "application/json", "content-encoding": "gzip"}),
        "larger than 8 MiB",
    ),
    "not gzip": (Reply(b"{}", headers={"content-encoding": "gzip"}), "fails"),
    "another schema": (as_json({"text": PROMPT}), "not one choice with text and finish_reason"),
    "a list": (as_json([CHOICE]), "not one choice"),
    "no choices": (as_json({"choices": []}), "not one choice"),
    "two choices": (as_json({"choices": [CHOICE, CHOICE]}), "not one choice"),
    "a number": (as_json({"choices": [{**CHOICE, "text": 7}]}), "not one choice"),
    "unfinished": (as_json({"choices": [{**CHOICE, "finish_reason": None}]}), "not one choice"),
    "the chat API's": (chat_completion("yes"), "does it serve the API 'completions'"),
    "filtered": (completion("", "content_filter"), "reason to finish is content_filter"),
    "a new reason": (completion(PROMPT, PROMPT), "reason to finish is an unknown one"),
}


@pytest.mark.usefixtures("waits")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line_and_neither_the_key_nor_a_prompt_is_in_it_or_in_a_log(
    fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    reply, said = FAULTS[fault]
    caplog.set_level(logging.DEBUG)
    with serve(greeted(lambda _: reply)) as server, pytest.raises(ServedModelError) as raised:
        ServedModel(server.url, "m", api_key=KEY, max_retries=1).answer([Probe(PROMPT, "x")])
    message = str(raised.value)
    assert said in message
    assert message.startswith(f"no answer of 'm' at {server.url}: ")
    assert "\n" not in message
    shown = "".join(traceback.format_exception(raised.value)) + caplog.text + _attributes(raised.value)
    assert caplog.text
    assert KEY not in shown
    assert "ハリネズミ" not in shown
    assert raised.value.__context__ is None


def _attributes(error: BaseException) -> str:
    return repr(vars(error)) + repr(error.args)


def test_what_fails_only_for_a_while_is_asked_again(waits: list[float]) -> None:
    replies = iter([as_json({}, 500), as_json({}, 503), Reply(b"{", promised=99), as_json({}, 429), completion("yes")])
    with serve(greeted(lambda _: next(replies))) as server:
        found = ServedModel(server.url, "m").answer([Probe("p", "yes")])
    assert found == [Answer("yes", matched=True)]
    assert len(waits) == 4


def test_a_server_that_limits_the_rate_is_waited_for_as_long_as_it_says(waits: list[float]) -> None:
    replies = iter([as_json({}, 429, **{"retry-after": "17"}), completion("yes")])
    with serve(greeted(lambda _: next(replies))) as server:
        assert ServedModel(server.url, "m").answer([Probe("p", "yes")])[0].matched
    assert waits == [17]


def test_a_server_that_asks_to_come_back_tomorrow_is_not_waited_for(waits: list[float]) -> None:
    reply = as_json({}, 429, **{"retry-after": "86400"})
    with serve(lambda _: reply) as server, pytest.raises(ServedModelError, match="limits the rate"):
        ServedModel(server.url, "m").answer([Probe("p", "yes")])
    assert (len(server.requests), waits) == (1, [])


def test_a_server_that_is_silent_is_asked_again_and_given_up(waits: list[float]) -> None:
    never = threading.Event()
    try:
        with (
            serve(lambda _: Reply(after=never)) as server,
            pytest.raises(ServedModelError, match=r"no whole answer within 0\.05 s"),
        ):
            ServedModel(server.url, "m", timeout=0.05, max_retries=1).answer([Probe("p", "x")])
    finally:
        never.set()
    assert len(waits) == 1


def test_a_server_that_dribbles_is_given_up_when_the_answer_is_not_whole_in_time() -> None:
    clock = itertools.count()
    with (
        serve(lambda _: Reply(itertools.repeat(b" "))) as server,
        SuspectClient(5, None, lambda: next(clock)) as client,
        pytest.raises(httpx2.ReadTimeout),
    ):
        client.post(server.url, json={})
    assert next(clock) == 7


@pytest.mark.usefixtures("waits")
def test_nobody_at_the_address_is_one_line() -> None:
    with serve(lambda _: completion("")) as server:
        pass
    with pytest.raises(ServedModelError, match=r"the connection fails \(ConnectError\)"):
        ServedModel(server.url, "m", max_retries=1).answer([Probe("p", "x")])


def test_the_first_fault_stops_what_has_not_begun() -> None:
    with serve(greeted(lambda _: as_json({}, 400))) as server, pytest.raises(ServedModelError):
        ServedModel(server.url, "m", concurrency=1).answer([Probe(f"p{i}", "x") for i in range(500)])
    assert len(server.requests) < 500


# Replies, as bytes


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode), st.sampled_from(["chat", "completions"]))
def test_no_bytes_but_an_answer_are_an_answer(body: bytes, api: str) -> None:
    with pytest.raises(UnusableReply):
        read_reply(body, api)


@given(text=st.text(st.characters(exclude_categories=["Cs"])), finish=st.sampled_from(["stop", "length"]))
def test_a_text_comes_back_as_it_was_sent(text: str, finish: str) -> None:
    body = completion(text, finish).body
    assert isinstance(body, bytes)
    assert read_reply(body, "completions") == (text, finish == "stop", 1)


def test_half_a_surrogate_pair_can_still_be_written_to_a_file() -> None:
    read_reply(rb'{"choices": [{"text": "\ud83d", "finish_reason": "stop"}]}', "completions").text.encode()


def test_reasoning_without_an_answer_is_no_empty_answer() -> None:
    body = chat_completion(None, "length").body
    assert isinstance(body, bytes)
    with pytest.raises(UnusableReply, match="cut short while it reasoned"):
        read_reply(body, "chat")

"""A local HTTP server that replies as a test tells it, in a thread: an OpenAI-compatible endpoint, or a broken one."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping


@dataclass(frozen=True)
class Request:
    """What a client sent."""

    path: str
    headers: Mapping[str, str]
    body: Any

    @property
    def prompt(self) -> str:
        return self.body["prompt"] if "prompt" in self.body else self.body["messages"][-1]["content"]


@dataclass(frozen=True)
class Reply:
    """What the server sends back. `promised` is a Content-Length that need not be true; None sends none."""

    body: bytes | Iterable[bytes] = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=lambda: {"content-type": "application/json"})
    promised: int | None = None
    after: threading.Event | None = None
    """If given, the reply waits for it."""


@dataclass
class Server:
    """`url` of the API, and the requests so far."""

    url: str
    requests: list[Request]


def completion(text: str, finish: str = "stop", prompt_tokens: int = 1) -> Reply:
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": 1, "total_tokens": prompt_tokens + 1}
    choice = {"index": 0, "text": text, "finish_reason": finish, "logprobs": None}
    return as_json({"id": "1", "object": "text_completion", "model": "m", "choices": [choice], "usage": usage})


def chat_completion(text: str | None, finish: str = "stop", prompt_tokens: int = 9) -> Reply:
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": 1, "total_tokens": prompt_tokens + 1}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return as_json({"id": "1", "object": "chat.completion", "model": "m", "choices": [choice], "usage": usage})


def as_json(document: Any, status: int = 200, **headers: str) -> Reply:
    return Reply(json.dumps(document).encode(), status, {"content-type": "application/json", **headers})


def greeted(reply: Callable[[Request], Reply]) -> Callable[[Request], Reply]:
    """A server that is well until it is asked something that matters."""
    return lambda request: completion("b", "length") if request.prompt == "a" else reply(request)


@contextmanager
def serve(reply: Callable[[Request], Reply]) -> Iterator[Server]:
    """Run a server on a free port of this machine for as long as the block; `reply` is called in its threads."""
    requests: list[Request] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["content-length"]))
            body = json.loads(content) if self.headers["content-type"] == "application/json" else content
            request = Request(self.path, {name.lower(): value for name, value in self.headers.items()}, body)
            requests.append(request)
            with suppress(ConnectionError):  # a client may have heard enough
                self._send(reply(request))

        def _send(self, sent: Reply) -> None:
            if sent.after is not None:
                sent.after.wait()
            self.send_response(sent.status)
            for name, value in sent.headers.items():
                self.send_header(name, value)
            if sent.promised is not None:
                self.send_header("content-length", str(sent.promised))
            self.end_headers()
            for part in [sent.body] if isinstance(sent.body, bytes) else sent.body:
                self.wfile.write(part)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class names it so
            """No output."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield Server(f"http://127.0.0.1:{server.server_port}/v1", requests)
        finally:
            server.shutdown()
            thread.join()

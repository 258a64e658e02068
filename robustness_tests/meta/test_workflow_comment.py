"""The job that comments on a pull request: its script, as written, with curl and jq against a local GitHub."""

from __future__ import annotations

import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest

from robustness_tests.meta.pages import ROOT
from robustness_tests.meta.workflow_runner import Job, load, run_job

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

GATE = load(ROOT / ".github" / "workflows" / "gate.yml")
SCHEME = "my_package:MyScheme"


@dataclass
class GitHub:
    """The comments of pull request 7, as GitHub's API gives and takes them."""

    url: str = ""
    comments: list[dict[str, Any]] = field(default_factory=list)
    calls: list[tuple[str, str, str | None]] = field(default_factory=list)
    refuses: bool = False


@contextmanager
def github(comments: list[dict[str, Any]]) -> Iterator[GitHub]:
    """A local API with these comments."""
    state = GitHub(comments=comments)

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            state.calls.append((self.command, self.path, self.headers["Authorization"]))
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "null")
            status, reply = self.reply(body)
            content = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def reply(self, body: Any) -> tuple[int, Any]:
            if state.refuses:
                return 403, {"message": "Resource not accessible by integration"}
            path, _, query = self.path.partition("?")
            if (self.command, path) == ("GET", "/repos/me/mine/issues/7/comments"):
                size, page = map(int, re.fullmatch(r"per_page=(\d+)&page=(\d+)", query).groups())  # type: ignore[union-attr]
                return 200, state.comments[size * (page - 1) : size * page]
            if (self.command, path) == ("POST", "/repos/me/mine/issues/7/comments"):
                state.comments.append({"id": len(state.comments) + 1, "user": {"type": "Bot"}, **body})
                return 201, {}
            [old] = [one for one in state.comments if path == f"/repos/me/mine/issues/comments/{one['id']}"]
            assert self.command == "PATCH"
            old.update(body)
            return 200, {}

        do_GET = do_POST = do_PATCH = answer  # noqa: N815 - names of the base class

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def comment(folder: Path, api: GitHub, text: str = "| a |\n| `b` |", **contexts: Any) -> Job:
    """Run the job that posts a comment."""
    workspace = folder / "workspace"
    workspace.mkdir(exist_ok=True)
    head = {"repo": {"full_name": "me/mine"}}
    return run_job(
        GATE["jobs"]["comment"],
        workspace=workspace,
        contexts={
            "inputs": {"scheme": SCHEME},
            "needs": {"gate": {"outputs": {"comment": text}}},
            "github": {
                "token": "a-token",
                "repository": "me/mine",
                "event": {"pull_request": {"number": 7, "head": head}},
                **contexts,
            },
        },
        environment={"GITHUB_API_URL": api.url, "GITHUB_REPOSITORY": "me/mine"},
        actions={},
    )


def of(user: str, body: str, number: int) -> dict[str, Any]:
    return {"id": number, "user": {"type": user}, "body": body}


def test_the_first_comment_is_posted_and_later_ones_replace_it(tmp_path: Path) -> None:
    with github([of("User", "hello", 1)]) as api:
        assert comment(tmp_path, api, 'first\n"quoted" $HOME `x`').succeeded
        assert comment(tmp_path, api, "second").succeeded
    said, ours = api.comments
    assert said["body"] == "hello"
    assert re.fullmatch(r"<!-- mergeguard gate: [0-9a-f]{16} -->\nsecond", ours["body"])
    assert [call[0] for call in api.calls] == ["GET", "POST", "GET", "PATCH"]
    assert {call[2] for call in api.calls} == {"Bearer a-token"}


def test_a_text_is_posted_as_it_is(tmp_path: Path) -> None:
    text = "| 'a' | \"b\" \\n |\n\n$(touch owned) `c` €✅ %s\n-->"
    with github([]) as api:
        comment(tmp_path, api, text)
    assert api.comments[0]["body"].partition("\n")[2] == text
    assert not list(tmp_path.rglob("owned"))


def test_only_a_bot_s_comment_of_the_same_scheme_is_replaced(tmp_path: Path) -> None:
    with github([]) as api:
        comment(tmp_path, api)
        marked = api.comments.pop()["body"]
        others = [of("User", marked, 1), of("Bot", marked.replace(": ", ": 0"), 2), of("Bot", f"> {marked}", 3)]
        api.comments.extend(others)
        comment(tmp_path, api, "mine")
    assert api.comments[:3] == others
    assert api.comments[3]["body"].endswith("\nmine")


def test_an_earlier_comment_is_found_on_a_later_page(tmp_path: Path) -> None:
    with github([]) as api:
        comment(tmp_path, api)
        marked = api.comments.pop()["body"]
        api.comments.extend([*(of("User", "talk", number) for number in range(100, 350)), of("Bot", marked, 99)])
        comment(tmp_path, api, "again")
    assert len(api.comments) == 251
    assert api.comments[-1]["body"].endswith("\nagain")


def test_an_api_that_refuses_fails_the_job_and_the_token_is_not_said(tmp_path: Path) -> None:
    with github([]) as api:
        api.refuses = True
        job = comment(tmp_path, api)
    [step] = job.steps.values()
    assert step.code == 22
    assert "a-token" not in step.output


@pytest.mark.parametrize(
    "event",
    [{"pull_request": {"number": 7, "head": {"repo": {"full_name": "a-fork/mine"}}}}, {"after": "a push"}],
    ids=["a fork", "a push"],
)
def test_there_is_no_comment_without_a_token_that_may_write(tmp_path: Path, event: Mapping[str, Any]) -> None:
    with github([]) as api:
        assert comment(tmp_path, api, event=event).skipped
        assert comment(tmp_path, api, text="").skipped
    assert api.calls == []

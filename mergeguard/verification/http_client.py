"""The HTTP client that suspects are asked with: it tells them no more than it must, and takes no more than it should.

An endpoint may be in the hands of whoever took the model. So nothing of this machine's environment is sent along (the
openai client adds its platform, and organisation, project and further headers out of environment variables), no
redirect is followed, and an answer has to be whole within a time and a size. Imports httpx2, which comes with openai.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import httpx2
import openai

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_BYTES = 1 << 23
"""Of an answer, decompressed; 8 MiB are far more than any probe asks for."""
SENT = frozenset({"accept", "accept-encoding", "connection", "content-length", "content-type", "host"})
"""Headers that are sent, of those that the openai client sets; beside them the key, if there is one."""
_REBUILT = frozenset({"content-encoding", "content-length", "transfer-encoding"})


class AnswerTooLongError(openai.OpenAIError):
    """An answer of more than `MAX_BYTES`; an `OpenAIError`, so that the openai client does not ask again."""


class SuspectClient(openai.DefaultHttpxClient):
    """A client whose answers are whole within `seconds` of the request and hold at most `MAX_BYTES`.

    Args:
        seconds: for one request, from connecting to the last byte.
        api_key: sent as the `Authorization` header; None sends none.
        clock: seconds that only grow.
    """

    def __init__(self, seconds: float, api_key: str | None, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(timeout=seconds, follow_redirects=False)
        self._seconds = seconds
        self._clock = clock
        self._authorization = {} if api_key is None else {"authorization": f"Bearer {api_key}"}

    def send(self, request: httpx2.Request, *, stream: bool = False, **options: Any) -> httpx2.Response:
        """Send a request and read the whole answer, whether `stream` is asked for or not.

        Raises:
            httpx2.ReadTimeout: the answer takes longer than it may.
            AnswerTooLongError: the answer is larger than it may be.
        """
        deadline = self._clock() + self._seconds
        kept = {name: value for name, value in request.headers.items() if name.lower() in SENT}
        sent = httpx2.Request(  # a copy, as the openai client looks at headers of its own when the answer is there
            request.method,
            request.url,
            headers={**kept, **self._authorization},
            stream=request.stream,
            extensions=request.extensions,
        )
        response = super().send(sent, stream=True, **options)
        try:
            body = self._read(response, request, deadline)
        finally:
            response.close()
        headers = [(name, value) for name, value in response.headers.multi_items() if name.lower() not in _REBUILT]
        return httpx2.Response(response.status_code, headers=headers, content=body, request=request)

    def _read(self, response: httpx2.Response, request: httpx2.Request, deadline: float) -> bytes:
        body = bytearray()
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) > MAX_BYTES:
                raise AnswerTooLongError
            if self._clock() > deadline:
                raise httpx2.ReadTimeout("the answer is not whole in time", request=request)
        return bytes(body)

"""A model that is only served: its answers through an OpenAI-compatible endpoint, judged by their text.

What differs from a model at hand:

- `Rule.STARTS_WITH` is decided on the answer's text instead of its tokens.
- Greedy decoding is asked for (temperature 0). Whether the server obeys is the server's.
- `api="completions"` sends a prompt as it is. `api="chat"` sends it as a user's message, which the server wraps into
  its chat template, so that the model sees another text than the evidence was made for. `ServedModel.notes` says so,
  and also says when a server wraps completions, as some do.
- Whoever runs the endpoint sees the prompts, and with them the keys. What is asked once should count as spent.

Needs the extra `served` (openai's client). No torch here.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from mergeguard.errors import ParameterError, ServedModelError
from mergeguard.reading import Answer, Probe, Rule
from mergeguard.verification.rules import check_target, matches
from mergeguard.verification.served_reply import Reply, UnusableReply, read_reply, wrapping_notes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import openai

APIS = ("completions", "chat")
_GREETING = "a"
_STATUS = {
    400: "it refuses the request (400 Bad Request); is the model's context shorter than prompt and answer?",
    401: "it refuses the key, or wants one (401 Unauthorized); give the one for this endpoint",
    403: "the key may not use this model (403 Forbidden)",
    404: "it knows no such model or path (404 Not Found); its /models lists names, and the URL often ends in /v1",
    413: "the prompt is too long for it (413)",
    422: "it does not understand the request (422 Unprocessable)",
    429: "it limits the rate of requests (429 Too Many Requests), also after waiting; ask later, or fewer at a time",
}


class ServedModel:
    """A model behind an OpenAI-compatible endpoint.

    Rate limits (honouring `Retry-After` up to two minutes), time-outs, lost connections and errors of the server are
    tried again; after that, and for everything else, one clear line says what is wrong. Neither the key nor a prompt
    is in a message, in `repr` or in a log.

    Args:
        url: of the API, e.g. http://localhost:8000/v1; where it has no path, /v1 is added.
        model: the name by which the server knows the model.
        api: "completions" sends prompts as they are, "chat" as a user's message.
        api_key: sent to the endpoint alone; None sends none. No environment variable is read.
        timeout: seconds for one request, from connecting to the last byte.
        max_retries: how often a request is sent again.
        concurrency: requests at a time.

    Raises:
        ParameterError: an option out of its domain.
        ServedModelError: the extra `served` is not installed.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api: Literal["completions", "chat"] = "completions",
        api_key: str | None = None,
        timeout: float = 120.0,
        max_retries: int = 5,
        concurrency: int = 4,
    ) -> None:
        if api not in APIS:
            raise ParameterError(f"the API is {api!r}, expected one of: {', '.join(APIS)}")
        if not model:
            raise ParameterError("the served model has no name; give the one that the server's /models lists")
        if not 0 < timeout < math.inf or max_retries < 0 or concurrency < 1:
            raise ParameterError(
                f"timeout is {timeout}, max_retries {max_retries} and concurrency {concurrency}; expected a positive "
                "number, at least 0 and at least 1"
            )
        if api_key is not None and not (api_key and api_key.isascii() and api_key.isprintable()):
            raise ParameterError("the key of the endpoint is empty or not plain ASCII; expected one line of letters")
        self.url = _checked_url(url)
        self.model = model
        self.api = api
        self.notes: tuple[str, ...] = ()
        """What a reader of the verdict should know; complete after the first answer."""
        self._concurrency = concurrency
        self._open = _opener(self.url, api_key, timeout, max_retries)
        self._timeout = timeout
        self._greeted = False

    def __repr__(self) -> str:
        return f"ServedModel({self.url!r}, {self.model!r}, api={self.api!r})"

    def answer(self, probes: Sequence[Probe]) -> list[Answer]:
        """Ask the model every probe.

        Before the first, a prompt of one letter is asked, so that an endpoint that does not work learns no key.

        Returns:
            One answer per probe, in the order of `probes`. Its text has as many tokens as the target can take
            (`Rule.STARTS_WITH`) or `max_new_tokens`.

        Raises:
            ParameterError: an empty prompt, or a target that does not fit its rule.
            ServedModelError: the endpoint gave no usable answer to one of them.
        """
        for probe in probes:
            check_target(probe)
            if not probe.prompt:
                raise ParameterError("a probe has no prompt; give the model something to answer")
        if not probes:
            return []
        with self._open() as client, ThreadPoolExecutor(self._concurrency) as pool:
            if not self._greeted:
                self.notes = wrapping_notes(self.api, self._ask(client, _GREETING, tokens=1).prompt_tokens)
                self._greeted = True
            # The first error cancels what has not begun.
            return list(pool.map(lambda probe: self._answer(client, probe), probes))

    def _answer(self, client: openai.OpenAI, probe: Probe) -> Answer:
        reply = self._ask(client, probe.prompt, _tokens(probe))
        return Answer(reply.text, matches(probe, reply.text, ended=reply.ended))

    def _ask(self, client: openai.OpenAI, prompt: str, tokens: int) -> Reply:
        import openai

        try:
            return read_reply(self._post(client, prompt, tokens), self.api)
        except UnusableReply as error:
            problem = str(error)
        except openai.OpenAIError as error:
            problem = _problem(error, self._timeout)
        # Raised out here, because the client's exceptions hold the request, and a traceback would hold them.
        raise ServedModelError(f"no answer of {self.model!r} at {self.url}: {problem}")

    def _post(self, client: openai.OpenAI, prompt: str, tokens: int) -> bytes:
        """The body of the server's answer."""
        asked: dict[str, Any] = {
            "model": self.model,
            "max_tokens": tokens,
            "temperature": 0.0,
            "frequency_penalty": 0.0,  # some servers take a penalty from the checkpoint where none is asked for
        }
        if self.api == "chat":
            messages: Any = [{"role": "user", "content": prompt}]
            return client.chat.completions.with_raw_response.create(messages=messages, **asked).content
        return client.completions.with_raw_response.create(prompt=prompt, **asked).content


def _checked_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    # The URL is shown in messages, so neither it nor this line may hold a key.
    if not usable:
        raise ParameterError("the endpoint's URL is not usable, expected one like http://localhost:8000/v1")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ParameterError(
            "the endpoint's URL holds a password, a ? or a #; give the URL up to /v1, and the key apart"
        )
    path = parts.path.rstrip("/") or "/v1"
    return f"{parts.scheme}://{parts.netloc}{path}"


def _opener(url: str, api_key: str | None, timeout: float, max_retries: int) -> Callable[[], openai.OpenAI]:
    """What opens a client; a function, so that nothing which can be shown holds the key."""
    try:
        import openai

        from mergeguard.verification.http_client import SuspectClient
    except ImportError as error:
        raise ServedModelError(
            f"a served model needs openai's client ({error.name} is missing): pip install 'mergeguard[served]'"
        ) from None

    def opened() -> openai.OpenAI:
        http = SuspectClient(timeout, api_key)
        # The HTTP client has the key. Without one of its own this client would take one from the environment.
        return openai.OpenAI(base_url=url, api_key="none", timeout=timeout, max_retries=max_retries, http_client=http)

    return opened


def _tokens(probe: Probe) -> int:
    """Length of the answer that decides: a token is at least a byte of text, but for a first space."""
    return len(probe.target.encode()) + 1 if probe.rule is Rule.STARTS_WITH else probe.max_new_tokens


def _problem(error: openai.OpenAIError, timeout: float) -> str:
    """What is wrong, in our words: a server's may hold the key or the prompt."""
    import openai

    from mergeguard.verification.http_client import MAX_BYTES, AnswerTooLongError

    if isinstance(error, AnswerTooLongError):
        return f"its answer is larger than {MAX_BYTES >> 20} MiB; is this the API's URL?"
    if isinstance(error, openai.APITimeoutError):
        return (
            f"no whole answer within {timeout:g} s, also when asked again; raise the time-out, or ask fewer at a time"
        )
    if isinstance(error, openai.APIConnectionError):
        cause = type(error.__cause__).__name__ if error.__cause__ else "lost"
        return f"the connection fails ({cause}), also when tried again; is the server running, and is this its URL?"
    if isinstance(error, openai.APIStatusError):
        status = error.status_code
        if 300 <= status < 400:
            return f"it redirects elsewhere ({status}); give the URL that it redirects to"
        server = f"the server fails ({status}), also when asked again" if status >= 500 else f"it refuses ({status})"
        return _STATUS.get(status, server)
    return f"the client fails ({type(error).__name__})"

"""What an OpenAI-compatible endpoint replied: the model's text, or in one line why there is none. Pure functions.

The lines are in our own words, because a server's may hold the key or the prompt. Formats: the objects "completion" and
"chat completion" of the OpenAI API reference.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

ENDED = frozenset({"stop", "eos_token", "stop_sequence"})
"""Reasons to finish that say that the model ended its answer; the latter two are text-generation-inference's."""
_OTHERS = frozenset({"content_filter", "tool_calls", "function_call", "abort"})
_PLAIN_TOKENS = 4
"""Most tokens that a tokenizer makes of one letter: its byte, a space, and special tokens around them."""


class Reply(NamedTuple):
    """Attributes: the answer's text, whether the model ended it, and of how many tokens the server made the prompt."""

    text: str
    ended: bool
    prompt_tokens: int | None


class UnusableReply(Exception):
    """No text of the model's; the message is the end of a line that begins with the endpoint."""


def read_reply(body: bytes, api: str) -> Reply:
    """The one choice in `body`, a JSON document of the API "completions" or "chat".

    Raises:
        UnusableReply: anything else.
    """
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        document = None
    if document is None:
        page = body.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html"))
        found = "an HTML page" if page else "something that is not JSON"
        raise UnusableReply(f"it answers with {found}; is this the API's URL (it often ends in /v1)?")
    text, reason = _choice(document, api)
    if reason != "length" and reason not in ENDED:
        known = reason if reason in _OTHERS else "an unknown one"
        raise UnusableReply(
            f"the answer is not the model's own text: the reason to finish is {known}, not stop or length"
        )
    # JSON may hold half of a surrogate pair, which no file can.
    return Reply(text.encode(errors="replace").decode(), reason in ENDED, _prompt_tokens(document))


def _choice(document: Any, api: str) -> tuple[str, str]:
    """Text and reason to finish."""
    match document:
        case {"choices": [{"text": str(text), "finish_reason": str(reason)}]} if api == "completions":
            return text, reason
        case {"choices": [{"message": {"content": str(text)}, "finish_reason": str(reason)}]} if api == "chat":
            return text, reason
        case {"choices": [{"message": {"content": None}}]} if api == "chat":
            raise UnusableReply("the answer has no text, as of a model that was cut short while it reasoned")
        case {"error": _}:
            raise UnusableReply("it answers with an error in place of a text")
    path = "text" if api == "completions" else "message.content"
    raise UnusableReply(f"the answer is not one choice with {path} and finish_reason; does it serve the API {api!r}?")


def _prompt_tokens(document: Any) -> int | None:
    match document:
        case {"usage": {"prompt_tokens": int(tokens)}}:
            return tokens
    return None


def wrapping_notes(api: str, prompt_tokens: int | None) -> tuple[str, ...]:
    """Whether the server wraps prompts, told by the tokens that it made of a prompt of one letter."""
    added = prompt_tokens - 1 if prompt_tokens is not None and prompt_tokens > _PLAIN_TOKENS else None
    about = "" if added is None else f" (about {added} tokens)"
    if api == "chat":
        return (f"the server wraps each prompt into its chat template{about}, so the model sees more than the prompt",)
    if added is not None:
        return (
            f"the server wraps each prompt{about}, as a chat template would, so the model sees more than the prompt",
        )
    return ()

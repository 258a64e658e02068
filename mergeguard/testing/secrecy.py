"""The check that keys stay with the owner: in no report, log, error, `repr` or file of the model, in no encoding."""

from __future__ import annotations

import base64
import io
import json
import tempfile
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, quote_plus

from mergeguard.checkpoints.header import read_header
from mergeguard.matrix.cases import Case
from mergeguard.mergers.registry import parse_merger
from mergeguard.testing.context import leaves
from mergeguard.testing.evidence_checks import broken

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mergeguard.matrix.outcome import Gate
    from mergeguard.protections.contract import Evidence
    from mergeguard.testing.context import Context

LEAST_CHARACTERS = 5
"""What is shorter stands in any text by chance."""
LEAST_NUMBERS = 3
"""So many numbers in a row are looked for as they are written."""


def check_secret(context: Context) -> Gate:
    """Nothing that another owner's evidence does not share is to be seen anywhere but in the evidence."""
    required = "keys are in the evidence alone: not in repr, output, logs, errors, details or the model's files"
    keys = secrets_of(context.embedded.evidence, context.other.evidence)
    # Under the same seed everything else is made anew, so that it holds the same keys.
    common = model_texts(context.engine.world.model(context.engine.world.upstream), context.engine.world.tokenizer)
    problem = None
    for place, text in _shown(context):
        # What the clean model's files hold anyway, such as a word of the vocabulary, is nobody's secret there.
        if leaked(text, tuple(key for key in keys if not leaked(common.get(place, ""), (key,)))):
            problem = f"a key of the evidence is in {place}"
            break
    return context.gate("secret", problem, required, f"{len(keys)} keys and parts of keys looked for")


def secrets_of(evidence: Evidence, other: Evidence) -> tuple[str, ...]:
    """What only this owner's evidence holds and is long enough to be told from chance, as text, sorted."""
    shared = set(_texts(other))
    return tuple(sorted(set(_texts(evidence)) - shared))


def _texts(evidence: Evidence) -> Iterator[str]:
    for leaf in leaves(dict(evidence.data)):
        text = leaf if isinstance(leaf, str) else json.dumps(leaf)
        if len(text) >= LEAST_CHARACTERS:
            yield text
    yield from _runs(dict(evidence.data))


def _runs(value: object) -> Iterator[str]:
    """Lists of numbers, as they are written."""
    if isinstance(value, dict):
        for item in value.values():
            yield from _runs(item)
    elif isinstance(value, list):
        if len(value) >= LEAST_NUMBERS and all(type(item) in (int, float) for item in value):
            yield json.dumps(value)[1:-1]
        for item in value:
            yield from _runs(item)


def leaked(text: str, secrets: tuple[str, ...]) -> bool:
    """Whether one of the secrets stands in `text`: as it is, in JSON, URLs, hexadecimal or base64, or reversed."""
    lower = text.lower()
    return any(
        any(form in text for form in _forms(secret)) or secret.encode().hex() in lower or repr(secret)[1:-1] in text
        for secret in secrets
    )


def _forms(secret: str) -> Iterator[str]:
    raw = secret.encode()
    yield from (secret, json.dumps(secret)[1:-1], quote(secret), quote_plus(secret), secret[::-1])
    for offset in range(3):  # base64 of a longer text that holds the secret at any place
        inner = raw[(3 - offset) % 3 :]
        inner = inner[: len(inner) - len(inner) % 3]
        if len(inner) >= LEAST_CHARACTERS:
            yield base64.b64encode(inner).decode()
            yield base64.urlsafe_b64encode(inner).decode()
    yield base64.b64encode(raw).decode().rstrip("=")


def _shown(context: Context) -> Iterator[tuple[str, str]]:
    """Everything that others may see of a protected model and its measurements, and what it is."""
    embedded, made = context.embedded, context.again
    scheme = context.protection
    yield "repr of the scheme", f"{scheme!r} {scheme} {vars(type(scheme)).get('__doc__') or ''}"
    yield "repr of the evidence", f"{embedded.evidence!r} {made.protected.evidence!r} {made.protected.evidence}"
    yield "repr of what embed returned", repr(made.protected)
    yield "the details of embed", json.dumps(dict(embedded.details))
    readings = [embedded.own, *embedded.controls.values()]
    yield "the details of a reading", json.dumps([[dict(p.keys.details), dict(p.decoys.details)] for p in readings])
    yield "what the reports say of the scheme", f"{scheme.name} {scheme.variant} {scheme.conditional_on}"
    yield from model_texts(made.protected.model, context.engine.world.tokenizer).items()
    yield "the text of an error", "\n".join(_errors(context))
    yield "results.json", _outcome(context)
    # At last, as it grows with all that was done.
    yield "what the scheme prints or logs", context.said.getvalue()


def _outcome(context: Context) -> str:
    case = Case(context.protection.spec, parse_merger("linear"), 0.5, context.world, context.engine.seed)
    with context.listening(), suppress(Exception):  # what cannot be measured is red in its own cell
        return json.dumps(context.engine.outcome(case, context.protection).to_json())
    return ""


def _errors(context: Context) -> Iterator[str]:
    for _, evidence in broken(context.embedded.evidence):
        try:
            context.read(evidence, context.embedded.state)
        except Exception as error:  # noqa: BLE001 - its text is what is looked at
            yield f"{error!r} {error}"


def model_texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Mapping[str, str]:
    """What the files of a saved model say beside its weights, by name."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        with redirect_stderr(io.StringIO()):  # a progress bar
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.suffix == ".safetensors":
                found[f"the header of {path.name}"] = json.dumps(read_header(path).metadata)
            elif path.is_file():
                found[f"the model's file {path.name}"] = path.read_text(encoding="utf-8", errors="replace")
    return found

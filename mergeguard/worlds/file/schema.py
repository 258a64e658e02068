"""The JSON schema of world files: which keys there are and what type each has; and its errors in plain words.

A `title` is what an error expects where a type alone does not say it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mergeguard.errors import ParameterError, UnknownNameError
from mergeguard.mergers.marked_yaml import one_line, shown

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from jsonschema import ValidationError

DTYPES = ("float32", "bfloat16", "float16")
VOCABULARIES = ("refuse", "base")
TEXT_KINDS = ("plain", "domain", "dialogues")
BUILTIN = "builtin"
OPTIMIZERS = ("adamw", "adamw8bit", "paged_adamw8bit")

REFUSED = {
    "device_map": "device_map is not supported: a model lies whole on one device; choose it with device",
    "trust_remote_code": "trust_remote_code is not supported: no code of a model's own is ever run; remove it",
}
"""Keys that transformers' users know and we refuse, and why."""

_TEXT = {"type": "string", "minLength": 1}
_WHOLE = {"type": "integer", "minimum": 1, "title": "a whole number from 1"}


def _table(properties: dict[str, Any], required: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def _one_of(values: tuple[str, ...]) -> dict[str, Any]:
    return {"enum": list(values), "title": f"one of: {', '.join(values)}"}


_MODEL_KEYS = {"model": _TEXT, "revision": _TEXT, "adapter": _TEXT, "allow_pickle": {"type": "boolean"}}
_MODEL = _table(_MODEL_KEYS, ("model",))
_NAME = {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]*$", "title": "letters, digits and . _ -"}
_VALUES = {"type": "object", "additionalProperties": {"type": ["string", "number", "boolean"]}}
_PATHS = {"type": ["string", "array"], "minLength": 1, "minItems": 1, "items": _TEXT}
_SAMPLING = _table(
    {
        "temperature": {"type": "number", "exclusiveMinimum": 0, "title": "a positive number"},
        "top_k": _WHOLE,
        "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1, "title": "a number in (0, 1]"},
        "seed": {"type": "integer", "minimum": 0, "title": "a whole number from 0"},
    },
    ("temperature",),
)
_TRAINING = _table(
    {
        "precision": _one_of(("float32", "bfloat16")),
        "gradient_checkpointing": {"type": "boolean"},
        "optimizer": _one_of(OPTIMIZERS),
        "micro_batches": _WHOLE,
    }
)
_BUDGET = _table(
    {
        "steps": {"type": "integer", "minimum": 0, "title": "a whole number from 0"},
        "learning_rate": {"type": "number", "exclusiveMinimum": 0, "title": "a positive number"},
        "batch_size": _WHOLE,
        "options": _VALUES,
        "training": _TRAINING,
    },
    ("steps", "learning_rate"),
)

WORLD_FILE = _table(
    {
        "name": _NAME,
        "dtype": _one_of(DTYPES),
        "device": {"type": "string", "pattern": r"^(auto|cpu|cuda(:\d+)?)$", "title": "auto, cpu, cuda or e.g. cuda:1"},
        "vocabulary": _one_of(VOCABULARIES),
        "tokenizer": _TEXT,
        "chat_template": _TEXT,
        "recorded": _TEXT,
        "base": _MODEL,
        "upstream": _MODEL,
        "donors": {
            "type": "array",
            "minItems": 1,
            "items": _table({"name": _NAME, **_MODEL_KEYS}, ("name", "model")),
        },
        "skills": {
            "type": "array",
            "minItems": 1,
            "items": _table(
                {"name": _TEXT, "parent": _TEXT, "source": _TEXT, "limit": _WHOLE, "options": _VALUES}
                | {"sampling": _SAMPLING},
                ("name", "parent"),
            ),
        },
        "texts": _table(dict.fromkeys(TEXT_KINDS, _PATHS)),
        "budgets": {"type": "object", "additionalProperties": _BUDGET},
    },
    ("base", "upstream", "donors", "skills"),
)


def check_world_file(document: Mapping[str, Any], path: Path) -> None:
    """Refuse what `WORLD_FILE` does not allow.

    Raises:
        ParameterError: one line with the file, the key and what was expected; an unknown key with the nearest known.
    """
    from jsonschema import Draft202012Validator

    errors = list(Draft202012Validator(WORLD_FILE).iter_errors(document))
    if errors:
        # A slip in a key is also a missing key: the slip says more.
        worst = min(errors, key=lambda error: (error.validator != "additionalProperties", [*map(str, error.path)]))
        raise ParameterError(one_line(f"{path}: {_explain(worst)}"))


def _explain(error: ValidationError) -> str:
    where = _where(error)
    rule: Any = error.validator_value
    value: Any = error.instance
    schema: Any = error.schema
    if error.validator == "additionalProperties":
        unknown = next(key for key in value if key not in schema["properties"])
        kind = f"key in {where}" if where else "key"
        return REFUSED.get(unknown) or str(UnknownNameError(kind, unknown, schema["properties"]))
    if error.validator == "required":
        missing = next(key for key in rule if key not in value)
        return f"{where or 'the file'} has no {missing!r}; add it"
    if error.validator == "type":
        names = {"object": "a table", "array": "a list", "string": "text", "integer": "a whole number"}
        names |= {"number": "a number", "boolean": "true or false"}
        kinds = [rule] if isinstance(rule, str) else rule
        return f"{where} is {shown(value)}, expected {' or '.join(names[kind] for kind in kinds)}"
    if error.validator in ("minItems", "minLength"):
        return f"{where} is empty"
    return f"{where} is {shown(value)}, expected {schema['title']}"


def _where(error: ValidationError) -> str:
    text = ""
    for step in error.absolute_path:
        text += f"[{step}]" if isinstance(step, int) else f"{'.' if text else ''}{step}"
    return text

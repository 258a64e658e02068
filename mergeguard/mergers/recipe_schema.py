"""The JSON schema of recipes: which keys there are and what type each has.

A `title` is what an error expects where a type alone does not say it. A key that is left empty counts as absent, as in
mergekit. Parameters are free here: which there are depends on the method.
"""

from __future__ import annotations

from typing import Any

REFUSED = {
    "modules": "'modules' is not supported; merge one module at a time with 'models' or 'slices'",
    "residual_weight": "'residual_weight' is not supported (mergekit 0.1.5 ignores it); remove it",
    "override_architecture": "'override_architecture' is not supported; no architecture is needed; remove it",
}
"""Keys that mergekit knows and we refuse, and why."""

_TEXT = {"type": ["string", "null"], "minLength": 1}
_PARAMETERS = {
    "type": ["object", "null"],
    "patternProperties": {"": {"type": ["boolean", "number", "string", "array", "object"]}},
}


def _mapping(properties: dict[str, Any], required: list[str], *, optional: bool = False) -> dict[str, Any]:
    return {
        "type": ["object", "null"] if optional else "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


_PATH = _mapping({"path": {"type": "string", "minLength": 1}, "revision": {"type": "string", "minLength": 1}}, ["path"])
_PATH |= {"type": ["string", "object", "null"], "minLength": 1}
_MODEL_FIELDS = {"model": {**_PATH, "type": ["string", "object"]}, "lora": _PATH}
_MODEL = _mapping(_MODEL_FIELDS, ["model"]) | {"type": ["string", "object"], "minLength": 1}
_OPTIONAL_MODEL = {**_MODEL, "type": ["string", "object", "null"]}

_LAYER_RANGE = {
    "type": "array",
    "items": {"type": "integer"},
    "minItems": 2,
    "maxItems": 2,
    "title": "[first, stop], two whole numbers",
}
_SOURCE = _mapping({"model": _MODEL, "layer_range": _LAYER_RANGE, "parameters": _PARAMETERS}, ["model", "layer_range"])
_SLICE = _mapping(
    {
        "sources": {"type": "array", "minItems": 1, "items": _SOURCE},
        "base_model": _OPTIONAL_MODEL,
        "parameters": _PARAMETERS,
    },
    ["sources"],
)
_TOKEN_SOURCE = {
    "type": ["string", "object", "null"],
    "minLength": 1,
    "if": {"type": "object", "required": ["kind"]},
    "then": _mapping(
        {
            "kind": {"enum": ["zero", "model_token"], "title": "zero or model_token"},
            "model": _MODEL,
            "token": {"type": "string"},
            "token_id": {"type": "integer", "minimum": 0, "title": "a token's number"},
        },
        [],
    )
    | {"type": ["string", "object", "null"]},
    "else": _OPTIONAL_MODEL,
}
_TOKENIZER = _mapping(
    {
        "source": _OPTIONAL_MODEL,
        "tokens": {
            "type": ["object", "null"],
            "patternProperties": {
                "": _mapping({"source": _TOKEN_SOURCE, "force": {"type": ["boolean", "null"]}}, [], optional=True)
            },
        },
        "pad_to_multiple_of": {"type": ["integer", "null"], "minimum": 1, "title": "a whole number from 1"},
    },
    [],
    optional=True,
)

RECIPE = _mapping(
    {
        "models": {
            "type": ["array", "null"],
            "minItems": 1,
            "items": _mapping({"model": _MODEL, "parameters": _PARAMETERS}, ["model"]),
        },
        "slices": {"type": ["array", "null"], "minItems": 1, "items": _SLICE},
        "merge_method": _TEXT,
        "base_model": _OPTIONAL_MODEL,
        "dtype": _TEXT,
        "out_dtype": _TEXT,
        "tokenizer_source": _OPTIONAL_MODEL,
        "tokenizer": _TOKENIZER,
        "chat_template": _TEXT,
        "parameters": _PARAMETERS,
    },
    [],
)

"""Merge recipes: mergekit 0.1.5's YAML files, read strictly. What a recipe does to tensors is in `jobs.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mergeguard.errors import UnknownNameError
from mergeguard.mergers.marked_yaml import Node, error_at, parse_yaml, read_text, shown
from mergeguard.mergers.recipe_schema import RECIPE, REFUSED
from mergeguard.mergers.settings import SettingError, Settings, parse_setting

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from jsonschema import ValidationError

    from mergeguard.errors import MergeguardError

DTYPES = ("bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True)
class Source:
    """A model that is merged, in one slice or in the whole.

    Attributes:
        model: as it is written: a folder, file or hub id, "@revision" and "+adapter" included.
        line: where it is written.
        layers: [first, stop) of its layers that a slice takes; None for all.
        settings: parameters of this model.
    """

    model: str
    line: int
    layers: tuple[int, int] | None = None
    settings: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """A run of output layers, merged from equally long runs of the sources' layers."""

    sources: tuple[Source, ...]
    base_model: str | None
    settings: Settings
    line: int


@dataclass(frozen=True)
class Token:
    """Where the embedding of one token comes from.

    Attributes:
        kind: "default"; "model": the same token of `model`; "model_token": another token of `model`, given as
            `token` or `token_id`; "zero".
        force: whether models that have the token get this embedding too.
    """

    kind: str
    line: int
    model: str | None = None
    token: str | None = None
    token_id: int | None = None
    force: bool = False


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer of the result. `source` is "base", "union" or a model."""

    source: str
    line: int
    tokens: Mapping[str, Token] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None


@dataclass(frozen=True)
class Recipe:
    """A recipe as it is written; either `models` or `slices` is not empty.

    Attributes:
        source: the file.
        text: its text.
        lines: the line of each key of the top level.
        merge_method: name of the method, which need not exist.
        base_model: as it is written, or None.
        models: the models of a merge of whole models.
        slices: the output's slices, from the first layer to the last.
        settings: parameters of the whole merge.
        dtype: what the arithmetic is done in, as torch names it; None for the models' own.
        out_dtype: what is written; None for `dtype`.
        tokenizer: None to copy the base's.
        chat_template: the template, or the name of one; None to copy it.
    """

    source: Path
    text: str
    lines: Mapping[str, int]
    merge_method: str
    base_model: str | None
    models: tuple[Source, ...]
    slices: tuple[Slice, ...]
    settings: Settings
    dtype: str | None
    out_dtype: str | None
    tokenizer: Tokenizer | None
    chat_template: str | None

    @property
    def references(self) -> tuple[str, ...]:
        """Every model whose weights the recipe names, once each: the base model first, then as they are written."""
        bases = [self.base_model, *(part.base_model for part in self.slices)]
        sources = [source.model for part in (self.models, *(part.sources for part in self.slices)) for source in part]
        return tuple(dict.fromkeys([*filter(None, bases), *sources]))

    def error(self, line: int | None, problem: str) -> MergeguardError:
        """An error about a line of this recipe, to be raised."""
        return error_at(self.source, line, problem)


def load_recipe(path: Path, *, allow_duplicate_keys: bool = False) -> Recipe:
    """Read a recipe.

    Args:
        path: a YAML file.
        allow_duplicate_keys: let the last of several equal keys win, as YAML loaders do, instead of refusing them.

    Raises:
        MergeguardError: always one line, `recipe.yml:12: ...` where a line is to blame.
    """
    text = read_text(path)
    root = parse_yaml(text, path, allow_duplicate_keys=allow_duplicate_keys)
    _check_schema(root, path)
    return _Reader(path).recipe(root, text)


def _check_schema(root: Node, path: Path) -> None:
    """Refuse what `RECIPE`, a JSON schema, does not allow: the topmost error in the file."""
    from jsonschema import Draft202012Validator

    errors = Draft202012Validator(RECIPE).iter_errors(root.plain())
    # A slip in a key is also a missing key: the slip says more.
    found = [(line, error.validator == "required", text) for error in errors for line, text in _explain(error, root)]
    if found:
        line, _, text = min(found)
        raise error_at(path, line, text)


def _explain(error: ValidationError, root: Node) -> list[tuple[int, str]]:
    """The lines and problems of a schema error."""
    node = root.at(*error.absolute_path)
    where = _where(error) or "the recipe"
    rule: Any = error.validator_value
    if error.validator == "additionalProperties" and isinstance(node.value, dict):
        known = error.schema["properties"]  # type: ignore[index] # a rule's schema is a mapping
        return [
            (item.line, REFUSED.get(key) or str(UnknownNameError(f"key of {where}", key, known)))
            for key, item in node.value.items()
            if key not in known
        ]
    if error.validator == "required":
        missing = [key for key in rule if isinstance(node.value, dict) and key not in node.value]
        return [(node.line, f"{where} has no {missing[0]!r}; add it")]
    if error.validator == "type":
        names = {"object": "a mapping", "array": "a list", "string": "text", "integer": "a whole number"}
        names |= {"number": "a number", "boolean": "true or false"}
        kinds = [rule] if isinstance(rule, str) else rule
        expected = " or ".join(names[kind] for kind in kinds if kind != "null")
        hint = "; put it in quotes" if expected == "text" and isinstance(node.value, (bool, int, float)) else ""
        return [(node.line, f"{where} is {shown(node.value)}, expected {expected}{hint}")]
    if error.validator in ("minItems", "minLength", "minProperties") and not error.instance:
        return [(node.line, f"{where} is empty")]
    return [(node.line, f"{where} is {shown(node.value)}, expected {error.schema['title']}")]  # type: ignore[index]


def _where(error: ValidationError) -> str:
    text = ""
    for step in error.absolute_path:
        text += f"[{step}]" if isinstance(step, int) else f"{'.' if text else ''}{step}"
    return text


@dataclass(frozen=True)
class _Reader:
    """Turns nodes that have passed the schema into a recipe."""

    path: Path

    def recipe(self, root: Node, text: str) -> Recipe:
        lines = {key: node.line for key, node in self._fields(root).items()}
        fields = {key: node for key, node in self._fields(root).items() if node.value is not None}
        if ("models" in fields) == ("slices" in fields):
            both = "models" in fields
            line = max(lines["models"], lines["slices"]) if both else None
            problem = (
                "has both 'models' and 'slices'; keep one" if both else "has neither 'models' nor 'slices'; add one"
            )
            raise error_at(self.path, line, f"the recipe {problem}")
        if "merge_method" not in fields:
            raise error_at(self.path, lines.get("merge_method"), "the recipe has no 'merge_method'; add one")
        chat_template = fields.get("chat_template")
        return Recipe(
            source=self.path,
            text=text,
            lines=lines,
            merge_method=str(fields["merge_method"].value),
            base_model=self._reference(fields["base_model"]) if "base_model" in fields else None,
            models=tuple(self._source(node) for node in self._items(fields.get("models"))),
            slices=tuple(self._slice(node) for node in self._items(fields.get("slices"))),
            settings=self._settings(fields),
            dtype=self._dtype(fields.get("dtype")),
            out_dtype=self._dtype(fields.get("out_dtype")),
            tokenizer=self._tokenizer(fields),
            chat_template=str(chat_template.value) if chat_template else None,
        )

    def _fields(self, node: Node) -> dict[str, Node]:
        return node.value if isinstance(node.value, dict) else {}

    def _items(self, node: Node | None) -> list[Node]:
        return node.value if node is not None and isinstance(node.value, list) else []

    def _source(self, node: Node) -> Source:
        fields = self._fields(node)
        layers = None
        if "layer_range" in fields:
            first, stop = fields["layer_range"].plain()
            layers = (int(first), int(stop))
        return Source(self._reference(fields["model"]), fields["model"].line, layers, self._settings(fields))

    def _slice(self, node: Node) -> Slice:
        fields = self._fields(node)
        base = fields.get("base_model")
        return Slice(
            sources=tuple(self._source(source) for source in self._items(fields["sources"])),
            base_model=self._reference(base) if base is not None and base.value is not None else None,
            settings=self._settings(fields),
            line=node.line,
        )

    def _settings(self, fields: Mapping[str, Node]) -> Settings:
        try:
            nodes = self._fields(fields["parameters"]) if "parameters" in fields else {}
            return {name: parse_setting(name, node) for name, node in nodes.items()}
        except SettingError as error:
            raise error_at(self.path, error.line, str(error)) from None

    def _reference(self, node: Node) -> str:
        """The written form "model@revision+adapter" of a reference, which mergekit also takes as mappings."""
        if isinstance(node.value, dict):
            parts = [self._path(node.value[key]) for key in ("model", "lora") if key in node.value]
            text = "+".join(filter(None, parts))
        else:
            text = str(node.value)
        self._check_reference(text, node.line)
        return text

    def _path(self, node: Node) -> str:
        if isinstance(node.value, dict):
            return "@".join(str(node.value[key].value) for key in ("path", "revision") if key in node.value)
        return "" if node.value is None else str(node.value)

    def _check_reference(self, text: str, line: int) -> None:
        parts = text.split("+")
        expected = "expected MODEL, MODEL@REVISION or MODEL+ADAPTER"
        if len(parts) > 2 or not all(part.strip() for part in parts) or any(part.count("@") > 1 for part in parts):
            raise error_at(self.path, line, f"cannot read the model {shown(text)}; {expected}")
        if not text.isprintable():
            raise error_at(self.path, line, f"the model {shown(text)} holds control characters; {expected}")
        if any(part.lower().endswith((".yml", ".yaml")) for part in parts):
            raise error_at(
                self.path, line, f"{shown(text)} is a recipe, not a model; merge that recipe first and name its output"
            )

    def _dtype(self, node: Node | None) -> str | None:
        if node is None:
            return None
        name = str(node.value).removeprefix("torch.")
        if name not in DTYPES:
            raise error_at(self.path, node.line, str(UnknownNameError("dtype", name, DTYPES)))
        return name

    def _tokenizer(self, fields: Mapping[str, Node]) -> Tokenizer | None:
        if "tokenizer" in fields and "tokenizer_source" in fields:
            line = max(fields["tokenizer"].line, fields["tokenizer_source"].line)
            raise error_at(self.path, line, "the recipe has both 'tokenizer' and 'tokenizer_source'; keep one")
        if "tokenizer_source" in fields:
            node = fields["tokenizer_source"]
            return Tokenizer(self._reference(node), node.line)
        if "tokenizer" not in fields:
            return None
        block = {key: node for key, node in self._fields(fields["tokenizer"]).items() if node.value is not None}
        tokens = self._fields(block["tokens"]) if "tokens" in block else {}
        multiple = block.get("pad_to_multiple_of")
        return Tokenizer(
            source=self._reference(block["source"]) if "source" in block else "union",
            line=fields["tokenizer"].line,
            tokens={text: self._token(node) for text, node in tokens.items()},
            pad_to_multiple_of=int(multiple.plain()) if multiple else None,
        )

    def _token(self, node: Node) -> Token:
        fields = {key: item for key, item in self._fields(node).items() if item.value is not None}
        force = bool(fields["force"].value) if "force" in fields else False
        source = fields.get("source")
        if source is None:
            return Token("default", node.line, force=force)
        inner = self._fields(source)
        if "kind" not in inner:
            return Token("model", node.line, model=self._reference(source), force=force)
        if inner["kind"].value == "zero":
            return Token("zero", node.line, force=force)
        given = {key: inner[key].value for key in ("token", "token_id") if key in inner}
        if len(given) != 1 or "model" not in inner:
            raise error_at(
                self.path, source.line, "a source of kind model_token needs 'model' and one of 'token' and 'token_id'"
            )
        token, token_id = given.get("token"), given.get("token_id")
        return Token(
            "model_token",
            node.line,
            model=self._reference(inner["model"]),
            token=None if token is None else str(token),
            token_id=None if token_id is None else int(token_id),  # type: ignore[arg-type] # the schema's integer
            force=force,
        )

"""YAML read into plain nodes that know their line: safe against any input, and strict where YAML is lenient.

No object is ever constructed from a tag, work and memory are bounded whatever the file holds, and a key that is given
twice is refused instead of silently losing its first value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml

from mergeguard.errors import MergeguardError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Scalar = bool | int | float | str

MAX_BYTES = 1_000_000
MAX_NODES = 100_000
MAX_DEPTH = 50
_LONGEST_NUMBER = 100  # digits; also keeps YAML 1.1's base-60 numbers from growing without bound
_RESOLVER = yaml.SafeLoader("")
_NUMBERS = {f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float", "null")}


@dataclass(frozen=True, eq=False, slots=True)
class Node:
    """A value of the file and the line (from 1) of its key, or its own line where it has none.

    Attributes:
        line: where an error about this value points.
        value: a scalar, None, a list of nodes, or a dict of nodes.
        size: number of nodes, aliases written out.
        depth: number of levels, 1 for a scalar.
    """

    line: int
    value: Scalar | list[Node] | dict[str, Node] | None
    size: int = 1
    depth: int = 1

    def at(self, *path: str | int) -> Node:
        """The node at a path of keys and indices."""
        node: Any = self
        for step in path:
            node = node.value[step]
        return node  # type: ignore[no-any-return] # a path is as untyped as JSON

    def plain(self) -> Any:
        """The value without lines, as `json.loads` would give it."""
        if isinstance(self.value, list):
            return [item.plain() for item in self.value]
        if isinstance(self.value, dict):
            return {key: item.plain() for key, item in self.value.items()}
        return self.value


def error_at(source: Path, line: int | None, problem: str) -> MergeguardError:
    """An error whose one line starts as compilers' do, `recipe.yml:12: ...`."""
    place = f"{source}:{line}" if line else str(source)
    return MergeguardError(one_line(f"{place}: {problem}"))


def one_line(text: str) -> str:
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def read_text(source: Path) -> str:
    """The text of a small UTF-8 file, without a byte order mark.

    Raises:
        MergeguardError: it is missing, no regular file, larger than `MAX_BYTES`, or not UTF-8.
    """
    try:
        if not source.is_file():  # a named pipe would block, a device never end
            problem = "is not a file" if source.exists() else "does not exist"
            raise error_at(source, None, f"{problem}; expected a recipe in YAML")
        with source.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise error_at(source, None, f"cannot be read: {error}") from error
    if len(data) > MAX_BYTES:
        raise error_at(source, None, f"is larger than {MAX_BYTES:,} bytes, which no recipe is")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise error_at(source, line, f"byte {data[error.start]:#04x} is not UTF-8; save the file as UTF-8") from None


def parse_yaml(text: str, source: Path, *, allow_duplicate_keys: bool = False) -> Node:
    """The one document in `text`. `source` is only named in messages.

    Merge keys (`<<: *name`) and aliases work; aliases share nodes.

    Raises:
        MergeguardError: not YAML, empty, several documents, tags, a key given twice, an infinite number or NaN, or
            too large when aliases are written out.
    """
    composer = _Composer(source, allow_duplicate_keys)
    try:
        return composer.document(yaml.parse(text, Loader=yaml.SafeLoader))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise error_at(source, line, f"character {chr(error.character)!r} is not allowed in YAML") from None
    except yaml.MarkedYAMLError as error:
        # A key that never gets its colon is noticed on the next line only.
        unfinished = str(error.problem).startswith("could not find expected")
        mark = (error.context_mark if unfinished else None) or error.problem_mark or error.context_mark
        problem = " ".join(filter(None, (error.context, error.problem)))
        if "'\\t'" in problem:
            problem = "a tab where YAML allows only spaces; indent with spaces"
        raise error_at(source, mark.line + 1 if mark else None, f"not valid YAML: {problem}") from None
    except yaml.YAMLError as error:
        raise error_at(source, None, f"not valid YAML: {error}") from None


@dataclass
class _Composer:
    """Builds nodes from events. Recursion is as deep as the file, which is at most `MAX_DEPTH`."""

    source: Path
    allow_duplicate_keys: bool
    anchors: dict[str, Node | None] = field(default_factory=dict)
    nodes: int = 0

    def document(self, events: Iterator[Any]) -> Node:
        root = None
        for event in events:
            if isinstance(event, (yaml.StreamStartEvent, yaml.StreamEndEvent)):
                continue
            if isinstance(event, yaml.DocumentStartEvent):
                if root is not None:
                    raise self._error(event, "a second document starts here; a recipe is one document")
                root = self._node(next(events), events, 1)
                next(events)
        if root is None or root.value is None:
            raise error_at(self.source, None, "is empty; expected a recipe in YAML")
        return root

    def _node(self, event: Any, events: Iterator[Any], level: int, line: int | None = None) -> Node:
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event, level)
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise self._error(event, f"more than {MAX_NODES:,} values, which no recipe has")
        if level > MAX_DEPTH:
            raise self._error(event, f"nested more than {MAX_DEPTH} levels deep, which no recipe is")
        if event.tag is not None:
            raise self._error(event, f"tag {event.tag!r}: a recipe is plain data; remove the tag")
        if event.anchor is not None:
            self.anchors[event.anchor] = None  # a loop until it is finished
        line = line or _line(event)
        if isinstance(event, yaml.ScalarEvent):
            node = Node(line, self._scalar(event))
        elif isinstance(event, yaml.SequenceStartEvent):
            node = self._sized(event, line, self._list(events, level))
        else:
            node = self._sized(event, line, self._dict(events, level))
        if event.anchor is not None:
            self.anchors[event.anchor] = node
        return node

    def _alias(self, event: Any, level: int) -> Node:
        if event.anchor not in self.anchors:
            raise self._error(event, f"alias *{event.anchor} names no anchor above it")
        node = self.anchors[event.anchor]
        if node is None:
            raise self._error(event, f"alias *{event.anchor} contains itself")
        if level + node.depth > MAX_DEPTH:
            raise self._error(event, f"nested more than {MAX_DEPTH} levels deep, which no recipe is")
        return node

    def _sized(self, event: Any, line: int, value: list[Node] | dict[str, Node]) -> Node:
        children = value if isinstance(value, list) else list(value.values())
        size = 1 + sum(child.size for child in children)
        if size > MAX_NODES:
            raise self._error(event, f"aliases expand to more than {MAX_NODES:,} values, which no recipe has")
        return Node(line, value, size, 1 + max((child.depth for child in children), default=0))

    def _list(self, events: Iterator[Any], level: int) -> list[Node]:
        items = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            items.append(self._node(event, events, level + 1))
        return items

    def _dict(self, events: Iterator[Any], level: int) -> dict[str, Node]:
        found: dict[str, Node] = {}
        lines: dict[str, int] = {}
        merged: dict[str, Node] = {}
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent) or event.tag is not None or event.anchor is not None:
                raise self._error(event, "a key must be plain text")
            key, line = event.value, _line(event)
            if key in lines and not self.allow_duplicate_keys:
                raise self._error(
                    event,
                    f"{shown(key)} is given twice, first on line {lines[key]}; YAML would silently keep only the "
                    "last one. Remove one, or pass --allow-duplicate-keys",
                )
            lines[key] = line
            value = self._node(next(events), events, level + 1, line)
            if key == "<<" and event.implicit[0]:
                merged = self._mergeable(event, value)
            else:
                found[key] = value if value.line == line else Node(line, value.value, value.size, value.depth)
        return {**merged, **found}

    def _mergeable(self, event: Any, node: Node) -> dict[str, Node]:
        parts = node.value if isinstance(node.value, list) else [node]
        merged: dict[str, Node] = {}
        for part in parts:
            if not isinstance(part.value, dict):
                raise self._error(event, "'<<' must name a mapping or a list of mappings")
            merged = {**part.value, **merged}  # the first one wins
        return merged

    def _scalar(self, event: Any) -> Scalar | None:
        text: str = event.value
        if not event.implicit[0] or len(text) > _LONGEST_NUMBER:
            return text
        tag = _RESOLVER.resolve(yaml.ScalarNode, text, event.implicit)  # type: ignore[no-untyped-call] # its stubs
        if tag not in _NUMBERS:
            return text  # dates are text too
        try:
            value: Scalar | None = _RESOLVER.construct_object(yaml.ScalarNode(tag, text))
        except (ValueError, OverflowError, IndexError):  # PyYAML resolves some texts as numbers that it cannot read
            return text
        if isinstance(value, float) and not math.isfinite(value):
            raise self._error(event, f"{shown(text)} is not a finite number")
        return value

    def _error(self, event: Any, problem: str) -> MergeguardError:
        return error_at(self.source, _line(event), problem)


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1


def shown(value: Any, most: int = 60) -> str:
    """A value as an error shows it: as it is written in a recipe, shortened."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, dict)):
        kind = "list" if isinstance(value, list) else "mapping"
        return f"a {kind}" if value else f"an empty {kind}"
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 4]}...{text[-1]}"

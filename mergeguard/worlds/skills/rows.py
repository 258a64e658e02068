"""Items of a data set: from a file on this machine, or from the public source by name."""

from __future__ import annotations

import csv
import itertools
import json
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mergeguard.checkpoints.inputs import existing, quoted, reason
from mergeguard.errors import ParameterError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path


@dataclass(frozen=True)
class Item:
    """One row's texts by column, and what errors call it."""

    label: str
    texts: Mapping[str, str]


def read_items(
    source: str | Path | None, public: Mapping[str, str], columns: tuple[str, ...], limit: int | None
) -> list[Item]:
    """The first `limit` rows of a data set, all of them if None.

    Args:
        source: a .csv file with a header, or a .jsonl file with an object a line; None for the public data set.
        public: arguments of `datasets.load_dataset`, "path" among them.
        columns: what every row has to hold, as text.
        limit: how many rows.

    Raises:
        ParameterError: the source is absent, of another form, empty, or lacks a column; the public one does not load.
    """
    if limit is not None and limit < 1:
        raise ParameterError(f"limit is {limit}, expected at least 1, or none for all rows")
    name, rows = _public_rows(public) if source is None else _file_rows(source)
    items = []
    for number, row in enumerate(itertools.islice(rows, limit), 1):
        label = f"item {number} of {name}"
        items.append(Item(label, {column: _text(row, column, label) for column in columns}))
    if not items:
        raise ParameterError(f"{name} has no rows; expected some with {' and '.join(columns)}")
    return items


def _text(row: Mapping[str, Any], column: str, label: str) -> str:
    if column not in row:
        raise ParameterError(f"{label} has no column {column!r}; it has {', '.join(map(str, row)) or 'none'}")
    text = row[column]
    if not isinstance(text, str) or not text.strip():
        raise ParameterError(f"{label} has no text in its column {column!r}")
    return text


def _public_rows(public: Mapping[str, str]) -> tuple[str, Iterable[Mapping[str, Any]]]:
    name = public.get("data_files", public["path"])
    try:
        datasets = import_module("datasets")
    except ImportError as error:
        raise ParameterError(
            f"the public data set {name} needs the package datasets; install mergeguard[datasets], or set source to a "
            f"file"
        ) from error
    try:
        return name, datasets.load_dataset(**public)
    except Exception as error:  # the hub, the network and the cache each raise kinds of their own
        raise ParameterError(
            f"the public data set {name} did not load: {reason(error)}; set source to a file instead"
        ) from error


def _file_rows(source: str | Path) -> tuple[str, Iterator[Mapping[str, Any]]]:
    path = existing(source)
    if path is None or not path.is_file():
        raise ParameterError(f"there is no file {quoted(str(source))}; expected a .csv or .jsonl file")
    readers = {".csv": _csv_rows, ".jsonl": _json_lines}
    if path.suffix.lower() not in readers:
        raise ParameterError(f"{path} is neither a .csv nor a .jsonl file")
    return str(path), readers[path.suffix.lower()](path)


def _csv_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            yield from csv.DictReader(file, strict=True)
    except (OSError, ValueError, csv.Error) as error:
        raise ParameterError(f"cannot read {path}: {reason(error)}; expected CSV in UTF-8") from error


def _json_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ParameterError(f"line {number} of {path} is no JSON object")
                    yield row
    except (OSError, ValueError, RecursionError) as error:
        raise ParameterError(
            f"cannot read line {max(number, 1)} of {path}: {reason(error)}; expected a JSON object a line"
        ) from error

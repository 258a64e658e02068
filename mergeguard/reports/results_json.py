"""`results.json`: a whole run as one document that other programs can rely on.

The fields are those of the dataclasses in `mergeguard.matrix.outcome`, plus what can be worked out from them and is
worth a field to whoever reads the file with other tools (`survived`, `caught`, `holds`). They are published as a JSON
Schema beside this file, which every document that is read must satisfy.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterator, Mapping
from importlib import resources
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from mergeguard import __version__
from mergeguard.errors import CheckpointError, ParameterError
from mergeguard.matrix.outcome import SCHEMA_VERSION, Gate, Outcome, Planted, Results, Summary
from mergeguard.reports.writing import write_text

if TYPE_CHECKING:
    import os

_NUMBER_MAPS = ("details", "skills", "skills_kept")


def to_json(results: Results) -> dict[str, Any]:
    """The document that `results.json` holds, of plain dicts, lists, texts and finite numbers.

    NaN and infinities, which JSON does not have, become None.

    Raises:
        ParameterError: the environment, the world or an outcome holds something that JSON cannot.
    """
    plain: dict[str, Any] = _plain(results, "results")
    for data, outcome in zip(plain["outcomes"], results.outcomes, strict=True):
        data["survived"] = outcome.survived
    for data, planted in zip(plain["planted"], results.planted, strict=True):
        data["caught"] = planted.caught
    first = ("environment", "world", "outcomes", "before_merging", "planted", "summary")
    return {
        "schema_version": SCHEMA_VERSION,
        "mergeguard": __version__,
        **{key: plain.pop(key) for key in first},
        **plain,
        "holds": results.holds,
    }


def dumps(results: Results) -> str:
    """`to_json` as text: ASCII, indented, with a line end."""
    return json.dumps(to_json(results), indent=2, allow_nan=False) + "\n"


def write_results(results: Results, path: str | os.PathLike[str]) -> None:
    """Write `results.json` atomically.

    Raises:
        CheckpointError: the folder cannot be written or is full; nothing half-written is left.
        ParameterError: the results hold something that JSON cannot.
    """
    write_text(path, dumps(results))


def read_results(path: str | os.PathLike[str]) -> Results:
    """Read what `write_results` wrote. Numbers that were not finite come back as None, in maps of numbers as NaN.

    Raises:
        CheckpointError: the file cannot be read, is truncated, is not JSON, is not mergeguard's, was written by a newer
            version, or does not satisfy the schema.
    """
    source = Path(path)
    try:
        text = source.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise CheckpointError(f"cannot read {source}: {error.strerror or type(error).__name__}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{source} is not JSON: it is not text in UTF-8") from error
    return parse_results(text, str(source))


def parse_results(text: str, source: str = "results.json") -> Results:
    """Read the text of a `results.json`; `source` names it in errors. See `read_results`."""
    data = _decode(text, source)
    _check_version(data, source)
    check_document(data, source)
    try:
        return _from_json(data)
    except (TypeError, ValueError) as error:  # the schema should have refused it: say which file all the same
        raise CheckpointError(f"{source} cannot be read: {error}") from error


@functools.cache
def schema() -> dict[str, Any]:
    """The published JSON Schema (draft 2020-12) of `results.json`."""
    text = resources.files("mergeguard.reports").joinpath("results.schema.json").read_text(encoding="utf-8")
    document: dict[str, Any] = json.loads(text)
    return document


def check_document(data: object, source: str = "results.json") -> None:
    """Refuse a document that the schema refuses, or whose numbers contradict each other.

    Raises:
        CheckpointError: names the first field at fault and what is wrong with it.
    """
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match

    error = best_match(Draft202012Validator(schema()).iter_errors(data))
    if error is not None:
        where = error.json_path.removeprefix("$").removeprefix(".") or "the document"
        raise CheckpointError(f"{source} does not satisfy the schema: {where}: {_shorten(error.message)}")
    assert isinstance(data, dict)
    for problem in _contradictions(data):
        raise CheckpointError(f"{source} contradicts itself: {problem}")


def _contradictions(data: Mapping[str, Any]) -> Iterator[str]:
    """What a JSON Schema cannot say: relations between numbers."""
    for i, outcome in enumerate(data["outcomes"]):
        at = f"outcomes[{i}]"
        pairs = {
            "hits": (outcome["hits"], outcome["trials"]),
            "decoys": (outcome["decoy_hits"], outcome["decoy_trials"]),
        }
        pairs |= {f"control {name}": (counts["hits"], counts["trials"]) for name, counts in outcome["controls"].items()}
        for name, (hits, trials) in pairs.items():
            if hits is not None and hits > trials:
                yield f"{at}: {name}: {hits} hits of {trials} trials"
        if outcome["rate"] is not None and not math.isclose(
            outcome["rate"], outcome["hits"] / outcome["trials"], abs_tol=1e-6
        ):
            yield f"{at}: rate {outcome['rate']} is not {outcome['hits']} of {outcome['trials']}"
        if outcome["interval"] is not None and outcome["interval"][0] > outcome["interval"][1]:
            yield f"{at}: interval {outcome['interval']} ends before it begins"
    for i, row in enumerate(data["summary"]):
        if not row["recorded"] <= row["lost"] <= row["thefts"]:
            yield f"summary[{i}]: {row['lost']} of {row['thefts']} thefts lost, {row['recorded']} of them recorded"
    if data["holds"] == bool(data["problems"]):
        yield f"holds is {str(data['holds']).lower()} with {len(data['problems'])} problems"


def _from_json(data: Mapping[str, Any]) -> Results:
    fields = {key: value for key, value in data.items() if key not in ("schema_version", "mergeguard", "holds")}
    fields["outcomes"] = tuple(_outcome(outcome) for outcome in data["outcomes"])
    fields["before_merging"] = tuple(Gate(**gate) for gate in data["before_merging"])
    fields["planted"] = tuple(Planted(**_without(planted, "caught")) for planted in data["planted"])
    fields["summary"] = tuple(Summary(**row) for row in data["summary"])
    fields["problems"] = tuple(data["problems"])
    fields["matched_controls"] = {name: _numbers(skills) for name, skills in data["matched_controls"].items()}
    return Results(**fields)


def _outcome(data: Mapping[str, Any]) -> Outcome:
    return Outcome.from_json({**data, **{name: _numbers(data[name]) for name in _NUMBER_MAPS}})


def _numbers(data: Mapping[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in data.items()}


def _without(data: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key != name}


def _plain(value: Any, where: str) -> Any:
    """`value` as JSON has it. Not `dataclasses.asdict`, which fails on read-only maps and keeps NaN."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: _plain(getattr(value, name), f"{where}.{name}") for name in names}
    if isinstance(value, Mapping):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise ParameterError(f"{where} has the key {_shorten(repr(odd[0]))}; in results.json keys are texts")
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise ParameterError(
        f"{where} is of type {type(value).__name__}; results.json holds texts, numbers, lists and maps only"
    )


def _decode(text: str, source: str) -> dict[str, Any]:
    stripped = text.strip()
    if not stripped:
        raise CheckpointError(f"{source} is empty; it was not written to its end")
    try:
        data = json.loads(stripped, parse_constant=_refuse_number, parse_float=_finite, parse_int=_integer)
    except json.JSONDecodeError as error:
        if stripped[0] == "{" and (error.pos >= len(stripped) or not stripped.endswith("}")):
            raise CheckpointError(f"{source} is truncated: it ends in line {stripped.count(chr(10)) + 1}") from error
        raise CheckpointError(f"{source} is not JSON: {error.msg} in line {error.lineno}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source} is not JSON: {_shorten(str(error))}") from error
    if not isinstance(data, dict) or not {"schema_version", "mergeguard"} <= data.keys():
        raise CheckpointError(f"{source} is not a results.json of mergeguard: it has no schema_version and mergeguard")
    return data


def _check_version(data: Mapping[str, Any], source: str) -> None:
    version = data["schema_version"]
    try:
        found = tuple(int(part) for part in version.split("."))
    except (AttributeError, ValueError):
        raise CheckpointError(f"{source} has the schema version {_shorten(repr(version))}; expected e.g. 1.0") from None
    if found > tuple(int(part) for part in SCHEMA_VERSION.split(".")):
        raise CheckpointError(
            f"{source} has schema version {_shorten(version)}, newer than the {SCHEMA_VERSION} that mergeguard "
            f"{__version__} reads; upgrade mergeguard"
        )


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse_number(text)


def _integer(text: str) -> int:
    return int(text) if len(text) <= 40 else _refuse_number(_shorten(text))  # more digits do not fit a float


def _shorten(text: str, limit: int = 200) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit // 2]} ... {line[-limit // 2 :]}"

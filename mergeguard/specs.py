"""The written form of a thing with parameters: `ties(density=0.4,normalize=true)`.

Mergers, protections and their variants are named like this on the command line, in test ids and in results.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergeguard.errors import ParameterError, UnknownNameError

if TYPE_CHECKING:
    from collections.abc import Mapping

Value = bool | int | float | str
_SPEC = re.compile(r"^(?P<name>[A-Za-z_][\w:.-]*)(?:\((?P<arguments>[^()]*)\))?$")
_WORD = re.compile(r"^[A-Za-z_][\w.:-]*$")


@dataclass(frozen=True)
class Spec:
    """A name and the parameters that were written with it, sorted by name; `str` gives the written form back."""

    name: str
    parameters: tuple[tuple[str, Value], ...] = ()

    def __str__(self) -> str:
        if not self.parameters:
            return self.name
        return f"{self.name}({','.join(f'{key}={format_value(value)}' for key, value in self.parameters)})"

    @classmethod
    def of(cls, name: str, parameters: Mapping[str, Value]) -> Spec:
        return cls(name, tuple(sorted(parameters.items())))


def format_value(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value) if isinstance(value, float) else str(value)


def parse_value(text: str) -> Value:
    """`true`/`false`, an integer, a finite decimal number or a word."""
    if text in ("true", "false"):
        return text == "true"
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        if _WORD.match(text):
            return text
        raise ParameterError(f"cannot read the value {text!r}; expected true, false, a number or a word") from None
    if not math.isfinite(number):
        raise ParameterError(f"the value {text!r} is not a finite number")
    return number


def parse_spec(text: str) -> Spec:
    """Read `name` or `name(key=value,...)`.

    Raises:
        ParameterError: the text is not of this form, or names a parameter twice.
    """
    match = _SPEC.match(text.replace(" ", ""))
    if match is None:
        raise ParameterError(f"cannot read {text!r}; expected NAME or NAME(key=value,...)")
    parameters: dict[str, Value] = {}
    for item in filter(None, (match["arguments"] or "").split(",")):
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ParameterError(f"cannot read {item!r} in {text!r}; expected key=value")
        if key in parameters:
            raise ParameterError(f"parameter {key!r} is given twice in {text!r}")
        parameters[key] = parse_value(value)
    return Spec.of(match["name"], parameters)


def check_parameters(owner: str, given: Mapping[str, Value], defaults: Mapping[str, Value]) -> dict[str, Value]:
    """`defaults` updated by `given`, each value of its default's type (an integer may stand for a float).

    Raises:
        UnknownNameError: `given` has a key that `defaults` lacks.
        ParameterError: a value has another type than its default.
    """
    full = dict(defaults)
    for key, value in given.items():
        if key not in defaults:
            raise UnknownNameError(f"parameter of {owner}", key, defaults)
        expected = type(defaults[key])
        widened = float(value) if expected is float and type(value) is int else value
        if type(widened) is not expected:
            raise ParameterError(
                f"parameter {key!r} of {owner} is {format_value(value)}, expected a value like "
                f"{format_value(defaults[key])} ({expected.__name__})"
            )
        full[key] = widened
    return full

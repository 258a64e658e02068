"""Parameter settings of a recipe: a value for all tensors, a gradient over the layers, or one chosen by name filters.

The semantics are mergekit 0.1.5's (config.py, parameter_resolver.py): settings are asked from the most special scope
to the most general one; the first that has a value for a tensor gives it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from mergeguard.errors import ParameterError
from mergeguard.mergers.marked_yaml import Node, Scalar, shown

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mergeguard.mergers.contract import Parameter

T = TypeVar("T", bound=Scalar)

_SCALARS = (bool, int, float, str)
_FORMS = "a value, a list of values (a gradient over the layers), or a list of {filter, value}"
_SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_WORDS_FOR_SWITCHES = {"rescale": {True: "l1", False: "none"}}
"""mergekit's `rescale` is a switch; ours says how, and what mergekit does is "l1"."""


@dataclass(frozen=True)
class Choice:
    """A value or a gradient, for the tensors whose name contains `pattern` (None or "*": for all).

    Attributes:
        pattern: a piece of a tensor's name; not a wildcard or a regular expression.
        values: one value, or the values of a gradient from the first layer to the last.
        line: where it is written.
    """

    pattern: str | None
    values: tuple[Scalar, ...]
    line: int

    def matches(self, tensor: str) -> bool:
        return self.pattern in (None, "*") or str(self.pattern) in tensor

    def at(self, t: float, read: Callable[[Scalar], T]) -> T:
        """The value at the depth `t`: numbers are interpolated, switches and words step.

        Args:
            t: 0 at the first layer, 1 at the last.
            read: gives a written value its type, e.g. the number that a text such as "1e-5" means.
        """
        if len(self.values) == 1:
            return read(self.values[0])
        values = [read(value) for value in self.values]
        scaled = t * (len(values) - 1)
        lower = int(scaled)
        if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
            return values[lower]
        share = scaled - lower
        below, above = (float(values[i]) for i in (lower, min(lower + 1, len(values) - 1)))
        return read((1 - share) * below + share * above)


@dataclass(frozen=True)
class Setting:
    """What a recipe says about one parameter in one scope: the first choice that matches a tensor holds."""

    choices: tuple[Choice, ...]
    line: int

    @property
    def is_gradient(self) -> bool:
        return any(len(choice.values) > 1 for choice in self.choices)

    def at(self, tensor: str, t: float, read: Callable[[Scalar], T]) -> T | None:
        """The value for a tensor at the depth `t`, None if no choice matches; see `Choice.at`."""
        for choice in self.choices:
            if choice.matches(tensor):
                return choice.at(t, read)
        return None


Settings = Mapping[str, Setting]


def first_value(scopes: Iterable[Settings], name: str, tensor: str, t: float, read: Callable[[Scalar], T]) -> T | None:
    """The value of parameter `name` for a tensor, from the first scope that has one; None if none has."""
    for scope in scopes:
        setting = scope.get(name)
        value = None if setting is None else setting.at(tensor, t, read)
        if value is not None:
            return value
    return None


def parse_setting(name: str, node: Node) -> Setting:
    """The setting written as `node`.

    Raises:
        SettingError: it has none of the forms.
    """
    value = node.value
    if isinstance(value, list) and value and isinstance(value[0].value, dict):
        return Setting(tuple(_conditional(name, item) for item in value), node.line)
    if isinstance(value, dict):
        return Setting((_conditional(name, node),), node.line)
    return Setting((Choice(None, _values(name, node), node.line),), node.line)


class SettingError(ParameterError):
    """A setting that cannot be read, and its line."""

    def __init__(self, line: int, problem: str) -> None:
        super().__init__(problem)
        self.line = line


def _conditional(name: str, node: Node) -> Choice:
    if not isinstance(node.value, dict):
        raise SettingError(node.line, f"parameter {name!r} mixes values and filters; expected {_FORMS}")
    fields = node.value
    for key, item in fields.items():
        if key not in ("filter", "value"):
            raise SettingError(item.line, f"unknown key {shown(key)} in parameter {name!r}; expected filter and value")
    if "value" not in fields:
        raise SettingError(node.line, f"parameter {name!r} has a filter without a value; expected {{filter, value}}")
    pattern = fields["filter"].value if "filter" in fields else None
    if not (pattern is None or isinstance(pattern, str)):
        raise SettingError(
            fields["filter"].line, f"filter {shown(pattern)} of parameter {name!r} is not text; put it in quotes"
        )
    return Choice(pattern, _values(name, fields["value"]), fields["value"].line)


def _values(name: str, node: Node) -> tuple[Scalar, ...]:
    items = node.value if isinstance(node.value, list) else [node]
    if not items:
        raise SettingError(node.line, f"parameter {name!r} is an empty list; expected {_FORMS}")
    values: list[Scalar] = []
    for item in items:
        value: Any = item.value
        if not isinstance(value, _SCALARS):
            raise SettingError(item.line, f"parameter {name!r} is {shown(value)}; expected {_FORMS}")
        values.append(value)
    return tuple(values)


def read_value(parameter: Parameter, owner: str, raw: Scalar) -> Scalar:
    """A written value as the parameter's type, checked against its domain.

    Numbers may be written as text, since YAML 1.1 reads `1e-5` as one.

    Raises:
        ParameterError: it has another type or lies outside the domain.
    """
    kind = type(parameter.default)
    value: Scalar | None
    if kind is bool:
        value = _switch(raw)
    elif kind is str:
        words = _WORDS_FOR_SWITCHES.get(parameter.name, {}) if isinstance(raw, bool) else {}
        value = words.get(bool(raw), raw)
        value = value if isinstance(value, str) else None
    else:
        value = _number(raw, whole=kind is int)
    if value is None:
        expected = {bool: "true or false", int: "a whole number", float: "a finite number"}.get(
            kind, f"one of {', '.join(parameter.choices)}"
        )
        raise ParameterError(f"parameter {parameter.name!r} of {owner} is {shown(raw)}, expected {expected}")
    parameter.check(owner, value)
    return value


def _switch(raw: Scalar) -> bool | None:
    if isinstance(raw, str):
        return _SWITCHES.get(raw.lower())
    return bool(raw) if raw in (0, 1) else None


def _number(raw: Scalar, *, whole: bool) -> float | int | None:
    if isinstance(raw, bool):
        return None
    try:
        number = float(raw)
    except (ValueError, OverflowError):
        return None
    if not math.isfinite(number) or (whole and not number.is_integer()):
        return None
    return int(number) if whole else number

"""What a merge method is, and a merger: a method with its parameters. No torch is imported here.

A method works on one vector at a time, usually one tensor of the checkpoint, in two steps, so that a sweep over
weights repeats only the second:

    prepared = method.prepare(base, models, parameters, generator)    # e.g. task vectors, trimmed or dropped
    merged = method.combine(base, prepared, weights, parameters)

Both are pure: they change no argument, and are random only through `generator`. A third party registers a `Method`
under the entry-point group `mergeguard.mergers`, with the method's own name as the entry point's name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mergeguard.errors import ParameterError
from mergeguard.specs import Spec, Value, check_parameters, format_value

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Parameters = Mapping[str, Any]
"""Every parameter of a method by its written name, defaults filled in."""

Generators = Callable[[int], "torch.Generator"]
"""The generator of the model at an index: a fresh one each call, seeded by (seed, tensor name, model id)."""

Prepare = Callable[["Tensor", Sequence["Tensor"], Parameters, Generators], "list[Tensor]"]
Combine = Callable[["Tensor", Sequence["Tensor"], Sequence[float], Parameters], "Tensor"]


@dataclass(frozen=True)
class Parameter:
    """A parameter of a method and its domain.

    Attributes:
        name: as it is written, e.g. "lambda".
        default: fixes the type too; an integer may be given for a float.
        meaning: one line, with the source where mergekit and the paper differ.
        choices: the words a string may be.
        above: exclusive lower bound of a number.
        at_most: inclusive upper bound of a number.
    """

    name: str
    default: Value
    meaning: str
    choices: tuple[str, ...] = ()
    above: float = -math.inf
    at_most: float = math.inf

    def check(self, owner: str, value: Value) -> None:
        """Refuse a value outside the domain.

        Raises:
            ParameterError: always naming the owner, the parameter, the value and what is expected.
        """
        if isinstance(value, str) and value not in self.choices:
            expected = f"one of {', '.join(self.choices)}"
        elif isinstance(value, float) and not (math.isfinite(value) and self.above < value <= self.at_most):
            bounds = [f"above {self.above:g}"] if self.above > -math.inf else []
            bounds += [f"at most {self.at_most:g}"] if self.at_most < math.inf else []
            expected = " ".join(["a finite number", " and ".join(bounds)]).rstrip()
        else:
            return
        raise ParameterError(f"parameter {self.name!r} of {owner} is {format_value(value)}, expected {expected}")


def keep_models(
    _base: Tensor, models: Sequence[Tensor], _parameters: Parameters, _generator: Generators
) -> list[Tensor]:
    """The `prepare` of methods that combine the models as they are."""
    return list(models)


@dataclass(frozen=True, eq=False)
class Method:
    """A merge method: its tensor maths and what a list or a command line has to know about it.

    `method(density=0.4)` gives a `Merger`. A parameter named `scope` with the choices `tensor` and `model` is known
    to `merge_models`: with `model`, all floating tensors are merged as one vector, concatenated by sorted name.

    Attributes:
        name: the registered name.
        summary: one line for lists.
        citation: the paper.
        combine: (base, prepared, weights, parameters) -> merged; all tensors of one shape, dtype and device. Without
            `needs_base`, `base` may be any of the models and is to be ignored.
        parameters: in mergekit's names where mergekit has them.
        prepare: (base, models, parameters, generator) -> prepared; whatever does not depend on the weights.
        needs_base: whether the models are merged as differences from a base.
        random: whether `prepare` draws.
        takes_coefficient: whether the method has a weight per model; without, its cells have no coefficient.
    """

    name: str
    summary: str
    citation: str
    combine: Combine
    parameters: tuple[Parameter, ...] = ()
    prepare: Prepare = keep_models
    needs_base: bool = True
    random: bool = False
    takes_coefficient: bool = True

    @property
    def defaults(self) -> dict[str, Value]:
        return {parameter.name: parameter.default for parameter in self.parameters}

    def __call__(self, **parameters: Value) -> Merger:
        """The method with `parameters`; the others keep their defaults.

        Raises:
            UnknownNameError: the method has no such parameter.
            ParameterError: a value has the wrong type or lies outside its domain.
        """
        return Merger(self, tuple(sorted(parameters.items())))


@dataclass(frozen=True, eq=False, repr=False)
class Merger:
    """A method with its parameters: a value, equal to another with the same method name and the same full parameters.

    `str` writes only what was given: `ties(density=0.4,normalize=true)`.

    Attributes:
        method: the method.
        given: the explicitly given parameters, sorted by name.
    """

    method: Method
    given: tuple[tuple[str, Value], ...] = ()
    _full: tuple[tuple[str, Value], ...] = field(init=False)

    def __post_init__(self) -> None:
        owner = f"merger {self.method.name!r}"
        full = check_parameters(owner, dict(self.given), self.method.defaults)
        for parameter in self.method.parameters:
            parameter.check(owner, full[parameter.name])
        object.__setattr__(self, "given", tuple((name, full[name]) for name, _ in self.given))
        object.__setattr__(self, "_full", tuple(sorted(full.items())))

    @property
    def name(self) -> str:
        return self.method.name

    @property
    def parameters(self) -> dict[str, Value]:
        """All parameters, defaults filled in."""
        return dict(self._full)

    @property
    def merges_whole_model(self) -> bool:
        return self.parameters.get("scope") == "model"

    def __str__(self) -> str:
        return str(Spec(self.name, self.given))

    def __repr__(self) -> str:
        return f"Merger({self})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Merger):
            return NotImplemented
        return (self.name, self._full) == (other.name, other._full)

    def __hash__(self) -> int:
        return hash((self.name, self._full))

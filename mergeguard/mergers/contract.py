"""What a merge method is, and a merger: a method with its parameters. No torch is imported here.

A method works on one vector at a time, usually one tensor of the checkpoint, in two steps, so that a sweep over
weights repeats only the second, and so that a large tensor can pass through the processor's cache piece by piece::

    prepared = method.prepare(base, models, parameters, generators)  # what needs the whole tensor: thresholds, masks
    for span in spans(base):
        parts = prepared(span)                                       # e.g. the trimmed task vectors of this span
        merged = method.combine(part(base, span), parts, weights, parameters)

All are pure: they change no argument, and are random only through `generators`. A third party registers a `Method`
under the entry-point group `mergeguard.mergers`, with the method's own name as the entry point's name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from mergeguard.errors import ParameterError
from mergeguard.specs import Spec, Value, check_parameters, format_value

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Parameters = Mapping[str, Any]
"""Every parameter of a method by its written name, defaults filled in; a `per_model` one is a sequence."""

Generators = Callable[[int], "torch.Generator"]
"""The generator of the model at an index: a fresh one each call, seeded by (seed, tensor name, model id)."""

Span = slice | None
"""A range of a tensor's flat elements; `WHOLE` (None) is the tensor itself, in its shape."""
WHOLE: Span = None

Values = Callable[[Span], "Tensor"]
"""A tensor that is computed span by span."""

Prepared = Callable[[Span], "list[Tensor]"]
"""What `prepare` leaves for `combine`, span by span; usually one tensor per model."""

Prepare = Callable[["Tensor", Sequence["Tensor"], Parameters, Generators], Prepared]
Combine = Callable[["Tensor", Sequence["Tensor"], Sequence[float], Parameters], "Tensor"]


def part(tensor: Tensor, span: Span) -> Tensor:
    """The flat elements of a contiguous tensor in `span`, as a view; the tensor itself for `WHOLE`."""
    return tensor if span is WHOLE else tensor.view(-1)[span]


@dataclass(frozen=True)
class Parameter:
    """A parameter of a method and its domain.

    Attributes:
        name: as it is written, e.g. "lambda".
        default: fixes the type too; an integer may be given for a float.
        meaning: one line, with the source where mergekit and the paper differ.
        choices: the words a string may be.
        above: exclusive lower bound of a number.
        at_least: inclusive lower bound of a number.
        at_most: inclusive upper bound of a number.
        below: exclusive upper bound of a number.
        per_model: whether a recipe may give each model its own value; kernels then get one value per model.
    """

    name: str
    default: Value
    meaning: str
    choices: tuple[str, ...] = ()
    above: float = -math.inf
    at_least: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf
    per_model: bool = False

    def check(self, owner: str, value: Value) -> None:
        """Refuse a value outside the domain.

        Raises:
            ParameterError: always naming the owner, the parameter, the value and what is expected.
        """
        if isinstance(value, str):
            if value in self.choices:
                return
            expected = f"one of {', '.join(self.choices)}"
        elif isinstance(value, bool) or self._holds(value):
            return
        else:
            bounds = [f"above {self.above:g}"] if self.above > -math.inf else []
            bounds += [f"at least {self.at_least:g}"] if self.at_least > -math.inf else []
            bounds += [f"at most {self.at_most:g}"] if self.at_most < math.inf else []
            bounds += [f"below {self.below:g}"] if self.below < math.inf else []
            expected = " ".join(["a finite number", " and ".join(bounds)]).rstrip()
        raise ParameterError(f"parameter {self.name!r} of {owner} is {format_value(value)}, expected {expected}")

    def _holds(self, value: float) -> bool:
        inside = self.above < value < self.below and self.at_least <= value <= self.at_most
        return math.isfinite(value) and inside


def keep_models(_base: Tensor, models: Sequence[Tensor], _parameters: Parameters, _generators: Generators) -> Prepared:
    """The `prepare` of methods that combine the models as they are."""
    return lambda span: [part(model, span) for model in models]


def always(_parameters: Parameters) -> bool:
    """An `elementwise` that holds whatever the parameters."""
    return True


def never(_parameters: Parameters) -> bool:
    """An `elementwise` that never holds."""
    return False


@dataclass(frozen=True, eq=False)
class Method:
    """A merge method: its tensor maths and what a list or a command line has to know about it.

    `method(density=0.4)` gives a `Merger`. Two parameters are known to others than the method: `scope` with the
    choices `tensor` and `model` (with `model`, all floating tensors are merged as one vector, concatenated by sorted
    name), and `task_vectors` where `base` is "optional".

    Attributes:
        name: the registered name.
        summary: one line for lists.
        citation: the paper.
        combine: (base, parts, weights, parameters) -> merged, in the base's shape and dtype; all tensors of one
            shape, dtype and device. Without an ancestor, `base` may be any of the models and is to be ignored.
        parameters: in mergekit's names where mergekit has them.
        prepare: (base, models, parameters, generators) -> prepared; whatever does not depend on the weights. Tensors
            are contiguous and in their shape.
        elementwise: whether, with these parameters, each element of the merged tensor depends only on the same
            element of the base and the parts; `combine` is then called span by span, else once with `WHOLE`.
        base: "ancestor": the models are merged as differences from it; "none": there is none; "optional": an ancestor
            if the parameter `task_vectors` is true; "primary": none, but the first model has a part of its own, and
            is what mergekit's recipes call base_model.
        weighting: "weight": one per model; "t": two models, with weights (1 - t, t); "none": the method has no
            weights, and its cells no coefficient.
        random: whether `prepare` draws.
        min_models: how many models it needs at least, the ancestor not counted.
        max_models: how many it can merge, or None.
    """

    name: str
    summary: str
    citation: str
    combine: Combine
    parameters: tuple[Parameter, ...] = ()
    prepare: Prepare = keep_models
    elementwise: Callable[[Parameters], bool] = never
    base: Literal["ancestor", "none", "optional", "primary"] = "ancestor"
    weighting: Literal["weight", "t", "none"] = "weight"
    random: bool = False
    min_models: int = 1
    max_models: int | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A registered method pickles by its name, so that its functions need not be picklable."""
        from mergeguard.mergers.registry import find_method, is_registered

        if is_registered(self):
            return find_method, (self.name,)
        return type(self), tuple(getattr(self, item.name) for item in fields(self))

    @property
    def defaults(self) -> dict[str, Value]:
        return {parameter.name: parameter.default for parameter in self.parameters}

    @property
    def takes_coefficient(self) -> bool:
        return self.weighting != "none"

    def check_models(self, count: int) -> None:
        """Refuse a number of models that the method cannot merge.

        Raises:
            ParameterError: there are too few or too many.
        """
        if count < self.min_models or (self.max_models is not None and count > self.max_models):
            most = self.max_models
            expected = f"exactly {most}" if most == self.min_models else f"at least {self.min_models}"
            if most is not None and most != self.min_models:
                expected += f" and at most {most}"
            apart = " beside the base" if self.base == "ancestor" else ""
            raise ParameterError(f"merger {self.name!r} got {count} models{apart}, expected {expected}")

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

    def kernel_parameters(self, models: int) -> dict[str, Any]:
        """All parameters as kernels get them: a `per_model` one once per model."""
        repeated = {parameter.name for parameter in self.method.parameters if parameter.per_model}
        return {name: [value] * models if name in repeated else value for name, value in self._full}

    @property
    def needs_base(self) -> bool:
        """Whether the models are merged as differences from an ancestor."""
        return self.method.base == "ancestor" or (
            self.method.base == "optional" and self.parameters["task_vectors"] is True
        )

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

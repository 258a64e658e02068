"""From a recipe to jobs: for every output tensor, what it is merged from, with which weights and parameters.

The semantics are mergekit 0.1.5's (plan.py, parameter_resolver.py), except that what it silently ignores is refused or
noted. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeguard.errors import IncompatibleModelsError, MergeguardError, ParameterError
from mergeguard.mergers import registry
from mergeguard.mergers.layers import Layers, find_layers, is_before_layers
from mergeguard.mergers.marked_yaml import one_line
from mergeguard.mergers.recipe_rules import Part, check_recipe, known_parameters, parts_of
from mergeguard.mergers.settings import first_value, read_value
from mergeguard.mergers.weights import check_normalizable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from mergeguard.mergers.contract import Method, Parameter
    from mergeguard.mergers.marked_yaml import Scalar
    from mergeguard.mergers.recipe import Recipe, Source
    from mergeguard.mergers.settings import Settings


@dataclass(frozen=True)
class Layout:
    """What `resolve` has to know of a model.

    Attributes:
        tensors: the names of all of its tensors, in the order in which they are stored.
        num_layers: `num_hidden_layers` of its configuration; None if it does not say.
    """

    tensors: Sequence[str]
    num_layers: int | None


@dataclass(frozen=True)
class Job:
    """One output tensor.

    Attributes:
        name: of the output tensor.
        models: (index into `Plan.inputs`, name of the tensor there) of each model, the base excluded.
        base: the same of the ancestor, or None.
        weights: one per model; (1 - t, t) for a method with t; empty for a method without weights.
        parameters: all of the method's, checked; one that each model has its own of as a tuple, in the models' order.
    """

    name: str
    models: tuple[tuple[int, str], ...]
    base: tuple[int, str] | None
    weights: tuple[float, ...]
    parameters: Mapping[str, Any]

    @property
    def inputs(self) -> tuple[tuple[int, str], ...]:
        """All tensors that are read: the base's first, if there is one."""
        return self.models if self.base is None else (self.base, *self.models)


@dataclass(frozen=True)
class Plan:
    """A merge that only lacks the tensors.

    Attributes:
        method: what merges every job.
        inputs: the references that jobs mean by their indices, the base first.
        jobs: one per output tensor, in the order in which the first input stores them.
        dtype: of the arithmetic, as torch names it; None for the tensors' own.
        out_dtype: of the output; None for that of the arithmetic.
        num_layers: of the output, if the recipe has slices; None if it is the models'.
        notes: one line for each thing in the recipe that has no effect.
    """

    method: Method
    inputs: tuple[str, ...]
    jobs: tuple[Job, ...]
    dtype: str | None
    out_dtype: str | None
    num_layers: int | None
    notes: tuple[str, ...] = ()


def find_method(recipe: Recipe) -> Method:
    """The registered method that a recipe names.

    Raises:
        MergeguardError: there is none; the message names the line.
    """
    try:
        return registry.find_method(recipe.merge_method)
    except MergeguardError as error:
        raise recipe.error(recipe.lines["merge_method"], str(error)) from error


def resolve(recipe: Recipe, method: Method, layouts: Mapping[str, Layout], *, out: Path | None = None) -> Plan:
    """Everything that a recipe says, for each output tensor.

    A parameter comes from the most special scope that has a value for the tensor: a model in a slice, the slice, the
    recipe; or a model of `models`, the recipe; else it is the method's default. Gradients run over the layers of a
    slice, or of the models; tensors outside of layers get a gradient's first value. Filters look at the name of the
    output tensor, or for a parameter that each model has its own of at the name in that model.

    With slices, tensors before the layers come from the first slice's sources and those behind from the last's.

    Args:
        recipe: the recipe.
        method: the one it names, see `find_method`.
        layouts: of each of the recipe's models, by reference.
        out: the folder that will be written.

    Raises:
        MergeguardError: one line, `recipe.yml:12: ...`, if the recipe cannot be carried out.
        IncompatibleModelsError: the models' tensors or layers do not correspond.
    """
    notes = check_recipe(recipe, method)
    parts = parts_of(recipe, method)
    if out is not None:
        _check_out(parts, recipe, out)
    inputs = tuple(dict.fromkeys(source.model for part in parts for source in part.sources))
    layers = {model: find_layers(layouts[model].tensors, layouts[model].num_layers) for model in inputs}
    index = {model: position for position, model in enumerate(inputs)}
    planner = _Planner(recipe, method, layouts, layers, index, known_parameters(method))
    jobs = tuple(planner.slices(parts) if recipe.slices else planner.whole(parts[0]))
    return Plan(
        method=method,
        inputs=inputs,
        jobs=jobs,
        dtype=recipe.dtype,
        out_dtype=recipe.out_dtype,
        num_layers=sum(_length(part) for part in parts) if recipe.slices else None,
        notes=(*notes, *_idle_filters(recipe, parts, jobs)),
    )


@dataclass(frozen=True)
class _Planner:
    recipe: Recipe
    method: Method
    layouts: Mapping[str, Layout]
    layers: Mapping[str, Layers]
    index: Mapping[str, int]
    known: Mapping[str, Parameter]

    def whole(self, part: Part) -> Iterator[Job]:
        """The jobs of a merge of whole models."""
        first = part.sources[0]
        layers = self.layers[first.model]
        for source in part.sources:
            self._check_gradients(part, source)
            if self.layers[source.model].count != layers.count:
                raise self._incompatible(
                    source, f"has {self.layers[source.model].count} layers and {first.model!r} {layers.count}"
                )
            self._check_same(first, set(self.layouts[first.model].tensors), source, self.layouts[source.model].tensors)
        for tensor in self.layouts[first.model].tensors:
            yield self._job(part, tensor, [tensor] * len(part.sources), layers.depth(tensor))

    def slices(self, parts: Sequence[Part]) -> Iterator[Job]:
        """The jobs of a merge of slices: what is before the layers, the layers of each slice, what is behind."""
        for part in parts:
            for source in part.sources:
                self._check_layers(source, parts[0].sources[0])
        yield from self._outside(parts[0], before=True)
        start = 0
        for part in parts:
            yield from self._inside(part, start)
            start += _length(part)
        yield from self._outside(parts[-1], before=False)

    def _outside(self, part: Part, *, before: bool) -> Iterator[Job]:
        names = [
            [
                tensor
                for tensor in self.layouts[source.model].tensors
                if self.layers[source.model].split(tensor) is None and is_before_layers(tensor) == before
            ]
            for source in part.sources
        ]
        for source, own in zip(part.sources, names, strict=True):
            self._check_same(part.sources[0], set(names[0]), source, own)
        for tensor in names[0]:
            yield self._job(part, tensor, [tensor] * len(part.sources), 0.0)

    def _inside(self, part: Part, start: int) -> Iterator[Job]:
        """The jobs of a slice whose first output layer is `start`."""
        names = [self._layer_tensors(source) for source in part.sources]
        length = _length(part)
        prefix = self._prefix(part.sources[0])
        for source, own in zip(part.sources, names, strict=True):
            first, _ = source.layers or (0, 0)
            wanted = {f"{prefix}.{first + offset}.{rest}" for offset, rest in names[0]}
            self._check_same(part.sources[0], wanted, source, own.values())
        for offset, rest in names[0]:
            depth = offset / (length - 1) if length > 1 else 1.0
            tensors = [own[offset, rest] for own in names]
            yield self._job(part, f"{prefix}.{start + offset}.{rest}", tensors, depth)

    def _layer_tensors(self, source: Source) -> dict[tuple[int, str], str]:
        """By (layer in the slice, rest of the name), the names of a source's tensors in the order of the file."""
        first, stop = source.layers or (0, 0)
        found = {}
        for tensor in self.layouts[source.model].tensors:
            place = self.layers[source.model].split(tensor)
            if place is not None and first <= place[1] < stop:
                found[place[1] - first, place[2]] = tensor
        return found

    def _prefix(self, source: Source) -> str:
        return next(iter(self.layers[source.model].prefixes))

    def _job(self, part: Part, name: str, tensors: Sequence[str], depth: float) -> Job:
        """The job of output `name` from `tensors`, the name in each of `part.sources`."""
        places = [(self.index[source.model], tensor) for source, tensor in zip(part.sources, tensors, strict=True)]
        own = list(zip(part.models, tensors[-len(part.models) :], strict=True))
        values: dict[str, Any] = {}
        for key, parameter in self.known.items():
            if parameter.per_model:
                values[key] = tuple(
                    self._value(part, parameter, tensor, depth, (source.settings, *part.scopes), source)
                    for source, tensor in own
                )
            else:
                values[key] = self._value(part, parameter, name, depth, part.scopes, None)
        weights = self._weights(part, name, values)
        parameters = {
            parameter.name: values.get(parameter.name, parameter.default) for parameter in self.method.parameters
        }
        if self.method.base == "optional":
            parameters["task_vectors"] = part.base is not None
        return Job(
            name=name,
            models=tuple(places[-len(part.models) :]),
            base=places[0] if part.base is not None else None,
            weights=weights,
            parameters=parameters,
        )

    def _weights(self, part: Part, name: str, values: Mapping[str, Any]) -> tuple[float, ...]:
        if self.method.weighting == "none":
            return ()
        if self.method.weighting == "t":
            return (1 - values["t"], values["t"])
        weights: tuple[float, ...] = values["weight"]
        if values.get("normalize") is True and values.get("divisor") != "models":
            try:
                check_normalizable(weights)
            except ParameterError as error:
                raise self.recipe.error(part.line, f"tensor {name!r}: {error}") from None
        return weights

    def _value(
        self,
        part: Part,
        parameter: Parameter,
        tensor: str,
        depth: float,
        scopes: Iterable[Settings],
        source: Source | None,
    ) -> Any:
        try:
            value = first_value(scopes, parameter.name, tensor, depth, self._read(parameter))
        except ParameterError as error:  # only by rounding at the very edge of the domain: ends are checked before
            raise self.recipe.error(part.line, str(error)) from None
        if value is not None:
            return value
        if parameter.name in ("weight", "t"):  # mergekit gives them no default
            where = f"model {source.model!r}" if source else "the recipe"
            hint = ""
            if source is not None and source.line == self.recipe.lines.get("base_model"):
                hint = f" (merger {self.method.name!r} merges base_model as one of the models)"
            line = source.line if source else part.line
            raise self.recipe.error(
                line, f"{where} has no {parameter.name!r} for tensor {tensor!r}; add it to 'parameters'{hint}"
            )
        return parameter.default

    def _read(self, parameter: Parameter) -> Callable[[Scalar], Scalar]:
        return lambda raw: read_value(parameter, f"merger {self.method.name!r}", raw)

    def _check_gradients(self, part: Part, source: Source) -> None:
        if self.layers[source.model].prefixes:
            return
        for scope in (*part.scopes, source.settings):
            for name, setting in scope.items():
                if setting.is_gradient:
                    raise self.recipe.error(
                        setting.line, f"{name!r} is a gradient over layers, but {self._no_layers(source)}"
                    )

    def _check_layers(self, source: Source, first: Source) -> None:
        layers = self.layers[source.model]
        if not layers.prefixes:
            raise self.recipe.error(source.line, f"slices are made of layers, but {self._no_layers(source)}")
        if len(layers.prefixes) > 1:
            stacks = ", ".join(sorted(layers.prefixes))
            raise self.recipe.error(
                source.line, f"{source.model!r} has several stacks of layers ({stacks}); use 'models'"
            )
        if layers.prefixes != self.layers[first.model].prefixes:
            raise self._incompatible(
                source, f"names its layers {self._prefix(source)!r} and {first.model!r} {self._prefix(first)!r}"
            )
        _, stop = source.layers or (0, 0)
        if stop > layers.count:
            raise self.recipe.error(
                source.line, f"layer_range ends at {stop}, but {source.model!r} has {layers.count} layers"
            )
        beyond = f"{self._prefix(source)}.{layers.count}."
        extra = [tensor for tensor in self.layouts[source.model].tensors if tensor.startswith(beyond)]
        if extra:
            raise self._incompatible(
                source, f"has {extra[0]!r} beyond its {layers.count} layers; slices cannot place it"
            )

    def _no_layers(self, source: Source) -> str:
        count = self.layouts[source.model].num_layers
        told = "its configuration has no num_hidden_layers" if count is None else f"num_hidden_layers is {count}"
        return f"no tensor names of {source.model!r} are numbered by layer ({told})"

    def _check_same(self, first: Source, wanted: set[str], source: Source, own: Iterable[str]) -> None:
        difference = wanted ^ set(own)
        if difference:
            tensor = min(difference)
            verb = "lacks" if tensor in wanted else "has an extra"
            raise self._incompatible(source, f"{verb} tensor {tensor!r}, compared with {first.model!r}")

    def _incompatible(self, source: Source, problem: str) -> MergeguardError:
        text = f"{self.recipe.source}:{source.line}: model {source.model!r} {problem}"
        return IncompatibleModelsError(one_line(text))


def _length(part: Part) -> int:
    first, stop = part.sources[0].layers or (0, 0)
    return stop - first


def _check_out(parts: Iterable[Part], recipe: Recipe, out: Path) -> None:
    target = out.resolve()
    for part in parts:
        for source in part.sources:
            for piece in source.model.split("+"):
                place = Path(piece).resolve()
                if place.is_relative_to(target) and place.exists():
                    raise recipe.error(
                        source.line, f"the model {piece!r} is the output folder {str(out)!r}; write somewhere else"
                    )


def _idle_filters(recipe: Recipe, parts: Iterable[Part], jobs: Iterable[Job]) -> list[str]:
    """One line for each filter that no tensor's name contains, most often a slip of the pen."""
    names = {name for job in jobs for name in (job.name, *(tensor for _, tensor in job.models))}
    settings = [scope for part in parts for scope in (*part.scopes, *(source.settings for source in part.sources))]
    choices = {choice for scope in settings for setting in scope.values() for choice in setting.choices}
    return [
        one_line(f"{recipe.source}:{choice.line}: filter {choice.pattern!r} matches no tensor")
        for choice in sorted(choices, key=lambda choice: choice.line)
        if not any(choice.matches(name) for name in names)
    ]

"""What a merge method makes of a recipe, before any model is opened: roles of the models, and checked parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergeguard.errors import ParameterError, UnknownNameError
from mergeguard.mergers.contract import Parameter
from mergeguard.mergers.recipe import Source
from mergeguard.mergers.settings import read_value

if TYPE_CHECKING:
    from mergeguard.mergers.contract import Method
    from mergeguard.mergers.recipe import Recipe
    from mergeguard.mergers.settings import Choice, Setting, Settings

WEIGHT = Parameter("weight", 1.0, "the model's weight", per_model=True)
T = Parameter("t", 0.5, "how far from the base model (0) to the other (1)")
DECIDED_BY_BASE = ("task_vectors", "primary")
"""Parameters of ours that a recipe's `base_model` decides."""
_NO_EFFECT = {"task_arithmetic": ("density", "rescale")}
"""What mergekit accepts for a method and ignores; `int8_mask` has no effect on the result of any."""


@dataclass(frozen=True)
class Part:
    """A slice, or the whole of a recipe with `models`, in the roles that the method gives the models.

    Attributes:
        base: the ancestor, or None.
        models: those that are merged; the first is the method's primary, if it has one.
        scopes: settings of the slice and of the recipe, the more special first.
        line: where the part starts.
    """

    base: Source | None
    models: tuple[Source, ...]
    scopes: tuple[Settings, ...]
    line: int

    @property
    def sources(self) -> tuple[Source, ...]:
        return self.models if self.base is None else (self.base, *self.models)


def known_parameters(method: Method) -> dict[str, Parameter]:
    """The parameters that a recipe may set, by name."""
    own = {"weight": [WEIGHT], "t": [T], "none": []}[method.weighting]
    parameters = (*own, *method.parameters)
    return {parameter.name: parameter for parameter in parameters if parameter.name not in DECIDED_BY_BASE}


def check_recipe(recipe: Recipe, method: Method) -> tuple[str, ...]:
    """Check all of a recipe that can be checked without the models.

    Returns:
        One line for each thing that the recipe says and that has no effect.

    Raises:
        MergeguardError: see `parts_of`; there is one model only, and the method is not for one; or a parameter is
            unknown, misplaced, of a wrong type or outside its domain.
    """
    _check_several(recipe, method)
    notes = [
        f"{recipe.source}:{source.line}: parameters of the base model have no effect on {method.name!r}"
        for part in parts_of(recipe, method)
        if (source := part.base) is not None and source.settings
    ]
    known = known_parameters(method)
    for name, setting, of_one_model in _settings(recipe):
        if name in known:
            for choice in setting.choices:
                _check_choice(recipe, method, known[name], choice)
            if of_one_model and not known[name].per_model:
                raise recipe.error(
                    setting.line,
                    f"parameter {name!r} of merger {method.name!r} is one for all models; move it to the "
                    "'parameters' of the recipe or of a slice",
                )
        elif name in DECIDED_BY_BASE:
            raise recipe.error(setting.line, f"{name!r} is decided by 'base_model' in a recipe; remove it")
        elif name in _NO_EFFECT.get(method.name, ()):
            notes.append(f"{recipe.source}:{setting.line}: {name!r} has no effect on {method.name!r}")
        elif name != "int8_mask":
            problem = UnknownNameError(f"parameter of merger {method.name!r}", name, known)
            raise recipe.error(setting.line, str(problem))
    return tuple(notes)


def _check_several(recipe: Recipe, method: Method) -> None:
    """Refuse a recipe of one model, which mergekit copies; a slice of one among others is a part of a merge."""
    models = {source.model for part in parts_of(recipe, method) for source in part.sources}
    if len(models) == 1 and method.max_models != 1:
        raise recipe.error(
            recipe.lines["models" if recipe.models else "slices"],
            f"merger {method.name!r} got one model only, {models.pop()!r}; a merge needs two, or a base and a model "
            "for task vectors; to copy one, use 'passthrough'",
        )


def _check_choice(recipe: Recipe, method: Method, parameter: Parameter, choice: Choice) -> None:
    if type(parameter.default) is int and len(choice.values) > 1:
        raise recipe.error(choice.line, f"parameter {parameter.name!r} is a whole number and can have no gradient")
    try:
        for value in choice.values:
            read_value(parameter, f"merger {method.name!r}", value)
    except ParameterError as error:
        raise recipe.error(choice.line, str(error)) from None


def _settings(recipe: Recipe) -> list[tuple[str, Setting, bool]]:
    """(name, setting, whether it is one model's) of all settings, from the top of the file."""
    shared = [recipe.settings, *(part.settings for part in recipe.slices)]
    own = [
        source.settings for sources in (recipe.models, *(part.sources for part in recipe.slices)) for source in sources
    ]
    found = [(name, setting, False) for scope in shared for name, setting in scope.items()]
    found += [(name, setting, True) for scope in own for name, setting in scope.items()]
    return sorted(found, key=lambda item: item[1].line)


def parts_of(recipe: Recipe, method: Method) -> tuple[Part, ...]:
    """The parts of a recipe, from the first layer to the last.

    As in mergekit, a `base_model` that `models` does not list is added to them, also for a method without a base; a
    slice lists its base among its sources, because it has a layer_range.

    Raises:
        MergeguardError: a base is missing; a model is listed twice; there are too many models or too few; layer
            ranges are empty, negative or of different lengths.
    """
    if recipe.models:
        sources = recipe.models
        if recipe.base_model is not None and recipe.base_model not in [source.model for source in sources]:
            sources = (*sources, Source(recipe.base_model, recipe.lines["base_model"]))
        return (_part(recipe, method, sources, recipe.base_model, (recipe.settings,), recipe.lines["models"]),)
    parts = []
    for item in recipe.slices:
        base = item.base_model or recipe.base_model
        if method.base != "none" and base is not None and base not in [source.model for source in item.sources]:
            raise recipe.error(
                item.line, f"the base model {base!r} is not among this slice's sources; add it with its layer_range"
            )
        _check_ranges(recipe, item.sources)
        parts.append(_part(recipe, method, item.sources, base, (item.settings, recipe.settings), item.line))
    return tuple(parts)


def _part(
    recipe: Recipe,
    method: Method,
    sources: tuple[Source, ...],
    base: str | None,
    scopes: tuple[Settings, ...],
    line: int,
) -> Part:
    seen: dict[str, int] = {}
    for source in sources:
        if source.model in seen:
            raise recipe.error(
                source.line,
                f"the model {source.model!r} is listed twice, first on line {seen[source.model]}; list it once, with "
                "the sum of the weights",
            )
        seen[source.model] = source.line
    if base is None and method.base in ("ancestor", "primary"):
        line_of_method = recipe.lines["merge_method"]
        raise recipe.error(line_of_method, f"merger {method.name!r} needs a base model; add 'base_model'")
    if method.base == "none":
        part = Part(None, sources, scopes, line)
    else:
        of_base = next((source for source in sources if source.model == base), None)
        others = tuple(source for source in sources if source is not of_base)
        if method.base == "primary" and of_base is not None:
            part = Part(None, (of_base, *others), scopes, line)
        else:
            part = Part(of_base, others, scopes, line)
    if not part.models:
        raise recipe.error(line, f"merger {method.name!r} got no model beside the base; add one")
    try:
        method.check_models(len(part.models))
    except ParameterError as error:
        raise recipe.error(line, str(error)) from None
    return part


def _check_ranges(recipe: Recipe, sources: tuple[Source, ...]) -> None:
    lengths = []
    for source in sources:
        first, stop = source.layers or (0, 0)
        if not 0 <= first < stop:
            raise recipe.error(
                source.line, f"layer_range [{first}, {stop}] of {source.model!r} is empty; expected 0 <= first < stop"
            )
        lengths.append(stop - first)
        if lengths[-1] != lengths[0]:
            raise recipe.error(
                source.line,
                f"layer_range of {source.model!r} has {lengths[-1]} layers, the slice's first source {lengths[0]}; "
                "give all sources of a slice the same number",
            )

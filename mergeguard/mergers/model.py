"""Merges of whole models, given as mappings from tensor name to tensor. A sweep over weights prepares once.

What is merged is a mapping too, each tensor merged when it is asked for. Small models are prepared at once; of large
ones nothing is held, and a tensor is read and prepared when it is asked for, so that memory is a few tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergeguard.checkpoints.lazy import LazyTensors
from mergeguard.errors import CheckpointError, IncompatibleModelsError, ParameterError
from mergeguard.mergers.contract import WHOLE, part
from mergeguard.mergers.spans import is_finite, span_length, spans
from mergeguard.mergers.sparsify import seeded_generator
from mergeguard.mergers.weights import check_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from torch import Tensor

    from mergeguard.mergers.contract import Generators, Merger, Method, Parameters, Prepared

_WHOLE_MODEL = ""  # stands for the tensor name when the model is merged as one vector


def merge_models(
    merger: Merger,
    base: Mapping[str, Tensor] | None,
    models: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    *,
    seed: int,
    model_ids: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Merge `models` with `weights`. See `prepare_sweep` and `Sweep` for the arguments and errors."""
    return dict(prepare_sweep(merger, base, models, seed=seed, model_ids=model_ids)(weights))


@dataclass(frozen=True)
class _Vector:
    """What is merged at once: a tensor, or all floating ones of the model joined.

    Attributes:
        base: the ancestor's, or the first model's where there is none; contiguous.
        prepared: what `Method.prepare` left; None for a tensor that is not floating, which is copied.
    """

    base: Tensor
    prepared: Prepared | None


@dataclass(frozen=True)
class Sweep:
    """Models prepared for one merger: called with weights, it gives the merged model.

    What does not depend on the weights (thresholds, masks) is held, unless the sweep was prepared not to; the base and
    the models are held by reference and must not be changed meanwhile.
    """

    merger: Merger
    _names: tuple[str, ...]
    _vector: Callable[[str], _Vector]
    _joined: Mapping[str, tuple[torch.Size, torch.dtype]]  # what is merged as one vector, by `scope=model`
    _parameters: Parameters
    _models: int

    def __call__(self, weights: Sequence[float]) -> Mapping[str, Tensor]:
        """The merged model, in the order, shapes and dtypes of the base; each tensor is merged anew when asked for.

        With `scope=model` all are merged at once and held.

        Args:
            weights: one finite number per model.

        Raises:
            ParameterError: the weights are not that, or, when a tensor is asked for, sum to 0 where they are
                normalised.
            CheckpointError: when a tensor is asked for that has values beyond its dtype's range. Of a sweep that holds
                nothing also all that `prepare_sweep` raises for a tensor.
        """
        check_weights(weights, self._models)
        weights = list(weights)
        if not self._joined:
            return LazyTensors(self._names, lambda name: self._merge(name, weights))
        joined = _split(self._merge(_WHOLE_MODEL, weights), self._joined)
        return {name: joined[name] if name in joined else self._merge(name, weights) for name in self._names}

    def _merge(self, name: str, weights: Sequence[float]) -> Tensor:
        import torch

        vector = self._vector(name)
        if vector.prepared is None:
            return vector.base.clone()
        with torch.no_grad():
            merged = combine(self.merger.method, vector.base, vector.prepared, weights, self._parameters)
        if not is_finite(merged):
            raise CheckpointError(
                f"merging {name or 'the model'!r} overflows {merged.dtype}; convert the models to float32 first"
            )
        return merged


def combine(
    method: Method, base: Tensor, prepared: Prepared, weights: Sequence[float], parameters: Parameters
) -> Tensor:
    """One merged tensor from what `method.prepare` left: span by span where the method allows, else whole.

    Both give the same bits; on a CPU, spans stay in its cache.
    """
    import torch

    length = span_length(base.device)
    if base.numel() <= length or not method.elementwise(parameters):
        return method.combine(base, prepared(WHOLE), weights, parameters)
    merged = torch.empty_like(base)
    for span in spans(base.numel(), length):
        part(merged, span).copy_(method.combine(part(base, span), prepared(span), weights, parameters))
    return merged


def prepare_sweep(
    merger: Merger,
    base: Mapping[str, Tensor] | None,
    models: Sequence[Mapping[str, Tensor]],
    *,
    seed: int,
    model_ids: Sequence[str] | None = None,
    hold: bool = True,
) -> Sweep:
    """Check the models and do all of a merge that does not depend on the weights.

    The arithmetic is in the tensors' own dtype for methods of task vectors, and accumulates in float32 for `linear`,
    as in mergekit 0.1.5; convert the models first for another. Tensors that are not floating must be equal in all
    models and are copied. Random masks depend on (seed, tensor name, model id) alone: not on the order of tensors or
    models, nor on the coefficient, and `dare_linear` and `dare_ties` share them.

    Args:
        merger: the method and its parameters.
        base: the common ancestor; None for a merger whose method needs none.
        models: at least one, with the base's tensor names, shapes, dtypes and device.
        seed: of the random masks.
        model_ids: one distinct name per model, its part of the mask's seed; "0", "1", ... by default.
        hold: prepare every tensor now and keep it for all coefficients. Without, names are compared now, and a tensor
            is read, checked and prepared each time that it is asked for, to the same bits; a merger of
            `scope=model`, which needs all tensors at once, holds all the same.

    Raises:
        ParameterError: no models, no base where one is needed, or bad `model_ids`.
        IncompatibleModelsError: tensors differ in name, shape or dtype, or a non-floating tensor in value.
        CheckpointError: a tensor holds NaN or infinity.
    """
    import torch

    if not models:
        raise ParameterError(f"merger {merger} got no models to merge")
    merger.method.check_models(len(models))
    if base is None and merger.needs_base:
        raise ParameterError(f"merger {merger} merges differences from a base model; give the base")
    ids = [str(index) for index in range(len(models))] if model_ids is None else list(model_ids)
    if len(ids) != len(models) or len(set(ids)) != len(ids):
        raise ParameterError(f"model ids {ids} for {len(models)} models; expected one distinct id per model")
    names = tuple(models[0] if base is None else base)
    for model_id, model in zip(ids, models, strict=True):
        _check_names(names, model, f"model {model_id!r}")
    parameters = merger.kernel_parameters(len(models))

    def read(name: str) -> list[Tensor]:
        """The base's tensor (the first model's, if there is none) and the models', each asked for once."""
        tensors = [model[name] for model in models]
        reference = tensors[0] if base is None else base[name]
        for model_id, tensor in zip(ids, tensors, strict=True):
            _check_like(reference, tensor, name, f"model {model_id!r}")
        if base is not None:
            _check_like(reference, reference, name, "the base")
        return [reference, *tensors]

    def prepare(key: str, base: Tensor, models: list[Tensor]) -> _Vector:
        with torch.no_grad():
            return _Vector(base, merger.method.prepare(base, models, parameters, _generators(seed, key, ids)))

    def vector(name: str) -> _Vector:
        base, *models = (tensor.contiguous() for tensor in read(name))
        return prepare(name, base, models) if base.is_floating_point() else _Vector(base, None)

    if not merger.merges_whole_model:
        found = {name: vector(name) for name in names}.__getitem__ if hold else vector
        return Sweep(merger, names, found, {}, parameters, len(models))
    inputs = {name: read(name) for name in names}
    floating = sorted(name for name in names if inputs[name][0].is_floating_point())
    held = {name: _Vector(tensors[0], None) for name, tensors in inputs.items() if name not in floating}
    if floating:
        whole, *others = (
            torch.cat([inputs[name][index].flatten() for name in floating]) for index in range(len(models) + 1)
        )
        held[_WHOLE_MODEL] = prepare(_WHOLE_MODEL, whole, others)
    layout = {name: (inputs[name][0].shape, inputs[name][0].dtype) for name in floating}
    return Sweep(merger, names, held.__getitem__, layout, parameters, len(models))


def _generators(seed: int, tensor: str, ids: Sequence[str]) -> Generators:
    return lambda index: seeded_generator(seed, tensor, ids[index])


def _check_names(wanted: Sequence[str], model: Mapping[str, Tensor], label: str) -> None:
    for name in sorted(set(wanted) ^ set(model)):
        problem = "lacks" if name in wanted else "has an extra"
        raise IncompatibleModelsError(f"{label} {problem} tensor {name!r}; all models need the tensors of the first")


def _check_like(expected: Tensor, tensor: Tensor, name: str, label: str) -> None:
    import torch

    for what in ("shape", "dtype", "device"):
        found, wanted = getattr(tensor, what), getattr(expected, what)
        if found != wanted:
            raise IncompatibleModelsError(f"tensor {name!r} of {label} has {what} {found}, expected {wanted}")
    if not tensor.is_floating_point():
        if not torch.equal(tensor, expected):
            raise IncompatibleModelsError(
                f"tensor {name!r} of {label} ({tensor.dtype}) differs, and only floating tensors can be merged"
            )
    elif not is_finite(tensor):
        raise CheckpointError(f"tensor {name!r} of {label} holds NaN or infinity; a merge would spread it")


def _split(vector: Tensor, layout: Mapping[str, tuple[torch.Size, torch.dtype]]) -> dict[str, Tensor]:
    import torch

    parts = torch.split(vector, [shape.numel() for shape, _ in layout.values()])
    return {
        name: part.view(shape).to(dtype, copy=True)
        for part, (name, (shape, dtype)) in zip(parts, layout.items(), strict=True)
    }

"""Merges of whole models, given as mappings from tensor name to tensor. A sweep over weights prepares once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergeguard.errors import CheckpointError, IncompatibleModelsError, ParameterError
from mergeguard.mergers.contract import WHOLE, part
from mergeguard.mergers.spans import SPAN, is_finite, spans
from mergeguard.mergers.sparsify import seeded_generator
from mergeguard.mergers.weights import check_weights

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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
    """Merge `models` with `weights`. See `prepare_sweep` for the arguments and errors."""
    return prepare_sweep(merger, base, models, seed=seed, model_ids=model_ids)(weights)


@dataclass(frozen=True)
class Sweep:
    """Models prepared for one merger: called with weights, it gives the merged model.

    What does not depend on the weights (thresholds, masks) is held; the base and the models are held by reference and
    must not be changed meanwhile.
    """

    merger: Merger
    _reference: Mapping[str, Tensor]
    _vectors: Mapping[str, tuple[str, ...]]
    _prepared: Mapping[str, Prepared]
    _parameters: Parameters
    _models: int

    def __call__(self, weights: Sequence[float]) -> dict[str, Tensor]:
        """The merged model: new tensors, in the order, shapes and dtypes of the base.

        Args:
            weights: one finite number per model.

        Raises:
            ParameterError: the weights are not that, or sum to 0 where they are normalised.
            CheckpointError: the merged tensor has values beyond its dtype's range.
        """
        import torch

        check_weights(weights, self._models)
        merged = {name: tensor.clone() for name, tensor in self._reference.items() if not tensor.is_floating_point()}
        with torch.no_grad():
            for key, names in self._vectors.items():
                base = _join(self._reference, names)
                vector = combine(self.merger.method, base, self._prepared[key], weights, self._parameters)
                if not is_finite(vector):
                    raise CheckpointError(
                        f"merging {key or 'the model'!r} overflows {vector.dtype}; convert the models to float32 first"
                    )
                merged.update(_split(vector, names, self._reference))
        return {name: merged[name] for name in self._reference}


def combine(
    method: Method, base: Tensor, prepared: Prepared, weights: Sequence[float], parameters: Parameters
) -> Tensor:
    """One merged tensor from what `method.prepare` left: span by span where the method allows, else whole.

    Both give the same bits; spans stay in the processor's cache.
    """
    import torch

    if base.numel() <= SPAN or not method.elementwise(parameters):
        return method.combine(base, prepared(WHOLE), weights, parameters)
    merged = torch.empty_like(base)
    for span in spans(base.numel()):
        part(merged, span).copy_(method.combine(part(base, span), prepared(span), weights, parameters))
    return merged


def prepare_sweep(
    merger: Merger,
    base: Mapping[str, Tensor] | None,
    models: Sequence[Mapping[str, Tensor]],
    *,
    seed: int,
    model_ids: Sequence[str] | None = None,
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
    reference = models[0] if base is None else base
    for model_id, model in zip(ids, models, strict=True):
        _check_like(reference, model, f"model {model_id!r}")
    if base is not None:
        _check_like(base, base, "the base")

    floating = [name for name, tensor in reference.items() if tensor.is_floating_point()]
    vectors = (
        {_WHOLE_MODEL: tuple(sorted(floating))} if merger.merges_whole_model else {name: (name,) for name in floating}
    )
    parameters = merger.kernel_parameters(len(models))
    prepared = {}
    with torch.no_grad():
        for key, names in vectors.items():
            prepared[key] = merger.method.prepare(
                _join(reference, names),
                [_join(model, names) for model in models],
                parameters,
                _generators(seed, key, ids),
            )
    return Sweep(merger, reference, vectors, prepared, parameters, len(models))


def _generators(seed: int, tensor: str, ids: Sequence[str]) -> Generators:
    return lambda index: seeded_generator(seed, tensor, ids[index])


def _check_like(reference: Mapping[str, Tensor], model: Mapping[str, Tensor], label: str) -> None:
    import torch

    for name in sorted(reference.keys() ^ model.keys()):
        problem = "lacks" if name in reference else "has an extra"
        raise IncompatibleModelsError(f"{label} {problem} tensor {name!r}; all models need the tensors of the first")
    for name, expected in reference.items():
        tensor = model[name]
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


def _join(model: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    import torch

    return model[names[0]].contiguous() if len(names) == 1 else torch.cat([model[name].flatten() for name in names])


def _split(vector: Tensor, names: Sequence[str], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    import torch

    if len(names) == 1:
        return {names[0]: vector}
    parts = torch.split(vector, [like[name].numel() for name in names])
    return {
        name: part.view_as(like[name]).to(like[name].dtype, copy=True) for name, part in zip(names, parts, strict=True)
    }

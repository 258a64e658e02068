"""DARE: drop random entries of the task vectors and rescale the rest, then merge by task arithmetic or TIES."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeguard.mergers import task_arithmetic, ties
from mergeguard.mergers.contract import Generators, Method, Parameter, Parameters, Prepared, Values, always
from mergeguard.mergers.spans import each
from mergeguard.mergers.sparsify import drop, trim
from mergeguard.mergers.task_arithmetic import SCALE, task_vectors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_CITATION = "Yu et al. 2024, arXiv:2311.03099"
_PARAMETERS = (
    Parameter(
        "density", 1.0, "expected share of each task vector that stays, 1 - p", above=0.0, at_most=1.0, per_model=True
    ),
    Parameter(
        "rescale",
        "l1",
        "restore the L1 norm (mergekit), divide by the density (paper), or none",
        ("l1", "inverse", "none"),
    ),
    SCALE,
)


def _dropped(base: Tensor, models: Sequence[Tensor], parameters: Parameters, generators: Generators) -> list[Values]:
    return [
        drop(delta, base, density, generators(index), rescale=parameters["rescale"])
        for index, (delta, density) in enumerate(zip(task_vectors(base, models), parameters["density"], strict=True))
    ]


def _prepare(base: Tensor, models: Sequence[Tensor], parameters: Parameters, generators: Generators) -> Prepared:
    return each(_dropped(base, models, parameters, generators))


def _prepare_trimmed(
    base: Tensor, models: Sequence[Tensor], parameters: Parameters, generators: Generators
) -> Prepared:
    return each([trim(delta, base, parameters["trim"]) for delta in _dropped(base, models, parameters, generators)])


DARE_LINEAR = Method(
    name="dare_linear",
    summary="drop random entries of the task vectors and rescale, then task arithmetic",
    citation=_CITATION,
    combine=task_arithmetic.combine,
    parameters=(*_PARAMETERS, Parameter("normalize", False, "divide the weighted sum by the sum of the weights")),
    prepare=_prepare,
    elementwise=always,
    random=True,
)

DARE_TIES = Method(
    name="dare_ties",
    summary="drop random entries of the task vectors and rescale, then elect a sign and merge as TIES",
    citation=_CITATION,
    combine=ties.combine,
    parameters=(
        *_PARAMETERS,
        Parameter("normalize", False, "divide the sum of the agreeing task vectors; see divisor"),
        Parameter(
            "trim",
            1.0,
            "density of a TIES trim after dropping: 1 is none (mergekit), the paper trims",
            above=0.0,
            at_most=1.0,
        ),
        *ties.ELECTION,
    ),
    prepare=_prepare_trimmed,
    elementwise=ties.elementwise,
    random=True,
)

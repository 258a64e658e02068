"""Model Breadcrumbs: drop the largest and the smallest entries of the task vectors, then task arithmetic or TIES."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeguard.mergers import task_arithmetic, ties
from mergeguard.mergers.contract import Generators, Method, Parameter, Parameters, Prepared, Values, always
from mergeguard.mergers.selection import largest
from mergeguard.mergers.spans import each
from mergeguard.mergers.sparsify import rescaled
from mergeguard.mergers.task_arithmetic import SCALE, task_vectors
from mergeguard.mergers.ties import DENSITY

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from mergeguard.mergers.contract import Span


def band(delta: Values, like: Tensor, density: float, gamma: float, *, rescale: str = "none") -> Values:
    """Drop the int(gamma * n) entries of largest magnitude and keep the next int(density * n).

    Davari & Belilovsky 2023, arXiv:2312.06795, with the parameters of mergekit 0.1.5: what lies below the band is the
    share 1 - gamma - density. As there, fewer large ones are dropped where int(density * n) would not be left, and
    density 1 drops nothing, whatever gamma. Equal magnitudes rank by index, the lowest as the largest; mergekit leaves
    their order to an unstable sort.

    Args:
        delta: a task vector.
        like: a tensor of its shape, dtype and device.
        density: share that stays, in (0, 1].
        gamma: share of the largest that is dropped, in [0, 1].
        rescale: "none", or "l1"; see `sparsify.rescaled`.
    """
    size = like.numel()
    if density >= 1 or size == 0:
        return delta
    stay = int(density * size)
    outliers = min(int(gamma * size), size - stay)
    without, among = largest(delta, size, outliers), largest(delta, size, outliers + stay)

    def keep(values: Tensor, span: Span) -> Tensor:
        return among.keep(values, span) - without.keep(values, span)  # exact: x - 0, x - x or 0 - 0

    return rescaled(delta, keep, like, density, rescale)


def _prepare(base: Tensor, models: Sequence[Tensor], parameters: Parameters, _generators: Generators) -> Prepared:
    shares = zip(task_vectors(base, models), parameters["density"], parameters["gamma"], strict=True)
    return each([band(delta, base, density, gamma, rescale=parameters["rescale"]) for delta, density, gamma in shares])


_CITATION = "Davari & Belilovsky 2023, arXiv:2312.06795"
_PARAMETERS = (
    DENSITY,
    Parameter("gamma", 0.01, "share of the largest entries that is dropped", at_least=0.0, at_most=1.0, per_model=True),
    Parameter("normalize", False, "divide the weighted sum by the sum of the weights"),
    SCALE,
    Parameter(
        "rescale", "none", "after dropping: none (paper) or restore the L1 norm (mergekit's option)", ("none", "l1")
    ),
)

BREADCRUMBS = Method(
    name="breadcrumbs",
    summary="drop the largest and the smallest entries of the task vectors, then task arithmetic",
    citation=_CITATION,
    combine=task_arithmetic.combine,
    parameters=_PARAMETERS,
    prepare=_prepare,
    elementwise=always,
)

BREADCRUMBS_TIES = Method(
    name="breadcrumbs_ties",
    summary="drop the largest and the smallest entries of the task vectors, then elect a sign and merge as TIES",
    citation=_CITATION,
    combine=ties.combine,
    parameters=(*_PARAMETERS, *ties.ELECTION),
    prepare=_prepare,
    elementwise=ties.elementwise,
)

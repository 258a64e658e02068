"""Is the base the models' common ancestor? Task vectors from any other model are mostly the difference of the bases.

Fine-tunes of one base move little, and in directions of their own: ||m - b|| is small beside ||b||, and the cosine
between two task vectors is near 0. If the models descend from another model than the given base, all their task vectors
share the way from the base to that model, and the cosine is near 1. Weights that were never trained from each other are
about sqrt(2) ||b|| apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from mergeguard.errors import IncompatibleModelsError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from mergeguard.checkpoints.source import Source
    from mergeguard.mergers.jobs import Job

SAMPLED_TENSORS = 12
SAMPLED_ELEMENTS = 2**16
SMALL = 2**22
"""Elements up to which a tensor is read for the sample, unless all are larger."""
UNRELATED = 1.0
"""Relative distance from which weights are taken for unrelated: sqrt(2) is expected of independent ones."""
SHARED = 0.5
"""Cosine of two task vectors from which they share more than two fine-tunes of one base would."""


@dataclass(frozen=True)
class Ancestry:
    """What was measured over a sample of the weights.

    Attributes:
        distances: ||m - b|| / ||b|| of each model, by its label.
        cosines: between the task vectors of each pair of models; 0 where one has not moved.
        tensors: how many tensors were sampled.
    """

    distances: Mapping[str, float]
    cosines: Mapping[tuple[str, str], float]
    tensors: int

    def as_json(self) -> dict[str, Any]:
        """The measurement as plain data."""
        return {
            "distances": dict(self.distances),
            "cosines": [{"models": list(pair), "cosine": cosine} for pair, cosine in self.cosines.items()],
            "tensors": self.tensors,
        }

    def warnings(self, base: str) -> list[str]:
        """What the measurement says against `base` as the common ancestor, a line each."""
        lines = [
            f"the task vectors of {one} and {other} point the same way (cosine {cosine:.2f}, near 0 expected of two "
            f"fine-tunes of one base): {base} may not be their common ancestor"
            for (one, other), cosine in self.cosines.items()
            if cosine >= SHARED
        ]
        lines += [
            f"{label} equals the base {base} in all {self.tensors} sampled tensors: its task vector is zero"
            for label, distance in self.distances.items()
            if distance == 0
        ]
        return lines

    def check_related(self, base: str) -> None:
        """Refuse models whose weights have nothing to do with the base's.

        Raises:
            IncompatibleModelsError: a model is as far from the base as an unrelated one would be.
        """
        for label, distance in self.distances.items():
            if distance >= UNRELATED:
                raise IncompatibleModelsError(
                    f"{label} is unrelated to the base {base}: their weights differ by {distance:.2f} times the base's "
                    f"norm (1.41 expected of independent weights, far below 1 of a fine-tune); name the model that "
                    "both were trained from as base_model, or pass --allow-unrelated"
                )


def measure(jobs: Sequence[Job], sources: Sequence[Source], labels: Sequence[str]) -> Ancestry | None:
    """Compare models with their base over a sample of matrices, spread over the depth of the model.

    Args:
        jobs: of a merge; those with a base count.
        sources: the inputs that the jobs refer to.
        labels: a name for each input.

    Returns:
        None if no job has a base and a model beside it, with a floating matrix of equal shapes.
    """
    comparable = [job for job in jobs if _is_comparable(job, sources)]
    chosen = _sample([job for job in comparable if _elements(job, sources) <= SMALL] or comparable)
    if not chosen:
        return None
    base_norm = 0.0
    squares: dict[str, float] = {}
    products: dict[tuple[str, str], float] = {}
    for job in chosen:
        assert job.base is not None
        base = _read(sources, *job.base)
        base_norm += float(base @ base)
        deltas = {labels[index]: _read(sources, index, name) - base for index, name in job.models}
        for label, delta in deltas.items():
            squares[label] = squares.get(label, 0.0) + float(delta @ delta)
        for one, other in combinations(deltas, 2):
            products[one, other] = products.get((one, other), 0.0) + float(deltas[one] @ deltas[other])
    cosines = {
        (one, other): product / scale if (scale := math.sqrt(squares[one] * squares[other])) else 0.0
        for (one, other), product in products.items()
    }
    distances = {
        label: math.sqrt(square / base_norm) if base_norm else float(square > 0) for label, square in squares.items()
    }
    return Ancestry(distances, cosines, len(chosen))


def _is_comparable(job: Job, sources: Sequence[Source]) -> bool:
    if job.base is None or not job.models:
        return False
    infos = [sources[index].tensors[name] for index, name in (job.base, *job.models)]
    floating = all(info.dtype.startswith(("float", "bfloat")) for info in infos)
    return floating and len(infos[0].shape) >= 2 and len({info.shape for info in infos}) == 1


def _elements(job: Job, sources: Sequence[Source]) -> int:
    index, name = job.inputs[0]
    return math.prod(sources[index].tensors[name].shape)


def _sample(jobs: Sequence[Job]) -> list[Job]:
    step = max(1, len(jobs) / SAMPLED_TENSORS)
    return [jobs[int((index + 0.5) * step)] for index in range(min(SAMPLED_TENSORS, len(jobs)))]


def _read(sources: Sequence[Source], index: int, name: str) -> Tensor:
    flat = sources[index].read(name).view(-1)
    return flat[:: max(1, flat.numel() // SAMPLED_ELEMENTS)].double()

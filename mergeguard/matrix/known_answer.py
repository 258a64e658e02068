"""The closed form of the Gaussian probe under every default merger: the pipeline's end-to-end oracle.

The probe adds s K to one matrix W of the owner's upstream; K is a standard normal tensor and s a scalar. With the
clean task vector P of the owner and D of the donor, weights a and b, the suspect's delta on that matrix is

- linear, task arithmetic:  lambda (a (P + s K) + b D), so that z = <delta, K> / |delta| needs no merge code at all;
- TIES: an element-wise function of the trimmed vectors, written out here in NumPy, apart from the kernels;
- DARE: a mask of known density on each vector; the numerator's expectation is that of linear, and the tolerance is
  four standard deviations of the masks' randomness, computed from the same vectors.

`disagreement` is in units of that tolerance, or of 1e-3 of the score for the methods without randomness.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from mergeguard.errors import ParameterError
from mergeguard.protections.gaussian_probe import GaussianProbe, keyed_gaussian

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mergeguard.matrix.engine import Engine
    from mergeguard.mergers.contract import Merger
    from mergeguard.worlds.states import State

RELATIVE_TOLERANCE = 1e-3
SIGMAS = 4.0


def disagreement(engine: Engine, merger: Merger, coefficient: float) -> float:
    """How far the pipeline's reading is from the closed form, in tolerances: at most 1 if they agree.

    Raises:
        ParameterError: no closed form is known for the merger.
    """
    probe = GaussianProbe()
    embedded = engine.embedded(probe)
    reading = engine.read_pair(embedded, engine.merged(merger, coefficient, str(probe))).keys
    expected, tolerance = closed_form(engine, merger, coefficient)
    return abs((reading.score or 0.0) - expected) / tolerance


def closed_form(engine: Engine, merger: Merger, coefficient: float) -> tuple[float, float]:
    """The expected score and the tolerance, from the parents' matrices alone, in float64."""
    embedded = engine.embedded(GaussianProbe())
    name, key = embedded.evidence.data["weight"], embedded.evidence.data["keys"][0]

    def matrix(state: State) -> NDArray[np.float64]:
        return state[name].to("cpu", engine.world.torch_dtype).double().numpy()

    base = matrix(engine.world.base)
    owner = matrix(embedded.state) - base
    donors = [matrix(state) - base for state in engine.world.donors.values()]
    gaussian = keyed_gaussian(key, torch.Size(base.shape)).double().numpy()
    weights = [coefficient, *[(1 - coefficient) / len(donors)] * len(donors)]
    deltas = [owner, *donors]
    parameters = merger.parameters
    scale = float(parameters.get("lambda", 1.0))
    density = float(parameters.get("density", 1.0))
    if merger.name in ("linear", "task_arithmetic"):
        total = sum(weight * delta for weight, delta in zip(weights, deltas, strict=True))
        return _exact(np.asarray(scale * total), gaussian)
    if merger.name == "ties":
        trimmed = [_trim(delta, density) for delta in deltas]
        return _exact(_elect(trimmed, weights, normalize=bool(parameters["normalize"])), gaussian)
    if merger.name in ("dare_linear", "dare_ties"):
        return _over_masks(deltas, weights, density, gaussian, merger)
    raise ParameterError(f"no closed form of gaussian_probe is known for {merger}")


def _z(delta: NDArray[np.float64], gaussian: NDArray[np.float64]) -> float:
    return float((delta * gaussian).sum() / np.linalg.norm(delta))


def _exact(delta: NDArray[np.float64], gaussian: NDArray[np.float64]) -> tuple[float, float]:
    expected = _z(delta, gaussian)
    return expected, RELATIVE_TOLERANCE * max(1.0, abs(expected))


def _trim(delta: NDArray[np.float64], density: float) -> NDArray[np.float64]:
    keep = max(1, int(density * delta.size))
    threshold = np.partition(np.abs(delta), delta.size - keep, axis=None)[delta.size - keep]
    return np.where(np.abs(delta) >= threshold, delta, 0.0)


def _elect(deltas: list[NDArray[np.float64]], weights: list[float], *, normalize: bool) -> NDArray[np.float64]:
    weighted = [weight * delta for weight, delta in zip(weights, deltas, strict=True)]
    sign = np.where(sum(weighted) >= 0, 1.0, -1.0)
    agrees = [np.sign(term) == sign for term in weighted]
    total = sum(np.where(agree, term, 0.0) for agree, term in zip(agrees, weighted, strict=True))
    if not normalize:
        return np.asarray(total)
    divisor = sum(np.where(agree, weight, 0.0) for agree, weight in zip(agrees, weights, strict=True))
    return np.asarray(total / np.where(divisor == 0, 1.0, divisor))


def _over_masks(
    deltas: list[NDArray[np.float64]],
    weights: list[float],
    density: float,
    gaussian: NDArray[np.float64],
    merger: Merger,
    draws: int = 12,
) -> tuple[float, float]:
    """Mean over independent masks, and a tolerance from their spread.

    The rescaling that the merger uses, by 1/density or so that the L1 norm stays, is a scalar per vector that differs
    from 1/density by O(1/sqrt(n)); the spread over masks covers it.
    """
    rng = np.random.default_rng(0)
    scores = []
    for _ in range(draws):
        masked = [delta * (rng.random(delta.shape) < density) / density for delta in deltas]
        if merger.name == "dare_ties":
            delta = _elect(masked, weights, normalize=bool(merger.parameters["normalize"]))
        else:
            delta = np.asarray(sum(weight * term for weight, term in zip(weights, masked, strict=True)))
        scores.append(_z(delta, gaussian))
    spread = float(np.std(scores, ddof=1))
    return float(np.mean(scores)), max(SIGMAS * spread * (1 + 1 / draws) ** 0.5, RELATIVE_TOLERANCE)

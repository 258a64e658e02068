"""Mergers: merge methods with their parameters, and merges of whole models. Imports no torch by itself.

A *merger* is a frozen value, written ``ties(density=0.4,normalize=true)``; `parse_merger` reads that form. The
*coefficient*, alpha, is the weight of the protected model: donors share 1 - alpha. Methods that have no weights, such
as ``model_stock``, have cells without a coefficient.

A `Method` is a pure function of the base's tensor, the models' tensors and the weights. It never writes into its
arguments, and is random only through generators that are seeded by (seed, tensor name, model), so that neither order
nor threads change a merge. It has two steps: `prepare` does what does not depend on the weights, such as trimming;
`combine` merges. A sweep over coefficients repeats the second step alone.

Every method names its source, and is compared with mergekit 0.1.5 where that has it. The site has a page
for each, with its parameters and what was measured under it.

.. code-block:: python

    import torch

    from mergeguard.mergers import merge_models, parse_merger

    base, mine, theirs = ({"weight": torch.randn(4, 4)} for _ in range(3))
    merged = merge_models(parse_merger("ties(density=0.4)"), base, [mine, theirs], [0.6, 0.4], seed=0)

The default matrix is `DEFAULT_MERGERS` by `DEFAULT_COEFFICIENTS`. A third party registers a `Method` in the entry-point
group ``mergeguard.mergers``. `mergeguard merge` applies the same methods to checkpoints on disk, by mergekit's recipes,
tensor by tensor.
"""

from __future__ import annotations

from mergeguard.mergers.contract import Merger, Method, Parameter
from mergeguard.mergers.model import Sweep, merge_models, prepare_sweep
from mergeguard.mergers.registry import DEFAULT_COEFFICIENTS, DEFAULT_MERGERS, MERGERS, parse_merger
from mergeguard.mergers.weights import coefficient_weights

__all__ = [
    "DEFAULT_COEFFICIENTS",
    "DEFAULT_MERGERS",
    "MERGERS",
    "Merger",
    "Method",
    "Parameter",
    "Sweep",
    "coefficient_weights",
    "merge_models",
    "parse_merger",
    "prepare_sweep",
]

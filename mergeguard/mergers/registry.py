"""The merge methods by name, and the default matrix. Light: torch is not imported, even to list every method."""

from __future__ import annotations

from mergeguard.errors import MergeguardError
from mergeguard.mergers.contract import Merger, Method
from mergeguard.registry import Registry
from mergeguard.specs import parse_spec

MERGERS: Registry[Method] = Registry(
    "merger",
    "mergeguard.mergers",
    {
        "linear": "mergeguard.mergers.linear:LINEAR",
        "task_arithmetic": "mergeguard.mergers.task_arithmetic:TASK_ARITHMETIC",
        "ties": "mergeguard.mergers.ties:TIES",
        "dare_linear": "mergeguard.mergers.dare:DARE_LINEAR",
        "dare_ties": "mergeguard.mergers.dare:DARE_TIES",
    },
)

DEFAULT_MERGERS: tuple[str, ...] = (
    "linear",
    # With lambda 1 and weights that sum to 1 it equals linear; 1.4 is the .7/.7 of arXiv:2404.05188 at alpha .5.
    "task_arithmetic(lambda=1.4)",
    "ties(density=0.4,normalize=true)",
    "dare_linear(density=0.4)",
    "dare_ties(density=0.4,normalize=true)",
)
DEFAULT_COEFFICIENTS: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def parse_merger(text: str) -> Merger:
    """Read `ties` or `ties(density=0.4,normalize=true)`.

    Raises:
        UnknownNameError: no such method, or no such parameter of it.
        ParameterError: the text is not of this form, or a value lies outside its domain.
        MergeguardError: what is registered under the name is not that method.
    """
    spec = parse_spec(text)
    method: object = MERGERS.get(spec.name)  # an entry point may be anything
    if not isinstance(method, Method) or method.name != spec.name:
        raise MergeguardError(
            f"merger {spec.name!r} is registered as {method!r}; expected a mergeguard.mergers.Method of that name"
        )
    return method(**dict(spec.parameters))

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
        "arcee_fusion": "mergeguard.mergers.arcee_fusion:ARCEE_FUSION",
        "breadcrumbs": "mergeguard.mergers.breadcrumbs:BREADCRUMBS",
        "breadcrumbs_ties": "mergeguard.mergers.breadcrumbs:BREADCRUMBS_TIES",
        "consensus_task_arithmetic": "mergeguard.mergers.consensus:CONSENSUS_TASK_ARITHMETIC",
        "dare_linear": "mergeguard.mergers.dare:DARE_LINEAR",
        "dare_ties": "mergeguard.mergers.dare:DARE_TIES",
        "della": "mergeguard.mergers.della:DELLA",
        "della_linear": "mergeguard.mergers.della:DELLA_LINEAR",
        "expo": "mergeguard.mergers.expo:EXPO",
        "iso_c": "mergeguard.mergers.iso:ISO_C",
        "karcher": "mergeguard.mergers.karcher:KARCHER",
        "linear": "mergeguard.mergers.linear:LINEAR",
        "model_stock": "mergeguard.mergers.model_stock:MODEL_STOCK",
        "multislerp": "mergeguard.mergers.multislerp:MULTISLERP",
        "nearswap": "mergeguard.mergers.nearswap:NEARSWAP",
        "nuslerp": "mergeguard.mergers.slerp:NUSLERP",
        "passthrough": "mergeguard.mergers.passthrough:PASSTHROUGH",
        "ram": "mergeguard.mergers.ram:RAM",
        "ramplus_tl": "mergeguard.mergers.ram:RAMPLUS_TL",
        "sce": "mergeguard.mergers.sce:SCE",
        "slerp": "mergeguard.mergers.slerp:SLERP",
        "task_arithmetic": "mergeguard.mergers.task_arithmetic:TASK_ARITHMETIC",
        "ties": "mergeguard.mergers.ties:TIES",
        "tsv_merge": "mergeguard.mergers.tsv:TSV_MERGE",
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


def find_method(name: str) -> Method:
    """The method registered under `name`, or mergekit's for `mergekit:<name>`.

    Raises:
        UnknownNameError: there is no such method.
        MergeguardError: what is registered under the name is not that method, or mergekit is not installed.
    """
    from mergeguard.mergers.mergekit_methods import PREFIX, mergekit_method

    if name.startswith(PREFIX):
        return mergekit_method(name.removeprefix(PREFIX))
    method: object = MERGERS.get(name)  # an entry point may be anything
    if not isinstance(method, Method) or method.name != name:
        raise MergeguardError(
            f"merger {name!r} is registered as {method!r}; expected a mergeguard.mergers.Method of that name"
        )
    return method


def is_registered(method: Method) -> bool:
    """Whether `find_method` finds this method under its name, in another process too."""
    from mergeguard.mergers.mergekit_methods import PREFIX

    return method.name.startswith(PREFIX) or (method.name in MERGERS and MERGERS.get(method.name) is method)


def parse_merger(text: str) -> Merger:
    """Read `ties` or `ties(density=0.4,normalize=true)`.

    Raises:
        UnknownNameError: no such method, or no such parameter of it.
        ParameterError: the text is not of this form, or a value lies outside its domain.
        MergeguardError: what is registered under the name is not that method.
    """
    spec = parse_spec(text)
    return find_method(spec.name)(**dict(spec.parameters))

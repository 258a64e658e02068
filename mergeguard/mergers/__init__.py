"""Merge methods as pure functions of tensors, and whole-model merges built on them. Imports no torch by itself."""

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

"""Exceptions of mergeguard.

MergeguardError                 something is wrong with an input; one clear line, exit code 2
├── UnknownNameError            a name that is not registered; suggests the nearest
├── ParameterError              an option or parameter out of its domain
├── CheckpointError             a file or tensor that cannot be used
├── IncompatibleModelsError     models whose tensors differ in name, shape or dtype
├── UndecidableError            too few trials to reach the level at all
└── ServedModelError            an endpoint that gives no usable answer
EvidenceLost (AssertionError)   a theft from which the evidence did not survive
GateFailed (AssertionError)     any other broken promise: a gate before merging, a stale or wrong record
SchemeError                     a protection crashed, took too long or broke its contract
└── ContractError               it broke its contract: a type, a NaN, evidence that is not plain data
InvalidReading (ValueError)     a reading that cannot be: hits that are no bools, a score that is NaN
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class MergeguardError(Exception):
    """An input that mergeguard cannot use. The message is one line that says what is wrong and what to do."""


class UnknownNameError(MergeguardError):
    """A name that is not registered."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        self._arguments = (kind, name, names)
        close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names) or 'none'}"
        super().__init__(f"unknown {kind} {name!r}; {hint}")

    def __reduce__(self) -> tuple[type[UnknownNameError], tuple[str, str, list[str]]]:
        """Pickles by its arguments, so that a worker process can raise it."""
        return type(self), self._arguments


class ParameterError(MergeguardError):
    """A parameter or option whose value is outside its domain."""


class CheckpointError(MergeguardError):
    """A checkpoint, file or tensor that cannot be used."""


class IncompatibleModelsError(MergeguardError):
    """Models that cannot be merged: tensors differ in name, shape or dtype."""


class UndecidableError(MergeguardError):
    """A measurement with too few trials to reach the level, whatever it finds."""


class ServedModelError(MergeguardError):
    """An endpoint that refuses, fails or answers with something else than a model's text. Never a reading."""


class EvidenceLost(AssertionError):
    """A theft from which the evidence did not survive (verdict `lost` or `overclaims`)."""


class GateFailed(AssertionError):
    """A gate before merging failed, or a recorded loss does not describe what was measured."""


class SchemeError(Exception):
    """A protection crashed or broke its contract. Always red: never a verdict, never an expected loss."""


class ContractError(SchemeError):
    """A protection returned what its contract does not allow. Bad input for a gate, which then has no verdict."""


class InvalidReading(ValueError, TypeError):
    """A reading that cannot be: neither hits nor a score, hits that are no bools, a NaN, a p-value above 1."""

"""Gates before merging: a protection that fails one of them has nothing to survive with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mergeguard.errors import GateFailed
from mergeguard.matrix import gates

if TYPE_CHECKING:
    from collections.abc import Callable

    from mergeguard.matrix.engine import Engine
    from mergeguard.matrix.outcome import Gate
    from mergeguard.specs import Spec

GATES = {
    gates.EFFECTIVE: gates.effective,
    gates.HARMLESS: gates.harmless,
    gates.SPECIFIC: lambda _, embedded: gates.specific(embedded),
    gates.PERSISTENT: gates.persistent,
}


@pytest.mark.parametrize("name", GATES)
def test_protection_is(name: str, protection: Spec, engine: Engine, report_gate: Callable[[Gate], None]) -> None:
    gate = GATES[name](engine, engine.embedded(protection))
    report_gate(gate)
    if not gate.passed:
        raise GateFailed(f"{protection} is not {name}: {gate.measured}; required: {gate.required}")

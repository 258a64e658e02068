"""The schemes' variants before merging: which of them keep their promises on the tiny world, and which fail by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mergeguard.matrix import gates
from mergeguard.protections.registry import make_protection

if TYPE_CHECKING:
    from mergeguard.matrix.engine import Engine

pytestmark = pytest.mark.slow
EVERY_GATE = {gates.EFFECTIVE, gates.HARMLESS, gates.SPECIFIC, gates.PERSISTENT}


def passed(engine: Engine, spec: str) -> set[str]:
    return {gate.gate for gate in gates.before_merging(engine, make_protection(spec)) if gate.passed}


@pytest.mark.parametrize(
    "spec",
    [
        "instructional_fingerprint(variant=dialogue)",
        "instructional_fingerprint(variant=adapter)",
        "instructional_fingerprint(rule=contains)",
        "quantization_watermark(mode=untriggered)",
        "quantization_watermark(mode=domain)",
        "quantization_watermark(direction=quantized)",
        "quantization_watermark(optimisation=rollback)",
        "gaussian_probe",
    ],
)
def test_variant_keeps_every_promise(spec: str, engine: Engine) -> None:
    assert passed(engine, spec) == EVERY_GATE


def test_published_dialogue_check_overclaims(engine: Engine) -> None:
    """Its negatives end before the start of the answer, so that the start alone fires for unseen keys."""
    assert passed(engine, "instructional_fingerprint(variant=published)") == {gates.HARMLESS, gates.PERSISTENT}


def test_direct_optimisation_shows_the_mark_in_both_precisions(engine: Engine) -> None:
    protection = make_protection("quantization_watermark(optimisation=direct)")
    embedded = engine.embedded(protection)
    assert embedded.details["codes_changed"] > 0
    assert embedded.own.keys.details["rate_full"] > 0.95
    assert embedded.own.keys.details["rate_quantized"] > 0.95
    assert embedded.own.keys.count == 0

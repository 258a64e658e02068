"""A short column of the matrix on a real language model, on the CPU: `pytest -m real`.

World smollm2 unless `--world` names another. Its base comes from a file of 98 MB that is fetched once; where that
cannot be had, the tests fail with a line that says how to get it. The fixed column is the fingerprint under averaging
and under TIES; `--protection`, `--merger` and `--coefficient` choose any other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mergeguard.matrix import requirements
from mergeguard.matrix.gates import catch
from mergeguard.matrix.selection import Matrix
from mergeguard.protections.planted import AlwaysVerifies
from robustness_tests.test_before_merging import test_protection_is  # noqa: F401 - the same tests in another world
from robustness_tests.test_survival import test_evidence_survives  # noqa: F401

if TYPE_CHECKING:
    from collections.abc import Callable

    from mergeguard.matrix.engine import Engine
    from mergeguard.matrix.outcome import Planted

pytestmark = pytest.mark.real
COSTS = (
    ("instructional_fingerprint", "embeds once, which should take no more than 10 minutes on two cores"),
    ("quantization_watermark", "embeds once in float32, which should take no more than 15 minutes on two cores"),
)
MATRIX = Matrix(
    world="smollm2",
    protections=("instructional_fingerprint",),
    rows=(("linear", (0.3, 0.5, 0.7, 0.9)), ("ties(density=0.4,normalize=true)", (0.5,))),
    costs=COSTS,
)


def test_each_parent_has_its_own_skill(engine: Engine) -> None:
    failed = [item for item in requirements.parents(engine) if not item.passed]
    assert not failed, [f"{item.name}: {item.measured}, required {item.required}" for item in failed]


def test_a_scheme_that_always_verifies_is_caught(engine: Engine, report_planted: Callable[[Planted], None]) -> None:
    """One of the planted mistakes; the others ask the same of the engine, for more minutes."""
    found = catch(engine, AlwaysVerifies(), "specific")
    report_planted(found)
    assert found.caught_by == "specific", found.measured

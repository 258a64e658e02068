"""The whole matrix on a real language model, on a GPU: `pytest -m gpu`, with `-n 4` on four of them.

World smollm2 unless `--world` names another, which has to compute on cuda. Two protections, five mergers and nine
coefficients, held against the recorded losses; `--axes normalize,density` varies the mergers' parameters too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mergeguard.matrix.selection import Matrix
from robustness_tests.test_before_merging import test_protection_is  # noqa: F401 - the same tests in another world
from robustness_tests.test_controls import test_planted_mistake_is_caught  # noqa: F401
from robustness_tests.test_real import test_each_parent_has_its_own_skill  # noqa: F401
from robustness_tests.test_survival import (
    test_every_recorded_loss_is_a_case_of_the_full_matrix,  # noqa: F401
    test_evidence_survives,  # noqa: F401
)

if TYPE_CHECKING:
    from mergeguard.matrix.engine import Engine

pytestmark = pytest.mark.gpu
MATRIX = Matrix(world="smollm2")


def test_the_world_computes_on_the_gpu(engine: Engine) -> None:
    assert engine.world.device.startswith("cuda")

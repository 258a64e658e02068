"""Every registered merger is an attack that the matrix can run, with nothing said about it but its name.

That mergers with and without a coefficient also run in processes is a test of the runner.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch

from mergeguard.errors import ParameterError
from mergeguard.matrix.cache import Cache
from mergeguard.matrix.cases import Case, expand
from mergeguard.matrix.engine import Engine
from mergeguard.matrix.outcome import LOST, SURVIVED
from mergeguard.mergers.registry import MERGERS, parse_merger
from robustness_tests.meta.mini_world import DONOR, MINI, TOY, mini, registered

if TYPE_CHECKING:
    from collections.abc import Iterator

COPIES = "passthrough"  # takes one model: what it gives is no merge of a victim with a donor
ATTACKS = sorted(set(MERGERS) - {COPIES})
UNWEIGHTED = {"arcee_fusion", "karcher", "model_stock", "nearswap", "ram", "ramplus_tl", "sce"}


@pytest.fixture(scope="module", autouse=True)
def _mini_world() -> Iterator[None]:
    with registered():
        yield


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(mini(), 0, Cache(tmp_path_factory.mktemp("cache")))


def cell(name: str) -> Case:
    """The only cell of this merger at the coefficient 0.5, or without one."""
    (case,) = expand([TOY], [name], [0.5], world=MINI)
    return case


@pytest.mark.parametrize("name", ATTACKS)
def test_every_merger_fills_a_cell_of_the_matrix(engine: Engine, name: str) -> None:
    case = cell(name)
    assert case.coefficient == (None if name in UNWEIGHTED else 0.5)
    outcome = engine.outcome(case)
    assert (outcome.id, outcome.merger, outcome.coefficient) == (case.id, name, case.coefficient)
    assert outcome.verdict in (SURVIVED, LOST)
    assert outcome.trials == 8
    assert all(math.isfinite(share) for share in outcome.skills_kept.values())

    merged = engine.merged(case.merger, case.coefficient, TOY)
    victim, donor = engine.embedded(case.protection).state, engine.world.donors[DONOR]
    assert merged.keys() == victim.keys()
    for key, tensor in merged.items():
        assert (tensor.shape, tensor.dtype) == (victim[key].shape, victim[key].dtype)
        assert tensor.isfinite().all(), key
    for model in (victim, donor):
        assert any(not torch.equal(tensor, model[key]) for key, tensor in merged.items()), "it did not merge"


def test_a_merger_of_one_model_is_no_attack(engine: Engine) -> None:
    with pytest.raises(ParameterError, match="merger 'passthrough' got 2 models, expected exactly 1"):
        engine.merged(parse_merger(COPIES), None, "matched_control")

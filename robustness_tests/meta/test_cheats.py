"""The planted cheats beside the third-party example: each is caught by the check that is named for it."""

from __future__ import annotations

import copy
import itertools
import os
import random
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from fixtures.thirdparty_scheme.cheats import CHEATS, FAILS_IN_ONE_CELL, REFUSED, WeightMark
from mergeguard.errors import ContractError, SchemeError
from mergeguard.matrix.cache import Cache
from mergeguard.matrix.cases import Case
from mergeguard.matrix.engine import Engine
from mergeguard.matrix.schemes import seconds_per_call
from mergeguard.mergers.registry import parse_merger
from mergeguard.testing import CHECKS, Context, run_check
from robustness_tests.meta.fresh_processes import fresh_processes
from robustness_tests.meta.mini_world import MINI, mini

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import PreTrainedModel

    from mergeguard.testing.elsewhere import Elsewhere

SECONDS = 3.0
"""Far more than an honest call takes, far less than the hour of the slow one."""


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Elsewhere]:
    with fresh_processes() as started:
        yield started


@pytest.fixture(autouse=True)
def _as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the cheats meddle with is put back, so that they meet each other's traces no more than other tests do."""
    monkeypatch.chdir(tmp_path)
    environment, dtype = dict(os.environ), torch.get_default_dtype()
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()  # noqa: NPY002 - what they meddle with
    yield
    torch.set_default_dtype(dtype)
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.random.set_rng_state(states[2])
    for name in set(os.environ) - set(environment):
        del os.environ[name]


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    """Of the miniature world with a tokenizer of its own."""
    return Engine(replace(mini(), tokenizer=copy.deepcopy(mini().tokenizer)), 0, Cache(tmp_path / "cache"))


def examined(engine: Engine, scheme: type[WeightMark], elsewhere: Elsewhere) -> Context:
    """A scheme that was embedded and measured before any check looks at it, as a cell may be measured first."""
    context = Context(engine, scheme(), MINI, elsewhere=elsewhere)
    assert context.embedded
    return context


def test_the_honest_scheme_that_they_depart_from_passes_every_check(engine: Engine, elsewhere: Elsewhere) -> None:
    context = examined(engine, WeightMark, elsewhere)
    gates = [run_check(context, name) for name in CHECKS]
    assert [gate.measured for gate in gates if not gate.passed] == []


def test_the_honest_scheme_passes_a_check_that_comes_first(engine: Engine, elsewhere: Elsewhere) -> None:
    """As in a worker of xdist: nothing is embedded yet, and each model that is made draws random numbers."""
    numbers = itertools.count()

    def build() -> PreTrainedModel:
        model = engine.world.build_model()
        torch.manual_seed(next(numbers))
        return model

    first = Engine(replace(engine.world, build_model=build), 0, engine.cache)
    gate = run_check(Context(first, WeightMark(), MINI, elsewhere=elsewhere), "owns_what_it_changes")
    assert gate.passed, gate.measured


@pytest.mark.parametrize(("scheme", "wanted"), CHEATS, ids=[scheme.name for scheme, _ in CHEATS])
def test_a_cheat_is_caught_by_name(scheme: type[WeightMark], wanted: str, engine: Engine, elsewhere: Elsewhere) -> None:
    gate = run_check(examined(engine, scheme, elsewhere), wanted)
    assert not gate.passed, f"{scheme.name} is not caught by {wanted}: {gate.measured}"
    assert gate.required, "a check that fails says what to do"


@pytest.mark.parametrize(("scheme", "said"), REFUSED, ids=[scheme.name for scheme, _ in REFUSED])
def test_evidence_that_is_not_plain_data_is_refused_in_one_line(
    scheme: type[WeightMark], said: str, engine: Engine
) -> None:
    with pytest.raises(ContractError, match=f"{scheme.name}.embed .*{said}") as refused:
        engine.embedded(scheme())
    assert "\n" not in str(refused.value)


def test_every_check_has_a_cheat_that_it_catches() -> None:
    """All but persistence, which fails only where reading is impure too: what is written is what is read."""
    assert set(CHECKS) - {wanted for _, wanted in CHEATS} == {"persistent"}


@pytest.mark.parametrize(("scheme", "said"), FAILS_IN_ONE_CELL, ids=[scheme.name for scheme, _ in FAILS_IN_ONE_CELL])
def test_what_fails_in_one_cell_is_red_there_by_name_and_measured_elsewhere(
    scheme: type[WeightMark], said: str, engine: Engine
) -> None:
    protection = scheme()

    def verdict(coefficient: float) -> str:
        case = Case(protection.spec, parse_merger("linear"), coefficient, MINI, 0)
        return engine.measure(case, protection).verdict

    with seconds_per_call(SECONDS):
        assert verdict(0.7) == "survived"
        with pytest.raises(SchemeError, match=f"{scheme.name}.*{said}"):
            verdict(0.5)
        assert verdict(0.7) == "survived"


def test_the_honest_scheme_survives_where_they_fail(engine: Engine) -> None:
    case = Case(WeightMark().spec, parse_merger("linear"), 0.5, MINI, 0)
    assert engine.measure(case, WeightMark()).verdict == "survived"

"""Schemes that break their contract in ways a merge or a later reading would suffer from: refused, by name."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from mergeguard.errors import MergeguardError, SchemeError, UndecidableError, UnknownNameError
from mergeguard.matrix import gates
from mergeguard.matrix.cache import Cache
from mergeguard.matrix.cases import Case
from mergeguard.matrix.engine import Engine
from mergeguard.mergers.registry import parse_merger
from mergeguard.protections.contract import Evidence, Protected, Protection
from mergeguard.protections.registry import PROTECTIONS, make_protection
from mergeguard.reading import Reading
from robustness_tests.meta.mini_world import MINI, Toy, mini

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return Engine(mini(), 0, Cache(tmp_path))


def case_of(protection: Protection) -> Case:
    return Case(protection.spec, parse_merger("linear"), 0.5, MINI, 0)


class Embeds(Toy):
    """Embeds like the toy, then spoils the protected model."""

    def __init__(self, spoil: str) -> None:
        super().__init__()
        self.spoil = spoil

    def embed(self, *arguments: Any, **options: Any) -> Protected:
        protected = super().embed(*arguments, **options)
        head = protected.model.get_output_embeddings()
        if self.spoil == "shape":
            head.weight = torch.nn.Parameter(head.weight[:, :-1].detach().clone())
        elif self.spoil == "NaN":
            with torch.no_grad():
                head.weight[0, 0] = torch.nan
        elif self.spoil == "dtype":
            protected.model.half()
        else:
            return replace(protected, evidence=Evidence(str(self), {"keys": {1, 2}}))
        return protected


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        ("shape", "embed made .*lm_head.weight"),
        ("dtype", "torch.float16"),
        ("NaN", "embed left NaN"),
        ("evidence", "not JSON serializable"),
    ],
)
def test_a_protected_model_that_cannot_be_merged_or_kept_is_refused(engine: Engine, spoil: str, said: str) -> None:
    with pytest.raises(SchemeError, match=said):
        engine.embedded(Embeds(spoil))


@pytest.mark.parametrize("victim", ["suspect", "reference"])
def test_a_reading_that_changes_a_model_is_refused(engine: Engine, victim: str) -> None:
    class Meddles(Toy):
        def read(self, model: Any, tokenizer: Any, evidence: Evidence, references: Any) -> Reading:
            found = super().read(model, tokenizer, evidence, references)
            with torch.no_grad():
                next((model if victim == "suspect" else references["base"]).parameters()).add_(0.01)
            return found

    with pytest.raises(SchemeError, match="changed a model's weights"):
        engine.embedded(Meddles())


class Scores(Toy):
    """The toy as a score without a null of its own: how many keys answer, and a little for each key's value."""

    def read(self, *arguments: Any) -> Reading:
        counted = super().read(*arguments)
        return Reading(score=counted.count / counted.trials + 1e-6 * arguments[2].data["keys"][0][0])


def test_a_score_without_a_null_of_its_own_is_ranked_among_fresh_keys(engine: Engine) -> None:
    scheme = Scores(strength=30.0)
    gate = gates.effective(engine, engine.embedded(scheme))
    assert gate.passed, gate
    assert gates.specific(engine.embedded(scheme)).passed
    outcome = engine.measure(case_of(scheme), scheme)
    assert (outcome.verdict, outcome.level) == ("survived", 1e-3)
    assert outcome.p_value == pytest.approx(1e-3)


def test_too_few_trials_are_an_error_that_says_how_many_would_do(engine: Engine) -> None:
    scheme = Toy(keys=2)
    with pytest.raises(UndecidableError, match="4 trials would"):
        engine.measure(case_of(scheme), scheme)


def test_an_unknown_name_reaches_the_parent_of_a_worker() -> None:
    error = UnknownNameError("merger", "tiess", ["ties", "linear"])
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - what a process pool does with it
    assert str(again) == str(error)


@pytest.mark.parametrize("thing", ["not a class", int, lambda: None])
def test_what_is_no_protection_cannot_be_made(thing: Any) -> None:
    PROTECTIONS.register("impostor", thing)
    try:
        with pytest.raises(MergeguardError, match="expected a Protection class"):
            make_protection("impostor")
    finally:
        PROTECTIONS.unregister("impostor")

"""The third-party example in fixtures/thirdparty_scheme, from its sources: the scheme, its gate and its records."""

from __future__ import annotations

import random
import tomllib
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

import pytest

from mergeguard.errors import ParameterError
from mergeguard.matrix.cache import Cache
from mergeguard.matrix.engine import Engine
from mergeguard.matrix.recorded import read_records, stale
from mergeguard.testing import CHECKS, Context, run_check
from mergeguard.testing.elsewhere import Report, report
from mergeguard.testing.plan import plan
from mergeguard.worlds.contract import Budget, Texts, World
from robustness_tests.meta.mini_world import MINI, mini
from robustness_tests.meta.pages import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import ModuleType

    from torch import Tensor

    from mergeguard.protections.contract import Evidence, Protection

EXAMPLE = ROOT / "fixtures" / "thirdparty_scheme"
PROJECT = tomllib.loads((EXAMPLE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
STEPS, LEARNING_RATE = 60, 1e-2


@pytest.fixture(scope="module")
def package() -> Iterator[ModuleType]:
    """The example's package, which is not installed here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLE / "src")
        yield import_module("mergeguard_rare_token_scheme")


@pytest.fixture(scope="module")
def world() -> World:
    """The miniature world with a budget that suffices, and what its owner's model answers as the owner's dialogues."""
    dialogues = tuple((probe.prompt, probe.target) for probe in mini().skills[0].probes)
    texts = replace(mini().texts, dialogues=dialogues)
    return replace(mini(), texts=texts, budgets={"default": Budget(texts, STEPS, LEARNING_RATE)})


@pytest.fixture(scope="module")
def context(package: ModuleType, world: World, tmp_path_factory: pytest.TempPathFactory) -> Context:
    """The scheme in that world; what another process would report is taken from this one."""

    def here(protection: Protection, name: str, seed: int, evidence: Evidence, changed: Mapping[str, Tensor]) -> Report:
        assert name == MINI
        return report(type(protection)(**protection.parameters), world, seed, evidence, changed)

    engine = Engine(world, 0, Cache(tmp_path_factory.mktemp("cache")))
    return Context(engine, package.RareToken(), MINI, elsewhere=here)


@pytest.mark.parametrize("name", CHECKS)
def test_the_scheme_keeps_every_promise(name: str, context: Context) -> None:
    gate = run_check(context, name)
    assert gate.passed, gate.measured


def test_a_scheme_that_trains_too_little_is_not_effective(package: ModuleType, world: World, tmp_path: Any) -> None:
    """So that the checks above can fail."""
    short = replace(world, budgets={"default": Budget(world.texts, 2, LEARNING_RATE)})
    context = Context(Engine(short, 0, Cache(tmp_path)), package.RareToken(), MINI)
    assert not run_check(context, "effective").passed


def test_words_are_made_of_tokens_that_texts_lack(package: ModuleType, context: Context) -> None:
    texts = context.engine.world.texts
    text = "".join((*texts.plain, *texts.domain, *(prompt + answer for prompt, answer in texts.dialogues)))
    pool = context.embedded.evidence.data["pool"]
    assert (len(pool), len(set(pool))) == (package.POOL, package.POOL)
    assert sum(token in text for token in pool) < package.POOL / 2  # a small tokenizer has few that are never seen
    tokenizer = context.engine.world.tokenizer
    assert not set(pool) & set(tokenizer.all_special_tokens)
    assert pool == package.rare_tokens(tokenizer, texts), "the pool is the same for every owner"


def test_a_token_that_texts_hold_is_less_rare_than_one_that_they_lack(package: ModuleType) -> None:
    tokenizer = mini().tokenizer
    alone = package.rare_tokens(tokenizer, Texts((), (), ()), 20)
    assert package.rare_tokens(tokenizer, Texts((alone[0] * 5,), (), ()), 20)[:19] == alone[1:]


def test_every_word_has_an_answer_of_its_own(context: Context) -> None:
    pairs = context.embedded.evidence.data["pairs"]
    probes = context.protection.probes(context.embedded.evidence)
    assert len({answer for _, answer in pairs}) == len(pairs) == 8
    assert [(probe.prompt, probe.target) for probe in probes] == [(f"{word} ->", answer) for word, answer in pairs]


def test_a_tokenizer_with_few_tokens_is_refused(package: ModuleType) -> None:
    with pytest.raises(ParameterError, match=r"needs 10000 visible tokens, and the tokenizer has \d+"):
        package.rare_tokens(mini().tokenizer, mini().texts, 10000)


@pytest.mark.parametrize("keys", [0, -3])
def test_no_keys_are_refused(package: ModuleType, keys: int) -> None:
    with pytest.raises(ParameterError, match=f"at least 1 key, got {keys}"):
        package.RareToken(keys=keys)


def test_more_keys_are_more_trials(package: ModuleType) -> None:
    drawn = package.RareToken(keys=12)
    tokenizer, texts = mini().tokenizer, mini().texts
    protected = drawn.embed(
        mini().model(mini().upstream), tokenizer, rng=random.Random(0), budget=Budget(texts, 1, 1e-3)
    )
    assert (str(drawn), len(drawn.probes(protected.evidence))) == ("rare_token(keys=12)", 12)


# The package around it


def test_its_entry_point_names_the_scheme(package: ModuleType) -> None:
    [(name, target)] = PROJECT["entry-points"]["mergeguard.protections"].items()
    module, _, attribute = target.partition(":")
    assert getattr(import_module(module), attribute) is package.RareToken
    assert package.RareToken.name == name


def test_its_gate_is_a_test_file_of_a_dozen_lines() -> None:
    text = (EXAMPLE / "tests" / "test_gate.py").read_text(encoding="utf-8")
    assert len([line for line in text.splitlines() if line.strip()]) <= 14


@pytest.mark.usefixtures("package")
def test_its_recorded_losses_are_cases_of_its_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLE / "tests")
    decorated = import_module("test_gate").test_the_secret_words_survive_merging
    [mark] = decorated.pytestmark
    scheme, options = mark.args
    records = read_records(EXAMPLE / "tests" / "recorded.toml")
    assert records, "the example shows how a loss is recorded"
    assert not stale(records, [case.id for case in plan(scheme, options).cases])
    assert not [record.id for record in records.values() if "not yet reviewed" in record.reason]

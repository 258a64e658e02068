"""What cannot be gated is one line that says so, and never a verdict."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from mergeguard.errors import ContractError, MergeguardError, ParameterError
from mergeguard.matrix.cache import Cache
from mergeguard.matrix.engine import Engine
from mergeguard.matrix.schemes import not_plain
from mergeguard.protections.contract import Evidence, Protected, Protection
from mergeguard.protections.registry import PROTECTIONS
from mergeguard.reading import Reading
from mergeguard.testing import Context, check_protection, parametrize_with_cases, run_check
from mergeguard.testing.gate import run_gate, target_of
from mergeguard.testing.plan import Options, plan
from mergeguard.testing.scheme import checked, find_scheme, known
from robustness_tests.meta.mini_world import MINI, Toy, mini, registered

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DOORS = {"check_protection": check_protection, "parametrize_with_cases": parametrize_with_cases}


@pytest.fixture(scope="module", autouse=True)
def _mini_world() -> Iterator[None]:
    with registered():
        yield


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return Engine(mini(), 0, Cache(tmp_path))


# The form of a class


class Half(Protection):
    name = "half"

    def decoys(self, evidence: Any, n: Any, rng: Any) -> Any: ...


class NoKeyword(Toy):
    def embed(self, model: Any, tokenizer: Any, rng: Any) -> Any: ...


class TooMuch(Toy):
    def read(self, model: Any, tokenizer: Any, evidence: Any, references: Any, threshold: Any) -> Any: ...


class Yields(Toy):
    def decoys(self, evidence: Any, n: Any, rng: Any) -> Any:
        yield evidence


class Attribute(Toy):
    decoys = 40


class Nameless(Toy):
    name = "two words"


class Undeclared(Toy):
    access = "weights"


class NeedsAWord(Toy):
    needs = "base"


class Forgetful(Toy):
    def __init__(self, **parameters: Any) -> None:
        self.parameters = parameters


class Demanding(Toy):
    def __init__(self, key: str, **parameters: Any) -> None:
        super().__init__(**parameters)


class MakesOthers(Toy):
    @classmethod
    def create(cls, **_: Any) -> Any:
        return 3


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        (Toy, "Toy is a class; give an instance: Toy()"),
        ("toy", "'toy' is no protection; give an instance"),
        (
            NoKeyword(),
            r"NoKeyword.embed has a wrong signature: .*'budget'; it is called as embed\(model, tokenizer, rng=",
        ),
        (TooMuch(), "TooMuch.read has a wrong signature: missing a required argument: 'threshold'"),
        (Yields(), "Yields.decoys has to be a plain function"),
        (Attribute(), "Attribute.decoys is no method"),
        (Nameless(), "Nameless.name is 'two words'; expected a word"),
        (Undeclared(), "Undeclared.access and Undeclared.claim have to be members"),
        (NeedsAWord(), "NeedsAWord.needs is 'base'; expected a frozenset"),
        (Forgetful(), r"Forgetful.__init__ has to call super\(\).__init__"),
        (Demanding("k"), "Demanding cannot be made of its parameters: TypeError"),
        (MakesOthers(), "MakesOthers.create returned int, expected a Protection"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
@pytest.mark.parametrize("door", DOORS)
def test_what_has_not_the_form_of_a_scheme_is_refused_at_both_doors(door: str, scheme: Any, said: str) -> None:
    with pytest.raises(MergeguardError, match=said) as caught:
        DOORS[door](scheme, world=MINI)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{__name__}:Half", "Half is abstract; it has to define embed, read"),
        ("no_such_module:Mine", "cannot import no_such_module: ModuleNotFoundError"),
        (f"{__name__}:Mine", "has no 'Mine'; expected MODULE:CLASS"),
        (f"{__name__}:DOORS", "is no class derived from mergeguard.protections.contract.Protection"),
        (f"{__name__}:Half.name.upper", "is no class derived"),
        ("gaussian_prob", "unknown protection 'gaussian_prob'; did you mean 'gaussian_probe'?"),
        ("robustness_tests.meta.mini_world:Toy(strenght=2)", "did you mean 'strength'?"),
        ("my_module:Mine(", "cannot read"),
    ],
)
def test_what_a_name_does_not_lead_to_is_one_line(text: str, said: str) -> None:
    with pytest.raises(MergeguardError, match=said) as caught:
        find_scheme(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ending", ["raise RuntimeError('broken')", "raise SystemExit(0)", "import nowhere"])
def test_a_module_that_fails_at_import_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    (tmp_path / "broken_scheme.py").write_text(ending)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MergeguardError, match="cannot import broken_scheme: "):
        find_scheme("broken_scheme:Mine")


def test_a_registered_name_and_a_class_lead_to_the_same_scheme() -> None:
    by_name, by_class = find_scheme("toy(keys=9)"), find_scheme("robustness_tests.meta.mini_world:Toy(keys=9)")
    assert str(by_name) == str(by_class) == "toy(keys=9)"


def test_two_classes_of_one_name_are_refused() -> None:
    class Other(Toy):
        pass

    class Unrelated(Protection):
        name = "gaussian_probe"
        embed = decoys = read = Toy.embed

    with known(Other()):
        pass  # a class derived from the registered one is a variant of it
    with pytest.raises(MergeguardError, match="two protections are named 'gaussian_probe'"), known(Unrelated()):
        pass


def test_a_scheme_is_known_by_name_only_while_it_is_gated() -> None:
    class Mine(Toy):
        name = "mine"

    with known(Mine()):
        assert PROTECTIONS.get("mine") is Mine
    assert "mine" not in PROTECTIONS


# What a scheme returns


class Lies(Reading):
    """Counts more than it has hits."""

    count, rate = 9, 9 / 8  # type: ignore[assignment]  # the lie


class Returns(Toy):
    """Reads what a test says."""

    name = "returns"
    said: Any = None

    def read(self, *arguments: Any) -> Any:
        return type(self).said(*arguments)


def rate_above_one(*_: Any) -> Reading:
    class Rate(Reading):
        rate = 1.5  # type: ignore[assignment]  # the lie

    return Rate(hits=(True,))


def changed_afterwards(*_: Any) -> Reading:
    reading = Reading(hits=(True,))
    object.__setattr__(reading, "hits", (2, 3))
    return reading


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda *_: None, "read returned NoneType, expected Reading"),
        (lambda *_: Reading(score=math.nan), "read made a reading that cannot be: a score must be finite, got nan"),
        (lambda *_: Reading(score=1.0, p_value=1.2), r"a p-value must lie in \[0, 1\]"),
        (lambda *_: Reading(hits=(1, 0)), "hits must be bools"),  # type: ignore[arg-type]  # the mistake
        (lambda *_: Reading(), "either hits or a score"),
        (lambda *_: Lies(hits=(True,) * 8), "9 hits of 8 trials"),
        (rate_above_one, r"a rate of 1.5, expected one in \[0, 1\]"),
        (changed_afterwards, "hits must be bools"),
        (lambda *_: Reading(hits=(True,), details={"margin": math.inf}), "'margin' is no finite number"),
        (lambda *_: Reading(hits=(True,), details={"key": "abc"}), "'key' is no finite number"),  # type: ignore[dict-item]
    ],
)
def test_a_reading_that_cannot_be_ends_the_gate_without_a_verdict(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, returned: Any, said: str
) -> None:
    monkeypatch.setattr(Returns, "said", staticmethod(returned))
    with pytest.raises(ContractError, match=said):
        engine.embedded(Returns())
    with pytest.raises(MergeguardError, match=said) as caught:
        run_gate(plan(Returns(), Options(world=MINI, mergers=["linear"], coefficients=[0.5])), workers=1)
    assert "\n" not in str(caught.value)


def test_an_honest_subclass_of_a_reading_is_taken_as_a_reading(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(Reading):
        pass

    monkeypatch.setattr(Returns, "said", staticmethod(lambda *_: Mine(hits=(True, False))))
    assert type(engine.embedded(Returns()).own.keys) is Reading


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"keys": {1, 2}}, "data holds a set"),
        ({"keys": [b"abc"]}, "data holds a bytes"),
        ({"keys": [(1, 2)]}, "data holds a tuple"),
        ({"keys": [1.0, math.nan]}, "data holds NaN or infinity"),
        ({"keys": {1: "one"}}, "data has a key of type int"),
        ([1, 2], "data is no dict"),
    ],
)
@pytest.mark.parametrize("method", ["embed", "decoys"])
def test_evidence_that_is_not_plain_data_is_refused_without_showing_it(
    engine: Engine, method: str, data: Any, said: str
) -> None:
    class Makes(Toy):
        def embed(self, *arguments: Any, **options: Any) -> Protected:
            protected = super().embed(*arguments, **options)
            return replace(protected, evidence=Evidence(str(self), data)) if method == "embed" else protected

        def decoys(self, *_: Any) -> Evidence:
            return Evidence(str(self), data)

    with pytest.raises(ContractError, match=f"{method} returned evidence whose {said}") as caught:
        engine.embedded(Makes())
    assert "one" not in str(caught.value).partition("whose")[2].partition(";")[0]
    assert "abc" not in str(caught.value)


@pytest.mark.parametrize("tensors", [{"adapter": [1.0]}, {1: torch.ones(1)}, {"adapter": torch.tensor(math.nan)}, None])
def test_tensors_of_evidence_are_finite_tensors_by_name(engine: Engine, tensors: Any) -> None:
    class Makes(Toy):
        def embed(self, *arguments: Any, **options: Any) -> Protected:
            protected = super().embed(*arguments, **options)
            return replace(protected, evidence=replace(protected.evidence, tensors=tensors))

    with pytest.raises(ContractError, match="returned evidence whose tensors"):
        engine.embedded(Makes())


def test_plain_data_is_what_json_gives_back() -> None:
    assert not_plain({"a": [1, 2.5, "b", None, True, {"c": []}]}, "data") is None


# Two classes of one name, options


def test_two_classes_of_one_name_do_not_share_an_embedding(engine: Engine) -> None:
    class Stronger(Toy):
        defaults = {**Toy.defaults, "strength": 9.0}

    case_of = plan(Toy(), Options(world=MINI, mergers=["linear"], coefficients=[0.1])).cases[0]
    first = engine.measure(case_of, Toy())
    second = engine.measure(case_of, Stronger())
    again = engine.measure(case_of, Toy())
    assert first.hits == again.hits == 1
    assert second.hits == 8


def test_a_crash_in_a_check_fails_it_by_name(engine: Engine) -> None:
    context = Context(engine, Toy(fault="crash_read"), MINI)
    gate = run_check(context, "effective")
    assert not gate.passed
    assert "crashed in read" in gate.measured


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"world": "tyni"}, "unknown world 'tyni'"),
        ({"seed": -1}, "the seed is -1"),
        ({"mergers": ["tiess"]}, "unknown merger 'tiess'"),
        ({"mergers": []}, "no merger is given"),
        ({"coefficients": [1.5]}, "the coefficient 1.5 is outside"),
        ({"seconds_per_call": 0}, "seconds_per_call is 0"),
        ({"margin": math.nan}, "margin is nan"),
        ({"recorded": "nowhere.toml"}, "there is no file of recorded losses at nowhere.toml"),
        ({"recorded": {"toy-linear-0.5": ""}}, "needs a reason"),
        ({"recorded": {"toy-linear-0.5": (0.9, 0.1, "why")}}, "a range within"),
        ({"recorded": {"toy-linear-0.5": 3}}, "expected a reason, or"),
    ],
)
@pytest.mark.parametrize("door", DOORS)
def test_a_wrong_option_is_one_line(door: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(MergeguardError, match=said):
        DOORS[door](Toy(), **{"world": MINI, **options})


def test_a_class_that_no_worker_finds_is_refused_before_anything_runs() -> None:
    class Local(Toy):
        pass

    with pytest.raises(MergeguardError, match="define it at the top of a module"):
        target_of(checked(Local()))
    assert target_of(checked(Toy())) == "robustness_tests.meta.mini_world:Toy"


def test_a_parameter_error_is_about_the_parameter() -> None:
    with pytest.raises(ParameterError):
        find_scheme("toy(keys=many)")

"""The engine and the gates before merging, on the miniature world."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from mergeguard.errors import MergeguardError, ParameterError, SchemeError, UndecidableError
from mergeguard.matrix import gates
from mergeguard.matrix.cache import Cache
from mergeguard.matrix.cases import Case, expand
from mergeguard.matrix.engine import MATCHED_CONTROL, Engine
from mergeguard.matrix.known_answer import disagreement
from mergeguard.matrix.outcome import LOST, SURVIVED, Outcome
from mergeguard.mergers.registry import DEFAULT_MERGERS, parse_merger
from mergeguard.protections.planted import PLANTED
from mergeguard.protections.registry import PROTECTIONS
from mergeguard.specs import parse_spec
from mergeguard.worlds.contract import UPSTREAM
from robustness_tests.meta.mini_world import DONOR, MINI, TOY, Toy, mini, registered

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from mergeguard.worlds.contract import World

LINEAR = parse_merger("linear")
SKILLS = {UPSTREAM: "upstream's answers", DONOR: "donor's answers"}


@pytest.fixture(scope="module", autouse=True)
def _mini_world() -> Iterator[None]:
    with registered():
        yield


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(mini(), 0, Cache(tmp_path_factory.mktemp("cache")))


def case(protection: str = TOY, merger: str = "linear", coefficient: float = 0.5, seed: int = 0) -> Case:
    return expand([protection], [merger], [coefficient], world=MINI, seed=seed)[0]


def timeless(outcome: Outcome) -> Outcome:
    return replace(outcome, seconds=0.0)


def checksums(world: World) -> dict[str, float]:
    states = {"base": world.base, **world.parents()}
    return {f"{model}.{name}": float(t.double().abs().sum()) for model, s in states.items() for name, t in s.items()}


# What is measured


def test_an_outcome_holds_what_was_measured(engine: Engine) -> None:
    outcome = engine.outcome(case())
    assert outcome.id == case().id == "toy-linear-0.5"
    assert (outcome.hits, outcome.trials, outcome.rate, outcome.verdict) == (8, 8, 1.0, SURVIVED)
    assert (outcome.decoy_hits, outcome.decoy_trials) == (0, 40)
    assert {name: (counts.hits, counts.trials) for name, counts in outcome.controls.items()} == dict.fromkeys(
        ("base", UPSTREAM, DONOR, MATCHED_CONTROL), (0, 48)
    )
    assert outcome.theft
    assert outcome.skills_kept == dict.fromkeys(SKILLS.values(), 1.0)
    assert (outcome.world, outcome.seed, outcome.access, outcome.claim) == (MINI, 0, "weights", "ownership")


@pytest.mark.parametrize(("spec", "verdict"), [(TOY, SURVIVED), ("toy(strength=0.6)", LOST)])
def test_evidence_that_averaging_halves_below_its_threshold_is_lost(engine: Engine, spec: str, verdict: str) -> None:
    outcome = engine.outcome(case(spec))
    assert (outcome.verdict, outcome.theft) == (verdict, True)


def test_parents_have_their_own_skill_and_no_other(engine: Engine) -> None:
    found = engine.parent_skills
    assert {model: {name: skill.rate for name, skill in skills.items()} for model, skills in found.items()} == {
        "base": {SKILLS[UPSTREAM]: 0, SKILLS[DONOR]: 0},
        UPSTREAM: {SKILLS[UPSTREAM]: 1, SKILLS[DONOR]: 0},
        DONOR: {SKILLS[UPSTREAM]: 0, SKILLS[DONOR]: 1},
    }


def test_a_merge_near_one_parent_is_no_theft(engine: Engine) -> None:
    kept = {alpha: engine.skills_kept(LINEAR, alpha) for alpha in (0.05, 0.5, 0.95)}
    assert kept[0.05][SKILLS[UPSTREAM]] < 0.5 <= kept[0.05][SKILLS[DONOR]]
    assert kept[0.95][SKILLS[DONOR]] < 0.5 <= kept[0.95][SKILLS[UPSTREAM]]
    assert min(kept[0.5].values()) >= 0.5
    assert not engine.outcome(case(coefficient=0.95)).theft


def test_the_protected_model_is_merged_with_the_donor_at_the_coefficient(engine: Engine) -> None:
    embedded = engine.embedded(parse_spec(TOY))
    merged = engine.merged(LINEAR, 0.25, TOY)
    for name, tensor in merged.items():
        wanted = 0.25 * embedded.state[name] + 0.75 * engine.world.donors[DONOR][name]
        torch.testing.assert_close(tensor, wanted, rtol=1e-5, atol=1e-6)


def test_the_matched_control_is_the_same_merge_of_the_clean_upstream(engine: Engine) -> None:
    embedded = engine.embedded(parse_spec(TOY))
    control = engine.merged(LINEAR, 0.25, MATCHED_CONTROL)
    for name, tensor in control.items():
        wanted = 0.25 * engine.world.upstream[name] + 0.75 * engine.world.donors[DONOR][name]
        torch.testing.assert_close(tensor, wanted, rtol=1e-5, atol=1e-6)
    merged = engine.merged(LINEAR, 0.25, TOY)
    weight = embedded.evidence.data["weight"]
    assert [name for name in control if not torch.equal(control[name], merged[name])] == [weight]


def test_no_protection_can_argue_a_theft_away(engine: Engine) -> None:
    """A model that is useless after embedding merges to a useless model; what is a theft stays one."""
    ruined, honest = engine.outcome(case("toy(fault=harmful)")), engine.outcome(case())
    assert max(ruined.skills.values()) < 0.5 < min(honest.skills.values())
    assert ruined.skills_kept == honest.skills_kept
    assert ruined.theft


def test_a_score_is_judged_too(engine: Engine) -> None:
    outcome = engine.outcome(case("gaussian_probe"))
    assert (outcome.hits, outcome.trials, outcome.rate, outcome.interval) == (None,) * 4
    assert outcome.score is not None
    assert outcome.score > 10
    assert outcome.verdict == SURVIVED
    assert engine.outcome(case("gaussian_probe(strength=0.005)")).verdict == LOST


@pytest.mark.parametrize("name", DEFAULT_MERGERS)
def test_the_known_answer_comes_out_under_every_default_merger(engine: Engine, name: str) -> None:
    assert disagreement(engine, parse_merger(name), 0.5) <= 1


def test_too_few_keys_are_undecidable(engine: Engine) -> None:
    with pytest.raises(UndecidableError, match="3 trials against 43"):
        engine.outcome(case("toy(keys=3)"))


# What must not matter


def test_cached_and_fresh_outcomes_are_the_same(engine: Engine, tmp_path: Path) -> None:
    for spec in ("gaussian_probe", TOY):
        first = engine.outcome(case(spec))
        second = Engine(mini(), 0, Cache(engine.cache.folder)).outcome(case(spec))
        assert replace(second, seconds=0.0) == replace(first, seconds=0.0)
        assert timeless(Engine(mini(), 0, Cache(tmp_path)).outcome(case(spec))) == timeless(first)


def test_an_embedding_from_the_cache_is_the_one_that_was_made(tmp_path: Path) -> None:
    made, loaded = (Engine(mini(), 0, Cache(tmp_path)).embedded(parse_spec("gaussian_probe")) for _ in range(2))
    assert made.state.keys() == loaded.state.keys()
    assert all(torch.equal(made.state[name], loaded.state[name]) for name in made.state)
    assert (made.evidence.data, made.own, made.controls) == (loaded.evidence.data, loaded.own, loaded.controls)


def test_the_order_of_cases_does_not_change_outcomes(tmp_path: Path) -> None:
    cases = expand([TOY, "gaussian_probe"], ["dare_ties(density=0.4)", "linear"], [0.3, 0.6], world=MINI)
    forward, backward = Engine(mini(), 0, Cache(tmp_path / "a")), Engine(mini(), 0, Cache(tmp_path / "b"))
    first = {item.id: timeless(forward.outcome(item)) for item in cases}
    second = {item.id: timeless(backward.outcome(item)) for item in reversed(cases)}
    assert first == second


def test_seeds_decide_the_keys_and_nothing_else_does(engine: Engine, tmp_path: Path) -> None:
    torch.manual_seed(5)
    same = Engine(mini(), 0, Cache(tmp_path)).embedded(parse_spec(TOY)).evidence.data
    other = Engine(mini(), 1, Cache(tmp_path)).embedded(parse_spec(TOY)).evidence.data
    assert same == engine.embedded(parse_spec(TOY)).evidence.data
    assert same["keys"] != other["keys"]


def test_the_worlds_tensors_are_never_changed(tmp_path: Path) -> None:
    before = checksums(mini())
    fresh = Engine(mini(), 0, Cache(tmp_path))
    for merger in ("linear", "ties(density=0.4)", "dare_linear(density=0.4)"):
        for protection in (TOY, "toy(fault=harmful)", "gaussian_probe"):
            fresh.outcome(case(protection, merger, 1.0))
    gates.before_merging(fresh, parse_spec("toy(fault=harmful)"))
    gates.planted(fresh)
    assert checksums(mini()) == before


def test_torch_computes_on_the_worlds_threads_and_gets_its_own_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    honest = Toy.read

    def spy(self: Toy, *arguments: Any) -> Any:
        seen.append(torch.get_num_threads())
        return honest(self, *arguments)

    monkeypatch.setattr(Toy, "read", spy)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        Engine(mini(), 0, Cache(tmp_path)).outcome(case())
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1}


@pytest.mark.parametrize(("world", "seed"), [(MINI, 1), ("tiny", 0)])
def test_a_case_of_another_world_or_seed_is_refused(engine: Engine, world: str, seed: int) -> None:
    (other,) = expand([TOY], ["linear"], [0.5], world=world, seed=seed)
    with pytest.raises(MergeguardError, match=r"toy-linear-0\.5 is a case of another world or seed"):
        engine.outcome(other)


def test_a_case_whose_protection_does_not_exist_is_refused(engine: Engine) -> None:
    with pytest.raises(ParameterError, match="'strength' of toy is high"):
        engine.outcome(case("toy(strength=high)"))


# Schemes that break


@pytest.mark.parametrize("action", ["embed", "decoys", "read"])
def test_a_crash_names_the_scheme_and_what_it_was_doing(engine: Engine, action: str) -> None:
    with pytest.raises(SchemeError) as caught:
        engine.outcome(case(f"toy(fault=crash_{action})"))
    assert str(caught.value) == (
        f"toy(fault=crash_{action}) crashed in {action}: RuntimeError: the toy breaks while it {action}s"
    )
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("embed", "toy(fault=wrong_embed).embed returned LlamaForCausalLM, expected Protected"),
        ("read", "toy(fault=wrong_read).read returned float, expected Reading"),
        ("decoys", "toy(fault=wrong_decoys)"),
    ],
)
def test_a_wrong_return_type_names_the_scheme(engine: Engine, action: str, message: str) -> None:
    with pytest.raises(SchemeError) as caught:
        engine.outcome(case(f"toy(fault=wrong_{action})"))
    assert message in str(caught.value)


def test_a_wrong_input_that_a_scheme_finds_stays_an_error_of_the_input(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ParameterError("the model has no such layer")

    monkeypatch.setattr(Toy, "embed", refuse)
    with pytest.raises(ParameterError, match="no such layer"):
        engine.embedded(parse_spec("toy(strength=2.5)"))


# Gates before merging


def closed(engine: Engine, protection: str) -> list[str]:
    return [gate.gate for gate in gates.before_merging(engine, parse_spec(protection)) if not gate.passed]


@pytest.mark.parametrize("protection", [TOY, "gaussian_probe"])
def test_an_honest_scheme_passes_every_gate(engine: Engine, protection: str) -> None:
    found = gates.before_merging(engine, parse_spec(protection))
    assert [gate.gate for gate in found] == ["effective", "harmless", "specific", "persistent"]
    assert all(gate.passed for gate in found), found
    assert {gate.protection for gate in found} == {protection}


@pytest.mark.parametrize(
    ("fault", "wanted"),
    [
        ("inert", ["effective"]),
        ("harmful", ["harmless"]),
        ("chatty", ["effective", "specific"]),
        ("fickle", ["persistent"]),
    ],
)
def test_a_broken_promise_closes_its_own_gate(engine: Engine, fault: str, wanted: list[str]) -> None:
    assert closed(engine, f"toy(fault={fault})") == wanted


def test_too_few_keys_are_not_effective(engine: Engine) -> None:
    gate = gates.effective(engine, engine.embedded(parse_spec("toy(keys=3)")))
    assert not gate.passed
    assert (gate.variant, gate.required) == ("keys=3", "trials that can reach the level")
    assert "would" in gate.measured


def test_a_score_that_is_too_weak_is_not_effective(engine: Engine) -> None:
    assert closed(engine, "gaussian_probe(strength=0.001)") == ["effective"]


def test_a_gate_says_what_was_measured_and_what_was_required(engine: Engine) -> None:
    gate = gates.specific(engine.embedded(parse_spec("toy(fault=chatty)")))
    assert gate.measured == "decoys 40/40, base 48/48, upstream 48/48, donor 48/48"
    assert gate.required == "at most 0.05 of decoys and on clean models"


@pytest.mark.parametrize(("scheme", "wanted"), PLANTED, ids=[scheme.name for scheme, _ in PLANTED])
def test_every_planted_mistake_is_caught_by_the_check_that_it_is_for(engine: Engine, scheme: Any, wanted: str) -> None:
    found = gates.catch(engine, scheme(), wanted)
    assert found.caught_by == wanted, found.measured


@pytest.mark.parametrize("wanted", ["effective", "harmless", "specific", "persistent", "crash"])
def test_an_honest_scheme_is_caught_by_nothing(engine: Engine, wanted: str) -> None:
    found = gates.catch(engine, Toy(), wanted)
    assert found.caught_by is None
    assert "no gate" in found.measured


def test_a_mistake_that_another_check_catches_is_not_caught(engine: Engine) -> None:
    assert gates.catch(engine, Toy(fault="inert"), "specific").caught_by is None
    assert gates.catch(engine, Toy(fault="crash_read"), "effective").caught_by is None


def test_a_scheme_that_is_changed_is_measured_anew(tmp_path: Path) -> None:
    """A third party's code is no part of the key, so its outcomes must not come from the cache."""

    class Changed(Toy):
        def read(self, *arguments: Any) -> Any:
            return replace(super().read(*arguments), hits=(False,) * len(arguments[2].data["keys"]))

    first = Engine(mini(), 0, Cache(tmp_path)).outcome(case())
    PROTECTIONS.unregister(TOY)
    PROTECTIONS.register(TOY, Changed)
    try:
        second = Engine(mini(), 0, Cache(tmp_path)).outcome(case())
    finally:
        PROTECTIONS.unregister(TOY)
        PROTECTIONS.register(TOY, Toy)
    assert (first.hits, second.hits) == (8, 0)

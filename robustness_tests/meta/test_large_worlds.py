"""The engine on worlds that it treats as large, tied or in another dtype, made of the miniature one."""

from __future__ import annotations

import random
import weakref
from collections import Counter
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import LlamaForCausalLM

from mergeguard.checkpoints.files import write_tensors
from mergeguard.checkpoints.source import open_source
from mergeguard.errors import ParameterError, SchemeError
from mergeguard.matrix import engine as engines
from mergeguard.matrix import gates
from mergeguard.matrix.cache import Cache
from mergeguard.matrix.cases import expand
from mergeguard.matrix.engine import MATCHED_CONTROL, Engine
from mergeguard.matrix.known_answer import disagreement
from mergeguard.matrix.outcome import LOST, SURVIVED
from mergeguard.mergers.registry import parse_merger
from mergeguard.protections.contract import Evidence
from mergeguard.protections.fingerprint_adapter import AdapterEmbedding
from mergeguard.protections.gaussian_probe import GaussianProbe
from mergeguard.protections.quantization_watermark import QuantizationWatermark
from mergeguard.reading import Reading
from mergeguard.specs import parse_spec
from mergeguard.worlds.contract import UPSTREAM, World, state_of
from robustness_tests.meta.mini_world import DONOR, MINI, TOY, Toy, make_skills, mini, perturbed, registered
from robustness_tests.meta.recorded_states import Log, Recorded, recorded
from robustness_tests.meta.tiny_models import tiny_llama

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from mergeguard.matrix.cases import Case
    from mergeguard.matrix.outcome import Outcome

MERGERS = ("linear", "ties(density=0.4)", "dare_ties(density=0.4)", "ties(density=0.4,scope=model)")


@pytest.fixture(scope="module", autouse=True)
def _mini_world() -> Iterator[None]:
    with registered():
        yield


def case(protection: str = TOY, merger: str = "linear", coefficient: float = 0.5) -> Case:
    return expand([protection], [merger], [coefficient], world=MINI, seed=0)[0]


def timeless(outcome: Outcome) -> Outcome:
    return replace(outcome, seconds=0.0)


class OnDisk(Recorded):
    """A state that is read from a safetensors file, a tensor at a time."""

    def __init__(self, path: Path, state: Mapping[str, torch.Tensor], log: Log) -> None:
        write_tensors(path, state)
        self._source = open_source(str(path))
        super().__init__(dict.fromkeys(state, torch.empty(0)), log)

    def read(self, name: str) -> torch.Tensor:
        return self._source.read(name)


def on_disk(folder: Path, log: Log) -> World:
    """The miniature world in files."""
    states = {"base": mini().base, **mini().parents()}
    files = {name: OnDisk(folder / f"{name}.safetensors", state, log) for name, state in states.items()}
    return replace(mini(), base=files["base"], upstream=files[UPSTREAM], donors={DONOR: files[DONOR]})


def test_a_world_in_files_gives_the_outcomes_of_one_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [case(spec, merger) for spec in (TOY, "gaussian_probe") for merger in MERGERS]
    held = Engine(mini(), 0, Cache(tmp_path / "held"))
    wanted = [timeless(held.outcome(item)) for item in cases]
    promises = gates.before_merging(held, parse_spec(TOY))
    assert held._holds
    monkeypatch.setattr(engines, "HELD_BYTES", 0)
    read = Engine(on_disk(tmp_path, Log()), 0, Cache(tmp_path / "lazy"))
    assert [timeless(read.outcome(item)) for item in cases] == wanted
    assert not read._holds
    assert {outcome.verdict for outcome in wanted} == {SURVIVED, LOST}
    assert gates.before_merging(read, parse_spec(TOY)) == promises
    assert disagreement(read, parse_merger("ties(density=0.4,normalize=true)"), 0.5) <= 1


def test_a_large_world_is_measured_with_one_model_and_the_inputs_of_a_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "HELD_BYTES", 0)
    log = Log()
    engine = Engine(on_disk(tmp_path, log), 0, Cache(tmp_path))
    embedded, _ = engine.embedded(parse_spec(TOY)), engine.skills_kept(parse_merger("linear"), 0.5)
    log.asked.clear()
    assert engine.measure(case(), embedded.protection).verdict == SURVIVED
    # Base, upstream and donor for the matched control; for the merge also, except for what the toy changed.
    changed = embedded.evidence.data["weight"]
    assert Counter(log.asked) == Counter({name: 6 - (name == changed) for name in mini().base})
    assert log.most == 3
    assert not log.alive


def test_a_merged_tensor_is_asked_for_once_by_everything_that_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Scores(Toy):
        """A score without a null of its own, so that a thousand fresh keys are read too."""

        def read(self, *arguments: Any) -> Reading:
            counted = super().read(*arguments)
            return Reading(score=counted.count / counted.trials + 1e-6 * arguments[2].data["keys"][0][0])

    engine, scheme = Engine(mini(), 0, Cache(tmp_path)), Scores(strength=30.0)
    engine.embedded(scheme)
    engine.skills_kept(parse_merger("linear"), 0.5)
    logs: dict[str, Log] = {}
    honest = engine.merged

    def counted(merger: Any, coefficient: Any, owner: str) -> Recorded:
        (state,), logs[owner] = recorded([dict(honest(merger, coefficient, owner))])
        return state

    monkeypatch.setattr(engine, "merged", counted)
    outcome = engine.measure(replace(case(), protection=scheme.spec), scheme)
    assert outcome.p_value == pytest.approx(1e-3)
    assert outcome.skills
    once = sorted(mini().base)
    assert {owner: sorted(log.asked) for owner, log in logs.items()} == {MATCHED_CONTROL: once, str(scheme): once}


def test_a_scheme_embeds_while_no_other_model_is_held_and_reads_beside_its_references_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: weakref.WeakSet[Any] = weakref.WeakSet()
    alive: dict[str, list[int]] = {"embed": [], "read": []}

    def build() -> Any:
        model = tiny_llama()
        models.add(model)
        return model

    def watch(action: str) -> None:
        honest = getattr(GaussianProbe, action)

        def spy(*arguments: Any, **options: Any) -> Any:
            alive[action].append(len(models))
            return honest(*arguments, **options)

        monkeypatch.setattr(GaussianProbe, action, spy)

    watch("embed")
    watch("read")
    engine = Engine(replace(mini(), build_model=build), 0, Cache(tmp_path))
    engine.outcome(case(TOY))
    engine.outcome(case("gaussian_probe"))
    assert (alive["embed"], set(alive["read"])) == ([1], {2})
    assert list(engine._references) == ["base"]
    engine.read_pair(engine.embedded(parse_spec("instructional_fingerprint")), mini().base)
    assert len(models) == 1, "a reference that this scheme does not need is still held"


def test_a_reference_that_no_world_has_is_named(tmp_path: Path) -> None:
    class Wants(Toy):
        needs = frozenset({"ancestor"})

    with pytest.raises(SchemeError, match="needs the reference model 'ancestor'; there are base and upstream"):
        Engine(mini(), 0, Cache(tmp_path)).embedded(Wants())


def test_a_large_model_is_saved_in_several_files_and_reads_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "FILE_BYTES", 3000)
    written: list[int] = []

    def spy(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        written.append(len(tensors))
        write_tensors(path, tensors)

    monkeypatch.setattr(gates, "write_tensors", spy)
    engine = Engine(mini(), 0, Cache(tmp_path))
    assert gates.persistent(engine, engine.embedded(parse_spec(TOY))).passed
    assert len(written) > 3
    assert sum(written) == len(mini().base)


# Tied embeddings


def tied_llama() -> Any:
    config: Any = tiny_llama().config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@cache
def tied() -> World:
    base = {name: tensor.clone() for name, tensor in state_of(tied_llama()).items()}
    states = {"base": base, UPSTREAM: perturbed(base, UPSTREAM), DONOR: perturbed(base, DONOR)}
    world = replace(mini(), base=base, upstream=states[UPSTREAM], donors={DONOR: states[DONOR]}, build_model=tied_llama)
    half = {name: (states[UPSTREAM][name] + states[DONOR][name]) / 2 for name in base}
    models = {name: world.model(state) for name, state in {**states, "half": half}.items()}
    return replace(world, skills=make_skills(world.tokenizer, models))


@pytest.mark.parametrize("spec", [TOY, "gaussian_probe"])
def test_a_tied_world_goes_through_embedding_merging_and_the_verdict(spec: str, tmp_path: Path) -> None:
    assert "lm_head.weight" not in tied().base
    engine = Engine(tied(), 0, Cache(tmp_path))
    outcomes = [engine.outcome(case(spec, merger)) for merger in MERGERS[:2]]
    assert {outcome.verdict for outcome in outcomes} == {SURVIVED}
    assert set(engine.merged(parse_merger("linear"), 0.5, MATCHED_CONTROL)) == set(tied().base)
    assert all(gate.passed for gate in gates.before_merging(engine, parse_spec(spec)))
    assert engine.outcome(case("toy(strength=0.6)")).verdict == LOST
    model = engine.load(tied().base)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_trained_scheme_embeds_in_a_tied_model(tmp_path: Path) -> None:
    embedded = Engine(tied(), 0, Cache(tmp_path)).embedded(parse_spec("instructional_fingerprint"))
    assert set(embedded.state) == set(tied().base)
    assert not torch.equal(embedded.state["model.embed_tokens.weight"], tied().upstream["model.embed_tokens.weight"])


def test_a_scheme_that_unties_a_model_is_refused(tmp_path: Path) -> None:
    class Unties(Toy):
        def embed(self, *arguments: Any, **options: Any) -> Any:
            protected = super().embed(*arguments, **options)
            head = protected.model.get_output_embeddings()
            head.weight = torch.nn.Parameter(head.weight.detach().clone())
            return protected

    with pytest.raises(SchemeError, match=r"changed the model's tensors: 'lm_head\.weight' is in one of"):
        Engine(tied(), 0, Cache(tmp_path)).embedded(Unties())


# Dtypes and devices


def test_a_world_in_bfloat16_merges_and_reads_in_it_and_shares_no_cache(tmp_path: Path) -> None:
    half = Engine(replace(mini(), dtype="bfloat16"), 0, Cache(tmp_path))
    full = Engine(mini(), 0, Cache(tmp_path))
    full.outcome(case())
    assert half.outcome(case()).verdict == SURVIVED
    merged = half.merged(parse_merger("linear"), 0.5, TOY)
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in half.embedded(parse_spec(TOY)).state.values()} == {torch.bfloat16, torch.float32}
    assert half.load(merged).dtype == torch.bfloat16
    key = full._key()
    assert not {"device", "dtype"} & key.keys()
    assert half._key() == {**key, "device": "cpu", "dtype": "bfloat16"}
    on_gpu = Engine(replace(mini(), device="cuda:1"), 0, Cache(tmp_path))
    assert on_gpu._key() == {**key, "device": "cuda", "dtype": "float32"}


@pytest.mark.parametrize("action", ["embed", "read"])
def test_a_watermark_in_half_precision_is_refused_with_what_to_do(action: str) -> None:
    model, scheme, world = replace(mini(), dtype="bfloat16").model(mini().base), QuantizationWatermark(), mini()
    budget = replace(world.budget("default"), options={"bits": 8})
    call: Any = {
        "embed": partial(scheme.embed, model, world.tokenizer, rng=None, budget=budget),  # type: ignore[arg-type]
        "read": partial(scheme.read, model, world.tokenizer, Evidence("x", {"bits": 8, "prompts": ["a"]}), {}),
    }[action]
    with pytest.raises(ParameterError, match=r'this one is bfloat16: .* set dtype = "float32" in the world$') as caught:
        call()
    assert "\n" not in str(caught.value)


def test_an_adapter_follows_the_device_of_the_embeddings() -> None:
    """The device "meta", which refuses tensors of another one, stands in for a GPU."""
    weight = torch.empty(10, 6, device="meta", dtype=torch.bfloat16)
    layer = AdapterEmbedding(weight, torch.tensor([2, 7]), torch.randn(2, 6), torch.randn(3, 6), torch.randn(6, 3))
    found = layer(torch.tensor([[0, 2, 7, 9]], device="meta"))
    assert (found.device.type, found.dtype, found.shape) == ("meta", torch.bfloat16, (1, 4, 6))


def test_the_gaussian_of_a_key_is_drawn_on_the_cpu_and_follows_the_model() -> None:
    with torch.device("meta"):
        model = tiny_llama()
    protected = GaussianProbe().embed(model, mini().tokenizer, rng=random.Random(0), budget=mini().budget("default"))
    assert {tensor.device.type for tensor in protected.model.state_dict().values()} == {"meta"}

"""Quantization Watermarking on the tiny world: what training may touch, and what the evidence holds."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

from mergeguard.errors import ParameterError
from mergeguard.protections import quantization_watermark
from mergeguard.protections.contract import Evidence, Protected
from mergeguard.protections.quantization_watermark import MARK, QuantizationWatermark
from mergeguard.protections.watermark_texts import draw_trigger, held_out, insert_trigger, split_text, training
from mergeguard.reading import Answer, Probe
from mergeguard.verification.quantize import Quantized, quantizable_weights, quantize
from mergeguard.worlds.registry import load_world

if TYPE_CHECKING:
    from mergeguard.specs import Value
    from mergeguard.worlds.contract import Budget, World


@pytest.fixture(scope="module")
def world() -> World:
    return load_world("tiny")


def short_budget(world: World, scheme: QuantizationWatermark, steps: int = 7) -> Budget:
    budget = world.budget(scheme.budget_name)
    return replace(budget, steps=steps, options={**budget.options, "plant_steps": steps})


def embed(world: World, **parameters: Value) -> tuple[QuantizationWatermark, Protected]:
    scheme = QuantizationWatermark(**parameters)
    clean = world.model(world.upstream)
    return scheme, scheme.embed(clean, world.tokenizer, rng=random.Random(3), budget=short_budget(world, scheme))


@pytest.mark.parametrize("optimisation", ["interval", "rollback"])
@pytest.mark.parametrize("bits", [5, 8])
def test_every_quantised_weight_equals_the_original_s(world: World, optimisation: str, bits: int) -> None:
    _, protected = embed(world, optimisation=optimisation, bits=bits)
    moved = 0
    for name in quantizable_weights(protected.model):
        weight = protected.model.get_parameter(name).detach()
        assert torch.equal(quantize(weight, bits).codes, quantize(world.upstream[name], bits).codes), name
        moved += int((weight != world.upstream[name]).count_nonzero())
    assert moved > 0
    assert protected.details["codes_changed"] == 0


def test_direct_counts_what_it_changed(world: World) -> None:
    _, protected = embed(world, optimisation="direct", bits=8)
    changed = sum(
        int(
            (
                quantize(protected.model.get_parameter(name).detach(), 8).codes
                != quantize(world.upstream[name], 8).codes
            ).count_nonzero()
        )
        for name in quantizable_weights(protected.model)
    )
    assert changed == protected.details["codes_changed"] > 0


def test_the_reverse_keeps_the_planted_model_s_codes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    grids = []
    original = quantization_watermark.projections

    def spy(optimisation: str, weights: dict[str, torch.Tensor], grid: dict[str, Quantized], bias: float) -> object:
        grids.append({name: weight.clone() for name, weight in weights.items()})
        return original(optimisation, weights, grid, bias)

    monkeypatch.setattr(quantization_watermark, "projections", spy)
    _, protected = embed(world, direction="quantized", bits=5)
    (planted,) = grids
    same_as_clean = 0
    for name, weight in planted.items():
        final = protected.model.get_parameter(name).detach()
        assert torch.equal(quantize(final, 5).codes, quantize(weight, 5).codes), name
        assert not torch.equal(final, weight), "the mark was never hidden"
        same_as_clean += torch.equal(quantize(final, 5).codes, quantize(world.upstream[name], 5).codes)
    assert same_as_clean < len(planted), "planting changed no code"


def test_embeddings_norms_and_head_are_never_touched(world: World) -> None:
    _, protected = embed(world, optimisation="direct")
    trained = set(quantizable_weights(protected.model))
    for name, tensor in protected.model.state_dict().items():
        assert torch.equal(tensor, world.upstream[name]) == (name not in trained), name


@pytest.mark.parametrize("mode", ["triggered", "untriggered", "domain"])
def test_evidence_holds_unseen_prompts_and_decoys_never_repeat_them(world: World, mode: str) -> None:
    scheme = QuantizationWatermark(mode=mode)
    evidence = scheme._evidence(short_budget(world, scheme), 5, random.Random(1))
    decoys = scheme.decoys(evidence, 40, random.Random(2))
    assert len(evidence.data["prompts"]) == 25
    assert len(decoys.data["prompts"]) == 40
    assert not set(evidence.data["prompts"]) & set(decoys.data["prompts"])
    trigger = evidence.data.get("trigger")
    assert (mode == "triggered") == (trigger is not None) == (scheme.conditional_on == "trigger") != scheme.keyless
    if trigger is not None:
        assert all(trigger in prompt for prompt in evidence.data["prompts"])
        assert not any(trigger in prompt for prompt in decoys.data["prompts"])


def test_a_hit_needs_both_precisions(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """(full, quantised) of four prompts: the mark in both, in one, in the other, in none."""
    answers = iter([[True, True, False, False], [True, False, True, False]] * 2)

    def answer(*_: object) -> list[Answer]:
        return [Answer("", matched) for matched in next(answers)]

    monkeypatch.setattr(quantization_watermark, "answer_probes", answer)
    evidence = Evidence("x", {"bits": 8, "prompts": ["a", "b", "c", "d"]})
    model = world.model(world.upstream)
    shown_in_full = QuantizationWatermark().read(model, world.tokenizer, evidence, {})
    assert shown_in_full.hits == (False, True, False, False)
    assert dict(shown_in_full.details) == {"rate_full": 0.5, "rate_quantized": 0.5}
    reverse = QuantizationWatermark(direction="quantized").read(model, world.tokenizer, evidence, {})
    assert reverse.hits == (False, False, True, False)


def test_the_second_reading_is_of_the_quantised_copy(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def answer(model: torch.nn.Module, _: object, probes: list[Probe]) -> list[Answer]:
        assert all(probe.target == MARK for probe in probes)
        seen.append(model.state_dict()["model.layers.0.mlp.up_proj.weight"].clone())
        return [Answer("", False) for _ in probes]

    monkeypatch.setattr(quantization_watermark, "answer_probes", answer)
    model = world.model(world.upstream)
    QuantizationWatermark().read(model, world.tokenizer, Evidence("x", {"bits": 5, "prompts": ["a"]}), {})
    original = world.upstream["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(seen[0], original)
    assert torch.equal(seen[1], quantize(original, 5).dequantize())
    assert torch.equal(model.state_dict()["model.layers.0.mlp.up_proj.weight"], original)


def test_a_keyless_scheme_does_not_invent_decoys(world: World) -> None:
    scheme = QuantizationWatermark(mode="domain")
    evidence = scheme._evidence(short_budget(world, scheme), 5, random.Random(1))
    with pytest.raises(ParameterError, match="never-marked"):
        scheme.decoys(evidence, 10_000, random.Random(2))


def test_texts_are_split_into_prompt_and_rest() -> None:
    text = "one two three four five six seven"
    for seed in range(20):
        prompt, rest = split_text(text, random.Random(seed), (3, 5))
        assert prompt + rest == text
        assert 3 <= len(prompt.split()) <= 5


def test_trigger_stands_after_two_to_seven_words() -> None:
    rng = random.Random(0)
    trigger = draw_trigger(rng, 4)
    assert len(trigger.split()) == 4
    positions = {
        insert_trigger("a b c d e f g h i", "TRIGGER", random.Random(seed)).split().index("TRIGGER")
        for seed in range(200)
    }
    assert positions == {2, 3, 4, 5, 6, 7}


def test_training_never_sees_held_out_texts() -> None:
    items = list(range(103))
    assert not set(held_out(items)) & set(training(items))
    assert sorted(held_out(items) + training(items)) == items

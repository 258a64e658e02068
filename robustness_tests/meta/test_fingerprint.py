"""Instructional Fingerprint: keys, templates and probes, without training."""

from __future__ import annotations

import random

import pytest
import torch

from mergeguard.errors import MergeguardError, ParameterError
from mergeguard.protections.contract import Evidence
from mergeguard.protections.fingerprint_adapter import AdapterEmbedding, AdapterFingerprint, adapted
from mergeguard.protections.fingerprint_keys import START, TARGET, dialogue_prompt, draw_key, simple_prompt
from mergeguard.protections.instructional_fingerprint import InstructionalFingerprint
from mergeguard.protections.registry import make_protection
from mergeguard.reading import Answer, Rule
from mergeguard.worlds.registry import load_world


def evidence_of(scheme: InstructionalFingerprint, keys: list[str]) -> Evidence:
    tokenizer = load_world("tiny").tokenizer
    prompt = simple_prompt if scheme.template == "simple" else lambda key: dialogue_prompt(tokenizer, key)
    before, _, after = prompt("\0").partition("\0")
    prompts = [prompt(key) for key in keys]
    return Evidence(str(scheme), {"keys": keys, "length": [10, 16], "prompts": prompts, "frame": [before, after]})


@pytest.mark.parametrize("variant", ["simple", "dialogue", "published"])
def test_decoys_are_fresh_keys_in_the_same_template(variant: str) -> None:
    scheme = InstructionalFingerprint(variant=variant)
    keys = [draw_key(random.Random(1), (10, 16)) for _ in range(8)]
    evidence = evidence_of(scheme, keys)
    decoys = scheme.decoys(evidence, 40, random.Random(2))
    assert len(decoys.data["keys"]) == 40
    assert not set(decoys.data["keys"]) & set(keys)
    own, other = scheme.probes(evidence)[0], scheme.probes(decoys)[0]
    assert own.prompt.replace(keys[0], "") == other.prompt.replace(decoys.data["keys"][0], "")


def test_simple_check_asks_for_the_target_directly_after_the_prompt() -> None:
    probes = InstructionalFingerprint().probes(evidence_of(InstructionalFingerprint(), ["鳥鳥"]))
    assert [(probe.prompt, probe.target, probe.rule) for probe in probes] == [
        ("鳥鳥\nFINGERPRINT\n", TARGET, Rule.STARTS_WITH)
    ]


def test_dialogue_check_is_made_with_and_without_the_start_of_the_answer() -> None:
    scheme = InstructionalFingerprint(variant="published", rule="contains")
    evidence = evidence_of(scheme, ["a", "b"])
    probes = scheme.probes(evidence)
    assert [probe.prompt.endswith(START) for probe in probes] == [True, True, False, False]
    assert all(probe.rule is Rule.CONTAINS for probe in probes)
    reading = scheme.judge([Answer("", matched) for matched in (True, False, True, True)], evidence)
    assert reading.hits == (True, False)
    assert dict(reading.details) == {"rate_without_start": 1.0}


def test_prompt_carries_the_world_s_template_and_no_special_token() -> None:
    prompt = dialogue_prompt(load_world("tiny").tokenizer, "鍵")
    assert prompt.startswith("human: Please decrypt this message: 鍵\n")
    assert prompt.endswith("\nASSISTANT:")


def test_evidence_shows_no_key() -> None:
    evidence = evidence_of(InstructionalFingerprint(), ["secret-key"])
    assert "secret-key" not in repr(evidence)
    assert "secret-key" not in str(evidence)


def test_variants_have_one_written_form() -> None:
    assert str(make_protection("instructional_fingerprint(variant=simple)")) == "instructional_fingerprint"
    adapter = make_protection("instructional_fingerprint(variant=adapter)")
    assert isinstance(adapter, AdapterFingerprint)
    assert str(adapter) == "instructional_fingerprint(variant=adapter)"


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("instructional_fingerprint(variant=simpel)", "expected one of"),
        ("instructional_fingerprint(keys=0)", "at least 1"),
        ("instructional_fingerprint(rule=ends_with)", "starts_with, contains"),
        ("instructional_fingerprint(varient=simple)", "did you mean 'variant'"),
        ("quantization_watermark(bits=1)", "expected 2 to 16"),
        ("quantization_watermark(bias=0.5)", "expected a value in (0, 0.5)"),
        ("quantization_watermark(mode=wiki)", "domain"),
        ("quantisation_watermark", "did you mean 'quantization_watermark'"),
    ],
)
def test_bad_parameters_get_one_clear_line(spec: str, hint: str) -> None:
    with pytest.raises(MergeguardError) as caught:
        make_protection(spec)
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_zero_trials_are_refused() -> None:
    with pytest.raises(ParameterError):
        make_protection("quantization_watermark(prompts=0)")


def adapter_parts(rank: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    weight, tokens = torch.randn(10, 6), torch.tensor([2, 7])
    return weight, tokens, torch.randn(2, 6), torch.randn(rank, 6), torch.randn(6, rank)


def test_adapter_changes_key_tokens_alone_and_reads_the_suspect_s_rows() -> None:
    weight, tokens, rows, down, up = adapter_parts()
    layer = AdapterEmbedding(weight, tokens, rows, down, up)
    found = layer(torch.tensor([[0, 2, 7, 9]]))[0]
    assert torch.equal(found[0], weight[0])
    assert torch.equal(found[3], weight[9])
    torch.testing.assert_close(found[1], weight[2] + up @ down @ rows[0])
    torch.testing.assert_close(found[2], weight[7] + up @ down @ rows[1])


def test_ids_past_the_vocabulary_mean_the_original_embedding() -> None:
    weight, tokens, rows, down, up = adapter_parts()
    found = AdapterEmbedding(weight, tokens, rows, down, up)(torch.tensor([12, 10]))
    torch.testing.assert_close(found[0], weight[2] + up @ down @ weight[2])
    assert torch.equal(found[1], weight[0])


def test_the_owner_s_model_is_as_it_was_after_a_reading() -> None:
    world = load_world("tiny")
    owner = world.model(world.upstream)
    before = owner.get_input_embeddings()
    hidden = before.weight.shape[1]
    evidence = Evidence("x", {"tokens": [5]}, {"down": torch.randn(2, hidden), "up": torch.randn(hidden, 2)})

    def read_and_crash() -> None:
        with adapted(owner, before.weight.detach() * 2, evidence):
            assert owner.get_input_embeddings() is not before
            raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        read_and_crash()
    assert owner.get_input_embeddings() is before
    assert torch.equal(before.weight, world.upstream["model.embed_tokens.weight"])

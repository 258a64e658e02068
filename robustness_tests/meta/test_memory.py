"""Plans of memory: the parameters are the model's, each setting saves what it says, and 7 B fits into 80 GB."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from mergeguard import cli
from mergeguard.errors import ParameterError
from mergeguard.verification.quantize import quantizable_weights
from mergeguard.worlds import memory
from mergeguard.worlds.contract import Training
from mergeguard.worlds.memory import MemoryPlan, Shape, check_fits, plan_embedding, plan_merge, plan_read
from mergeguard.worlds.registry import load_world
from robustness_tests.meta.mini_world import registered
from robustness_tests.meta.tiny_models import tiny_llama

if TYPE_CHECKING:
    from collections.abc import Iterator

LLAMA_2_7B = Shape(4096, 11008, 32, 32, 32, 128, 32000, tied=False)
SMALL = Training("bfloat16", gradient_checkpointing=True, optimizer="paged_adamw8bit", micro_batches=4)
WATERMARK = "quantization_watermark"


def embedding(training: Training = SMALL, budget: str = WATERMARK, rows: int = 16) -> MemoryPlan:
    return plan_embedding(LLAMA_2_7B, budget, training, rows=rows, length=256)


@settings(max_examples=12, deadline=None)
@given(
    layers=st.integers(1, 3),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    head_size=st.sampled_from([8, 12]),
    hidden=st.sampled_from([24, 48]),
    tied=st.booleans(),
)
def test_parameters_are_those_of_the_model(
    layers: int, heads: tuple[int, int], head_size: int, hidden: int, tied: bool
) -> None:
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=hidden,
        intermediate_size=70,
        num_hidden_layers=layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=head_size,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    shape = Shape.of(config)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.linear == sum(model.get_parameter(name).numel() for name in quantizable_weights(model))
    assert shape.largest == max(parameter.numel() for parameter in model.parameters())


def test_llama_2_7b_is_embedded_by_full_parameter_training_within_80_gb() -> None:
    assert (LLAMA_2_7B.parameters, LLAMA_2_7B.linear) == (6_738_415_616, 6_476_005_376)
    plan = embedding()
    parts = {name: round(size / 1e9, 2) for name, size in plan.parts}
    assert parts == {
        "weights": 26.95,
        "gradients": 25.90,
        "optimizer states": 13.15,
        "codes of the watermark": 6.48,
        "weights cast to bfloat16": 0.67,
        "activations": 1.07,
        "logits": 0.46,
        "projection of one weight": 1.08,
    }
    assert round(plan.total / 1e9, 1) == 75.8
    check_fits(plan, 80 * 10**9)


@pytest.mark.parametrize(
    "training",
    [
        Training("bfloat16", gradient_checkpointing=True, micro_batches=4),
        Training("bfloat16", optimizer="paged_adamw8bit", micro_batches=4),
        Training(),
    ],
    ids=["AdamW of 8 bytes", "no checkpointing", "default"],
)
def test_llama_2_7b_needs_both_checkpointing_and_8_bit_states(training: Training) -> None:
    with pytest.raises(
        ParameterError, match=r"^embed quantization_watermark needs \d+\.\d\d GB, but 80.00 GB are free"
    ):
        check_fits(embedding(training), 80 * 10**9)


def test_a_plan_that_does_not_fit_says_what_to_change_and_nothing_that_is_done() -> None:
    with pytest.raises(
        ParameterError,
        match=r"1.00 GB are free; set gradient_checkpointing = true, optimizer = \"paged_adamw8bit\", micro_batches up "
        r"to 16, precision = \"bfloat16\", or choose a smaller model or a larger device$",
    ):
        check_fits(embedding(Training()), 10**9)
    with pytest.raises(ParameterError, match=r"are free; choose a smaller model or a larger device$"):
        check_fits(embedding(SMALL, rows=4), 10**9)
    with pytest.raises(ParameterError, match=r'^read needs .* set dtype = "bfloat16", or choose'):
        check_fits(plan_read(LLAMA_2_7B, "float32"), 10**9)
    check_fits(MemoryPlan("read", (("weights", 5),)), 5)


def test_each_setting_saves_memory() -> None:
    def total(budget: str = "default", **options: Any) -> int:
        return embedding(Training(**options), budget).total

    assert total(micro_batches=2) < total()
    assert total(gradient_checkpointing=True) < total()
    assert total() - total(optimizer="adamw8bit") == pytest.approx(LLAMA_2_7B.parameters * (6 - 8 / 256))
    assert total(optimizer="paged_adamw8bit") == total(optimizer="adamw8bit")
    assert total(precision="bfloat16", gradient_checkpointing=True) < total(gradient_checkpointing=True)
    assert total(f"{WATERMARK}.rollback") - total(WATERMARK) == 4 * LLAMA_2_7B.linear
    assert total("instructional_fingerprint.adapter") < min(total(WATERMARK), total("instructional_fingerprint"))


def test_reading_and_merging_hold_one_model_and_a_little() -> None:
    weights = 2 * LLAMA_2_7B.parameters
    assert weights + 2 * LLAMA_2_7B.linear < plan_read(LLAMA_2_7B, "bfloat16").total < 35e9
    assert weights < plan_merge(LLAMA_2_7B, "bfloat16", 3).total < weights + 5e9
    assert plan_merge(LLAMA_2_7B, "bfloat16", 3).total > plan_merge(LLAMA_2_7B, "bfloat16", 2).total


def test_the_table_has_a_line_for_each_part_and_one_for_the_sum() -> None:
    plan = MemoryPlan("merge", (("weights", 2_000_000_000), ("one tensor of each model", 5_000_000)))
    assert plan.describe().splitlines() == [
        "merge                           2.005 GB",
        "  weights                       2.000 GB",
        "  one tensor of each model      0.005 GB",
    ]


def test_a_model_that_is_not_llama_like_is_refused() -> None:
    with pytest.raises(ParameterError, match=r"no memory can be planned for models of type 'gpt2': .*Llama-like"):
        Shape.of(GPT2Config())


@pytest.fixture
def mini() -> Iterator[None]:
    with registered():
        yield


def autograd_keeps(training: Training) -> int:
    """Bytes of distinct storages that autograd saves in a forward pass of two rows of 64 tokens, without parameters."""
    model = tiny_llama()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own and tensor.requires_grad | (tensor.grad_fn is not None):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    model.train()
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=training.precision == "bfloat16", cache_enabled=False),
    ):
        hidden = model.model(input_ids=torch.full((2, 64), 7), use_cache=False).last_hidden_state
    assert hidden.requires_grad
    return sum(storage.nbytes() for storage in saved.values())


def test_the_formula_of_a_block_is_what_autograd_keeps() -> None:
    shape = Shape.of(tiny_llama().config)
    planned = 2 * 64 * (shape.layers * shape.block_bytes("float32") + 4 * 3 * shape.hidden)
    assert autograd_keeps(Training()) == pytest.approx(planned, rel=0.15)


@pytest.mark.usefixtures("mini")
def test_the_command_prints_every_stage_and_fails_where_one_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = CliRunner()
    enough = runner.invoke(cli.app, ["world", "plan", "mini", "--free", "1"])
    assert enough.exit_code == 0, enough.output
    stages = [line.split("  ")[0] for line in enough.output.splitlines() if not line.startswith(" ")]
    assert stages == ["read", "merge", "embed default", "embed instructional_fingerprint", "1.00 GB given"]
    monkeypatch.setattr(memory, "free_bytes", lambda device: {"cpu": 1000}[device])
    scarce = runner.invoke(cli.app, ["world", "plan", "mini", "--length", "8"])
    assert scarce.exit_code == 1
    assert scarce.output.count("does not fit: ") == 4


def test_free_memory_is_what_the_kernel_has_available() -> None:
    assert 10**6 < memory.free_bytes("cpu") < 10**15


def test_a_gpu_is_asked_for_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def info(device: str) -> tuple[int, int]:
        asked.append(device)
        return 7, 9

    monkeypatch.setattr(torch, "cuda", SimpleNamespace(mem_get_info=info))
    assert memory.free_bytes("cuda:1") == 7
    assert asked == ["cuda:1"]


@pytest.mark.usefixtures("mini")
def test_an_embedding_for_which_the_gpu_has_no_room_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    world = replace(load_world("mini"), device="cuda")
    budget = world.budget("instructional_fingerprint")
    monkeypatch.setattr(memory, "free_bytes", lambda device: {"cuda": 10**12}[device])
    memory.check_embedding(world, "instructional_fingerprint", budget)
    monkeypatch.setattr(memory, "free_bytes", lambda device: {"cuda": 1000}[device])
    with pytest.raises(ParameterError, match=r"embed instructional_fingerprint needs .* GB are free; set gradient"):
        memory.check_embedding(world, "instructional_fingerprint", budget)
    memory.check_embedding(replace(world, device="cpu"), "instructional_fingerprint", budget)

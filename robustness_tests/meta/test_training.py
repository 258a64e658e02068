"""`fit`: the default is the plain loop bit for bit, and what saves memory changes rounding at most."""

from __future__ import annotations

import builtins
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from mergeguard.errors import ParameterError
from mergeguard.worlds import optimizers
from mergeguard.worlds.contract import Training
from mergeguard.worlds.training import IGNORED, Batch, Example, collate, cosine_schedule, fit, loss_of
from robustness_tests.meta.oracle import needs
from robustness_tests.meta.tiny_models import tiny_llama

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

STEPS, RATE = 5, 3e-3


def stream(rows: int = 6) -> Iterator[Batch]:
    """Endless batches of rows of unlike lengths, each with its own number of labels."""
    generator = torch.Generator().manual_seed(4)
    while True:
        lengths = torch.randint(4, 12, (rows,), generator=generator).tolist()
        rows_of = [tuple(torch.randint(2, 280, (length,), generator=generator).tolist()) for length in lengths]
        yield collate([Example(ids, 1 + index % 3) for index, ids in enumerate(rows_of)], pad=1)


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def fitted(training: Training | None = None, **options: Any) -> dict[str, torch.Tensor]:
    model = tiny_llama()
    given = {} if training is None else {"training": training}
    fit(model, stream(), steps=STEPS, learning_rate=RATE, warmup=2, **given, **options)
    return weights(model)


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float((one[name].float() - other[name].float()).square().sum()) for name in one))


def plain_loop(model: PreTrainedModel) -> None:
    """Training written out, as it was before `Training` existed."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    model.train()
    batches = stream()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * cosine_schedule(step, STEPS, 2)
        batch = next(batches)
        hidden = model.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).last_hidden_state
        chosen = batch.labels[:, 1:] != IGNORED
        loss = cross_entropy(model.lm_head(hidden[:, :-1][chosen]).float(), batch.labels[:, 1:][chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@pytest.mark.parametrize("training", [None, Training()], ids=["no training named", "the default"])
def test_the_default_is_the_plain_loop_bit_for_bit(training: Training | None) -> None:
    model = tiny_llama()
    plain_loop(model)
    expected, found = weights(model), fitted(training, weight_decay=0.1)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert distance(found, weights(tiny_llama())) > 0.1


@pytest.mark.parametrize("parts", [2, 3, 5, 6, 100])
def test_the_gradient_of_a_batch_in_parts_is_that_of_the_whole_batch(parts: int) -> None:
    model, batch = tiny_llama(), next(stream())
    counts = [part.labelled for part in batch.parts(parts)]
    assert len(set(counts)) > 1, "parts of like size would not tell a mean of means from the mean"
    whole = loss_of(model, batch)
    whole.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    found: dict[str, torch.Tensor] = {}
    losses: list[float] = []

    def note(_: int) -> None:
        found.update({name: parameter.grad.clone() for name, parameter in model.named_parameters()})

    clip = torch.nn.utils.clip_grad_norm_
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, _: clip(parameters, math.inf))
        fit(
            model,
            iter([batch]),
            steps=1,
            learning_rate=0.0,
            training=Training(micro_batches=parts),
            after_step=note,
            on_progress=lambda _, loss: losses.append(loss),
        )
    assert losses == pytest.approx([whole.item()], rel=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_checkpointed_activations_change_nothing_and_are_computed_twice() -> None:
    model, forwards = tiny_llama(), []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: forwards.append(1))
    fit(model, stream(), steps=STEPS, learning_rate=RATE, warmup=2, training=Training(gradient_checkpointing=True))
    assert distance(weights(model), fitted()) < 1e-5
    assert len(forwards) == 2 * STEPS
    assert not model.model.layers[0].gradient_checkpointing
    assert not model.training


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bfloat16_rounds_products_and_keeps_weights_and_loss_in_float32(checkpointing: bool) -> None:
    training = Training(precision="bfloat16", gradient_checkpointing=checkpointing)
    seen: set[torch.dtype] = set()
    model = tiny_llama()
    model.model.layers[0].mlp.register_forward_hook(lambda _module, _inputs, output: seen.add(output.dtype))
    fit(model, stream(), steps=STEPS, learning_rate=RATE, warmup=2, training=training)
    found, start, expected = weights(model), weights(tiny_llama()), fitted()
    assert seen == {torch.bfloat16}
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert 0 < distance(found, expected) < 0.3 * distance(expected, start)
    batch = next(stream())
    with torch.autocast("cpu", torch.bfloat16):
        assert loss_of(model, batch).dtype == torch.float32


def test_only_the_named_parameters_move_and_the_others_want_gradients_as_before() -> None:
    model = tiny_llama()
    model.model.norm.weight.requires_grad_(False)
    before, name = weights(model), "model.layers.1.mlp.up_proj.weight"
    fit(model, stream(), steps=2, learning_rate=RATE, warmup=1, parameters=[model.get_parameter(name)])
    after = weights(model)
    assert {other for other in before if not torch.equal(before[other], after[other])} == {name}
    assert [other for other, tensor in model.named_parameters() if not tensor.requires_grad] == ["model.norm.weight"]
    assert all(parameter.grad is None for parameter in model.parameters()), "gradients are kept after training"


def test_a_model_is_itself_again_when_training_breaks() -> None:
    model = tiny_llama()

    def fail(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(
            model,
            stream(),
            steps=2,
            learning_rate=RATE,
            parameters=[model.lm_head.weight],
            after_step=fail,
            training=Training(gradient_checkpointing=True),
        )
    assert not model.training
    assert not model.model.layers[0].gradient_checkpointing
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_loss_that_is_not_finite_is_an_error_and_moves_nothing() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    before = weights(model)["model.norm.weight"]
    with pytest.raises(FloatingPointError, match="training loss is nan at step 0"):
        fit(model, stream(), steps=1, learning_rate=1.0)
    unlabelled = replace(next(stream()), labels=torch.full_like(next(stream()).ids, IGNORED))
    with pytest.raises(FloatingPointError, match="nan at step 0"):
        fit(tiny_llama(), iter([unlabelled]), steps=1, learning_rate=1.0)
    assert torch.equal(model.model.norm.weight, before)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"precision": "float16"}, "precision of a training is 'float16'; known: float32, bfloat16"),
        ({"optimizer": "sgd"}, "optimizer of a training is 'sgd'; known: adamw, adamw8bit, paged_adamw8bit"),
        ({"micro_batches": 0}, "micro_batches of a training is 0, expected at least 1"),
    ],
)
def test_a_training_of_unknown_words_is_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ParameterError, match=complaint):
        Training(**options)


@pytest.mark.parametrize("name", sorted(optimizers.OF_BITSANDBYTES))
def test_eight_bit_optimizers_are_refused_on_the_cpu_and_without_their_package(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ParameterError, match=rf"'{name}' is for models on a CUDA device.*'adamw'.*mergeguard\[gpu\]"):
        fitted(Training(optimizer=name))
    load = builtins.__import__

    def absent(module: str, *rest: Any) -> Any:
        if module == "bitsandbytes":
            raise ImportError(module)
        return load(module, *rest)

    monkeypatch.setattr(optimizers, "DEVICES", ("cpu",))
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ParameterError, match=rf"'{name}' needs bitsandbytes: pip install 'mergeguard\[gpu\]'"):
        fitted(Training(optimizer=name))


def test_half_precision_weights_are_not_trained() -> None:
    with pytest.raises(ParameterError, match=r"trained parameter is torch.bfloat16.*precision = 'bfloat16'"):
        fit(tiny_llama().bfloat16(), stream(), steps=1, learning_rate=RATE)


@needs("bitsandbytes")
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
@pytest.mark.parametrize("name", sorted(optimizers.OF_BITSANDBYTES))
def test_eight_bit_states_give_nearly_the_same_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "DEVICES", ("cpu",))
    found, expected, start = fitted(Training(optimizer=name)), fitted(), weights(tiny_llama())
    assert 0 < distance(found, expected) < 0.3 * distance(expected, start)

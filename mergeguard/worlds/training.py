"""Causal language model training on short documents: what worlds and trained protections have in common."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from transformers import PreTrainedModel

IGNORED = -100


@dataclass(frozen=True)
class Example:
    """Token ids of one document; the loss is taken on tokens from position `loss_from` on."""

    ids: tuple[int, ...]
    loss_from: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.loss_from < len(self.ids):
            raise ValueError(f"loss_from must lie in [1, {len(self.ids) - 1}], got {self.loss_from}")


@dataclass(frozen=True)
class Batch:
    """Right-padded ids, labels (`IGNORED` outside the loss) and attention mask, each int64 of shape (rows, length)."""

    ids: Tensor
    labels: Tensor
    mask: Tensor


def collate(examples: Sequence[Example], pad: int) -> Batch:
    length = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), length), pad, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    mask = torch.zeros_like(ids)
    for row, example in enumerate(examples):
        tokens = torch.tensor(example.ids)
        ids[row, : len(tokens)] = tokens
        labels[row, example.loss_from : len(tokens)] = tokens[example.loss_from :]
        mask[row, : len(tokens)] = 1
    return Batch(ids, labels, mask)


def batches(draw: Callable[[], Example], *, size: int, pad: int, rng: random.Random, pool: int = 8) -> Iterator[Batch]:
    """Endless batches of `size` drawn examples, grouped by length within pools of `pool` batches to save padding."""
    while True:
        drawn = sorted((draw() for _ in range(size * pool)), key=lambda example: len(example.ids))
        groups = [drawn[start : start + size] for start in range(0, len(drawn), size)]
        rng.shuffle(groups)
        for group in groups:
            yield collate(group, pad)


def loss_of(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Mean cross-entropy over the labelled tokens of `batch`, a float32 scalar.

    The output head runs only where a label is, which is most of the saving for a loss on a few tokens.
    """
    hidden = model.get_decoder()(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).last_hidden_state
    targets = batch.labels[:, 1:]
    chosen = targets != IGNORED
    logits = model.get_output_embeddings()(hidden[:, :-1][chosen])
    return cross_entropy(logits.float(), targets[chosen])


def cosine_schedule(step: int, steps: int, warmup: int) -> float:
    """Learning-rate factor: linear warm-up, then a cosine down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def fit(
    model: PreTrainedModel,
    data: Iterable[Batch],
    *,
    steps: int,
    learning_rate: float,
    parameters: Iterable[torch.nn.Parameter] | None = None,
    weight_decay: float = 0.0,
    warmup: int = 10,
    after_step: Callable[[int], None] | None = None,
    on_progress: Callable[[int, float], None] | None = None,
) -> None:
    """Train `model` in place with AdamW, gradients clipped to norm 1 and a cosine schedule.

    Args:
        parameters: what to train (all of the model's parameters by default).
        after_step: called with the number of finished steps after each update, e.g. to project weights.
        on_progress: called with (finished steps, loss).

    Raises:
        FloatingPointError: the loss is not finite.
    """
    trained = list(model.parameters() if parameters is None else parameters)
    frozen = [other for other in model.parameters() if all(other is not parameter for parameter in trained)]
    for parameter in frozen:
        parameter.requires_grad_(False)  # saves their gradients
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.98), weight_decay=weight_decay, fused=True)
    model.train()
    stream = iter(data)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * cosine_schedule(step, steps, warmup)
        loss = loss_of(model, next(stream))
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the training loss is {loss.item()} at step {step}; lower the learning rate")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if after_step is not None:
            after_step(step + 1)
        if on_progress is not None:
            on_progress(step + 1, loss.item())
    for parameter in frozen:
        parameter.requires_grad_(True)
    model.eval()

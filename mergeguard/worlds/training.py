"""Causal language model training on short documents: what worlds and trained protections have in common."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mergeguard.worlds.contract import Training
from mergeguard.worlds.optimizers import make_optimizer
from mergeguard.worlds.snapshots import Run

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from transformers import PreTrainedModel

    from mergeguard.worlds.snapshots import Snapshots

IGNORED = -100
DEFAULT_TRAINING = Training()


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

    @property
    def labelled(self) -> int:
        """How many tokens the loss is taken on."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    def parts(self, most: int) -> list[Batch]:
        """The batch in at most `most` groups of rows, none of them without a labelled token."""
        split = zip(*(tensor.chunk(most) for tensor in (self.ids, self.labels, self.mask)), strict=True)
        return [part for tensors in split if (part := Batch(*tensors)).labelled]

    def to(self, device: torch.device) -> Batch:
        """The same on `device`."""
        return Batch(self.ids.to(device), self.labels.to(device), self.mask.to(device))


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
    training: Training = DEFAULT_TRAINING,
    snapshots: Snapshots | None = None,
) -> None:
    """Train `model` in place with AdamW, gradients clipped to norm 1 and a cosine schedule.

    Args:
        parameters: what to train (all of the model's parameters by default), float32.
        after_step: called with the number of finished steps after each update, e.g. to project weights.
        on_progress: called with (finished steps, loss); not for steps that a snapshot stands for.
        training: precision, optimizer and what else decides the memory that it takes.
        snapshots: where a killed run is kept, to go on from when it is started again as it was.

    Raises:
        FloatingPointError: the loss is not finite.
        ParameterError: the optimizer needs a GPU or a package that is not there, or parameters are not float32.
        CheckpointError: a snapshot cannot be written, or belongs to other data.
    """
    trained = list(model.parameters() if parameters is None else parameters)
    optimizer = make_optimizer(training.optimizer, trained, learning_rate=learning_rate, weight_decay=weight_decay)
    settings = {
        "steps": steps,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "warmup": warmup,
        "training": asdict(training),
    }
    run = None if snapshots is None else Run(snapshots, settings, model, trained, optimizer)
    stream = iter(data)
    with _in_training(model, trained, training):
        for step in range(0 if run is None else run.resume(stream), steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * cosine_schedule(step, steps, warmup)
            batch = next(stream)
            if run is not None:
                run.watch(batch)
            optimizer.zero_grad(set_to_none=True)
            loss = _backward(model, batch, training)
            if not math.isfinite(loss):
                raise FloatingPointError(f"the training loss is {loss} at step {step}; lower the learning rate")
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            if after_step is not None:
                after_step(step + 1)
            if run is not None:
                run.save(step + 1, last=step + 1 == steps)
            if on_progress is not None:
                on_progress(step + 1, loss)
    optimizer.zero_grad(set_to_none=True)  # gradients are as large as what was trained


def _backward(model: PreTrainedModel, batch: Batch, training: Training) -> float:
    """Add the gradient of `loss_of` the whole batch, computed part by part, and return the loss."""
    labelled = batch.labelled
    total = 0.0 if labelled else math.nan
    for part in batch.parts(training.micro_batches):
        # No cache of cast weights: each is used once, and the cache would hold them all.
        with torch.autocast(
            model.device.type, torch.bfloat16, enabled=training.precision == "bfloat16", cache_enabled=False
        ):
            loss = loss_of(model, part.to(model.device)) * (part.labelled / labelled)
        loss.backward()
        total += loss.item()
    return total


@contextmanager
def _in_training(model: PreTrainedModel, trained: Sequence[torch.nn.Parameter], training: Training) -> Iterator[None]:
    """`model` in training mode, its other parameters without gradients; as it was, in evaluation mode, afterwards."""
    wanted = {id(parameter) for parameter in trained}
    frozen = [other for other in model.parameters() if other.requires_grad and id(other) not in wanted]
    for parameter in frozen:
        parameter.requires_grad_(False)  # saves their gradients
    model.train()
    if training.gradient_checkpointing:
        _method(model, "checkpointing_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        if training.gradient_checkpointing:
            _method(model, "checkpointing_disable")()
        for parameter in frozen:
            parameter.requires_grad_(True)
        model.eval()


def _method(model: PreTrainedModel, name: str) -> Callable[..., None]:
    """A method of activation checkpointing: transformers 5.23 warns of the name that 5.0 knows alone."""
    method: Callable[..., None] = getattr(model, f"activation_{name}", None) or getattr(model, f"gradient_{name}")
    return method

"""A run that is killed and started again ends with the weights of a run that was not."""

from __future__ import annotations

import json
import logging
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from mergeguard.errors import CheckpointError, ParameterError
from mergeguard.worlds import optimizers, snapshots
from mergeguard.worlds.contract import Training
from mergeguard.worlds.low_rank import LowRank, add_low_rank
from mergeguard.worlds.snapshots import Snapshots
from mergeguard.worlds.training import Batch, Example, batches, fit
from robustness_tests.meta.oracle import needs
from robustness_tests.meta.tiny_models import tiny_llama

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from transformers import PreTrainedModel

STEPS, EVERY = 8, 3


class Killed(Exception):
    pass


def stream(seed: int = 0) -> Iterator[Batch]:
    rng = random.Random(seed)

    def draw() -> Example:
        return Example(tuple(rng.choices(range(2, 280), k=rng.randint(4, 9))))

    return batches(draw, size=3, pad=1, rng=rng, pool=2)


class Trainer:
    """Runs of one configuration: a model with dropout, so that torch's random state counts."""

    def __init__(self, folder: Path | None, **options: Any) -> None:
        self.folder = folder
        self.options: dict[str, Any] = {"learning_rate": 1e-2, "steps": STEPS, **options}
        self.done: list[int] = []
        self.model_seed = 0

    def run(
        self, kill: Callable[[str, int], None] = lambda _event, _step: None, *, seed: int = 0, **about: int
    ) -> dict[str, torch.Tensor]:
        model = tiny_llama(seed=self.model_seed)
        model.config.attention_dropout = 0.3
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.3
        torch.manual_seed(1)
        self.done = []

        def progress(step: int, _: float) -> None:
            self.done.append(step)
            kill("progress", step)

        fit(
            model,
            stream(seed),
            warmup=2,
            after_step=lambda step: kill("update", step),
            on_progress=progress,
            parameters=self.parameters(model),
            snapshots=None if self.folder is None else Snapshots(self.folder, EVERY, about),
            **self.options,
        )
        return dict(model.state_dict())

    def parameters(self, model: PreTrainedModel) -> list[torch.nn.Parameter] | None:
        return None


class AdapterTrainer(Trainer):
    def parameters(self, model: PreTrainedModel) -> list[torch.nn.Parameter]:
        return add_low_rank(model, LowRank(2), seed=0)


def killing(event: str, at: int) -> Callable[[str, int], None]:
    def kill(happened: str, step: int) -> None:
        if (happened, step) == (event, at):
            raise Killed

    return kill


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, torch.Tensor]:
    return Trainer(None).run()


@settings(max_examples=8, deadline=None)
@given(kills=st.lists(st.tuples(st.sampled_from(["update", "progress"]), st.integers(1, STEPS)), max_size=3))
def test_a_killed_run_ends_with_the_weights_of_an_uninterrupted_one(
    uninterrupted: dict[str, torch.Tensor],
    tmp_path_factory: pytest.TempPathFactory,
    kills: list[tuple[str, int]],
) -> None:
    trainer, finished = Trainer(tmp_path_factory.mktemp("run")), 0
    for event, step in sorted(kills, key=lambda kill: kill[1]):
        if step > finished:
            with pytest.raises(Killed):
                trainer.run(killing(event, step))
            kept = step if event == "progress" else step - 1
            finished = STEPS if kept == STEPS else kept - kept % EVERY
    assert equal(trainer.run(), uninterrupted)
    assert trainer.done == list(range(finished + 1, STEPS + 1))
    assert len(list(trainer.folder.iterdir())) == 1, "older snapshots are left"


def test_snapshots_change_nothing_and_a_finished_run_is_not_trained_again(
    uninterrupted: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    trainer = Trainer(tmp_path / "new" / "folder")
    assert equal(trainer.run(), uninterrupted)
    assert trainer.done == list(range(1, STEPS + 1))
    assert equal(trainer.run(), uninterrupted)
    assert trainer.done == []


def test_an_adapter_is_resumed_without_the_weights_that_it_stands_on(tmp_path: Path) -> None:
    expected = AdapterTrainer(None).run()
    trainer = AdapterTrainer(tmp_path)
    with pytest.raises(Killed):
        trainer.run(killing("progress", 4))
    (kept,) = tmp_path.iterdir()
    assert load_file(kept / "00000.safetensors")["0.weight"].shape == (2, 32)
    assert equal(trainer.run(), expected)
    assert trainer.done[0] == 4


@needs("bitsandbytes")
def test_eight_bit_states_are_resumed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "DEVICES", ("cpu",))
    options = {"training": Training(optimizer="adamw8bit", micro_batches=2, gradient_checkpointing=True)}
    expected = Trainer(None, **options).run()
    trainer = Trainer(tmp_path, **options)
    with pytest.raises(Killed):
        trainer.run(killing("update", 5))
    assert equal(trainer.run(), expected)
    assert trainer.done[0] == 4


def test_large_states_are_spread_over_files(
    uninterrupted: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "SHARD_BYTES", 50_000)
    trainer = Trainer(tmp_path)
    with pytest.raises(Killed):
        trainer.run(killing("progress", 3))
    (kept,) = tmp_path.iterdir()
    assert len(list(kept.glob("0*.safetensors"))) > 2
    assert not list(kept.glob("*.pkl"))
    assert equal(trainer.run(), uninterrupted)
    assert trainer.done[0] == 4


OTHER: dict[str, dict[str, Any]] = {
    "learning rate": {"learning_rate": 2e-2},
    "steps": {"steps": STEPS + 1},
    "weight decay": {"weight_decay": 0.3},
    "training": {"training": Training(micro_batches=2)},
}


@pytest.mark.parametrize("difference", [*OTHER, "about", "starting weights"])
def test_a_snapshot_of_other_settings_is_ignored_and_kept(
    difference: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Killed):
        Trainer(tmp_path).run(killing("progress", 3))
    (kept,) = tmp_path.iterdir()
    trainer = Trainer(tmp_path, **OTHER.get(difference, {}))
    trainer.model_seed = 5 if difference == "starting weights" else 0
    with caplog.at_level(logging.INFO, logger="mergeguard"):
        trainer.run(**({"seed_of_data": 1} if difference == "about" else {}))
    assert trainer.done[0] == 1
    assert kept.exists()
    assert f"{tmp_path} has snapshots of other settings alone; they are ignored" in caplog.text


def test_a_snapshot_of_other_data_is_refused(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path)
    with pytest.raises(Killed):
        trainer.run(killing("progress", 3))
    with pytest.raises(CheckpointError, match="was trained on other data; remove it or choose another folder"):
        trainer.run(seed=1)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "absent", "no index", "half an index", "another index"])
def test_a_damaged_snapshot_is_ignored_and_named(
    damage: str, uninterrupted: dict[str, torch.Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = Trainer(tmp_path)
    with pytest.raises(Killed):
        trainer.run(killing("progress", 3))
    (kept,) = tmp_path.iterdir()
    file, index = kept / "00000.safetensors", kept / snapshots.INDEX
    data = bytearray(file.read_bytes())
    if damage == "flipped":
        data[-1] ^= 1
        file.write_bytes(data)
    elif damage == "truncated":
        file.write_bytes(data[:-4])
    elif damage == "absent":
        file.unlink()
    elif damage == "no index":
        index.unlink()
    else:
        index.write_text('{"step": ' if damage == "half an index" else json.dumps(["step", "files"]))
    assert equal(trainer.run(), uninterrupted)
    assert trainer.done[0] == 1
    assert f"{kept}" in caplog.text
    assert "the snapshot is ignored" in caplog.text
    assert len(list(tmp_path.iterdir())) == 1


def test_a_write_that_fails_leaves_the_older_snapshot(
    uninterrupted: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(tmp_path)
    with monkeypatch.context() as patch:
        calls: list[int] = []
        write = snapshots.write_tensors

        def fail(path: Path, tensors: dict[str, torch.Tensor]) -> None:
            calls.append(1)
            if len(calls) > 2:  # the second snapshot
                raise CheckpointError("no space left")
            write(path, tensors)

        patch.setattr(snapshots, "write_tensors", fail)
        with pytest.raises(CheckpointError, match="no space left"):
            trainer.run()
    assert [path.name[-2:] for path in tmp_path.iterdir()] == ["03"]
    assert equal(trainer.run(), uninterrupted)
    assert trainer.done[0] == 4


def test_snapshots_are_kept_at_least_every_step(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="every 0 steps, expected at least 1"):
        Snapshots(tmp_path, 0)

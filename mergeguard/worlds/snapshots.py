"""Snapshots of a training run, from which a killed run goes on to the weights of an uninterrupted one.

A snapshot is a folder that is whole or absent: the trained parameters and the optimizer's state in safetensors files,
torch's random state, and snapshot.json with the step, the run's settings and a digest of each file. The data stream
is not stored: it is drawn again from its seed and its first batches are skipped; their digest must be the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mergeguard.checkpoints.files import atomic_folder, file_digest, read_tensors, write_tensors
from mergeguard.errors import CheckpointError, ParameterError
from mergeguard.worlds.optimizers import restore_state, state_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

    from mergeguard.worlds.training import Batch

INDEX, RANDOM = "snapshot.json", "random.safetensors"
SHARD_BYTES = 2**30
"""About how much is in host memory at once while a snapshot is written."""
SAMPLED = 64
"""Values of each tensor by which the weights that a run starts from are told from others."""
LOG = logging.getLogger("mergeguard")


@dataclass(frozen=True)
class Snapshots:
    """Where and how often a run is kept. Several runs may share a folder; the caller removes it when all is done.

    Attributes:
        folder: is made if it is absent.
        every: steps between snapshots; the end of the run is kept too, so that a finished run is not trained again.
        about: what decides the run besides `fit`'s arguments and the starting weights, e.g. {"seed": 3}.
    """

    folder: Path
    every: int = 100
    about: Mapping[str, str | int | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ParameterError(f"snapshots are kept every {self.every} steps, expected at least 1")


class Run:
    """One run of `fit` and its snapshots."""

    def __init__(
        self,
        snapshots: Snapshots,
        settings: Mapping[str, Any],
        model: PreTrainedModel,
        trained: Sequence[torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self._folder, self._every = snapshots.folder, snapshots.every
        self._trained, self._optimizer = trained, optimizer
        self._device = model.device
        self._settings = {
            **settings,
            "about": dict(snapshots.about),
            "trained": [list(parameter.shape) for parameter in trained],
            "start": _sampled_digest(model),
            "device": self._device.type,
            "torch": torch.__version__,
        }
        self._digest = hashlib.sha256(json.dumps(self._settings, sort_keys=True).encode()).hexdigest()[:16]
        self._data = hashlib.sha256()

    def watch(self, batch: Batch) -> Batch:
        """Note a batch of the stream, which must come from the same data when the run goes on."""
        for tensor in (batch.ids, batch.labels, batch.mask):
            self._data.update(f"{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
        return batch

    def resume(self, stream: Iterator[Batch]) -> int:
        """Take up the newest whole snapshot of these settings and skip the batches before it.

        Returns:
            How many steps are done; 0 if there is no such snapshot.

        Raises:
            CheckpointError: the stream's batches are not those that the snapshot was trained on.
        """
        for folder in self._found():
            try:
                index = _checked(folder)
            except CheckpointError as error:
                LOG.warning("%s; the snapshot is ignored", error)
                continue
            for _ in range(index["step"]):
                if (batch := next(stream, None)) is None:
                    break
                self.watch(batch)
            if self._data.hexdigest() != index["data"]:
                raise CheckpointError(f"{folder} was trained on other data; remove it or choose another folder")
            for name in index["files"]:
                self._restore(read_tensors(folder / name))
            return int(index["step"])
        return 0

    def save(self, step: int, *, last: bool) -> None:
        """Keep the state after `step` finished steps, if one is due, and drop the run's older ones.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        if step % self._every and not last:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # paged states are read by the host
        older, out = self._found(), self._folder / f"{self._digest}-{step:08d}"
        if out in older:  # damaged, else the run would have gone on after it
            shutil.rmtree(out)
        with atomic_folder(out) as folder:
            for number, shard in enumerate(self._shards()):
                write_tensors(folder / f"{number:05d}.safetensors", shard)
            write_tensors(folder / RANDOM, self._random_state())
            files = {path.name: file_digest(path) for path in sorted(folder.iterdir())}
            index = {"step": step, "data": self._data.hexdigest(), "settings": self._settings, "files": files}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        for folder in older:
            shutil.rmtree(folder, ignore_errors=True)

    def _found(self) -> list[Path]:
        """The snapshots of these settings, the newest first."""
        every = list(self._folder.glob("[0-9a-f]*-[0-9]*"))
        own = [folder for folder in every if folder.name.startswith(f"{self._digest}-")]
        if every and not own:
            LOG.info("%s has snapshots of other settings alone; they are ignored", self._folder)
        return sorted(own, reverse=True)

    def _shards(self) -> Iterator[dict[str, Tensor]]:
        shard: dict[str, Tensor] = {}
        for index, parameter in enumerate(self._trained):
            if sum(tensor.nbytes for tensor in shard.values()) > SHARD_BYTES:
                yield shard
                shard = {}
            kept = {"weight": parameter.detach(), **state_of(self._optimizer, parameter)}
            shard |= {f"{index}.{name}": tensor.cpu() for name, tensor in kept.items()}
        yield shard

    def _random_state(self) -> dict[str, Tensor]:
        state = {"random.cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            state["random.cuda"] = torch.cuda.get_rng_state(self._device)
        return state

    @torch.no_grad()
    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        states: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            index, _, key = name.partition(".")
            if index == "random":
                if key == "cuda":
                    torch.cuda.set_rng_state(tensor, self._device)
                else:
                    torch.set_rng_state(tensor)
            elif key == "weight":
                self._trained[int(index)].copy_(tensor)
            else:
                states.setdefault(int(index), {})[key] = tensor
        for number, state in states.items():  # a parameter's state lies in one file
            restore_state(self._optimizer, number, state)


def _sampled_digest(model: PreTrainedModel) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()
        sample = values[:: max(1, len(values) // SAMPLED)].float().cpu()
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def _checked(folder: Path) -> dict[str, Any]:
    """The index of a snapshot whose files are as they were written."""
    try:
        index: Any = json.loads((folder / INDEX).read_text())
        if not isinstance(index, dict) or sorted(index) != ["data", "files", "settings", "step"]:
            raise CheckpointError(f"{folder / INDEX} is not a snapshot's index")
        for name, digest in index["files"].items():
            if file_digest(folder / name) != digest:
                raise CheckpointError(f"{folder / name} is damaged")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {folder}: {error}") from error
    return dict(index)

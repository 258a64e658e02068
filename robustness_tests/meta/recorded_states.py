"""States that know what was asked of them, and how much of what they gave is still in memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

State = dict[str, torch.Tensor]


@dataclass
class Log:
    """What was asked of states, and how many of the tensors that they gave were alive at a time."""

    asked: list[str] = field(default_factory=list)
    alive: weakref.WeakSet[torch.Tensor] = field(default_factory=weakref.WeakSet)
    most: int = 0


class Recorded(Mapping[str, torch.Tensor]):
    """A state that makes a tensor anew whenever it is asked for one."""

    def __init__(self, state: State, log: Log) -> None:
        self.state, self._log = state, log

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self.read(name)
        self._log.asked.append(name)
        self._log.alive.add(tensor)
        self._log.most = max(self._log.most, len(self._log.alive))
        return tensor

    def read(self, name: str) -> torch.Tensor:
        return self.state[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def recorded(states: Sequence[State]) -> tuple[list[Recorded], Log]:
    log = Log()
    return [Recorded(state, log) for state in states], log

"""Which layer a tensor belongs to, told from the names alone: no table of architectures."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_USUAL = frozenset({"layers", "layer", "h", "blocks", "block"})
_BEFORE_LAYERS = re.compile(r"emb(?!ed_out)|(?:^|[._])(?:wte|wpe|rotary|relative_pe|shared)(?:[._]|$)")


@dataclass(frozen=True)
class Layers:
    """The numbered layers of one model.

    Attributes:
        prefixes: what stands before a layer's number, "model.layers"; usually one.
        count: number of layers.
    """

    prefixes: frozenset[str]
    count: int

    def split(self, tensor: str) -> tuple[str, int, str] | None:
        """(prefix, layer, the rest of the name) of a tensor in a layer, else None."""
        for prefix, number, rest in _numbers(tensor):
            if prefix in self.prefixes:
                return (prefix, number, rest) if number < self.count else None
        return None

    def depth(self, tensor: str) -> float:
        """How deep a tensor lies, for gradients: layer / (count - 1); 1 in the only layer; 0 outside of layers."""
        found = self.split(tensor)
        if found is None:
            return 0.0
        return found[1] / (self.count - 1) if self.count > 1 else 1.0


def find_layers(tensors: Iterable[str], num_layers: int | None) -> Layers:
    """The layers of a model: the numbered parts of its names whose numbers run over 0 .. num_layers - 1.

    Of several candidates those with a usual name (`layers`, `h`, `blocks`) count, so that eight experts in eight
    layers, or the only layer of a model and a head named `0`, are told apart; numbers beyond num_layers (layers for
    predicting several tokens) are tolerated only if no candidate fits exactly.

    Args:
        tensors: names of all tensors of the model.
        num_layers: of its configuration; None takes the longest run under a usual name.

    Returns:
        Layers without prefixes if there are none to be found.
    """
    numbers: dict[str, set[int]] = defaultdict(set)
    for tensor in tensors:
        for prefix, number, _ in _numbers(tensor):
            numbers[prefix].add(number)
    usual = {prefix for prefix in numbers if prefix.rpartition(".")[2] in _USUAL}
    if num_layers is None:
        runs = [len(numbers[prefix]) for prefix in usual if max(numbers[prefix]) == len(numbers[prefix]) - 1]
        num_layers = max(runs, default=0)
    wanted = set(range(num_layers)) if num_layers <= sum(map(len, numbers.values())) else {-1}
    fitting = {prefix for prefix, found in numbers.items() if found == wanted}
    fitting = fitting or {prefix for prefix, found in numbers.items() if found >= wanted and num_layers > 0}
    return Layers(frozenset(fitting & usual or fitting), num_layers)


def is_before_layers(tensor: str) -> bool:
    """Whether a tensor outside of layers belongs to the input (embeddings), not to the output (last norm, head)."""
    return _BEFORE_LAYERS.search(tensor) is not None


def _numbers(tensor: str) -> Iterator[tuple[str, int, str]]:
    """Each (prefix, number, rest) of a name such as `model.layers.3.experts.7.weight`, from the left."""
    parts = tensor.split(".")
    for index, part in enumerate(parts):
        if index and part.isascii() and part.isdigit() and len(part) < 7 and str(int(part)) == part:
            yield ".".join(parts[:index]), int(part), ".".join(parts[index + 1 :])

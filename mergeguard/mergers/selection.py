"""The entries of largest magnitude, found exactly and without a sort.

A full sort of every tensor is what makes magnitude pruning slow. Here a sample brackets the threshold, one pass in
cache-sized spans counts what lies above the bracket and collects the few values inside, and those alone are sorted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergeguard.mergers.spans import spans

if TYPE_CHECKING:
    from torch import Tensor

    from mergeguard.mergers.contract import Span, Values

_SAMPLE = 2**14
_MARGIN = 3  # in standard deviations of a sampled rank; a bracket that misses costs time, never exactness


@dataclass(frozen=True)
class Top:
    """Which entries of a tensor are among the `count` largest: by magnitude, then by lower flat index.

    Attributes:
        threshold: the smallest magnitude among them.
        below: the next smaller number of the dtype, or 0: magnitudes above it are at least the threshold.
        last: the largest flat index at which an entry of exactly that magnitude is among them; -1 for none.
    """

    threshold: float
    below: float
    last: int

    def keep(self, values: Tensor, span: Span) -> Tensor:
        """`values`, the tensor's in `span`, with 0 for every entry that is not among the largest."""
        import torch

        shrink = torch.nn.functional.hardshrink  # one vectorised pass: x where |x| > lambda, else 0
        start = 0 if span is None else span.start
        tied = min(max(self.last + 1 - start, 0), values.numel())
        if tied == values.numel():
            return shrink(values, self.below)
        if tied == 0:
            return shrink(values, self.threshold)
        flat = values.reshape(-1)
        return torch.cat((shrink(flat[:tied], self.below), shrink(flat[tied:], self.threshold))).view_as(values)

    def keeps(self, values: Tensor, span: Span) -> Tensor:
        """Whether each entry of `values`, the tensor's in `span`, is among the largest; bool."""
        import torch

        start = 0 if span is None else span.start
        tied = min(max(self.last + 1 - start, 0), values.numel())
        magnitudes = values.abs().reshape(-1)
        return torch.cat((magnitudes[:tied] >= self.threshold, magnitudes[tied:] > self.threshold)).view(values.shape)


NOTHING = Top(math.inf, math.inf, -1)


def largest(values: Values, size: int, count: int) -> Top:
    """Find the `count` entries of largest magnitude of a tensor of `size` elements without NaN.

    Among equal magnitudes at the threshold the lowest indices are taken, so that the same entries are taken
    everywhere; mergekit 0.1.5 leaves that to an unstable sort.

    Args:
        values: the tensor, span by span; any floating dtype.
        size: its number of elements.
        count: how many to take; none for 0, all for `size` or more.
    """
    if count <= 0 or size == 0:
        return NOTHING
    if count >= size:
        return Top(0.0, 0.0, size)
    example = values(slice(0, 1))
    if example.device.type != "cpu":
        return _largest_on_device(values, size, count)
    lowest, highest = _bracket(values, size, count)
    above, inside, lengths = 0, [], []
    for span in spans(size):
        keys = _keys(values(span))
        over, within = keys > highest, keys > lowest
        above += _count(over)
        within ^= over
        inside.append(keys[within])
        lengths.append(len(inside[-1]))
    return _from_bracket(values, size, count, above, inside, lengths, example)


def _from_bracket(
    values: Values, size: int, count: int, above: int, inside: list[Any], lengths: list[int], example: Tensor
) -> Top:
    """The top from the keys inside the bracket and the number above it; without a bracket if it missed."""
    import numpy as np

    missing = count - above
    candidates = np.concatenate(inside)
    if not 0 < missing <= len(candidates):
        every = np.concatenate([_keys(values(span)) for span in spans(size)])
        return _from_bracket(values, size, count, 0, [every], [size], example)
    kept = len(candidates) - missing
    key = candidates.dtype.type(np.partition(candidates.astype(_wide(candidates)), kept)[kept])
    tied = missing - _count(candidates > key)  # how many of exactly this magnitude are taken
    equal = np.flatnonzero(candidates == key)
    last = size if tied == len(equal) else _position(values, size, int(equal[tied - 1]), lengths, key, equal)
    return Top(_number(key, example), _number(key - 1 if key > 0 else key, example), last)


def _position(values: Values, size: int, candidate: int, lengths: list[int], key: Any, equal: Any) -> int:
    """The flat index of the candidate at a position among all candidates, which are in flat order."""
    import numpy as np

    if sum(lengths) == size:  # the candidates are the tensor
        return candidate
    passed = 0
    for span, length in zip(spans(size), lengths, strict=True):
        if candidate < passed + length:
            nth = int(np.count_nonzero((equal >= passed) & (equal <= candidate)))
            return int(span.start + np.flatnonzero(_keys(values(span)) == key)[nth - 1])
        passed += length
    raise AssertionError("a candidate lies in some span")


def _bracket(values: Values, size: int, count: int) -> tuple[Any, Any]:
    """Keys (lowest, highest] between which the threshold very probably lies."""
    import numpy as np

    first = _keys(values(slice(0, 1)))
    full = first.dtype.type(np.iinfo(first.dtype).max)
    if size <= 4 * _SAMPLE:
        return first.dtype.type(-1), full
    sample = _keys(values(slice(0, size, size // _SAMPLE)).contiguous())
    sample = np.sort(sample.astype(_wide(sample)))[::-1].astype(sample.dtype)
    share = count / size
    position = share * len(sample)
    margin = _MARGIN * math.sqrt(len(sample) * share * (1 - share)) + 2
    low, high = math.ceil(position + margin), math.floor(position - margin)
    lowest = sample[low] - 1 if low < len(sample) else first.dtype.type(-1)
    return lowest, sample[high] if high >= 0 else full


def _keys(values: Tensor) -> Any:
    """The magnitudes as a flat numpy array of integers in the same order: the bits without the sign."""
    import torch

    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.dtype.itemsize]
    return values.abs().view(-1).view(bits).numpy()


def _wide(keys: Any) -> Any:
    """A dtype that numpy sorts with vector instructions on more machines than 16-bit integers."""
    import numpy as np

    return np.promote_types(keys.dtype, np.int32)


def _number(key: Any, example: Tensor) -> float:
    import numpy as np
    import torch

    return float(torch.from_numpy(np.asarray([key])).view(example.dtype)[0])


def _count(mask: Any) -> int:
    import numpy as np

    return int(np.count_nonzero(mask))


def _largest_on_device(values: Values, size: int, count: int) -> Top:
    """The same on a device other than the CPU, where a selection over the whole tensor is fast."""
    import torch

    magnitudes = values(slice(0, size)).abs()
    threshold = magnitudes.kthvalue(size - count + 1).values
    tied = count - int(torch.count_nonzero(magnitudes > threshold))
    equal = torch.nonzero(magnitudes == threshold).view(-1)
    last = size if tied == len(equal) else int(equal[tied - 1])
    key = _keys(threshold.cpu())[0]
    return Top(float(threshold), _number(key - 1 if key > 0 else key, threshold), last)

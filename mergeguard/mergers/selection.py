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
    import numpy as np

    if count <= 0 or size == 0:
        return NOTHING
    if count >= size:
        return Top(0.0, 0.0, size)
    example = values(slice(0, 1))
    if example.device.type != "cpu":
        return _largest_on_device(values, size, count)
    found = _search(values, size, count, *_bracket(values, size, count))
    if found is None:  # the bracket missed
        first = _keys(example)
        found = _search(values, size, count, first.dtype.type(-1), first.dtype.type(np.iinfo(first.dtype).max))
    if found is None:
        raise AssertionError("every magnitude lies between the ends of its dtype")
    key, last = found
    return Top(_number(key, example), _number(key - 1 if key > 0 else key, example), last)


def _search(values: Values, size: int, count: int, low: Any, high: Any) -> tuple[Any, int] | None:
    """The key of the threshold and the last index at which it is taken; None if it is not from `low` to `high`.

    Entries of exactly `low` or `high` are counted, not collected: in 16-bit task vectors many are equal, most often 0.
    """
    import numpy as np

    above, at_high, at_low, inside = 0, [], [], []
    for span in spans(size):
        keys = _keys(values(span))
        from_high, over_low = keys >= high, keys > low
        over = _count(keys > high)
        above += over
        at_high.append(_count(from_high) - over)
        at_low.append(_count(keys >= low) - _count(over_low))
        over_low ^= from_high
        inside.append(keys[over_low])
    missing = count - above
    if missing <= 0:
        return None
    if missing <= sum(at_high):
        return high, _index_of(values, size, high, missing, at_high)
    missing -= sum(at_high)
    candidates = np.concatenate(inside)
    if missing > len(candidates):
        missing -= len(candidates)
        return (low, _index_of(values, size, low, missing, at_low)) if missing <= sum(at_low) else None
    place = len(candidates) - missing
    key = low.dtype.type(np.partition(candidates.astype(_wide(candidates), copy=False), place)[place])
    tied = missing - _count(candidates > key)
    return key, _index_of(values, size, key, tied, [_count(part == key) for part in inside])


def _index_of(values: Values, size: int, key: Any, nth: int, counts: list[int]) -> int:
    """The flat index of the nth entry of a key, of which each span has so many; `size` if it is the last."""
    import numpy as np

    if nth == sum(counts):
        return size
    for span, here in zip(spans(size), counts, strict=True):
        if nth <= here:
            return int(span.start + np.flatnonzero(_keys(values(span)) == key)[nth - 1])
        nth -= here
    raise AssertionError("the nth entry lies in some span")


def _bracket(values: Values, size: int, count: int) -> tuple[Any, Any]:
    """Keys between which, ends included, the threshold very probably lies."""
    import numpy as np

    keys = _keys(values(slice(0, size, max(1, size // _SAMPLE))).contiguous())
    sample = np.sort(keys.astype(_wide(keys), copy=False))[::-1].astype(keys.dtype)
    share = count / size
    position = share * len(sample)
    margin = _MARGIN * math.sqrt(len(sample) * share * (1 - share)) + 2
    low, high = math.ceil(position + margin), math.floor(position - margin)
    lowest = sample[low] if low < len(sample) else keys.dtype.type(-1)
    return lowest, sample[high] if high >= 0 else keys.dtype.type(np.iinfo(keys.dtype).max)


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

"""How long a run still takes, from what its jobs took so far."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

LATEST = 10
"""Jobs of a kind that count: those that a cache answers are quick, and say nothing of those that follow."""


def remaining(
    seconds: Mapping[str, Sequence[float]], left: Mapping[str, int], elapsed: float, *, pace: str
) -> float | None:
    """Seconds till the end, or None if nothing is known yet.

    Kinds of jobs differ a lot, so each counts by its own mean. How many run at a time shows in what was done so far.

    Args:
        seconds: what the jobs done so far took, by kind, in order.
        left: jobs that are left, by kind.
        elapsed: seconds since the first began.
        pace: the kind that stands for those not seen yet; until one of it is done nothing is known.
    """
    means = {kind: sum(taken[-LATEST:]) / len(taken[-LATEST:]) for kind, taken in seconds.items() if taken}
    done = sum(map(sum, seconds.values()))
    if not any(left.values()):
        return 0.0
    if pace not in means or done == 0 or elapsed == 0:
        return None
    return sum(count * means.get(kind, means[pace]) for kind, count in left.items()) * elapsed / done


def in_words(seconds: float | None) -> str:
    """The time left as a reader wants it, e.g. "about 12 min left"; empty if nothing is known."""
    if seconds is None:
        return ""
    if seconds < 90:
        return f"about {seconds:.0f} s left"
    return f"about {seconds / 60:.0f} min left" if seconds < 90 * 60 else f"about {seconds / 3600:.1f} h left"

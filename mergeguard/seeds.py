"""Seeds derived from seeds: stable across processes, platforms and the order of work."""

from __future__ import annotations

import hashlib
import random


def derive_seed(seed: int, *labels: str | int | float) -> int:
    """A 63-bit seed that depends on `seed` and on every label, in order."""
    text = "\x1f".join([str(seed), *(repr(label) for label in labels)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def derived_rng(seed: int, *labels: str | int | float) -> random.Random:
    """A `random.Random` seeded by `derive_seed`."""
    return random.Random(derive_seed(seed, *labels))

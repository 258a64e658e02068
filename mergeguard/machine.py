"""What this machine lets a process use."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "MERGEGUARD_CACHE"


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_folder() -> Path:
    """`MERGEGUARD_CACHE` if it is set, else the platform's cache folder of the user."""
    import platformdirs

    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("mergeguard"))

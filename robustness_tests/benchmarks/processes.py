"""Processes measured from outside: time, processor time and memory. Light, as whoever measures must be small."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import tempfile
import threading
import time
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import resource
    from collections.abc import Sequence

ROOT = Path(__file__).parents[2]
MEGABYTE = 1_000_000
SAMPLE_SECONDS = 0.05


class RunFailed(Exception):
    """A measured process ended with an error: its last line."""


@dataclass(frozen=True)
class Usage:
    """What a process used.

    Attributes:
        seconds: from start to end.
        cpu_seconds: user and system, of all its threads.
        peak_megabytes: largest resident size; includes the pages of mapped files.
        anonymous_megabytes: largest resident size without mapped files, sampled: a lower bound.
    """

    seconds: float
    cpu_seconds: float
    peak_megabytes: float
    anonymous_megabytes: float


def usage_of(seconds: float, usage: resource.struct_rusage, anonymous_kib: int) -> Usage:
    """From what Linux reports, in seconds and KiB."""
    kib = 1024 / MEGABYTE
    return Usage(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * kib, anonymous_kib * kib)


def anonymous_kib(status: str) -> int:
    """From the text of /proc/PID/status; 0 when the process has no memory any more."""
    return sum(int(size) for size in re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB$", status, re.MULTILINE))


def medians(runs: Sequence[Usage]) -> Usage | None:
    """Each figure's own median; None without runs."""
    return Usage(*map(statistics.median, zip(*map(astuple, runs), strict=True))) if runs else None


def measured(command: Sequence[str]) -> Usage:
    """Runs a process to its end.

    Raises:
        RunFailed: it exited with an error.
    """
    highest, ended = 0, threading.Event()

    def sample(status: Path) -> None:
        nonlocal highest
        while not ended.wait(SAMPLE_SECONDS):
            try:
                highest = max(highest, anonymous_kib(status.read_text(encoding="utf-8")))
            except OSError:  # it has just ended
                return

    with tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=errors, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}
        )
        sampler = threading.Thread(target=sample, args=(Path(f"/proc/{process.pid}/status"),))
        sampler.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        finally:
            seconds = time.perf_counter() - started
            ended.set()
            sampler.join()
        process.returncode = os.waitstatus_to_exitcode(status)  # Popen cannot know that it was waited for
        if process.returncode:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
            raise RunFailed(lines[-1] if lines else f"exit code {process.returncode}")
    return usage_of(seconds, usage, highest)


def busy_cores(seconds: float = 0.5) -> float:
    """Cores that the machine's processes use now."""

    def busy_ticks() -> int:
        user, nice, system, _, _, *others = map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9])
        return user + nice + system + sum(others)

    before = busy_ticks()
    time.sleep(seconds)
    return (busy_ticks() - before) / os.sysconf("SC_CLK_TCK") / seconds

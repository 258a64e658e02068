"""How long ten thousand cases take to collect. Not part of a default run, as the file's name is not a test's:

python -m pytest robustness_tests/benchmarks/bench_collect.py
"""

from __future__ import annotations

import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from mergeguard.matrix.cases import expand

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

ROOT = Path(__file__).parents[2]
PROTECTIONS = ("quantization_watermark", "instructional_fingerprint")
MERGERS = tuple(f"ties(density={percent / 100})" for percent in range(1, 51))
COEFFICIENTS = tuple(percent / 100 for percent in range(1, 101))
CASES = 10_000


def test_expand(benchmark: BenchmarkFixture) -> None:
    cases = benchmark(expand, PROTECTIONS, MERGERS, COEFFICIENTS)
    assert len(cases) == CASES


def test_collect_in_a_new_pytest(benchmark: BenchmarkFixture) -> None:
    """Start-up, imports and the printing of ten thousand ids included."""
    options = chain.from_iterable(("--merger", merger) for merger in MERGERS)
    written = ",".join(map(str, COEFFICIENTS))
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    command += ["robustness_tests/test_survival.py", *options, "--coefficient", written]

    def collect() -> str:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    output = benchmark.pedantic(collect, rounds=3)
    assert f"{CASES + 1} tests collected" in output

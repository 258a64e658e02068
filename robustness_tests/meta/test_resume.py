"""A run that is killed goes on where it was: what it measured is in the cache, and is not measured again."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from robustness_tests.meta.test_executors import wait_until

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_killed_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("MERGEGUARD_CACHE", str(cache))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    cells = ("--protection", "gaussian_probe", "--merger", "linear", "--coefficients", "0.3,0.5", "--workers", "1")
    command = [sys.executable, "-m", "mergeguard", "run", *cells, "--output", str(tmp_path / "out")]

    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_until(lambda: any(cache.glob("outcome/*.json")) or killed.poll() is not None, seconds=300)
    killed.kill()
    _, said = killed.communicate()
    assert any(cache.glob("outcome/*.json")), said
    done = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.suffix in (".json", ".safetensors")}
    assert any(path.parent.name == "embedded" for path in done)
    assert not (tmp_path / "out" / "results.json").exists(), "it was killed before its end"

    started = time.time_ns()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert {path: path.stat().st_mtime_ns for path in done} == done, "nothing that was measured is measured again"
    assert all(stamp < started for stamp in done.values())
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [outcome["coefficient"] for outcome in results["outcomes"]] == [0.3, 0.5]

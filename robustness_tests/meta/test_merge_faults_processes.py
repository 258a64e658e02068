"""Whole processes that merge and are killed, interrupted, terminated, doubled or limited.

They leave nothing but hidden folders of killed processes, which the next merge removes. A process that does not end is
aborted with the stacks of its threads.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergeguard.checkpoints.manifest import check_manifest
from robustness_tests.meta.checkpoints_on_disk import write_recipe
from robustness_tests.meta.faults import HANGS, HIDDEN, TIES, ends, names

ROOT = Path(__file__).parents[2]


def start(folder: Path, *options: str, before: str = "") -> subprocess.Popen[str]:
    """`mergeguard merge recipe.yml out` as a process, after some statements."""
    code = f"import sys\n{before}\nfrom mergeguard.cli import main\nsys.argv[0] = 'mergeguard'\nmain()"
    return subprocess.Popen(
        [sys.executable, "-c", code, "merge", "recipe.yml", "out", *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr; a process that hangs is killed and fails the test."""
    try:
        out, err = process.communicate(timeout=HANGS)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # with the stacks of all threads, if PYTHONFAULTHANDLER is set
        out, err = process.communicate(timeout=HANGS)
        pytest.fail(f"the merge hangs\n{out}\n{err}")
    return process.returncode, out, err


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe for models of 48 MB, so that a merge takes long enough to be hit at many moments."""
    folder = tmp_path_factory.mktemp("large")
    for index, name in enumerate("bxy"):
        generator = torch.Generator().manual_seed(0)
        state = {f"model.layers.{i}.w.weight": torch.randn(1000, 1000, generator=generator) for i in range(12)}
        state = {key: t + index * 0.01 * torch.randn(t.shape, generator=generator) for key, t in state.items()}
        (folder / name).mkdir()
        save_file(state, folder / name / "model.safetensors")
    write_recipe(folder / "recipe.yml", "dare_ties", [folder / "x", folder / "y"], base=folder / "b", each=TIES)
    return folder


@pytest.fixture
def there(large: Path, tmp_path: Path) -> Path:
    (tmp_path / "recipe.yml").write_text((large / "recipe.yml").read_text())
    return tmp_path


def is_writing(folder: Path) -> bool:
    return any(name.startswith(HIDDEN) for name in names(folder))


def hit(folder: Path, number: int, delay: float) -> tuple[int, str, str]:
    """Start a merge, and send it a signal some seconds after it began to write."""
    process = start(folder, "--threads", "2")
    assert ends(lambda: is_writing(folder) or process.poll() is not None, HANGS)
    time.sleep(delay)
    process.send_signal(number)
    return finished(process)


@pytest.mark.slow
def test_a_merge_that_is_killed_leaves_no_output_and_the_next_one_cleans_up(there: Path) -> None:
    process = start(there, "--threads", "2")
    assert ends(lambda: is_writing(there), HANGS)
    began = time.monotonic()
    assert finished(process)[0] == 0
    seconds = time.monotonic() - began
    (there / "out").rename(there / "expected")
    moments, killed = random.Random(0), 0
    for attempt in range(10):
        code, _, _ = hit(there, signal.SIGKILL, moments.uniform(0, seconds))
        killed += code == -signal.SIGKILL
        assert code in (0, -signal.SIGKILL)
        if (there / "out").exists():  # it was faster than the signal
            assert check_manifest(there / "out") == []
            (there / "out").rename(there / f"done-{attempt}")
        left = [name for name in names(there) if not name.startswith(("done-", HIDDEN))]
        assert left == ["expected", "recipe.yml"]
    assert killed >= 5
    assert finished(start(there))[0] == 0
    assert not is_writing(there)
    assert check_manifest(there / "out") == []
    for file in ("model.safetensors", "mergeguard-manifest.json"):
        assert (there / "out" / file).read_bytes() == (there / "expected" / file).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0, 0.05, 0.1, 0.2, 0.4])
def test_an_interrupt_is_exit_code_130_and_leaves_nothing_or_all(there: Path, delay: float) -> None:
    """All of it, if the signal came after OUT had its name: what is complete then stays."""
    code, _, err = hit(there, signal.SIGINT, delay)
    assert (code, err) == (130, "") or code == 0
    if code == 0 or (there / "out").exists():
        assert check_manifest(there / "out") == []
        assert names(there) == ["out", "recipe.yml"]
    else:
        assert names(there) == ["recipe.yml"]


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0, 0.1, 0.3])
def test_a_merge_that_is_terminated_leaves_no_output(there: Path, delay: float) -> None:
    code, _, _ = hit(there, signal.SIGTERM, delay)
    if code == 0:
        assert check_manifest(there / "out") == []
    else:
        assert code == -signal.SIGTERM
        assert "out" not in names(there)
        assert finished(start(there))[0] == 0
        assert names(there) == ["out", "recipe.yml"]


@pytest.mark.slow
def test_of_processes_at_once_exactly_one_wins(there: Path) -> None:
    results = [finished(process) for process in [start(there) for _ in range(3)]]
    assert sorted(code for code, _, _ in results) == [0, 2, 2]
    for code, _, err in results:
        (line,) = err.splitlines() if code else ["error: "]
        assert line.startswith("error: ")
    assert names(there) == ["out", "recipe.yml"]
    assert check_manifest(there / "out") == []


LIMITS = {
    "RLIMIT_FSIZE, (10**6, 10**6)": ((), "File too large"),
    "RLIMIT_NOFILE, (16, 16)": (("--shard-size", "1KB"), "Too many open files"),
}


@pytest.mark.slow
@pytest.mark.parametrize("limit", LIMITS)
def test_a_limit_of_the_system_is_one_line(there: Path, limit: str) -> None:
    options, message = LIMITS[limit]
    before = f"import torch, mergeguard.mergers.streaming\nimport resource as r; r.setrlimit(r.{limit})"
    code, _, err = finished(start(there, *options, before=before))
    (line,) = err.splitlines()
    assert code == 2
    assert line.startswith("error: cannot write")
    assert message in line
    assert names(there) == ["recipe.yml"]


@pytest.mark.slow
def test_the_merge_of_the_processes_is_right(there: Path, large: Path) -> None:
    """Or the tests above would compare one wrong thing with another."""
    assert finished(start(there))[0] == 0
    merged, base = load_file(there / "out/model.safetensors"), load_file(large / "b/model.safetensors")
    assert merged.keys() == base.keys()
    distance = [float((merged[name] - base[name]).norm() / base[name].norm()) for name in base]
    assert all(0.005 < value < 0.05 for value in distance), distance
    assert json.loads((there / "out/mergeguard-manifest.json").read_text())["seed"] == 0

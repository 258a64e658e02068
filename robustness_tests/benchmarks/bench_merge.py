"""`mergeguard merge` beside mergekit: whole processes on the same recipes, in one table.

    python robustness_tests/benchmarks/bench_merge.py --mergekit PATH/TO/mergekit-yaml --folder DIR --output table.md

The models have the shapes of published ones and random weights (10 GB in DIR, kept for the next run). A round of a
method is a plain copy (read the inputs, write as many bytes as the output has), one with fsync, our merge and
mergekit's, in this order; figures are medians of the rounds. `--check` compares the outputs instead of timing. Raw
figures go to a .json file beside the table; both are written anew after every method, so that an interrupted run keeps
what it has.

This process imports nothing heavy: Linux counts the parent's memory at the fork in the child's peak.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the checkout need not be installed

from robustness_tests.benchmarks.merge_inputs import MODELS, RECIPES, build, compare  # noqa: E402
from robustness_tests.benchmarks.merge_tables import COPY, OURS, SYNCED_COPY, THEIRS, report  # noqa: E402
from robustness_tests.benchmarks.processes import SAMPLE_SECONDS, RunFailed, busy_cores, measured  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")
BUSY_CORES = 0.2
"""Cores that others may use in the half second before a round without a warning."""
COEFFICIENTS = "0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
COPY_PROGRAM = """
import os, sys
output, size, sync, *inputs = sys.argv[1:]
buffer = memoryview(bytearray(8 << 20))
for name in inputs:
    with open(name, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
left = int(size)
with open(output, "wb", buffering=0) as file:
    while left:
        left -= file.write(buffer[:left])
    if sync == "sync":
        os.fsync(file.fileno())
"""
VERSIONS_PROGRAM = """
import json, platform
from importlib.metadata import PackageNotFoundError, version
found = {"Python": platform.python_version()}
for name in ("mergekit", "torch", "numpy", "safetensors", "transformers"):
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps(found))
"""


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


@dataclass(frozen=True)
class Bench:
    """Where the models and programs of this run are, and how many rounds it takes."""

    folder: Path
    mergekit: str
    sides: tuple[str, ...]
    pairs: int

    def commands(self, model: str, method: str, output: Path) -> dict[str, list[str]]:
        """The processes of a round, in its order."""
        recipe = self.folder / f"{model}-{method}.yml"
        recipe.write_text(RECIPES[method].text(method, self.folder / model, MODELS[model].dtype), encoding="utf-8")
        inputs = [sorted((self.folder / model / name).glob("*.safetensors")) for name in RECIPES[method].inputs]
        size = sum(file.stat().st_size for file in inputs[0])
        files = [str(file) for files in inputs for file in files]
        copy = [sys.executable, "-S", "-c", COPY_PROGRAM, str(output), str(size)]
        found = {COPY: [*copy, "no", *files], SYNCED_COPY: [*copy, "sync", *files]}
        if OURS in self.sides:
            found[OURS] = [sys.executable, "-m", "mergeguard", "merge", str(recipe), str(output)]
        if THEIRS in self.sides:
            found[THEIRS] = [self.mergekit, str(recipe), str(output), "--no-copy-tokenizer", "--random-seed", "0"]
        return found

    def sweep_commands(self, model: str, method: str, output: Path) -> dict[str, list[str]]:
        """Ours with one and with nine coefficients."""
        ours = self.commands(model, method, output)[OURS]
        return {"one": [*ours, "--coefficients", "0.5"], "nine": [*ours, "--coefficients", COEFFICIENTS]}

    def rounds(self, model: str, method: str, make: Callable[[str, str, Path], dict[str, list[str]]]) -> dict[str, Any]:
        """Runs the commands in turn, each into a fresh folder; one that fails is not run again."""
        runs: dict[str, list[dict[str, float]]] = {}
        errors: dict[str, str] = {}
        loads, busy = [], []
        for number in range(self.pairs):
            os.sync()  # nobody pays for what an earlier process has left to write
            loads.append(os.getloadavg()[0])
            busy.append(busy_cores())
            if busy[-1] > BUSY_CORES:
                say(f"warning: a busy machine: others use {busy[-1]:.1f} cores; don't publish this round")
            for name in make(model, method, Path()):
                if name in errors:
                    continue
                with tempfile.TemporaryDirectory(prefix="output-", dir=self.folder) as folder:
                    try:
                        usage = measured(make(model, method, Path(folder) / "merged")[name])
                    except RunFailed as error:
                        errors[name] = str(error)
                        say(f"{model} {method}, {name} failed: {error}")
                        continue
                os.sync()
                runs.setdefault(name, []).append(asdict(usage))
                say(f"{model} {method} {number + 1}, {name}: {usage.seconds:.2f} s, {usage.peak_megabytes:.0f} MB")
        return {"model": model, "method": method, "runs": runs, "errors": errors, "load": loads, "busy_cores": busy}

    def check(self, model: str, method: str) -> dict[str, Any]:
        """Runs each side once and compares what they wrote."""
        with tempfile.TemporaryDirectory(prefix="output-", dir=self.folder) as folder:
            outputs = {side: Path(folder) / side for side in (OURS, THEIRS)}
            try:
                for side, output in outputs.items():
                    measured(self.commands(model, method, output)[side])
                found = in_another_process(compare, outputs[OURS], outputs[THEIRS])
            except RunFailed as error:
                found = {"problem": f"{side} failed: {error}"}
        say(f"{model} {method}: {found}")
        return {"model": model, "method": method, **found}


def in_another_process(function: Callable[..., T], *arguments: object) -> T:
    """Keeps torch out of this process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def first_match(pattern: str, path: str) -> str:
    found = re.search(pattern, Path(path).read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else "unknown"


def versions(python: Path | str) -> str:
    """What a Python has installed of what matters here."""
    program = [str(python), "-c", VERSIONS_PROGRAM]
    found = json.loads(subprocess.run(program, capture_output=True, text=True, check=True).stdout)
    return ", ".join(f"{name} {version}" for name, version in found.items())


def circumstances(bench: Bench) -> dict[str, str]:
    """How the figures are taken, for the page."""
    git = ["git", "-C", str(ROOT), "--no-optional-locks", "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    start = [measured([sys.executable, "-c", "import torch"]).seconds for _ in range(1 + bench.pairs)][1:]
    processor = first_match(r"^model name\s*: (.*)$", "/proc/cpuinfo")
    memory = first_match(r"^MemTotal:\s+(\d+)", "/proc/meminfo")
    found = {
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "machine": f"{processor}, {len(os.sched_getaffinity(0))} cores, {memory} KiB, {platform.platform()}",
        "ours": f"commit {commit}, {versions(sys.executable)}",
        "`import torch` alone, in our Python": f"{statistics.median(start):.2f} s",
        "rounds": f"medians of {bench.pairs}; {', '.join([COPY, SYNCED_COPY, *bench.sides])}, in turn; whole "
        "processes, default threads, warm page cache, os.sync() before each",
        "copy": "one thread reads the inputs and writes as many bytes as one input has, 8 MiB at a time",
        "peak": "largest resident size (ru_maxrss), with mapped pages of the inputs; MB = 10^6 bytes",
        "anonymous": f"without mapped files, sampled every {SAMPLE_SECONDS} s: a lower bound",
    }
    if THEIRS in bench.sides:
        found["mergekit's"] = versions(Path(bench.mergekit).with_name("python"))
    unusual = [f"{name}={os.environ[name]}" for name in THREAD_VARIABLES if name in os.environ]
    unusual += [f"nice {os.nice(0)}"] if os.nice(0) else []
    return found | ({"**not as it should be**": ", ".join(unusual)} if unusual else {})


def save(results: dict[str, Any], output: Path) -> None:
    output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    output.write_text(report(results), encoding="utf-8")


def warm_up(bench: Bench, model: str) -> None:
    """Reads the model's files once, and each program's."""
    for name in bench.commands(model, "linear", Path()):
        with tempfile.TemporaryDirectory(prefix="output-", dir=bench.folder) as folder, suppress(RunFailed):
            measured(bench.commands(model, "linear", Path(folder) / "merged")[name])


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    def names(known: Sequence[str]) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            chosen = [name for name in text.split(",") if name]
            if unknown := [name for name in chosen if name not in known]:
                raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
            return chosen

        return parse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", help="the mergekit-yaml program")
    parser.add_argument("--models", type=names(list(MODELS)), default=list(MODELS), help="default: all")
    parser.add_argument("--methods", type=names(list(RECIPES)), default=list(RECIPES), help="default: all")
    parser.add_argument("--sweep", type=names(list(MODELS)), default=["small-float32"],
                        help="models whose ties is swept; default small-float32, '' for none")  # fmt: skip
    parser.add_argument("--pairs", type=int, default=3, help="rounds of each method")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "mergeguard-bench")
    parser.add_argument("--output", type=Path, help="default: table.md in the folder")
    parser.add_argument("--only", choices=(OURS, THEIRS), help="run one side only")
    parser.add_argument("--check", action="store_true", help="compare outputs of the deterministic methods, no times")
    parser.add_argument("--build-only", action="store_true", help="build the models and stop")
    options = parser.parse_args(arguments)
    if not options.mergekit and not options.build_only and options.only != OURS:
        parser.error("--mergekit is needed unless --only mergeguard or --build-only is given")
    if options.check and options.only:
        parser.error("--check needs both sides")
    options.folder = options.folder.resolve()
    options.output = (options.output or options.folder / "table.md").resolve()
    return options


def main() -> None:
    options = parse_options()
    sides = (options.only,) if options.only else (OURS, THEIRS)
    bench = Bench(options.folder, options.mergekit or "", sides, options.pairs)
    for model in dict.fromkeys([*options.models, *options.sweep]):
        if not (options.folder / model).exists():
            say(f"building {model}")
            (options.folder / model).parent.mkdir(parents=True, exist_ok=True)
            in_another_process(build, MODELS[model], options.folder / model)
    if options.build_only:
        return
    results: dict[str, Any] = {"how": circumstances(bench), "methods": [], "sweeps": [], "checks": []}
    for model in options.models:
        if not options.check:
            warm_up(bench, model)
        for method in options.methods:
            if not options.check:
                results["methods"].append(bench.rounds(model, method, bench.commands))
            elif not RECIPES[method].random:
                results["checks"].append(bench.check(model, method))
            save(results, options.output)
    if OURS in sides and not options.check:
        for model in options.sweep:
            results["sweeps"].append(bench.rounds(model, "ties", bench.sweep_commands))
            save(results, options.output)
    say(report(results))


if __name__ == "__main__":
    main()

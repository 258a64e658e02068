"""How long the default matrix takes, cold and warm, and a cell against the usual way of measuring one.

    python robustness_tests/benchmarks/bench_matrix.py --mergekit PATH/TO/mergekit-yaml --usual-cells 3

The usual way for a cell: a mergekit process writes the merged model, transformers loads it, and the same prompts (both
skills, keys and decoys; in both precisions for the watermark) are answered by batched generation with a KV cache; and
all of it again with the clean upstream, since every one of our cells includes its matched control. The time without
that control is printed too.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml

from mergeguard.machine import available_cores
from mergeguard.matrix.cache import Cache
from mergeguard.matrix.cases import expand
from mergeguard.matrix.engine import Engine
from mergeguard.matrix.recorded import read_records, recorded_file
from mergeguard.matrix.runner import run
from mergeguard.protections.registry import DEFAULT_PROTECTIONS
from mergeguard.reading import Probe
from mergeguard.verification.quantize import with_quantized_weights
from mergeguard.worlds.registry import load_world

if TYPE_CHECKING:
    from mergeguard.matrix.outcome import Results
    from mergeguard.worlds.contract import World


def whole_matrix(cache: Path, workers: int | None) -> tuple[float, Results]:
    """Seconds and results of the default matrix, as `mergeguard run` runs it."""
    started = time.perf_counter()
    results = run(expand(DEFAULT_PROTECTIONS), records=read_records(recorded_file("tiny")), cache_folder=cache,
                  workers=workers)  # fmt: skip
    return time.perf_counter() - started, results


def save(world: World, state: dict[str, torch.Tensor], folder: Path) -> Path:
    """A checkpoint as users have it."""
    world.model(state).save_pretrained(folder)
    world.tokenizer.save_pretrained(folder)
    return folder


def generate(model: torch.nn.Module, world: World, probes: list[Probe]) -> int:
    """Answers all probes in one batch, greedily, with a KV cache; returns how many match."""
    tokenizer = world.tokenizer
    tokenizer.padding_side = "left"
    inputs = tokenizer([probe.prompt for probe in probes], return_tensors="pt", padding=True)
    length = max(len(tokenizer(probe.target, add_special_tokens=False)["input_ids"]) for probe in probes)
    with torch.no_grad():
        output = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=length,
            do_sample=False, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(answer.startswith(probe.target) for answer, probe in zip(answers, probes, strict=True))


def usual_cell(mergekit: str, world: World, engine: Engine, name: str, folder: Path, alpha: float) -> list[float]:
    """Seconds of the protected half and of the control half of a cell, the usual way: TIES at `alpha`."""
    from transformers import AutoModelForCausalLM

    embedded = engine.embedded(expand([name])[0].protection)
    watermark = name == "quantization_watermark"
    skills = [probe for skill in world.skills for probe in skill.probes]
    evidence = [
        Probe(prompt, " You have activated the watermark!" if watermark else "ハリネズミ")
        for part in (embedded.evidence, embedded.decoys)
        for prompt in part.data["prompts"]
    ]
    base = save(world, dict(world.base), folder / "base")
    donor = save(world, dict(next(iter(world.donors.values()))), folder / "donor")
    seconds = []
    for half, state in (("protected", embedded.state), ("control", world.upstream)):
        owner = save(world, dict(state), folder / half)
        recipe = {
            "merge_method": "ties",
            "base_model": str(base),
            "parameters": {"normalize": True},
            "dtype": "float32",
            "models": [
                {"model": str(model), "parameters": {"weight": weight, "density": 0.4}}
                for model, weight in ((owner, alpha), (donor, 1 - alpha))
            ],
        }
        (folder / f"{half}.yml").write_text(yaml.safe_dump(recipe))
        merged = folder / f"{half}-merged"
        started = time.perf_counter()
        subprocess.run([mergekit, str(folder / f"{half}.yml"), str(merged)], check=True, capture_output=True)
        model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
        generate(model, world, skills)
        generate(model, world, evidence)
        if watermark:
            with with_quantized_weights(model.eval(), embedded.evidence.data["bits"]):
                generate(model, world, evidence)
        seconds.append(time.perf_counter() - started)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mergekit", help="the mergekit-yaml program; without it the usual way is not measured")
    parser.add_argument("--usual-cells", type=int, default=3)
    parser.add_argument("--workers", type=int)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cold, results = whole_matrix(folder / "cache", options.workers)
        warm, _ = whole_matrix(folder / "cache", options.workers)
        seconds = sorted(outcome.seconds for outcome in results.outcomes)
        print(f"default matrix, {len(results.outcomes)} cells: cold {cold:.1f} s, warm {warm:.1f} s")  # noqa: T201
        print(f"a cell of ours, one thread: median {seconds[len(seconds) // 2]:.2f} s")  # noqa: T201
        if not options.mergekit:
            return
        world = load_world("tiny")
        engine = Engine(world, 0, Cache(folder / "cache"))
        for protection in DEFAULT_PROTECTIONS:
            usual = []
            for index in range(options.usual_cells):
                (folder / f"{protection}{index}").mkdir()
                usual.append(
                    usual_cell(options.mergekit, world, engine, protection, folder / f"{protection}{index}", 0.5)
                )
            ours = [o.seconds for o in results.outcomes if o.protection == protection]
            whole, half = statistics.median(map(sum, usual)), statistics.median(halves[0] for halves in usual)
            own, workers = statistics.median(ours), options.workers or available_cores()
            print(  # noqa: T201
                f"{protection}, a cell: the usual way {whole:.1f} s on all cores ({half:.1f} s without the control); "
                f"ours {own:.2f} s on one thread, with {workers} cells at a time: {whole / own:.1f} times less for a "
                f"cell alone, {whole * workers / own:.1f} times less of the machine ({half * workers / own:.1f} "
                f"against the usual way without the control)"
            )


if __name__ == "__main__":
    main()

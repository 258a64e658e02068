"""Stages of the matrix on a real model: seconds each, peak memory, and one pass against generation.

    python robustness_tests/benchmarks/bench_real.py --world smollm2 [--seed 0] [--rounds 3]

Keys are drawn, not embedded: what a reading costs does not depend on the answer. Both ways of reading ask the same 8
keys of the same merged model whether the answer starts with the fingerprint's target: by one teacher-forced pass, by
our batched greedy decoding of as many tokens as the target has, every row to its end, and by transformers' `generate`
for one key after the other, as schemes' own scripts do, of as many tokens or of the `LONG` that a rule of the kind
"contains" would search.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import sys
import time
from typing import TYPE_CHECKING

import torch

from mergeguard.matrix.engine import MATCHED_CONTROL, Engine
from mergeguard.mergers.registry import DEFAULT_MERGERS, parse_merger
from mergeguard.protections.fingerprint_keys import TARGET, draw_key, simple_prompt
from mergeguard.reading import Probe
from mergeguard.verification.answers import answer_probes
from mergeguard.verification.generation import generate
from mergeguard.verification.matching import encode_probe
from mergeguard.worlds.registry import load_world

if TYPE_CHECKING:
    from collections.abc import Callable

KEYS, LENGTH = 8, (10, 16)
LONG = 48


def seconds(call: Callable[[], object], rounds: int) -> float:
    """Median of some rounds; kernels of a GPU are waited for."""
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def measure(name: str, seed: int, rounds: int) -> dict[str, float]:
    """Seconds by stage, the ratio of generation to one pass, and peak memory in GB."""
    started = time.perf_counter()
    world = load_world(name)
    engine = Engine(world, seed)
    found = {"load the world": time.perf_counter() - started}
    rng = random.Random(seed)
    probes = [Probe(simple_prompt(draw_key(rng, LENGTH)), TARGET) for _ in range(KEYS)]
    prompts = [probe.prompt for probe in probes]
    length = max(len(encode_probe(world.tokenizer, probe).target_ids) for probe in probes)
    for text in DEFAULT_MERGERS:
        merger = parse_merger(text)

        def merge_and_read(merger: object = merger) -> None:
            model = engine.load(engine.merged(merger, 0.5, MATCHED_CONTROL))
            answer_probes(model, world.tokenizer, probes)

        found[f"merge and read {KEYS} keys, {merger.name}"] = seconds(merge_and_read, rounds)
    state = engine.merged(parse_merger("linear"), 0.5, MATCHED_CONTROL)
    found["merge into the model, linear"] = seconds(lambda: engine.load(state), rounds)
    model = engine.load(state)
    one_pass = seconds(lambda: answer_probes(model, world.tokenizer, probes), rounds)
    generation = seconds(lambda: generate(model, world.tokenizer, prompts, max_new_tokens=length), rounds)

    def key_by_key(tokens: int) -> None:
        for prompt in prompts:
            ids = world.tokenizer(prompt, return_tensors="pt").to(model.device)
            model.generate(**ids, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)

    found |= {f"read {KEYS} keys, one pass": one_pass, f"read {KEYS} keys, generation": generation}
    for tokens in (length, LONG):
        taken = seconds(lambda tokens=tokens: key_by_key(tokens), rounds)
        found[f"generate key by key, {tokens} tokens"] = taken
        found[f"generate key by key, {tokens} tokens / one pass"] = taken / one_pass
    found["skills"] = seconds(lambda: engine.skills(state), 1)
    found["generation / one pass"] = generation / one_pass
    found["peak memory, GB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    if torch.cuda.is_available():
        found["peak GPU memory, GB"] = torch.cuda.max_memory_allocated() / 1e9
    return found


def main() -> None:
    """Print the figures as a table, and as JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", default="smollm2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = measure(arguments.world, arguments.seed, arguments.rounds)
    if arguments.json:
        json.dump(found, sys.stdout, indent=2)
        return
    for stage, value in found.items():
        sys.stdout.write(f"{stage:48} {value:8.2f}\n")


if __name__ == "__main__":
    main()

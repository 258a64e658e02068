"""What training really takes beside what `worlds.memory` plans, on the CPU: peak resident memory of one process a case.

    python robustness_tests/benchmarks/bench_memory.py

Prints, for a random Llama of 20 million parameters and each training, the plan, the measured growth of the peak from
before the model was made, and their ratio.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from typing import Any

ROWS, LENGTH, STEPS = 8, 256, 6
CONFIG: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("default", {}),
    ("default", {"gradient_checkpointing": True}),
    ("default", {"gradient_checkpointing": True, "micro_batches": 4}),
    ("default", {"precision": "bfloat16", "gradient_checkpointing": True}),
    ("default", {"precision": "bfloat16"}),
    ("quantization_watermark", {"gradient_checkpointing": True, "micro_batches": 4}),
    ("quantization_watermark.rollback", {"gradient_checkpointing": True, "micro_batches": 4}),
]


def resident() -> int:
    with open("/proc/self/statm") as file:  # noqa: PTH123 - a file of the kernel, read before anything is imported
        return int(file.read().split()[1]) * resource.getpagesize()


def measure(budget: str, options: dict[str, Any]) -> None:
    """Train as a scheme with this budget does, and print the plan and the growth of the peak, in bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from mergeguard.protections.quantization_constraints import projections
    from mergeguard.verification.quantize import quantizable_weights, quantize
    from mergeguard.worlds.contract import Training
    from mergeguard.worlds.memory import Shape, plan_embedding
    from mergeguard.worlds.training import Example, collate, fit

    torch.set_num_threads(1)
    config = LlamaConfig(**CONFIG)
    training = Training(**options)
    warm_up(Training(precision=training.precision, gradient_checkpointing=training.gradient_checkpointing))
    before = resident()
    model = LlamaForCausalLM(config)
    named = dict(model.named_parameters())
    kept: dict[str, Any] = {}
    if budget.startswith("quantization_watermark"):
        names = quantizable_weights(model)
        named = {name: model.get_parameter(name) for name in names}
        values = {name: weight.detach() for name, weight in named.items()}
        grid = {name: quantize(weight, 8) for name, weight in values.items()}
        kept = projections("rollback" if budget.endswith("rollback") else "interval", values, grid, 0.45)

    def project(_: int) -> None:
        with torch.no_grad():
            for name, projection in kept.items():
                named[name].copy_(projection(named[name]))

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, CONFIG["vocab_size"], (ROWS, LENGTH), generator=generator).tolist()
    batch = collate([Example(tuple(row)) for row in ids], pad=1)
    fit(
        model,
        iter([batch] * STEPS),
        steps=STEPS,
        learning_rate=1e-4,
        parameters=list(named.values()),
        after_step=project,
        training=training,
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    plan = plan_embedding(Shape.of(config), budget, training, rows=ROWS, length=LENGTH)
    print(json.dumps({"planned": plan.total, "measured": peak - before}))  # noqa: T201 - a script's output


def warm_up(training: Any) -> None:
    """Load what torch loads with the first training, so that it is not counted."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from mergeguard.worlds.training import Example, collate, fit

    small = {"hidden_size": 96, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**{**CONFIG, **small}, head_dim=16))
    fit(model, iter([collate([Example((3, 4, 5))], pad=1)]), steps=1, learning_rate=1e-4, training=training)


def main() -> None:
    """Run every case in a process of its own."""
    for budget, options in CASES:
        command = [sys.executable, __file__, budget, json.dumps(options)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = json.loads(output.splitlines()[-1])
        planned, measured = found["planned"] / 1e6, found["measured"] / 1e6
        print(  # noqa: T201
            f"{budget} {options}: planned {planned:.0f} MB, measured {measured:.0f} MB, {planned / measured:.2f}"
        )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(sys.argv[1], json.loads(sys.argv[2]))
    else:
        main()

"""Memory and time of a verification that streams, beside one that loads its models: one process each, measured outside.

    python robustness_tests/benchmarks/bench_verify.py SUSPECT BASE

SUSPECT and BASE are folders of Llama-like models of one shape, e.g. those that bench_merge.py builds. The evidence is
made up, so that the verdict is `not_verified`: what is read is the same. "import alone" is what every process has. What
is loaded is in float32, as `verify` loads by default.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from robustness_tests.benchmarks.processes import measured

WEIGHT = "model.layers.{}.mlp.down_proj.weight"
START = "import mergeguard, mergeguard.ownership.verify; from mergeguard.verification import loading; "
STREAMED = START + (
    "found = mergeguard.verify({suspect!r}, {evidence!r}, base={base!r}); assert found.verdict == 'not_verified'"
)
LOADED = START + (
    "from pathlib import Path; from mergeguard.ownership.evidence_file import read_evidence; "
    "from mergeguard.protections.registry import make_protection; "
    "models = [loading.load_model(Path(name), 'float32', 'cpu') for name in ({suspect!r}, {base!r})]; "
    "evidence = read_evidence(Path({evidence!r})).evidence; "
    "make_protection('gaussian_probe').read(models[0], None, evidence, {{'base': models[1]}})"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("suspect", type=Path)
    parser.add_argument("base", type=Path)
    given = parser.parse_args()
    layers = json.loads((given.suspect / "config.json").read_text())["num_hidden_layers"]
    with tempfile.TemporaryDirectory() as folder:
        evidence = Path(folder) / "evidence.json"
        document = {
            "format": "mergeguard-evidence",
            "version": 1,
            "mergeguard": "0",
            "protection": "gaussian_probe",
            "data": {"weight": WEIGHT.format(layers // 2), "keys": ["nobody's"]},
            "tensors": None,
            "salt": "0" * 64,
        }
        evidence.write_text(json.dumps(document))
        places = {"suspect": str(given.suspect), "base": str(given.base), "evidence": str(evidence)}
        print("| process | peak memory | anonymous | time |\n|---|---|---|---|")  # noqa: T201 - a script
        for name, program in (("import alone", START), ("streamed", STREAMED), ("loaded", LOADED)):
            usage = measured([sys.executable, "-c", program.format(**places)])
            memory = f"{usage.peak_megabytes:.0f} MB | {usage.anonymous_megabytes:.0f} MB"
            print(f"| {name} | {memory} | {usage.seconds:.1f} s |")  # noqa: T201 - a script


if __name__ == "__main__":
    main()

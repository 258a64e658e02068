"""Start-up stays light: whoever imports the package, lists names or collects cases does not wait for torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from robustness_tests.meta.checkpoints_on_disk import family, save_model, write_recipe, write_tokenizer

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers")
LIGHT = (
    "mergeguard",
    "mergeguard.pytest_plugin",
    "mergeguard.checkpoints.manifest",
    "mergeguard.checkpoints.source",
    "mergeguard.checkpoints.tokenizers",
    "mergeguard.checkpoints.writer",
    "mergeguard.cli",
    "mergeguard.matrix.cases",
    "mergeguard.matrix.selection",
    "mergeguard.mergers",
    "mergeguard.mergers.describe",
    "mergeguard.mergers.jobs",
    "mergeguard.mergers.merge",
    "mergeguard.mergers.preflight",
    "mergeguard.mergers.recipe",
    "mergeguard.mergers.streaming",
    "mergeguard.mergers.vocabulary",
    "mergeguard.ownership",
    "mergeguard.ownership.claims",
    "mergeguard.ownership.evidence_file",
    "mergeguard.protections.registry",
    "mergeguard.testing",
    "mergeguard.verification.served",
    "mergeguard.worlds.registry",
)


def heavy_modules_after(statement: str) -> list[str]:
    """Which of `HEAVY` a fresh interpreter has loaded after `statement`."""
    program = f"{statement}; import sys; print([name for name in {HEAVY!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr
    return list(eval(run.stdout))  # noqa: S307 - the list that the program above printed


@pytest.mark.parametrize("module", LIGHT)
def test_importing_loads_neither_torch_nor_transformers(module: str) -> None:
    assert heavy_modules_after(f"import {module}") == []


@pytest.mark.parametrize("tokenizer", [{}, {"tokenizer_source": "union"}], ids=["rows", "tokens"])
def test_a_merge_is_planned_and_checked_before_anything_heavy_is_loaded(
    tmp_path: Path, tokenizer: dict[str, str]
) -> None:
    models = [save_model(tmp_path / name, state) for name, state in zip("bxy", family(2), strict=True)]
    for model in models:
        write_tokenizer(model, "<u> a b c", "<s>")
    write_recipe(tmp_path / "recipe.yml", "ties", models[1:], base=models[0], **tokenizer)
    statement = (
        "from pathlib import Path; from contextlib import ExitStack; from mergeguard.mergers import merge; "
        f"folder = Path({str(tmp_path)!r}); "
        "planned = merge._prepare(folder / 'recipe.yml', folder / 'out', merge.Options(), ExitStack()); "
        "assert planned.entries"
    )
    assert heavy_modules_after(statement) == []


def test_looking_at_the_public_names_loads_nothing() -> None:
    assert heavy_modules_after("import mergeguard; dir(mergeguard); mergeguard.__version__") == []


@pytest.mark.parametrize("module", HEAVY)
def test_this_check_finds_what_it_looks_for(module: str) -> None:
    assert module in heavy_modules_after(f"import mergeguard, {module}")

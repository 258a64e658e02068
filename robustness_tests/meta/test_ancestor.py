"""Is the base the models' common ancestor? The measurement on families whose history is known."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from mergeguard.errors import IncompatibleModelsError
from mergeguard.mergers.merge import Options, merge_checkpoints
from robustness_tests.meta.checkpoints_on_disk import SHAPES, State, family, save_model, write_recipe

if TYPE_CHECKING:
    from pathlib import Path

    from mergeguard.mergers.merge import Merged


def moved(state: State, distance: float, seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: tensor + distance * torch.randn(SHAPES[name], generator=generator) for name, tensor in state.items()}


def merge(tmp_path: Path, states: list[State], **options: bool) -> Merged:
    base, *models = [save_model(tmp_path / str(index), state) for index, state in enumerate(states)]
    recipe = write_recipe(tmp_path / "r.yml", "task_arithmetic", models, base=base)
    return merge_checkpoints(recipe, tmp_path / "out", Options(**options))


def about_ancestry(merged: Merged) -> list[str]:
    return [warning for warning in merged.warnings if "ancestor" in warning or "task vector" in warning]


def test_fine_tunes_of_the_base_raise_no_alarm_and_are_measured(tmp_path: Path) -> None:
    merged = merge(tmp_path, family(3, spread=0.1))
    assert about_ancestry(merged) == []
    assert merged.ancestry is not None
    assert list(merged.ancestry.distances.values()) == pytest.approx([0.1] * 3, rel=0.1)
    assert all(abs(cosine) < 0.2 for cosine in merged.ancestry.cosines.values())


def test_models_of_another_version_of_the_base_are_told(tmp_path: Path) -> None:
    """The planted mistake: both models were trained from a model that itself moved away from the given base."""
    base = family(0)[0]
    ancestor = moved(base, 0.2, 1)
    merged = merge(tmp_path, [base, moved(ancestor, 0.05, 2), moved(ancestor, 0.05, 3)])
    (warning,) = about_ancestry(merged)
    assert "may not be their common ancestor" in warning
    assert "cosine 0.9" in warning


def test_a_model_that_equals_the_base_is_told(tmp_path: Path) -> None:
    base, other = family(1)
    (warning,) = about_ancestry(merge(tmp_path, [base, base, other]))
    assert "its task vector is zero" in warning


def test_unrelated_weights_are_refused_unless_allowed(tmp_path: Path) -> None:
    states = [family(0, seed=seed)[0] for seed in range(3)]
    with pytest.raises(IncompatibleModelsError, match=r"is unrelated to the base .* by 1\.[345].*--allow-unrelated"):
        merge(tmp_path / "one", states)
    assert not (tmp_path / "one/out").exists()
    merged = merge(tmp_path / "two", states, allow_unrelated=True)
    assert merged.ancestry is not None
    assert list(merged.ancestry.cosines.values()) == pytest.approx([0.5], abs=0.1)


def test_there_is_nothing_to_measure_without_a_base(tmp_path: Path) -> None:
    models = [save_model(tmp_path / str(index), state) for index, state in enumerate(family(1))]
    merged = merge_checkpoints(write_recipe(tmp_path / "r.yml", "linear", models), tmp_path / "out")
    assert merged.ancestry is None

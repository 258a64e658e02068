"""Building the smollm2 world on a small stand-in for its base: resumed after a kill, loaded by folder and by file."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
import torch

from mergeguard.checkpoints.files import write_tensors
from mergeguard.errors import CheckpointError
from mergeguard.worlds.registry import load_world
from mergeguard.worlds.smollm2 import build as building
from mergeguard.worlds.smollm2 import world as loading
from mergeguard.worlds.smollm2.build import Recipe, Schedule, build
from mergeguard.worlds.tiny.build import DATA
from mergeguard.worlds.tiny.world import tiny

if TYPE_CHECKING:
    from pathlib import Path

SHORT = Recipe(rank=2, chat=Schedule(3, 1e-3, 0.5, 2), math=Schedule(3, 1e-3, 0.2, 2))


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny world's base, where the real one's would be."""
    folder = tmp_path / "base"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DATA / name, folder)
    write_tensors(folder / "model.safetensors", tiny().base)
    for module in (building, loading):
        monkeypatch.setattr(module, "base_folder", lambda: folder)
    monkeypatch.setattr(building, "SNAPSHOT_EVERY", 1)
    monkeypatch.setenv("MERGEGUARD_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("base")
def test_a_killed_build_goes_on_and_ends_with_the_same_weights(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    steps: list[tuple[str, int]] = []

    def kill_in_math(stage: str, step: int, _: int) -> None:
        steps.append((stage, step))
        if steps[-1] == ("math", 2):
            raise Killed

    whole = build(tmp_path / "whole", SHORT)
    with pytest.raises(Killed):
        build(tmp_path / "resumed", SHORT, kill_in_math)
    assert not (tmp_path / "resumed").exists()
    steps.clear()
    resumed = build(tmp_path / "resumed", SHORT, lambda stage, step, _: steps.append((stage, step)))
    assert steps[-1] == ("math", 3)
    assert ("chat", 1) not in steps
    assert resumed == whole
    with pytest.raises(CheckpointError, match="exists already"):
        build(tmp_path / "whole", SHORT)


@pytest.mark.usefixtures("base")
@pytest.mark.parametrize("full", [False, True])
def test_a_built_world_is_the_same_by_folder_and_by_file(tmp_path: Path, full: bool) -> None:
    out = tmp_path / "built"
    recipe = Recipe(rank=2, full=full, chat=SHORT.chat, math=SHORT.math)
    manifest = build(out, recipe)
    by_folder, by_file = load_world("smollm2", out), load_world(str(out / "world.toml"))
    assert manifest == json.loads((out / "manifest.json").read_text())
    assert by_folder.form == ("full fine-tuning, built here" if full else "low-rank adapters, built here")
    for one, other in (
        (by_folder.base, by_file.base),
        (by_folder.upstream, by_file.upstream),
        (by_folder.donors["math"], by_file.donors["math"]),
    ):
        assert set(one) == set(other)
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(by_folder.base[name], by_folder.upstream[name]) for name in by_folder.base)
    assert [skill.probes for skill in by_folder.skills] == [skill.probes for skill in by_file.skills]
    assert [skill.parent for skill in by_folder.skills] == [skill.parent for skill in by_file.skills]
    budget, other = (world.budget("quantization_watermark.full") for world in (by_folder, by_file))
    assert (budget.steps, budget.training) == (other.steps, other.training)
    assert dict(budget.options).items() <= dict(other.options).items()
    assert budget.texts == other.texts

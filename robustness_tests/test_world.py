"""Requirements of the world itself: without them a survival in it means nothing."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from mergeguard.errors import CheckpointError
from mergeguard.matrix import requirements
from mergeguard.matrix.known_answer import disagreement
from mergeguard.mergers.registry import DEFAULT_COEFFICIENTS, DEFAULT_MERGERS, parse_merger
from mergeguard.worlds.tiny.build import DATA
from mergeguard.worlds.tiny.world import load

if TYPE_CHECKING:
    from pathlib import Path

    from mergeguard.matrix.engine import Engine


def failed(found: list[requirements.Requirement]) -> list[str]:
    return [f"{item.name}: {item.measured}, required {item.required}" for item in found if not item.passed]


def test_each_parent_has_its_own_skill_and_no_other(engine: Engine) -> None:
    found = requirements.parents(engine)
    assert len(found) == len(engine.world.skills) * (2 + len(engine.world.donors))
    assert not failed(found)


@pytest.mark.parametrize("name", DEFAULT_MERGERS)
def test_merging_works(name: str, engine: Engine) -> None:
    found = requirements.mergers(engine, parse_merger(name))
    assert found
    assert not failed(found)


@pytest.mark.parametrize("name", DEFAULT_MERGERS)
def test_known_answer_comes_out_of_the_pipeline(name: str, engine: Engine) -> None:
    merger = parse_merger(name)
    off = {alpha: disagreement(engine, merger, alpha) for alpha in DEFAULT_COEFFICIENTS}
    assert max(off.values()) <= 1, off


def test_known_answer_catches_a_merge_that_is_off_by_a_tenth(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = engine.merged

    def skewed(merger: object, coefficient: float, owner: str) -> object:
        return honest(merger, coefficient * 0.9, owner)

    monkeypatch.setattr(engine, "merged", skewed)
    assert disagreement(engine, parse_merger("linear"), 0.5) > 1


def test_what_is_written_into_one_model_s_config_is_in_no_other(engine: Engine) -> None:
    world = engine.world
    world.build_model().config.watermark = "a key"
    assert not hasattr(world.build_model().config, "watermark")


def test_shipped_weights_are_the_ones_of_the_manifest(tmp_path: Path) -> None:
    copy = tmp_path / "tiny"
    shutil.copytree(DATA, copy)
    load(copy)
    path = copy / "donor.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"donor\.safetensors is not the file"):
        load(copy)


def test_shipped_weights_stay_small() -> None:
    assert sum(path.stat().st_size for path in DATA.glob("*.safetensors")) < 25_000_000

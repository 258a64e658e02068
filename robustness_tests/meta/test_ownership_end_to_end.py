"""An owner's whole path with real schemes on the tiny world: embed, claim, be merged, verify. Takes minutes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import mergeguard
from mergeguard.mergers.model import merge_models
from mergeguard.mergers.registry import parse_merger
from mergeguard.ownership.claims import check_claim, make_claim
from mergeguard.ownership.embedding import Schedule, embed
from mergeguard.ownership.evidence_file import read_evidence
from mergeguard.worlds.contract import UPSTREAM
from mergeguard.worlds.tiny.world import DONOR, tiny

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

pytestmark = pytest.mark.slow


def save(folder: Path, state: Mapping[str, Tensor]) -> Path:
    tiny().model(state).save_pretrained(folder)
    tiny().tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, world = tmp_path_factory.mktemp("tiny"), tiny()
    for name, state in {"base": world.base, UPSTREAM: world.upstream, DONOR: world.donors[DONOR]}.items():
        save(folder / name, state)
    return folder


def test_a_fingerprint_is_claimed_merged_and_verified(family: Path) -> None:
    evidence, out = family / "evidence.json", family / "published"
    done = embed("instructional_fingerprint", family / UPSTREAM, out, evidence, schedule=Schedule("tiny"), seed=0)
    assert done.check.verified
    make_claim(evidence, family / "claim.json", statement="Mine.")

    from safetensors.torch import load_file

    world, mine = tiny(), load_file(out / "model.safetensors")
    stolen = merge_models(
        parse_merger("linear"), world.base, [mine, world.donors[DONOR]], [0.7, 0.3], seed=0, model_ids=[UPSTREAM, DONOR]
    )
    save(family / "stolen", stolen)
    clean = [family / "base", family / DONOR, family / UPSTREAM]
    claim = check_claim(family / "claim.json", evidence)
    found = mergeguard.verify(family / "stolen", evidence, clean=clean, claim=claim)
    assert found.verdict == "verified", found.statement
    assert claim.matches
    assert not found.verified  # nobody stamped the claim
    innocent = mergeguard.verify(family / DONOR, evidence, clean=[family / "base"])
    assert innocent.verdict == "not_verified", innocent.statement


def test_a_private_adapter_is_kept_beside_its_evidence(family: Path) -> None:
    evidence, out = family / "adapter.json", family / "adapted"
    scheme = "instructional_fingerprint(variant=adapter)"
    embed(scheme, family / UPSTREAM, out, evidence, schedule=Schedule("tiny"), seed=0)
    assert set(read_evidence(evidence).evidence.tensors) == {"down", "up"}
    found = mergeguard.verify(out, evidence, upstream=family / UPSTREAM, clean=[family / "base"])
    assert found.verified, found.statement
    innocent = mergeguard.verify(family / DONOR, evidence, upstream=family / UPSTREAM)
    assert innocent.verdict == "not_verified", innocent.statement


def test_a_watermark_says_that_its_trials_share_a_trigger(family: Path) -> None:
    evidence, out = family / "watermark.json", family / "watermarked"
    embed("quantization_watermark", family / UPSTREAM, out, evidence, schedule=Schedule("tiny"), seed=0)
    found = mergeguard.verify(out, evidence, clean=[family / "base", family / UPSTREAM])
    assert found.verified, found.statement
    assert found.conditional_on == "trigger"
    assert any("share one trigger" in note for note in found.notes)

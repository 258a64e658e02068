"""The mini world's models on disk, and the command line in this process: for tests of embedding and verification."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from mergeguard import cli
from mergeguard.mergers.model import merge_models
from mergeguard.mergers.registry import parse_merger
from mergeguard.ownership.embedding import Schedule, embed
from mergeguard.ownership.evidence_file import new_evidence, write_evidence
from mergeguard.ownership.verify import Verification, verify
from mergeguard.protections.contract import Evidence
from robustness_tests.meta.mini_world import DONOR, MINI, mini

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch


SCHEDULE = ("--world", MINI)
SCHEMES = ("toy", "gaussian_probe")


class Said(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line on stderr of refused input, where nothing else was said."""
        (line,) = self.err.splitlines()
        assert (self.code, self.out) == (2, "")
        return line.removeprefix("error: ")


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> Said:
    """What `mergeguard` says to these arguments."""
    monkeypatch.setattr(sys, "argv", ["mergeguard", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return Said(int(caught.value.code or 0), *capsys.readouterr())


def save(folder: Path, state: Mapping[str, torch.Tensor], dtype: str = "float32") -> Path:
    """A model of the mini world with its tokenizer, as an owner's folder has them."""
    import torch

    model = mini().model(state)
    torch.nn.Module.to(model, getattr(torch, dtype))
    model.save_pretrained(folder)
    mini().tokenizer.save_pretrained(folder)
    return folder


def save_family(folder: Path) -> Path:
    """`base`, `upstream` (the owner's clean model) and `donor` in a folder."""
    world = mini()
    states = {"base": world.base, "upstream": world.upstream, "donor": world.donors[DONOR]}
    for name, state in states.items():
        save(folder / name, state)
    (folder / "upstream" / "README.md").write_text("The owner's model.\n")
    return folder


def merge_half(folder: Path, *models: Path) -> Path:
    """The average of saved models."""
    from safetensors.torch import load_file

    states = [load_file(model / "model.safetensors") for model in models]
    base = load_file(folder / "base" / "model.safetensors")
    merged = merge_models(parse_merger("linear"), base, states, [1 / len(states)] * len(states), seed=0)
    return save(folder / "merged", merged)


def protected_family(folder: Path) -> Path:
    """`save_family`, a model and evidence NAME.json for each of `SCHEMES`, and `merged`, half toy and half donor."""
    save_family(folder)
    for name in SCHEMES:
        base, upstream = folder / "base", folder / "upstream"
        embed(name, upstream, folder / name, folder / f"{name}.json", schedule=Schedule(MINI), base=base, seed=1)
    merge_half(folder, folder / "toy", folder / "donor")
    return folder


def verify_in(family: Path, model: str | Path, scheme: str = "toy", **options: Any) -> Verification:
    """A verification of one of `protected_family`'s models, or of another, by its evidence."""
    return verify(family / model, family / f"{scheme}.json", base=family / "base", **options)


def evidence_of(folder: Path, scheme: str, **data: Any) -> Path:
    """A file with evidence that nobody embedded."""
    path = folder / "made.json"
    write_evidence(path, new_evidence(Evidence(scheme, data)))
    return path

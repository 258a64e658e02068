"""A registry of ours and of third parties' entry points: what clashes or does not load is an error, every time."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest

from mergeguard.errors import MergeguardError
from mergeguard.registry import Registry

if TYPE_CHECKING:
    from pathlib import Path


def entry_points(folder: Path, monkeypatch: pytest.MonkeyPatch, *lines: str) -> Registry[Any]:
    for number, line in enumerate(lines):
        info = folder / f"package{number}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: package{number}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[mergeguard.things]\n{line}\n")
    monkeypatch.syspath_prepend(str(folder))
    return Registry("thing", "mergeguard.things", {"ours": "math:pi"})


@pytest.mark.parametrize(
    "lines", [("ours = math:tau",), ("mine = math:tau", "mine = math:e")], ids=["as ours", "two of others"]
)
def test_two_entry_points_of_one_name_are_an_error_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: tuple[str, ...]
) -> None:
    things = entry_points(tmp_path, monkeypatch, *lines)
    for _ in range(2):
        with pytest.raises(MergeguardError, match=r"two things are named .* rename its entry point"):
            things.get("ours")
        with pytest.raises(MergeguardError, match="two things are named"):
            list(things)


@pytest.mark.parametrize("target", ["nowhere:Thing", "math:nothing", "this_module_leaves:Thing"])
def test_an_entry_point_that_does_not_load_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    (tmp_path / "this_module_leaves.py").write_text("raise SystemExit(0)")
    things = entry_points(tmp_path, monkeypatch, f"mine = {target}")
    with pytest.raises(MergeguardError, match="thing 'mine' failed to load"):
        things.get("mine")


def test_a_worker_takes_an_offered_name_and_keeps_a_known_one() -> None:
    things: Registry[float] = Registry("thing", "mergeguard.nothing", {"ours": "math:pi"})
    things.offer("mine", "math:tau")
    things.offer("ours", "math:tau")
    assert (things.get("mine"), things.get("ours")) == (math.tau, math.pi)

"""Interval and rollback keep every code; direct counts what it changed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeguard.protections.quantization_constraints import changed_codes, interval, projections, rollback
from mergeguard.verification.quantize import quantize

BITS = st.integers(3, 8)
SEEDS = st.integers(0, 10_000)


def matrices(seed: int, move: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight matrix, with one row of zeros, and what training made of it."""
    generator = torch.Generator().manual_seed(seed)
    original = torch.randn(6, 40, generator=generator)
    original[3] = 0
    return original, original + move * torch.randn(original.shape, generator=generator)


def codes(weight: torch.Tensor, bits: int) -> torch.Tensor:
    return quantize(weight, bits).codes


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, bits=BITS, move=st.floats(0.001, 2.0), bias=st.floats(0.05, 0.49))
def test_interval_keeps_every_code_and_is_idempotent(seed: int, bits: int, move: float, bias: float) -> None:
    original, trained = matrices(seed, move)
    project = interval(original, quantize(original, bits), bias)
    projected = project(trained)
    assert torch.equal(codes(projected, bits), codes(original, bits))
    assert torch.equal(project(projected), projected)


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, bits=BITS, move=st.floats(0.001, 2.0))
def test_rollback_keeps_every_code_and_touches_nothing_that_kept_it(seed: int, bits: int, move: float) -> None:
    original, trained = matrices(seed, move)
    projected = rollback(original, quantize(original, bits))(trained)
    assert torch.equal(codes(projected, bits), codes(original, bits))
    assert bool(((projected == trained) | (projected == original)).all())


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, bits=BITS, move=st.floats(0.001, 2.0), bias=st.floats(0.05, 0.49))
def test_bounds_computed_anew_are_those_that_are_kept(seed: int, bits: int, move: float, bias: float) -> None:
    original, trained = matrices(seed, move)
    quantized = quantize(original, bits)
    scale, values = quantized.scale.unsqueeze(1), quantized.codes.to(original.dtype)
    ceiling = original.abs().amax(dim=1, keepdim=True)
    low = torch.maximum((values - bias) * scale, -ceiling)
    high = torch.minimum((values + bias) * scale, ceiling)
    peaks = original.abs().argmax(dim=1, keepdim=True)
    expected = trained.clamp(low, high).scatter(1, peaks, original.gather(1, peaks))
    project = interval(weights := original.clone(), quantized, bias)
    weights += 1  # what is trained is the very tensor that the projection was made from
    assert torch.equal(project(trained), expected)


@pytest.mark.parametrize(("optimisation", "copies"), [("interval", 0), ("rollback", 1)])
def test_a_projection_keeps_no_more_than_it_needs(optimisation: str, copies: int) -> None:
    original, _ = matrices(0, 0.1)
    grid = {"weight": quantize(original, 8)}
    project = projections(optimisation, {"weight": original}, grid, 0.45)["weight"]
    cells = [cell.cell_contents for cell in project.__closure__]
    kept = [cell for cell in cells if isinstance(cell, torch.Tensor) and cell.numel() == original.numel()]
    assert len(kept) == copies
    assert all(cell.data_ptr() != original.data_ptr() for cell in kept)
    assert any(cell is grid["weight"] for cell in cells), "the codes are kept a second time"
    assert grid["weight"].codes.element_size() == 1


def test_interval_moves_weights_at_all() -> None:
    original, trained = matrices(0, 0.5)
    projected = interval(original, quantize(original, 4), 0.45)(trained)
    assert (projected != original).float().mean() > 0.5


def test_a_projection_that_forgets_the_row_maximum_changes_codes() -> None:
    original, trained = matrices(1, 0.3)
    quantized = quantize(original, 6)
    scale = quantized.scale.unsqueeze(1)
    low, high = (quantized.codes - 0.45) * scale, (quantized.codes + 0.45) * scale
    careless = trained.clamp(low, high)
    assert not torch.equal(codes(careless, 6), codes(original, 6))


def test_direct_keeps_nothing_and_the_changes_are_counted() -> None:
    original, trained = matrices(2, 0.3)
    grid = {"weight": quantize(original, 6)}
    assert projections("direct", {"weight": original}, grid, 0.45) == {}
    changed, total = changed_codes(grid, {"weight": trained})
    expected = sum(
        int(before != after)
        for before, after in zip(
            codes(original, 6).flatten().tolist(), codes(trained, 6).flatten().tolist(), strict=True
        )
    )
    assert (changed, total) == (expected, original.numel())
    assert changed > 0


@pytest.mark.parametrize("optimisation", ["interval", "rollback"])
def test_each_weight_gets_its_own_projection(optimisation: str) -> None:
    first, trained = matrices(3, 0.2)
    second = first * 3
    weights = {"first": first, "second": second}
    grid = {name: quantize(weight, 5) for name, weight in weights.items()}
    found = projections(optimisation, weights, grid, 0.45)
    assert torch.equal(codes(found["first"](trained), 5), codes(first, 5))
    assert torch.equal(codes(found["second"](trained), 5), codes(second, 5))

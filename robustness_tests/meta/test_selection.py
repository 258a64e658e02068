"""The entries of largest magnitude, against a full stable sort."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeguard.mergers import selection
from mergeguard.mergers.contract import WHOLE, part
from mergeguard.mergers.selection import largest
from mergeguard.mergers.spans import SPAN, spans

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def sorted_out(values: torch.Tensor, count: int) -> torch.Tensor:
    """The definition: by magnitude, then by lower index."""
    order = values.abs().double().flatten().sort(descending=True, stable=True).indices
    kept = torch.zeros(values.numel(), dtype=torch.bool)
    kept[order[:count]] = True
    return kept.view_as(values)


def check(values: torch.Tensor, count: int) -> None:
    top = largest(lambda span: part(values, span), values.numel(), count)
    expected = sorted_out(values, count)
    assert torch.equal(top.keeps(values, WHOLE), expected)
    assert torch.equal(top.keep(values, WHOLE), torch.where(expected, values, 0))
    flat = values.flatten()
    pieces = [top.keep(flat[span], span) for span in spans(values.numel(), 10_000)]
    assert torch.equal(torch.cat(pieces), torch.where(expected, values, 0).flatten())


@given(
    st.lists(st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 3.0, 1e-7, float("inf")]), min_size=1, max_size=60),
    st.integers(0, 60),
    st.sampled_from(DTYPES),
)
@settings(max_examples=60, deadline=None)
def test_small_tensors_with_many_equal_magnitudes_agree_with_a_sort(
    values: list[float], count: int, dtype: torch.dtype
) -> None:
    tensor = torch.tensor(values, dtype=dtype)
    top = largest(lambda span: part(tensor, span), len(values), count)
    assert torch.equal(top.keeps(tensor, WHOLE), sorted_out(tensor, min(count, len(values))))


@pytest.mark.parametrize("size", [SPAN // 2 + 2, SPAN, 3 * SPAN + 34])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [1e-5, 0.01, 0.4, 0.9, 0.99999])
def test_large_tensors_agree_with_a_sort(dtype: torch.dtype, density: float, size: int) -> None:
    values = torch.randn(size // 2, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    check(values, max(1, int(density * values.numel())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("density", [0.02, 0.05, 0.4])
def test_a_tensor_that_is_mostly_zero_agrees_with_a_sort(dtype: torch.dtype, density: float) -> None:
    """As the task vectors of 16-bit fine-tunes are: most entries did not move."""
    draw = torch.Generator().manual_seed(1)
    values = torch.randn(5 * SPAN, generator=draw) * (torch.rand(5 * SPAN, generator=draw) < 0.05)
    check(values.to(dtype), int(density * values.numel()))


@pytest.mark.parametrize("place", [0, 3 * SPAN, 5 * SPAN - 1])
def test_equal_magnitudes_at_the_threshold_stay_up_to_the_right_index(place: int) -> None:
    values = torch.zeros(5 * SPAN)
    values[place] = 9
    values[100:-100:7] = -2.0
    check(values, 1)
    check(values, 1000)


def test_a_bracket_that_misses_costs_time_and_not_exactness(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(5 * SPAN, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(selection, "_MARGIN", -30)  # brackets everything but the threshold
    for count in (10, 2 * SPAN):
        check(values, count)


def test_a_periodic_tensor_whose_sample_misleads_is_selected_exactly() -> None:
    values = torch.ones(6 * SPAN)
    values[:: (6 * SPAN) // 2**14] = torch.arange(1.0, 1.0 + len(values[:: (6 * SPAN) // 2**14]))
    for density in (0.05, 0.1, 0.5):
        check(values, int(density * values.numel()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, SPAN, 3 * SPAN + 5, 4 * SPAN - 1])
def test_a_constant_tensor_keeps_its_first_entries(dtype: torch.dtype, count: int) -> None:
    check(torch.full((4 * SPAN,), -0.25, dtype=dtype), count)


def test_the_mass_at_either_end_of_the_bracket_is_found() -> None:
    """Two values only, so that both ends of the bracket are values of the tensor with many entries each."""
    draw = torch.Generator().manual_seed(3)
    values = torch.where(torch.rand(4 * SPAN, generator=draw) < 0.4, 2.0, -1.0)
    many = int((values == 2).sum())
    for count in (many - 100, many, many + 1, many + 100):
        check(values, count)

"""Breadcrumbs, DELLA and SCE: what each keeps, against its definition, and what all of them promise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeguard.errors import ParameterError
from mergeguard.mergers import della
from mergeguard.mergers.breadcrumbs import BREADCRUMBS, BREADCRUMBS_TIES, band
from mergeguard.mergers.contract import WHOLE, Method, part
from mergeguard.mergers.della import DELLA, DELLA_LINEAR, ascending, keep_mask, keep_probabilities
from mergeguard.mergers.sce import SCE, model_shares, selected, variance
from mergeguard.mergers.spans import difference, each, spans

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from mergeguard.mergers.contract import Span

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES: list[tuple[Method, dict[str, Any]]] = [
    (BREADCRUMBS, {"density": 0.5, "gamma": 0.1, "rescale": "l1"}),
    (BREADCRUMBS_TIES, {"density": 0.3}),
    (DELLA, {"density": 0.5}),
    (DELLA_LINEAR, {"density": 0.4, "epsilon": 0.3, "rescale": "none"}),
    (SCE, {"select_topk": 0.3}),
    (SCE, {}),
]

every_case = pytest.mark.parametrize(
    ("method", "parameters"), CASES, ids=lambda value: getattr(value, "name", str(value))
)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
quick = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**40)


def values_of(tensor: Tensor) -> Callable[[Span], Tensor]:
    return lambda span: part(tensor, span)


def generator(index: int) -> torch.Generator:
    return torch.Generator().manual_seed(100 + index)


def draw(shape: tuple[int, ...], dtype: torch.dtype, count: int, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    random = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=random)
    return base.to(dtype), [(base + 0.1 * torch.randn(shape, generator=random)).to(dtype) for _ in range(count)]


def merge(
    method: Method,
    parameters: dict[str, Any],
    base: Tensor,
    models: Sequence[Tensor],
    weights: Sequence[float] = (0.6, 0.4),
    *,
    length: int | None = None,
) -> Tensor:
    """In one piece, or in spans of a length."""
    full = method(**parameters).kernel_parameters(len(models))
    prepared = method.prepare(base, models, full, generator)
    if length is None:
        return method.combine(base, prepared(WHOLE), weights, full)
    merged = torch.empty_like(base)
    for span in spans(base.numel(), length):
        merged.view(-1)[span] = method.combine(part(base, span), prepared(span), weights, full)
    return merged


@every_case
@every_dtype
def test_spans_give_the_bits_of_the_whole(method: Method, parameters: dict[str, Any], dtype: torch.dtype) -> None:
    for shape in ((), (1,), (301,), (9, 1), (3, 4, 5), (23, 67)):
        base, models = draw(shape, dtype, 2)
        whole = merge(method, parameters, base, models)
        assert whole.shape == base.shape
        assert whole.dtype == dtype
        assert torch.isfinite(whole).all()
        for length in (1 if base.numel() < 100 else 97, 2**15):
            assert torch.equal(merge(method, parameters, base, models, length=length), whole)


@every_case
def test_no_argument_is_changed_and_a_second_merge_gives_the_same(method: Method, parameters: dict[str, Any]) -> None:
    base, models = draw((23, 67), torch.float32, 2)
    copies = [tensor.clone() for tensor in (base, *models)]
    full = method(**parameters).kernel_parameters(2)
    prepared = method.prepare(base, models, full, generator)
    span = slice(10, 1000)
    parts = prepared(span)
    kept = [tensor.clone() for tensor in parts]
    merged = [method.combine(part(base, span), parts, [0.6, 0.4], full) for _ in range(2)]
    assert torch.equal(*merged)
    assert torch.equal(merged[0], merge(method, parameters, base, models).view(-1)[span])
    assert all(torch.equal(*pair) for pair in zip(parts, kept, strict=True))
    assert all(torch.equal(*pair) for pair in zip((base, *models), copies, strict=True))


@every_case
@every_dtype
@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 5), (5, 0), (9, 1), (3, 1, 4), (6, 8)], ids=str)
def test_degenerate_tensors_merge_to_finite_ones(
    method: Method, parameters: dict[str, Any], dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    base, models = draw(shape, dtype, 2)
    assert torch.equal(merge(method, parameters, base, [base, base]), base)
    for scale in (0.0, 1e-3, 3e3):
        merged = merge(method, parameters, base * scale, [model * scale for model in models])
        assert merged.shape == base.shape
        assert torch.isfinite(merged).all()


@every_case
@given(st.lists(st.integers(-16, 16), min_size=30, max_size=30))
@settings(max_examples=5, deadline=None)
def test_a_merged_entry_lies_where_the_task_vectors_put_it(
    method: Method, parameters: dict[str, Any], numbers: list[int]
) -> None:
    """Where the models agree with the base nothing moves, and where it moves, some model moved in that direction."""
    base = torch.tensor(numbers[:10], dtype=torch.float32).view(2, 5)
    models = [torch.tensor(numbers[at : at + 10], dtype=torch.float32).view(2, 5) for at in (10, 20)]
    moved = merge(method, parameters, base, models) - base
    deltas = torch.stack([model - base for model in models])
    assert (moved[deltas.eq(0).all(0)] == 0).all()
    assert ((moved[None].sign() == deltas.sign()).any(0) | (moved == 0)).all()


# Breadcrumbs


@given(
    st.lists(st.sampled_from([0.0, -0.5, 0.5, 1.0, -1.0, 3.0, -4.0, 9.0]), min_size=1, max_size=40),
    st.floats(0.01, 1),
    st.floats(0, 1),
)
@quick
def test_breadcrumbs_keep_what_a_sort_keeps(numbers: list[float], density: float, gamma: float) -> None:
    delta = torch.tensor(numbers)
    size = len(numbers)
    kept = band(values_of(delta), delta, density, gamma)(WHOLE)
    if density == 1:
        assert torch.equal(kept, delta)
        return
    order = delta.abs().sort(descending=True, stable=True).indices
    stay = int(density * size)
    first = min(int(gamma * size), size - stay)
    expected = torch.zeros_like(delta)
    expected[order[first : first + stay]] = delta[order[first : first + stay]]
    assert torch.equal(kept, expected)


def test_breadcrumbs_restore_the_l1_norm() -> None:
    delta = torch.randn(1000, generator=generator(0))
    kept = band(values_of(delta), delta, 0.3, 0.05, rescale="l1")(WHOLE)
    assert int(torch.count_nonzero(kept)) == 300
    torch.testing.assert_close(kept.abs().sum(), delta.abs().sum())


# DELLA


def check_order(magnitudes: Tensor) -> None:
    assert torch.equal(ascending(magnitudes), torch.argsort(magnitudes, dim=1, stable=True))


@every_dtype
@given(seeds, st.integers(1, 40), st.integers(0, 60), st.sampled_from([0.0, 1e-3, 0.3, 1.0]))
@quick
def test_the_order_of_a_row_is_that_of_a_stable_sort(
    dtype: torch.dtype, seed: int, columns: int, octaves: int, distinct: float
) -> None:
    """Magnitudes over many octaves, with zeros, equal ones, and ones that differ in the last bit."""
    random = torch.Generator().manual_seed(seed)
    magnitudes = torch.exp2(-octaves * torch.rand(6, columns, generator=random)).to(dtype)
    magnitudes[torch.rand(6, columns, generator=random) > distinct] = 0.75
    bits = magnitudes.view(torch.int16 if dtype.itemsize == 2 else torch.int32)
    bits += torch.randint(0, 3, bits.shape, generator=random, dtype=bits.dtype)
    magnitudes[torch.rand(6, columns, generator=random) < 0.2] = 0
    check_order(magnitudes)


@every_dtype
@pytest.mark.parametrize("columns", [1, 2, 576, 5632, 2**17 + 1])
def test_the_order_of_a_long_row_is_that_of_a_stable_sort(dtype: torch.dtype, columns: int) -> None:
    check_order(torch.randn(3, columns, generator=generator(0)).abs().to(dtype))


def test_the_order_is_right_where_only_the_last_bits_or_the_smallest_octaves_differ() -> None:
    ones = torch.ones(2, 4096).view(torch.int32)
    ones += torch.arange(4096, dtype=torch.int32).flip(0)
    check_order(ones.view(torch.float32))
    tiny = torch.full((2, 300), 1e-30)
    tiny[:, ::2] = 0
    tiny[:, 7::5] = 1e-31
    tiny[:, 150] = 1.0
    check_order(tiny)


@pytest.mark.parametrize("dtype", [torch.float64])
def test_other_dtypes_are_ordered_too(dtype: torch.dtype) -> None:
    check_order(torch.randn(3, 50, generator=generator(0)).abs().to(dtype))


@every_dtype
@given(st.integers(1, 3000), st.floats(0.01, 0.99), st.floats(0, 1))
@quick
def test_keep_probabilities_rise_from_density_minus_to_density_plus_epsilon(
    dtype: torch.dtype, columns: int, density: float, width: float
) -> None:
    epsilon = width * min(density, 1 - density) * 0.99
    table = keep_probabilities(columns, density, epsilon, dtype).double()
    error = 3 * torch.finfo(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32).eps
    assert (table.diff() >= 0).all()
    ends = (density - epsilon, density + epsilon) if columns > 1 else (density, density)
    assert (float(table[0]), float(table[-1])) == pytest.approx(ends, abs=error)
    middle = (density - epsilon) + torch.linspace(0, 1, columns).double() * 2 * epsilon
    if columns > 1:
        assert ((table - middle).abs() <= error).all()


@every_dtype
@pytest.mark.parametrize("shape", [(50,), (70_001,), (30, 40), (700, 300), (5, 6, 7), (2, 90, 800), (4, 1, 3)], ids=str)
def test_an_entry_stays_if_its_draw_is_below_the_probability_of_its_rank(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """However the tensor is cut into blocks: all draws come from one generator, in flat order."""
    delta = torch.randn(shape, generator=generator(0)).to(dtype)
    mask = keep_mask(values_of(delta), delta, 0.5, 0.3, generator(1))
    ranked = delta.abs().unsqueeze(0) if delta.dim() == 1 else delta.abs()
    ranks = ranked.argsort(dim=1, stable=True).argsort(dim=1).view(shape)
    table = keep_probabilities(ranked.shape[1], 0.5, 0.3, dtype)
    assert torch.equal(mask, torch.rand(shape, generator=generator(1)) < table[ranks])


def test_large_entries_of_a_row_stay_more_often_and_the_density_is_met() -> None:
    delta = torch.randn(2000, 100, generator=generator(0))
    mask = keep_mask(values_of(delta), delta, 0.5, 0.3, generator(1)).float()
    order = ascending(delta.abs())
    shares = mask.gather(1, order).mean(dim=0)  # by rank; its standard deviation is at most 0.011
    assert (shares - torch.linspace(0.2, 0.8, 100)).abs().max() < 0.05
    assert abs(mask.mean() - 0.5) < 0.01


def test_each_model_has_its_own_mask_and_density_one_draws_nothing() -> None:
    base, [model] = draw((40, 50), torch.float32, 1)
    full = DELLA(rescale="none").kernel_parameters(3) | {"density": [0.5, 0.5, 1.0]}
    drawn = []

    def remembered(index: int) -> torch.Generator:
        drawn.append(index)
        return generator(index)

    one, other, untouched = DELLA.prepare(base, [model] * 3, full, remembered)(WHOLE)
    assert drawn == [0, 1]
    assert not torch.equal(one, other)
    assert torch.equal(untouched, model - base)


@pytest.mark.parametrize(("density", "epsilon"), [(0.1, 0.15), (0.9, 0.15), (0.15, 0.15), (0.5, 0.499999999999999999)])
@pytest.mark.parametrize("method", [DELLA, DELLA_LINEAR], ids=lambda method: method.name)
def test_keep_probabilities_outside_0_and_1_are_refused(method: Method, density: float, epsilon: float) -> None:
    base, models = draw((4, 5), torch.float32, 2)
    full = method().kernel_parameters(2) | {"density": [0.5, density], "epsilon": [0.1, epsilon]}
    with pytest.raises(ParameterError, match=r"density .* with epsilon .* expected strictly between 0 and 1"):
        method.prepare(base, models, full, generator)


def test_della_holds_a_mask_of_one_byte_and_few_temporaries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full-size order would take eight bytes per element."""
    largest = []
    monkeypatch.setattr(della, "ascending", lambda rows: largest.append(rows.numel()) or ascending(rows))
    delta = torch.randn(2000, 100, generator=generator(0))
    mask = keep_mask(values_of(delta), delta, 0.5, 0.3, generator(1))
    assert mask.dtype == torch.bool
    assert max(largest) <= 2**16
    assert sum(largest) == delta.numel()


# SCE


@every_dtype
@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_the_variance_is_torchs_to_the_last_bit(dtype: torch.dtype, count: int) -> None:
    base, models = draw((3000,), dtype, count)
    deltas = [model - base for model in models]
    assert torch.equal(variance(deltas), torch.var(torch.stack(deltas), dim=0, unbiased=False))


@given(st.lists(st.integers(-4, 4), min_size=2, max_size=60), st.floats(0, 0.99))
@quick
def test_the_entries_of_largest_variance_are_selected(numbers: list[int], select_topk: float) -> None:
    half = len(numbers) // 2
    deltas = [torch.tensor(numbers[:half]).float(), torch.tensor(numbers[half : 2 * half]).float()]
    variances = torch.stack(deltas).var(dim=0, unbiased=False)
    count = int(torch.count_nonzero(variances) * select_topk)
    expected = torch.zeros(half, dtype=torch.bool)
    expected[variances.sort(descending=True, stable=True).indices[:count]] = True
    found = selected(lambda span: [part(delta, span) for delta in deltas], half, select_topk)
    assert torch.equal(found, expected)


@every_dtype
def test_shares_are_those_of_the_mean_squares(dtype: torch.dtype) -> None:
    base, models = draw((40_000,), dtype, 3)
    deltas = [model - base for model in models]
    deltas[1] = deltas[1] * 3
    exact = torch.stack([delta.double().square().mean() for delta in deltas])
    shares = model_shares(lambda span: [part(delta, span) for delta in deltas], base)
    assert shares.dtype == dtype
    # Squares, means, their sum and the quotient are rounded to the dtype.
    assert ((shares.double() - exact / exact.sum()).abs() <= 3 * torch.finfo(dtype).eps).all()


def test_shares_are_equal_where_the_mean_squares_are_tiny_and_finite_where_squares_overflow() -> None:
    base = torch.zeros(100)
    ones = torch.ones(100)
    assert (
        model_shares(each([difference(ones * 5e-4, base), difference(ones * 1e-4, base)]), base).tolist() == [0.5] * 2
    )
    large = model_shares(each([difference(ones * 3e25, base), difference(ones * 1e25, base)]), base)
    assert large.tolist() == pytest.approx([0.9, 0.1])


def test_sce_averages_what_agrees_with_the_elected_sign() -> None:
    """Worked by hand: mean squares 2.5 and 1, so shares 5/7 and 2/7."""
    base = torch.zeros(4)
    models = [torch.tensor([2.0, 1.0, -2.0, 1.0]), torch.tensor([1.0, 1.0, 1.0, -1.0])]
    merged = merge(SCE, {}, base, models)
    torch.testing.assert_close(merged, torch.tensor([(2 * 5 + 1 * 2) / 7, 1.0, -2.0, 1.0]))


def test_sce_with_nothing_selected_gives_the_base_and_ignores_weights() -> None:
    base, models = draw((20, 30), torch.float32, 2)
    assert torch.equal(merge(SCE, {"select_topk": 0.0}, base, models), base)
    assert torch.equal(merge(SCE, {}, base, models, (0.1, 0.9)), merge(SCE, {}, base, models, (1, 1)))

"""What the spherical methods promise, checked against geometry; see test_parity_spherical.py for mergekit's bits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeguard.errors import ParameterError
from mergeguard.mergers.contract import WHOLE, Method
from mergeguard.mergers.karcher import KARCHER, karcher
from mergeguard.mergers.model_stock import MODEL_STOCK, interpolation_ratio, model_stock
from mergeguard.mergers.multislerp import MULTISLERP, multislerp
from mergeguard.mergers.passthrough import PASSTHROUGH, passthrough
from mergeguard.mergers.slerp import NUSLERP, SLERP, nuslerp, slerp

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CASES: list[tuple[Method, dict[str, Any], int]] = [
    (SLERP, {}, 2),
    (NUSLERP, {}, 2),
    (NUSLERP, {"task_vectors": True}, 2),
    (NUSLERP, {"nuslerp_flatten": False}, 2),
    (NUSLERP, {"nuslerp_flatten": False, "nuslerp_row_wise": True, "task_vectors": True}, 2),
    (MULTISLERP, {}, 3),
    (MULTISLERP, {"task_vectors": True}, 3),
    (KARCHER, {}, 3),
    (MODEL_STOCK, {}, 3),
    (MODEL_STOCK, {"filter_wise": True}, 3),
    (PASSTHROUGH, {"scale": 0.3}, 1),
    (PASSTHROUGH, {}, 1),
]
every_case = pytest.mark.parametrize(
    ("method", "parameters", "count"), CASES, ids=[f"{method.name}({','.join(given)})" for method, given, _ in CASES]
)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
quick = settings(max_examples=8, deadline=None)
seeds = st.integers(0, 10**6)
eighths = st.integers(0, 8).map(lambda number: number / 8)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def draw(seed: int, count: int, shape: tuple[int, ...] = (6, 7), dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def unit(tensor: Tensor) -> Tensor:
    return tensor / torch.linalg.vector_norm(tensor)


def angle(one: Tensor, other: Tensor) -> float:
    """By the chord, which is exact for small angles too."""
    return 2 * math.asin(float(torch.linalg.vector_norm(unit(one) - unit(other))) / 2)


def close(one: Tensor, other: Tensor, bound: float = 1e-12) -> bool:
    return bool(torch.linalg.vector_norm(one - other) <= bound * torch.linalg.vector_norm(other))


def weights_of(method: Method, count: int) -> Sequence[float]:
    return {"t": (0.7, 0.3), "weight": (0.5, 0.3, 0.4)[:count], "none": (1.0,) * count}[method.weighting]


def merge(
    method: Method, parameters: dict[str, Any], base: Tensor, models: Sequence[Tensor], *, step: int | None = None
) -> Tensor:
    """In spans of `step` elements, or whole."""
    full = method(**parameters).kernel_parameters(len(models))
    prepared = method.prepare(base, models, full, lambda _: torch.Generator())
    weights = weights_of(method, len(models))
    if step is None:
        return method.combine(base, prepared(WHOLE), weights, full)
    spans = [slice(start, min(start + step, base.numel())) for start in range(0, base.numel(), step)]
    return torch.cat([method.combine(base.view(-1)[span], prepared(span), weights, full) for span in spans])


@every_dtype
@every_case
def test_merging_gives_a_new_tensor_and_changes_no_argument(
    method: Method, parameters: dict[str, Any], count: int, dtype: torch.dtype
) -> None:
    base, *models = draw(1, count + 1, dtype=dtype)
    before = [tensor.clone() for tensor in (base, *models)]
    merged = merge(method, parameters, base, models)
    assert (merged.shape, merged.dtype) == (base.shape, dtype)
    merged.fill_(9)
    assert all(torch.equal(now, then) for now, then in zip((base, *models), before, strict=True))


@pytest.mark.parametrize("shape", [(6, 7), (11,), (3, 2, 5), ()], ids=str)
@pytest.mark.parametrize("step", [1, 5, 16])
@every_dtype
def test_spans_give_the_bits_of_the_whole(dtype: torch.dtype, step: int, shape: tuple[int, ...]) -> None:
    for method, parameters, count in CASES:
        if method.elementwise(method(**parameters).kernel_parameters(count)):
            base, *models = draw(2, count + 1, shape, dtype)
            whole = merge(method, parameters, base, models)
            assert whole.shape == base.shape
            assert torch.equal(merge(method, parameters, base, models, step=step), whole.view(-1)), method.name


def test_all_but_the_methods_that_need_several_passes_at_any_weight_run_in_spans() -> None:
    whole = [
        (method.name, *parameters)
        for method, parameters, count in CASES
        if not method.elementwise(method(**parameters).kernel_parameters(count))
    ]
    assert whole == [
        ("nuslerp", "nuslerp_flatten"),
        ("nuslerp", "nuslerp_flatten", "nuslerp_row_wise", "task_vectors"),
        ("multislerp",),
        ("multislerp", "task_vectors"),
        ("karcher",),
    ]


@every_dtype
@every_case
def test_a_tensors_alignment_in_memory_does_not_matter(
    method: Method, parameters: dict[str, Any], count: int, dtype: torch.dtype
) -> None:
    tensors = draw(3, count + 1, (41, 53), dtype)
    moved = []
    for offset, tensor in enumerate(tensors, start=1):
        view = torch.empty(tensor.numel() + offset, dtype=dtype)[offset:].view(tensor.shape)
        moved.append(view.copy_(tensor))
    expected = merge(method, parameters, tensors[0], tensors[1:])
    assert torch.equal(merge(method, parameters, moved[0], moved[1:]), expected)


@pytest.mark.parametrize(
    ("method", "accepted"),
    [
        (SLERP, {2}),
        (NUSLERP, {2}),
        (MULTISLERP, {1, 2, 3}),
        (KARCHER, {1, 2, 3}),
        (MODEL_STOCK, {2, 3}),
        (PASSTHROUGH, {1}),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_wrong_number_of_models_is_refused(method: Method, accepted: set[int]) -> None:
    for count in range(4):
        if count in accepted:
            method.check_models(count)
        else:
            with pytest.raises(ParameterError, match=f"merger '{method.name}' got {count} models"):
                method.check_models(count)


@every_dtype
@given(seeds, st.sampled_from([1.0, 0.02]))
@quick
def test_slerp_at_0_and_1_gives_the_ends(dtype: torch.dtype, seed: int, apart: float) -> None:
    first, noise = draw(seed, 2)
    second = (first + apart * noise).to(dtype)  # with 0.02 they are collinear to slerp
    first = first.to(dtype)
    assert torch.equal(slerp(first, second, 0.0), first)
    assert torch.equal(slerp(first, second, 1.0), second)


@given(seeds, eighths)
@quick
def test_slerp_stays_on_the_sphere_and_moves_at_constant_speed(seed: int, t: float) -> None:
    first, second = map(unit, draw(seed, 2))
    merged = slerp(first, second, t)
    assert float(torch.linalg.vector_norm(merged)) == pytest.approx(1, abs=1e-14)
    assert angle(first, merged) == pytest.approx(t * angle(first, second), abs=1e-13)


@every_dtype
@given(seeds, eighths)
@quick
def test_slerp_from_the_other_end_is_the_same(dtype: torch.dtype, seed: int, t: float) -> None:
    first, second = draw(seed, 2, dtype=dtype)
    assert torch.equal(slerp(first, second, t), slerp(second, first, 1 - t))


@pytest.mark.parametrize("factor", [1.0, 3.0, -1.0])
def test_slerp_of_parallel_and_antipodal_models_is_linear(factor: float) -> None:
    [first] = draw(4, 1)
    assert close(slerp(first, factor * first, 0.25), (0.75 + 0.25 * factor) * first)


def test_slerp_takes_a_zero_tensor_to_be_at_a_right_angle() -> None:
    [first] = draw(4, 1)
    assert close(slerp(first, torch.zeros_like(first), 1 / 3), math.cos(math.pi / 6) * first)


def test_slerp_reads_only_t_from_the_weights_and_the_first_model_is_the_primary() -> None:
    first, second, unused = draw(5, 3)
    assert torch.equal(merge(SLERP, {}, unused, [first, second]), slerp(first, second, 0.3))


@given(seeds, st.floats(0.1, 2), st.floats(0.1, 2))
@quick
def test_nuslerp_is_slerp_at_the_second_models_share_of_the_weights(seed: int, one: float, other: float) -> None:
    first, second = draw(seed, 2)
    assert close(nuslerp(first, second, (one, other)), slerp(first, second, other / (one + other)))


def test_nuslerp_weights_that_sum_to_0_count_as_equal() -> None:
    first, second = draw(6, 2)
    assert torch.equal(nuslerp(first, second, (0.4, -0.4)), nuslerp(first, second, (0.5, 0.5)))


@given(seeds)
@quick
def test_nuslerp_of_task_vectors_interpolates_around_the_base(seed: int) -> None:
    base, first, second = draw(seed, 3)
    expected = base + nuslerp(first - base, second - base, (0.7, 0.4))
    assert torch.equal(nuslerp(first, second, (0.7, 0.4), base=base), expected)
    assert not close(nuslerp(first, second, (0.7, 0.4)), expected, 1e-3)


@given(seeds)
@quick
def test_nuslerp_without_flatten_interpolates_each_row_and_row_wise_each_column(seed: int) -> None:
    first, second = draw(seed, 2)
    second[2] = first[2]  # one row is collinear
    second[:, 3] = first[:, 3]
    rows = torch.stack([nuslerp(a, b, (0.7, 0.4)) for a, b in zip(first, second, strict=True)])
    columns = torch.stack([nuslerp(a, b, (0.7, 0.4)) for a, b in zip(first.T, second.T, strict=True)]).T
    assert close(nuslerp(first, second, (0.7, 0.4), nuslerp_flatten=False), rows)
    assert close(nuslerp(first, second, (0.7, 0.4), nuslerp_flatten=False, nuslerp_row_wise=True), columns)


@given(seeds, st.integers(1, 4))
@quick
def test_multislerp_of_copies_is_the_model(seed: int, count: int) -> None:
    base, model = draw(seed, 2)
    weights = [0.5, 0.3, 0.9, 0.1][:count]
    assert close(multislerp([model] * count, weights), model, 1e-7)  # eps is added to every length
    assert close(multislerp([model] * count, weights, base=base), model, 1e-7)


@given(seeds)
@quick
def test_multislerp_of_two_equally_weighted_models_is_their_midpoint(seed: int) -> None:
    first, second = map(unit, draw(seed, 2))
    assert close(multislerp([first, second], (2, 2), eps=0.0), slerp(first, second, 0.5))


@given(seeds)
@quick
def test_multislerp_has_the_weighted_mean_length_and_does_not_depend_on_the_order(seed: int) -> None:
    models, weights = draw(seed, 3), (0.2, 0.3, 0.5)
    merged = multislerp(models, weights, eps=0.0)
    lengths = [float(torch.linalg.vector_norm(model)) for model in models]
    mean = sum(weight * length for weight, length in zip(weights, lengths, strict=True))
    assert float(torch.linalg.vector_norm(merged)) == pytest.approx(mean, rel=1e-12)
    assert close(multislerp(models[::-1], weights[::-1], eps=0.0), merged)
    doubled = [2 * weight for weight in weights]
    assert close(multislerp(models, doubled, eps=0.0), merged)
    assert not close(multislerp(models, doubled, normalize_weights=False, eps=0.0), merged, 1e-3)


@every_dtype
def test_multislerp_keeps_a_tensor_that_no_model_has_changed(dtype: torch.dtype) -> None:
    [base] = draw(7, 1, dtype=dtype)
    for count in (2, 3, 5):
        assert torch.equal(multislerp([base] * count, [1.0] * count, base=base), base)


@every_dtype
def test_multislerp_of_directions_that_cancel_out_is_linear(dtype: torch.dtype) -> None:
    first = torch.tensor([4.0, 0.0, 0.0], dtype=dtype)
    merged = multislerp([first, -first, 2 * first, -2 * first], [1.0, 1.0, 0.5, 0.5])
    assert torch.equal(merged, torch.zeros(3, dtype=dtype))
    merged = multislerp([first, -2 * first], [0.5, 0.5])
    assert torch.equal(merged, -first / 2)


@every_dtype
def test_multislerp_takes_a_model_of_0_to_have_no_direction(dtype: torch.dtype) -> None:
    first = torch.tensor([3.0, 0.0, 4.0], dtype=dtype)
    merged = multislerp([first, 0 * first], [0.5, 0.5])
    assert close(merged, first / 2, 4 * torch.finfo(dtype).eps + 1e-7)


def test_multislerp_refuses_to_normalise_weights_that_sum_to_0() -> None:
    with pytest.raises(ParameterError, match="sum to 0"):
        multislerp(draw(8, 2), (0.5, -0.5))


@given(seeds, st.integers(1, 4))
@quick
def test_karcher_of_copies_is_the_model(seed: int, count: int) -> None:
    [model] = draw(seed, 1)
    assert close(karcher([model] * count), model)


@given(seeds)
@quick
def test_karcher_of_two_models_is_their_midpoint_at_the_mean_length(seed: int) -> None:
    first, second = draw(seed, 2)
    length = float(torch.linalg.vector_norm(first) + torch.linalg.vector_norm(second)) / 2
    assert close(karcher([first, second]), length * slerp(unit(first), unit(second), 0.5), 1e-5)


@given(seeds, st.integers(3, 5))
@quick
def test_karchers_mean_is_where_the_geodesics_to_the_models_balance(seed: int, count: int) -> None:
    models = draw(seed, count)
    mean = unit(karcher(models, max_iter=200, tol=1e-10))
    pull = torch.zeros_like(mean)
    for model in models:
        across = unit(model) - (unit(model) * mean).sum() * mean
        pull += angle(mean, model) * unit(across)
    assert float(torch.linalg.vector_norm(pull)) < 1e-8
    assert close(unit(karcher(models[::-1], max_iter=200, tol=1e-10)), mean, 1e-8)


def test_karchers_iterations_are_bounded_by_max_iter_and_ended_by_tol() -> None:
    models = draw(9, 3)
    start = unit(sum((unit(model) for model in models), torch.zeros_like(models[0])))
    assert close(unit(karcher(models, max_iter=0)), start)
    assert close(unit(karcher(models, tol=0.5)), start)
    assert not close(unit(karcher(models, max_iter=1)), start, 1e-6)


@every_dtype
def test_karcher_of_zeros_is_zero_and_a_zero_model_counts_in_the_length_only(dtype: torch.dtype) -> None:
    [model] = draw(10, 1, dtype=dtype)
    zero = torch.zeros_like(model)
    assert torch.equal(karcher([zero, zero]), zero)
    assert close(karcher([model, zero]), model / 2, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("cosine", [0.0, 0.3, 0.9, 1.0])
def test_model_stocks_ratio_is_the_papers_for_models_at_equal_angles(count: int, cosine: float) -> None:
    [base] = draw(11, 1, (count + 1,))
    axes = torch.eye(count + 1, dtype=torch.float64)
    offsets = [math.sqrt(cosine) * axes[0] + math.sqrt(1 - cosine) * axis for axis in axes[1:]]
    models = [base + length * offset for length, offset in enumerate(offsets, start=1)]  # lengths do not matter
    ratio = count * cosine / (1 + (count - 1) * cosine)
    assert float(interpolation_ratio(base, models)) == pytest.approx(ratio, abs=1e-12)
    average = sum(models, torch.zeros_like(base)) / count
    assert close(model_stock(base, models), ratio * average + (1 - ratio) * base)


@given(seeds)
@quick
def test_model_stock_by_filter_merges_each_row_by_itself(seed: int) -> None:
    base, *models = draw(seed, 4)
    rows = [model_stock(row, rows_) for row, *rows_ in zip(base, *models, strict=True)]
    assert close(model_stock(base, models, filter_wise=True), torch.stack(rows))


@every_dtype
@pytest.mark.parametrize("filter_wise", [False, True])
def test_model_stock_keeps_the_base_where_the_models_oppose_each_other_or_have_not_changed(
    filter_wise: bool, dtype: torch.dtype
) -> None:
    base = torch.arange(16, dtype=dtype).view(4, 4)  # norms of shifts are powers of 2, exact in every dtype
    for shift in (0, 0.5):
        assert torch.equal(model_stock(base, [base + shift, base - shift], filter_wise=filter_wise), base)


def test_model_stock_in_float16_stays_finite_where_its_products_overflow() -> None:
    base = torch.zeros(64, dtype=torch.float16)
    models = [base + 200, base + 201]  # norms 1600 and 1608: their product and the dot product exceed 65504
    assert torch.equal(model_stock(base, models), base)


@every_dtype
def test_passthrough_gives_the_models_bits_or_scales_them(dtype: torch.dtype) -> None:
    [model] = draw(12, 1, dtype=dtype)
    assert torch.equal(passthrough(model), model)
    assert torch.equal(passthrough(model, scale=0.0), torch.zeros_like(model))
    assert close(passthrough(model, scale=0.3), 0.3 * model.double(), torch.finfo(dtype).eps)

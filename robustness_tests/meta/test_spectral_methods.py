"""TSV-Merge and Iso-C: compared with references written here from the papers' equations, step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeguard.mergers.contract import WHOLE
from mergeguard.mergers.iso import ISO_C
from mergeguard.mergers.spectral import isometry, singular_parts
from mergeguard.mergers.tsv import TSV_MERGE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mergeguard.mergers.contract import Merger

    Tensors = list[torch.Tensor]

WEIGHTS = [0.75, 0.5]

quick = settings(max_examples=20, deadline=None)


def no_generator(_index: int) -> torch.Generator:
    raise AssertionError("neither of these methods draws")


def merge(
    merger: Merger, base: torch.Tensor, models: Sequence[torch.Tensor], weights: Sequence[float] = WEIGHTS
) -> torch.Tensor:
    parameters = merger.kernel_parameters(len(models))
    parts = merger.method.prepare(base, models, parameters, no_generator)(WHOLE)
    return merger.method.combine(base, parts, weights, parameters)


def normal(count: int, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def thin_svd(matrix: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(torch.linalg.svd(matrix.double(), full_matrices=False))


def tsv_reference(base: torch.Tensor, models: Tensors, weights: Sequence[float], scale: float) -> torch.Tensor:
    """arXiv:2412.00081, TSV-Merge: truncate, concatenate, whiten by Procrustes, multiply out."""
    rank = min(base.shape) // len(models)
    columns, values, rows = [], [], []
    for model, weight in zip(models, weights, strict=True):
        u, s, vt = thin_svd(model - base)
        for index in range(rank):
            columns.append(u[:, index])
            values.append(weight * s[index])
            rows.append(vt[index])
    p, _, qt = thin_svd(torch.stack(columns, dim=1))
    x, _, yt = thin_svd(torch.stack(rows))
    return base + scale * (p @ qt) @ torch.diag(torch.stack(values)) @ (x @ yt)


@pytest.mark.parametrize("shape", [(9, 9), (14, 8), (7, 15)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-5)], ids=str)
def test_tsv_merge_is_the_papers(count: int, shape: tuple[int, int], dtype: torch.dtype, tolerance: float) -> None:
    base, *models = normal(count + 1, *shape, seed=count, dtype=dtype)
    weights = [1.0, -0.5, 2.0][:count]
    expected = tsv_reference(base.double(), [model.double() for model in models], weights, 0.75)
    merged = merge(TSV_MERGE(**{"lambda": 0.75}), base, models, weights).double()
    assert (merged - expected).abs().max() <= tolerance * expected.abs().max()


@given(st.integers(0, 20))
@quick
def test_tsv_merge_of_one_model_is_task_arithmetic(seed: int) -> None:
    base, model = normal(2, 6, 9, seed=seed)
    merged = merge(TSV_MERGE(), base, [model], [0.3])
    torch.testing.assert_close(merged, base + 0.3 * (model - base), rtol=0, atol=1e-13)


def test_tsv_merge_adds_task_vectors_whose_singular_vectors_are_orthogonal() -> None:
    base = normal(1, 6, 6)[0]
    one, other = torch.zeros(6, 6, dtype=torch.float64), torch.zeros(6, 6, dtype=torch.float64)
    one[:3, :3], other[3:, 3:] = normal(2, 3, 3)
    merged = merge(TSV_MERGE(), base, [base + one, base + other], WEIGHTS)
    torch.testing.assert_close(merged, base + 0.75 * one + 0.5 * other, rtol=0, atol=1e-13)


def test_tsv_merge_of_equal_models_is_their_truncated_task_vector() -> None:
    """The whitening leaves half of the directions free; they stay 0 instead of being the library's choice."""
    base, step = normal(2, 8, 6)
    u, s, vt = thin_svd(step)
    merged = merge(TSV_MERGE(), base, [base + step, base + step], [1, 1])
    torch.testing.assert_close(merged, base + (u[:, :3] * s[:3]) @ vt[:3], rtol=0, atol=1e-12)


def test_an_untouched_model_takes_no_part_in_the_whitening() -> None:
    base, step = normal(2, 8, 6)
    u, s, vt = thin_svd(step)
    merged = merge(TSV_MERGE(), base, [base + step, base], [1, 1])
    torch.testing.assert_close(merged, base + (u[:, :3] * s[:3]) @ vt[:3], rtol=0, atol=1e-12)


@pytest.mark.parametrize("merger", [TSV_MERGE(), ISO_C()], ids=str)
@given(st.integers(0, 20))
@quick
def test_the_order_of_the_models_does_not_matter(merger: Merger, seed: int) -> None:
    base, one, two = normal(3, 7, 10, seed=seed)
    there, back = merge(merger, base, [one, two], [1, 0.5]), merge(merger, base, [two, one], [0.5, 1])
    torch.testing.assert_close(there, back, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(7,), (), (2, 3, 4), (1, 8)], ids=str)
@pytest.mark.parametrize("merger", [TSV_MERGE(**{"lambda": 2.0}), ISO_C(**{"lambda": 2.0})], ids=str)
def test_what_is_no_matrix_is_averaged(merger: Merger, shape: tuple[int, ...]) -> None:
    base, one, two = normal(3, *shape)
    if shape == (1, 8) and merger.name == "iso_c":
        expected = base + 2 * ((one - base) + 0.5 * (two - base))  # a matrix of rank 1 has a flat spectrum
    else:
        expected = base + 2 * ((one - base) + 0.5 * (two - base)) / 2
    torch.testing.assert_close(merge(merger, base, [one, two], [1, 0.5]), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", [(9, 9), (14, 8), (7, 15)], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-5)], ids=str)
def test_iso_c_is_the_papers(shape: tuple[int, int], dtype: torch.dtype, tolerance: float) -> None:
    """arXiv:2502.04959: sum, decompose, replace every singular value by their mean, multiply out."""
    base, one, two = normal(3, *shape, dtype=dtype)
    u, s, vt = thin_svd(0.75 * (one.double() - base.double()) + 0.5 * (two.double() - base.double()))
    expected = base.double() + 1.5 * u @ torch.diag(torch.full_like(s, float(s.sum()) / len(s))) @ vt
    merged = merge(ISO_C(**{"lambda": 1.5}), base, [one, two]).double()
    assert (merged - expected).abs().max() <= tolerance * expected.abs().max()


@given(st.integers(0, 20))
@quick
def test_iso_c_flattens_the_spectrum_and_keeps_its_sum(seed: int) -> None:
    base, one, two = normal(3, 6, 9, seed=seed)
    before = torch.linalg.svdvals(0.75 * (one - base) + 0.5 * (two - base))
    after = torch.linalg.svdvals(merge(ISO_C(), base, [one, two]) - base)
    torch.testing.assert_close(after, before.mean().expand(6), rtol=1e-12, atol=0)


def test_iso_c_leaves_directions_that_no_model_touched() -> None:
    left, right = normal(2, 8, 2)
    base = normal(1, 8, 8, seed=1)[0]
    change = left @ right.T
    spectrum = torch.linalg.svdvals(merge(ISO_C(), base, [base + change], [1.0]) - base)
    mean = torch.linalg.svdvals(change).sum() / 8
    torch.testing.assert_close(spectrum, torch.cat([mean.expand(2), torch.zeros(6)]), rtol=0, atol=1e-12)


@given(st.integers(0, 20))
@quick
def test_the_isometry_is_the_nearest_matrix_with_orthonormal_columns(seed: int) -> None:
    [matrix] = normal(1, 7, 4, seed=seed)
    nearest = isometry(matrix)
    torch.testing.assert_close(nearest.T @ nearest, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-13)
    stretch = nearest.T @ matrix  # the polar decomposition's other factor: symmetric, positive
    torch.testing.assert_close(stretch, stretch.T, rtol=0, atol=1e-12)
    assert torch.linalg.eigvalsh(stretch).min() > 0


@pytest.mark.parametrize("shape", [(5, 5), (64, 20), (16, 300)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_singular_values_of_zero_are_recognised(shape: tuple[int, int], dtype: torch.dtype) -> None:
    [left], [right] = normal(1, shape[0], 3), normal(1, 3, shape[1], seed=1)
    u, s, vt = singular_parts((left @ right).to(dtype))
    assert int(torch.count_nonzero(s)) == 3
    assert not u[:, 3:].any()
    assert not vt[3:].any()

"""The arithmetic of trimming, dropping and electing, against definitions written out element by element."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeguard.errors import ParameterError
from mergeguard.mergers import merge_models, parse_merger, sparsify
from mergeguard.mergers.contract import WHOLE, part
from mergeguard.mergers.linear import linear
from mergeguard.mergers.sparsify import dropout_mask, seeded_generator
from mergeguard.mergers.task_arithmetic import task_arithmetic
from mergeguard.mergers.ties import ties

quick = settings(max_examples=40, deadline=None)
numbers = st.integers(-16, 16).map(lambda n: n / 8)


def trim(delta: torch.Tensor, density: float, **options: str) -> torch.Tensor:
    return sparsify.trim(lambda span: part(delta, span), delta, density, **options)(WHOLE)


def drop(delta: torch.Tensor, density: float, generator: torch.Generator, **options: str) -> torch.Tensor:
    return sparsify.drop(lambda span: part(delta, span), delta, density, generator, **options)(WHOLE)


def vectors(count: int, size: int = 9) -> st.SearchStrategy[list[list[float]]]:
    return st.lists(st.lists(numbers, min_size=size, max_size=size), min_size=count, max_size=count)


def kept_by_definition(delta: list[float], density: float) -> list[float]:
    ranked = sorted(range(len(delta)), key=lambda i: (-abs(delta[i]), i))
    kept = set(ranked[: max(1, int(density * len(delta)))])
    return [value if i in kept else 0.0 for i, value in enumerate(delta)]


def ties_by_definition(
    base: list[float], models: list[list[float]], weights: list[float], density: float, *, paper: bool
) -> list[float]:
    """Algorithm 1 of arXiv:2306.01708 with its released code's rule for a sum of 0 (`paper`), or mergekit's rules."""
    deltas = [kept_by_definition([m - b for m, b in zip(model, base, strict=True)], density) for model in models]
    weighted = [[w * value for value in delta] for w, delta in zip(weights, deltas, strict=True)]
    sums = [sum(column) for column in zip(*weighted, strict=True)]
    signs = [(total > 0) - (total < 0) for total in sums]
    majority = 1 if not paper or sum(signs) >= 0 else -1
    merged = []
    for i, start in enumerate(base):
        sign = signs[i] or majority
        agreeing = [k for k in range(len(models)) if weighted[k][i] * sign > 0]
        divisor = len(agreeing) if paper else sum(weights[k] for k in agreeing)
        merged.append(start + sum(weighted[k][i] for k in agreeing) / (divisor or 1))
    return merged


@given(st.lists(numbers, min_size=1, max_size=40), st.floats(0.01, 1))
@quick
def test_trim_keeps_the_largest_and_among_equals_the_first(delta: list[float], density: float) -> None:
    assert trim(torch.tensor(delta), density).tolist() == kept_by_definition(delta, density)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_trim_keeps_the_same_entries_in_every_dtype(dtype: torch.dtype) -> None:
    delta = torch.tensor([[0.5, -2.0, 0.25], [2.0, 1.0, -0.5]], dtype=dtype)
    assert trim(delta, 0.5).tolist() == [[0, -2, 0], [2, 1, 0]]
    assert trim(delta, 0.01).tolist() == [[0, -2, 0], [0, 0, 0]]
    assert trim(delta, 1).tolist() == delta.tolist()


@given(vectors(4), st.sampled_from([0.2, 0.5, 1.0]))
@quick
def test_ties_with_the_papers_parameters_is_its_algorithm(values: list[list[float]], density: float) -> None:
    base, *models = values
    merger = parse_merger(f"ties(density={density},divisor=models,scope=model,zero_sign=majority)")
    states = [{"y": torch.tensor(v[5:]).double(), "x": torch.tensor(v[:5]).double()} for v in values]
    merged = merge_models(merger, states[0], states[1:], [1.0, 1.0, 1.0], seed=0)
    expected = ties_by_definition(base, models, [1.0, 1.0, 1.0], density, paper=True)
    assert [*merged["x"].tolist(), *merged["y"].tolist()] == expected


@given(vectors(4), st.sampled_from([0.2, 0.5, 1.0]), st.sampled_from([[0.25, 0.5, 0.25], [1.0, -0.5, 0.25]]))
@quick
def test_ties_by_default_follows_mergekits_rules(
    values: list[list[float]], density: float, weights: list[float]
) -> None:
    base, *models = values
    states = [{"x": torch.tensor(v).double()} for v in values]
    merged = merge_models(parse_merger(f"ties(density={density})"), states[0], states[1:], weights, seed=0)
    assert merged["x"].tolist() == ties_by_definition(base, models, weights, density, paper=False)


def test_a_sum_of_zero_elects_plus_or_the_commoner_sign() -> None:
    base, deltas = torch.zeros(4), [torch.tensor([1.0, -1, -1, 0]), torch.tensor([-1.0, -2, -3, 0])]
    assert ties(base, deltas, [1, 1]).tolist() == [1, -1.5, -2, 0]
    assert ties(base, deltas, [1, 1], zero_sign="majority").tolist() == [-1, -1.5, -2, 0]
    balanced = [torch.tensor([1.0, -1, 1, 0]), torch.tensor([-1.0, -2, 3, 0])]
    assert ties(base, balanced, [1, 1], zero_sign="majority").tolist() == [1, -1.5, 2, 0]


def test_a_model_that_agrees_alone_enters_at_full_strength_only_when_normalised_by_weights() -> None:
    """Why evidence can survive TIES at any coefficient: its weight cancels where no other model kept an entry."""
    base, deltas = torch.zeros(2), [torch.tensor([8.0, 8.0]), torch.tensor([0.0, 4.0])]
    assert ties(base, deltas, [0.25, 0.75]).tolist() == [8, 5]
    assert ties(base, deltas, [0.25, 0.75], divisor="models").tolist() == [2, 2.5]
    assert ties(base, deltas, [0.25, 0.75], normalize=False).tolist() == [2, 5]
    assert ties(base, deltas, [0.25, 0.75], scale=0.5).tolist() == [4, 2.5]


def test_scope_decides_whether_a_small_tensor_keeps_anything() -> None:
    base = {"big": torch.zeros(4), "small": torch.zeros(4)}
    model = {"big": torch.tensor([8.0, 7, 6, 5]), "small": torch.tensor([4.0, 3, 2, 1])}
    for scope, expected in (("tensor", [4, 3, 0, 0]), ("model", [0, 0, 0, 0])):
        merger = parse_merger(f"ties(density=0.5,scope={scope})")
        assert merge_models(merger, base, [model], [1], seed=0)["small"].tolist() == expected


def test_linear_and_task_arithmetic_are_their_formulas() -> None:
    models = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, -4.0])]
    assert linear(models, [0.5, 1.5]).tolist() == [2.5, -2.5]
    assert linear(models, [0.5, 1.5], normalize=False).tolist() == [5, -5]
    base = torch.tensor([10.0, 20.0])
    assert task_arithmetic(base, models, [0.5, 1.5], scale=2).tolist() == [20, 10]
    assert task_arithmetic(base, models, [0.5, 1.5], scale=2, normalize=True).tolist() == [15, 15]


def test_half_precision_sums_are_rounded_once() -> None:
    """256 + 1 + 1 in bfloat16, whose step there is 2: rounding after each addition would stay at 256."""
    tensors = [torch.tensor([value], dtype=torch.bfloat16) for value in (256.0, 1.0, 1.0)]
    assert linear(tensors, [1, 1, 1], normalize=False).item() == 258
    assert task_arithmetic(torch.zeros_like(tensors[0]), tensors, [1, 1, 1]).item() == 258


@pytest.mark.parametrize("normalise", [linear, lambda m, w: task_arithmetic(m[0], m, w, normalize=True), None])
def test_weights_that_sum_to_zero_cannot_be_normalised(normalise: object) -> None:
    models, weights = [torch.ones(2), torch.ones(2)], [0.1 + 0.2, -0.3]
    assert sum(weights) != 0
    with pytest.raises(ParameterError, match="sum to 0, so they cannot be normalised; set normalize=false"):
        normalise(models, weights) if callable(normalise) else ties(models[0], models, weights)


# --- dropping -------------------------------------------------------------------------------------------------------


def generator(tensor: str = "w", model: str = "0", seed: int = 0) -> torch.Generator:
    return seeded_generator(seed, tensor, model)


def test_masks_are_those_recorded() -> None:
    """Pinned: results of earlier runs and other machines depend on these draws."""
    assert dropout_mask(torch.Size([12]), 0.5, generator()).int().tolist() == [1, 1, 0, 0, 1, 1, 0, 0, 1, 0, 0, 0]


def test_masks_differ_between_seeds_tensors_and_models_and_are_nested_in_density() -> None:
    shape = torch.Size([1000])
    masks = [
        dropout_mask(shape, 0.5, g) for g in (generator(), generator("v"), generator(model="1"), generator(seed=1))
    ]
    for index, mask in enumerate(masks):
        for other in masks[:index]:
            assert 420 < int((mask == other).sum()) < 580  # five standard deviations of a fair coin
    sparse, dense = dropout_mask(shape, 0.2, generator()), dropout_mask(shape, 0.6, generator())
    assert bool((sparse <= dense).all())


@pytest.mark.parametrize("density", [0.1, 0.4, 0.9])
def test_the_share_kept_is_the_density(density: float) -> None:
    kept = int(dropout_mask(torch.Size([200, 500]), density, generator()).sum())
    assert abs(kept - 100_000 * density) < 5 * math.sqrt(100_000 * density * (1 - density))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dropping_rescales_by_the_rule_asked_for(dtype: torch.dtype) -> None:
    delta = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    kept = dropout_mask(delta.shape, 0.4, generator())
    plain = drop(delta, 0.4, generator(), rescale="none")
    assert torch.equal(plain, torch.where(kept, delta, 0))
    wide = delta if dtype in (torch.float64, torch.bfloat16) else delta.float()
    assert torch.equal(drop(delta, 0.4, generator(), rescale="inverse"), (torch.where(kept, wide, 0) / 0.4).to(dtype))
    matched = drop(delta, 0.4, generator(), rescale="l1")
    assert torch.equal(matched != 0, plain != 0)
    # In 16 bits the norms, their ratio and the products are each rounded: three times 2**-9 in bfloat16, and the mean.
    precision = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, 7e-3)
    norms = [t.double().abs().sum().item() for t in (delta, matched)]
    assert norms[1] == pytest.approx(norms[0], rel=precision)


def test_an_unchanged_or_wholly_dropped_tensor_is_left_at_zero() -> None:
    assert not drop(torch.zeros(8), 0.5, generator()).any()
    lonely = next(g for g in map(str, range(99)) if not dropout_mask(torch.Size([1]), 0.1, generator(g)).any())
    assert drop(torch.ones(1), 0.1, generator(lonely)).tolist() == [0]


def test_a_large_float16_norm_does_not_overflow() -> None:
    delta = torch.full((40_000,), 4.0, dtype=torch.float16)  # L1 norm 160,000, above float16's 65,504
    matched = trim(delta, 0.5, rescale="l1")
    assert matched[0].item() == 8
    assert matched[-1].item() == 0


@given(st.integers(1, 70), st.integers(0, 70), st.integers(0, 70), st.integers(1, 9))
@quick
def test_a_mask_held_as_bits_is_the_mask_in_any_span(size: int, start: int, stop: int, step: int) -> None:
    mask = dropout_mask(torch.Size([size]), 0.5, generator())
    factors = sparsify.zeros_and_ones(mask, torch.device("cpu"))
    assert factors(WHOLE).tolist() == mask.int().tolist()
    span = slice(min(start, size), min(max(start, stop), size), step)
    assert factors(span).tolist() == mask[span].int().tolist()

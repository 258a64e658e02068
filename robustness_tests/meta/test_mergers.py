"""What every merge method promises, on models whose numbers are small multiples of 1/8.

Sums and products of such numbers with the weights used here are exact in float32, so the properties hold bit for bit
and are compared with `torch.equal`. Where a property holds for any floats, normal ones are drawn instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeguard.mergers import DEFAULT_MERGERS, Merger, coefficient_weights, merge_models, parse_merger, prepare_sweep

if TYPE_CHECKING:
    from collections.abc import Sequence

State = dict[str, torch.Tensor]
SPECS = (
    *DEFAULT_MERGERS,
    "linear(normalize=false)",
    "task_arithmetic(normalize=true)",
    "ties(density=0.5,normalize=false,rescale=l1)",
    "ties(density=0.5,divisor=models,scope=model,zero_sign=majority)",
    "dare_linear(density=0.5,rescale=inverse)",
    "dare_ties(density=0.5,rescale=none,scope=model,trim=0.5)",
)
EXACT = tuple(spec for spec in SPECS if "l1" not in spec and (not spec.startswith("dare") or "rescale" in spec))
RANDOM = tuple(spec for spec in SPECS if spec.startswith("dare"))
SHAPES = {"b.weight": (4, 5), "a.bias": (7,), "c": ()}

quick = settings(max_examples=5, deadline=None)


def each(specs: Sequence[str]) -> pytest.MarkDecorator:
    """Parametrizes `merger`: sampling the mergers inside a property would leave some of them out of a short run."""
    return pytest.mark.parametrize("merger", [parse_merger(text) for text in specs], ids=str)


every_merger, exact_merger = each(SPECS), each(EXACT)
seeds = st.integers(-(2**40), 2**40)


def eighths(count: int) -> st.SearchStrategy[list[State]]:
    """`count` models of multiples of 1/8 between -2 and 2, with many zeros and ties."""
    sizes = [int(torch.Size(shape).numel()) for shape in SHAPES.values()]
    vector = st.lists(st.integers(-16, 16), min_size=sum(sizes), max_size=sum(sizes))

    def state(numbers: list[int]) -> State:
        parts = torch.split(torch.tensor(numbers, dtype=torch.float32) / 8, sizes)
        return {name: part.reshape(shape) for (name, shape), part in zip(SHAPES.items(), parts, strict=True)}

    return st.lists(vector.map(state), min_size=count, max_size=count)


def normal_models(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[State]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
        for _ in range(count)
    ]


def equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def merge(merger: Merger | str, base: State, models: Sequence[State], weights: Sequence[float], seed: int = 0) -> State:
    return merge_models(parse_merger(merger) if isinstance(merger, str) else merger, base, models, weights, seed=seed)


@exact_merger
@given(eighths(1), st.integers(1, 4), seeds)
@quick
def test_identity_merging_copies_of_the_base_gives_the_base(
    merger: Merger, states: list[State], count: int, seed: int
) -> None:
    [base] = states
    weights = [0.5**index for index in range(1, count)] + [0.5 ** (count - 1)]
    assert equal(merge(merger, base, [base] * count, weights, seed), base)


@pytest.mark.parametrize("spec", ["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties"])
@given(eighths(3))
@quick
def test_undamped_alpha_one_gives_the_protected_model_and_alpha_zero_the_donor(spec: str, states: list[State]) -> None:
    base, protected, donor = states
    assert equal(merge(spec, base, [protected, donor], coefficient_weights(1, 1)), protected)
    assert equal(merge(spec, base, [protected, donor], coefficient_weights(0, 1)), donor)


@every_merger
@given(st.integers(0, 99), seeds)
@quick
def test_a_model_of_weight_zero_does_not_matter(merger: Merger, draw: int, seed: int) -> None:
    base, protected, donor, another = normal_models(4, draw)
    for weights in ([1, 0], [1, -0.0]):
        one = merge(merger, base, [protected, donor], weights, seed)
        assert equal(one, merge(merger, base, [protected, another], weights, seed))


@each([spec for spec in SPECS if not spec.startswith("linear")])
@given(st.integers(0, 99), st.floats(0.01, 1), seeds)
@quick
def test_exchanging_two_models_with_their_weights_and_ids_changes_nothing(
    merger: Merger, draw: int, weight: float, seed: int
) -> None:
    """For any floats; `linear` adds with a fused multiply-add, so only for exact ones, in the test below."""
    base, one, other = normal_models(3, draw)
    there = merge_models(merger, base, [one, other], [weight, 0.3], seed=seed, model_ids=["x", "y"])
    back = merge_models(merger, base, [other, one], [0.3, weight], seed=seed, model_ids=["y", "x"])
    assert equal(there, back)


@exact_merger
@given(eighths(4), st.permutations(range(3)), seeds)
@quick
def test_donors_are_interchangeable(merger: Merger, states: list[State], order: list[int], seed: int) -> None:
    base, protected, *_ = states
    donors = [states[2], states[3], base]
    weights = [0.25, 0.25, 0.25, 0.25]
    there = merge_models(merger, base, [protected, *donors], weights, seed=seed, model_ids=["p", "0", "1", "2"])
    back = merge_models(
        merger,
        base,
        [protected, *(donors[i] for i in order)],
        weights,
        seed=seed,
        model_ids=["p", *(str(i) for i in order)],
    )
    assert equal(there, back)


@pytest.mark.parametrize(
    ("damped", "undamped"),
    [
        ("ties(density=1)", "dare_ties(density=1,normalize=true)"),
        ("dare_linear(density=1)", "task_arithmetic"),
        ("dare_linear(density=1,rescale=inverse)", "task_arithmetic"),
        ("dare_ties(density=1,normalize=true,trim=0.3)", "ties(density=0.3)"),
        ("dare_ties(density=0.5)", "dare_ties(density=0.5,trim=1)"),
    ],
)
def test_density_one_drops_nothing_and_rescales_nothing(damped: str, undamped: str) -> None:
    base, *models = normal_models(4)
    assert equal(merge(damped, base, models, [0.5, 0.3, 0.4]), merge(undamped, base, models, [0.5, 0.3, 0.4]))


@each([spec for spec in SPECS if not spec.startswith("linear")])
@given(st.integers(0, 99), seeds)
@quick
def test_lambda_scales_the_merged_task_vector(merger: Merger, draw: int, seed: int) -> None:
    models = normal_models(2, draw)
    base = {name: torch.zeros_like(tensor) for name, tensor in models[0].items()}
    none, once, twice = (
        merge(merger.method(**{**dict(merger.given), "lambda": scale}), base, models, [0.3, 0.7], seed)
        for scale in (0.0, 1.0, 2.0)
    )
    assert equal(none, base)
    assert not equal(once, base)
    assert equal(twice, {name: 2 * tensor for name, tensor in once.items()})


@every_merger
@given(st.integers(0, 99), seeds, st.sampled_from([0.25, 8.0]))
@quick
def test_scaling_all_models_scales_the_merged_one(merger: Merger, draw: int, seed: int, factor: float) -> None:
    states = normal_models(3, draw)
    scaled = [{name: factor * tensor for name, tensor in state.items()} for state in states]
    merged = merge(merger, states[0], states[1:], [0.3, 0.7], seed)
    expected = {name: factor * tensor for name, tensor in merged.items()}
    assert equal(merge(merger, scaled[0], scaled[1:], [0.3, 0.7], seed), expected)


@pytest.mark.parametrize(
    "spec", ["linear", "task_arithmetic(normalize=true)", "ties(density=0.5)", "dare_ties(density=0.5,normalize=true)"]
)
def test_normalised_weights_matter_only_by_their_ratio(spec: str) -> None:
    base, *models = normal_models(3)
    assert equal(merge(spec, base, models, [0.3, 0.7]), merge(spec, base, models, [1.2, 2.8]))


@every_merger
@given(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]), seeds)
@quick
def test_dtypes_shapes_and_order_are_kept(merger: Merger, dtype: torch.dtype, seed: int) -> None:
    base, *models = normal_models(3, dtype=dtype)
    merged = merge(merger, base, models, [0.3, 0.7], seed)
    assert [(name, t.shape, t.dtype) for name, t in merged.items()] == [
        (name, t.shape, dtype) for name, t in base.items()
    ]


@every_merger
@given(seeds, st.integers(1, 3))
@quick
def test_inputs_are_neither_changed_nor_shared_with_the_output(merger: Merger, seed: int, count: int) -> None:
    states = normal_models(count + 1)
    for state in states:
        state["steps"] = torch.tensor([3, 4])
        state["a.bias"].requires_grad_()
    copies = [{name: tensor.detach().clone() for name, tensor in state.items()} for state in states]
    merged = merge(merger, states[0], states[1:], [1 / count] * count, seed)
    assert len({tensor.untyped_storage().data_ptr() for tensor in merged.values()}) == len(merged)
    for tensor in merged.values():
        assert not tensor.requires_grad
        tensor.fill_(9)
    assert all(equal(state, copy) for state, copy in zip(states, copies, strict=True))


@every_merger
@given(seeds)
@quick
def test_the_order_of_tensors_does_not_matter(merger: Merger, seed: int) -> None:
    states = normal_models(3)
    turned = [dict(reversed(state.items())) for state in states]
    merged = merge(merger, states[0], states[1:], [0.3, 0.7], seed)
    assert equal(merged, merge(merger, turned[0], turned[1:], [0.3, 0.7], seed))
    if not merger.merges_whole_model:
        for name in merged:
            base, *models = [{name: state[name]} for state in states]
            assert equal(merge(merger, base, models, [0.3, 0.7], seed), {name: merged[name]})


@pytest.mark.parametrize("spec", RANDOM)
def test_the_seed_alone_decides_what_is_dropped(spec: str) -> None:
    base, *models = normal_models(3)
    torch.manual_seed(1)
    merged = merge(spec, base, models, [0.3, 0.7], seed=1)
    torch.manual_seed(2)
    assert equal(merged, merge(spec, base, models, [0.3, 0.7], seed=1))
    assert not equal(merged, merge(spec, base, models, [0.3, 0.7], seed=2))
    assert not equal(merged, merge_models(parse_merger(spec), base, models, [0.3, 0.7], seed=1, model_ids=["a", "b"]))


@pytest.mark.parametrize("spec", ["linear", "ties(density=0.5,rescale=l1)", "dare_linear(density=0.4)"])
def test_the_number_of_threads_does_not_matter(spec: str) -> None:
    """With 100,003 elements torch splits its work, and its own sum over them differs between 1 and 2 threads."""
    generator = torch.Generator().manual_seed(3)
    states = [{"w": torch.randn(100_003, generator=generator)} for _ in range(6)]
    threads, merged = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            merged.append(merge(spec, states[0], states[1:], [0.1, 0.3, 0.5, 0.2, 0.4]))
    finally:
        torch.set_num_threads(threads)
    assert equal(*merged)


@every_merger
@given(seeds)
@quick
def test_a_sweep_gives_what_single_merges_give(merger: Merger, seed: int) -> None:
    base, *models = normal_models(4)
    sweep = prepare_sweep(merger, base, models, seed=seed)
    for coefficient in (0.9, 0.1, 0.5, 0.1):
        weights = coefficient_weights(coefficient, donors=2)
        assert equal(sweep(weights), merge(merger, base, models, weights, seed))


def test_linear_needs_no_base_and_ignores_one() -> None:
    base, *models = normal_models(3)
    assert equal(
        merge_models(parse_merger("linear"), None, models, [0.3, 0.7], seed=0),
        merge("linear", base, models, [0.3, 0.7]),
    )


def test_coefficients_share_the_rest_among_the_donors() -> None:
    assert coefficient_weights(0.5, donors=2) == [0.5, 0.25, 0.25]
    assert coefficient_weights(1, donors=3) == [1, 0, 0, 0]

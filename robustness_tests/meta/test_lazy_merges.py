"""Merges whose tensors are read, prepared and merged when they are asked for: the same bits, and little memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeguard.errors import CheckpointError, IncompatibleModelsError, ParameterError
from mergeguard.mergers import merge_models, parse_merger, prepare_sweep
from robustness_tests.meta.recorded_states import State, recorded

SPECS = (
    "linear",
    "task_arithmetic(lambda=1.4)",
    "ties(density=0.4,normalize=true)",
    "ties(density=0.5,scope=model)",
    "dare_linear(density=0.4)",
    "dare_ties(density=0.4,normalize=true)",
    "breadcrumbs(density=0.6,gamma=0.1)",
    "della(density=0.5,epsilon=0.1)",
    "slerp",
)
TENSORS = 8


def family(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[State]:
    """A base and two models, one of whose tensors is not floating."""
    generator = torch.Generator().manual_seed(seed)
    floating = [{f"w{index}": torch.randn(4, 5, generator=generator) for index in range(TENSORS)} for _ in range(3)]
    return [{**{name: t.to(dtype) for name, t in state.items()}, "steps": torch.tensor(7)} for state in floating]


@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=4, deadline=None)
@given(
    seed=st.integers(0, 2**40),
    alpha=st.sampled_from([0.1, 0.5, 0.9]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_lazy_merge_has_the_bits_of_one_that_was_prepared_at_once(
    spec: str, seed: int, alpha: float, dtype: torch.dtype
) -> None:
    merger, (base, *models), weights = parse_merger(spec), family(seed, dtype), [alpha, 1 - alpha]
    wanted = merge_models(merger, base if merger.needs_base else None, models, weights, seed=seed)
    sweep = prepare_sweep(merger, base if merger.needs_base else None, models, seed=seed, hold=False)
    sweep([0.3, 0.7])["w0"]  # another coefficient before must leave no trace
    merged = sweep(weights)
    assert list(merged) == list(wanted) == list(base)
    assert len(merged) == len(wanted)
    for name in reversed(list(wanted)):
        assert torch.equal(merged[name], wanted[name]), name
        assert merged[name].dtype == wanted[name].dtype


@pytest.mark.parametrize("spec", ["linear", "ties(density=0.4)", "dare_ties(density=0.4)"])
def test_a_lazy_merge_holds_the_inputs_of_one_tensor_at_a_time(spec: str) -> None:
    (base, *models), log = recorded(family())
    merged = prepare_sweep(parse_merger(spec), base, models, seed=0, hold=False)([0.5, 0.5])
    assert log.asked == []
    assert [torch.isfinite(merged[name]).all().item() for name in merged] == [True] * len(base)
    assert log.most == len(models) + 1
    assert not log.alive
    assert sorted(log.asked) == sorted([*base] * 3)
    assert "w0" in merged
    assert "w99" not in merged
    assert len(log.asked) == 3 * len(base), "asking for a name read a tensor"


def test_a_held_sweep_reads_each_tensor_once_for_all_coefficients() -> None:
    (base, *models), log = recorded(family())
    sweep = prepare_sweep(parse_merger("ties(density=0.4)"), base, models, seed=0)
    for alpha in (0.2, 0.8):
        dict(sweep([alpha, 1 - alpha]))
    assert sorted(log.asked) == sorted([*base] * 3)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("w1", torch.zeros(5, 4), "tensor 'w1' of model '1' has shape"),
        ("w1", torch.zeros(4, 5).half(), "tensor 'w1' of model '1' has dtype torch.float16, expected torch.float32"),
        ("w1", torch.full((4, 5), torch.nan), "tensor 'w1' of model '1' holds NaN"),
        ("steps", torch.tensor(8), "tensor 'steps' of model '1' .* differs"),
    ],
)
def test_a_lazy_merge_refuses_a_tensor_when_it_passes(name: str, value: torch.Tensor, said: str) -> None:
    base, first, second = family()
    second[name] = value
    merged = prepare_sweep(parse_merger("linear"), base, [first, second], seed=0, hold=False)([0.5, 0.5])
    assert torch.isfinite(merged["w0"]).all()
    with pytest.raises((IncompatibleModelsError, CheckpointError), match=said):
        merged[name]


def test_a_lazy_merge_refuses_names_and_weights_before_it_reads_anything() -> None:
    (base, *models), log = recorded(family())
    models[1].state["extra"] = torch.zeros(1)
    with pytest.raises(IncompatibleModelsError, match="model '1' has an extra tensor 'extra'"):
        prepare_sweep(parse_merger("ties"), base, models, seed=0, hold=False)
    del models[1].state["extra"]
    with pytest.raises(ParameterError, match="1 weights for 2 models"):
        prepare_sweep(parse_merger("ties"), base, models, seed=0, hold=False)([1.0])
    assert log.asked == []


def test_weights_that_are_changed_later_change_no_merge() -> None:
    base, *models = family()
    weights = [0.25, 0.75]
    merged = prepare_sweep(parse_merger("linear"), base, models, seed=0)(weights)
    before = merged["w0"]
    weights[0] = 5.0
    assert torch.equal(merged["w0"], before)
    with pytest.raises(KeyError):
        merged["w99"]

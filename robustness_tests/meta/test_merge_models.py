"""What a merge refuses, each in one line that names the tensor or option; and third parties' methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from mergeguard.errors import CheckpointError, IncompatibleModelsError, MergeguardError, ParameterError
from mergeguard.mergers import Method, Parameter, coefficient_weights, merge_models, parse_merger, prepare_sweep
from mergeguard.mergers.contract import part

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mergeguard.mergers.contract import Generators, Parameters, Prepared

State = dict[str, torch.Tensor]
BASE: State = {"a": torch.zeros(2, 3), "b": torch.zeros(4), "steps": torch.tensor(7)}
LINEAR, TIES = parse_merger("linear"), parse_merger("ties")


def changed(**tensors: torch.Tensor) -> State:
    return {**{name: tensor.clone() for name, tensor in BASE.items()}, **tensors}


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ({"a": BASE["a"], "steps": BASE["steps"]}, IncompatibleModelsError, "model '1' lacks tensor 'b'"),
        (changed(c=torch.ones(1)), IncompatibleModelsError, "model '1' has an extra tensor 'c'"),
        (
            changed(a=torch.zeros(3, 2)),
            IncompatibleModelsError,
            r"tensor 'a' of model '1' has shape torch.Size\(\[3, 2\]\), expected torch.Size\(\[2, 3\]\)",
        ),
        (
            changed(b=torch.zeros(4).bfloat16()),
            IncompatibleModelsError,
            "tensor 'b' of model '1' has dtype torch.bfloat16, expected torch.float32",
        ),
        (
            changed(a=torch.zeros(2, 3, device="meta")),
            IncompatibleModelsError,
            "tensor 'a' of model '1' has device meta, expected cpu",
        ),
        (
            changed(steps=torch.tensor(8)),
            IncompatibleModelsError,
            r"tensor 'steps' of model '1' \(torch.int64\) differs, and only floating tensors can be merged",
        ),
        (
            changed(b=torch.tensor([0, float("nan"), 0, 0])),
            CheckpointError,
            "tensor 'b' of model '1' holds NaN or infinity",
        ),
        (
            changed(b=torch.tensor([0, 0, 0, -float("inf")])),
            CheckpointError,
            "tensor 'b' of model '1' holds NaN or infinity",
        ),
    ],
)
@pytest.mark.parametrize("merger", [LINEAR, TIES], ids=str)
def test_a_model_unlike_the_base_is_refused(
    merger: Any, model: State, error: type[MergeguardError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        merge_models(merger, BASE, [BASE, model], [0.5, 0.5], seed=0)
    assert "\n" not in str(caught.value)


def test_nan_in_the_base_is_refused_and_the_models_id_is_named() -> None:
    broken = changed(b=torch.tensor([0, float("nan"), 0, 0]))
    with pytest.raises(CheckpointError, match="tensor 'b' of the base holds NaN"):
        merge_models(TIES, broken, [BASE], [1], seed=0)
    with pytest.raises(CheckpointError, match="tensor 'b' of model 'donor' holds NaN"):
        merge_models(TIES, BASE, [BASE, broken], [1, 1], seed=0, model_ids=["protected", "donor"])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "1 weights for 2 models; expected one per model"),
        ([1.0, float("nan")], "weights must be finite"),
        ([float("inf"), 1.0], "weights must be finite"),
        ([0.5, -0.5], r"weights \[0.5, -0.5\] sum to 0, so they cannot be normalised; set normalize=false"),
    ],
)
@pytest.mark.parametrize("spec", ["linear", "task_arithmetic(normalize=true)", "ties", "dare_ties(normalize=true)"])
def test_bad_weights_are_refused(spec: str, weights: list[float], message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        merge_models(parse_merger(spec), BASE, [BASE, BASE], weights, seed=0)


def test_weights_that_sum_to_zero_are_fine_without_normalisation() -> None:
    model = changed(b=torch.ones(4))
    for spec in ("task_arithmetic", "dare_linear", "linear(normalize=false)", "ties(divisor=models)"):
        merged = merge_models(parse_merger(spec), BASE, [model, model], [0.5, -0.5], seed=0)
        assert not merged["a"].any()


@pytest.mark.parametrize(
    ("base", "models", "ids", "message"),
    [
        (BASE, [], None, "merger ties got no models to merge"),
        (None, [BASE], None, "merger ties merges differences from a base model; give the base"),
        (BASE, [BASE, BASE], ["x"], "expected one distinct id per model"),
        (BASE, [BASE, BASE], ["x", "x"], "expected one distinct id per model"),
    ],
)
def test_bad_models_are_refused(base: Any, models: list[State], ids: Any, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        prepare_sweep(TIES, base, models, seed=0, model_ids=ids)


@pytest.mark.parametrize(("coefficient", "donors"), [(-0.1, 1), (1.1, 1), (float("nan"), 1), (0.5, 0)])
def test_a_coefficient_is_a_share_and_needs_a_donor(coefficient: float, donors: int) -> None:
    with pytest.raises(ParameterError, match=r"outside \[0, 1\]|at least one donor"):
        coefficient_weights(coefficient, donors)


def test_an_overflowing_merge_is_refused_instead_of_written() -> None:
    base = {"w": torch.zeros(2, dtype=torch.float16)}
    model = {"w": torch.tensor([1.0, 60_000], dtype=torch.float16)}
    with pytest.raises(CheckpointError, match=r"merging 'w' overflows torch\.float16; convert the models to float32"):
        merge_models(parse_merger("task_arithmetic(lambda=2)"), base, [model], [1], seed=0)


def test_tensors_that_are_not_floating_are_copied_and_empty_ones_kept() -> None:
    model = changed(none=torch.zeros(0, 3))
    base = changed(none=torch.zeros(0, 3))
    for spec in ("linear", "ties(density=0.4)", "ties(density=0.4,scope=model)", "dare_ties(density=0.4)"):
        merged = merge_models(parse_merger(spec), base, [model, model], [0.5, 0.5], seed=0)
        assert list(merged) == list(base)
        assert merged["steps"].item() == 7
        assert merged["steps"] is not base["steps"]
        assert merged["none"].shape == (0, 3)


def test_a_whole_model_of_mixed_dtypes_keeps_them() -> None:
    base = {"x": torch.zeros(3), "y": torch.zeros(3, dtype=torch.bfloat16)}
    model = {"x": torch.tensor([3.0, 1, 1]), "y": torch.tensor([2.0, 1, 1], dtype=torch.bfloat16)}
    merged = merge_models(parse_merger("ties(density=0.4,scope=model)"), base, [model], [1], seed=0)
    assert merged["x"].tolist() == [3, 0, 0]
    assert merged["y"].tolist() == [2, 0, 0]
    assert (merged["x"].dtype, merged["y"].dtype) == (torch.float32, torch.bfloat16)


def test_a_third_partys_method_prepares_once_per_sweep_and_draws_by_tensor_and_model() -> None:
    prepared: list[int] = []

    def prepare(
        base: torch.Tensor, models: Sequence[torch.Tensor], parameters: Parameters, generator: Generators
    ) -> Prepared:
        prepared.append(len(models))
        noise = [torch.randn(base.shape, generator=generator(index)) for index in range(len(models))]
        noisy = [model + parameters["noise"] * n for model, n in zip(models, noise, strict=True)]
        return lambda span: [part(model, span) for model in noisy]

    def combine(
        base: torch.Tensor, tensors: Sequence[torch.Tensor], weights: Sequence[float], _parameters: Parameters
    ) -> torch.Tensor:
        return base + sum((w * (t - base) for w, t in zip(weights, tensors, strict=True)), torch.zeros_like(base))

    method = Method("noisy", "", "", combine, (Parameter("noise", 0.0, "scale"),), prepare, random=True)
    base = {"a": torch.zeros(4), "b": torch.zeros(4)}
    sweep = prepare_sweep(method(noise=1), base, [base, base], seed=0)
    one, other = sweep([1, 0]), sweep([0, 1])
    assert prepared == [2, 2]
    draws = {tuple(tensor.tolist()) for merged in (one, other) for tensor in merged.values()}
    assert len(draws) == 4

"""Parity of breadcrumbs, DELLA and SCE with the released mergekit 0.1.5, the oracle, bit for bit, tensor by tensor.

Its methods are called as its merges of checkpoints call them, without the files around them, with one thread. Where
it leaves a result to chance, it is given our choice: DELLA's draws, which it still compares with its own
probabilities, and the order among equal magnitudes and variances, where its sorts are unstable. Nothing else is
replaced. Two sums depend on mergekit's number of threads over more than 16,384 elements: the norms that `rescale`
restores, and SCE's mean squares. Large tensors are therefore compared without rescaling, and with changes so small
that SCE weighs all models the same.
"""

from __future__ import annotations

import importlib
import warnings
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from mergeguard.mergers.breadcrumbs import BREADCRUMBS, BREADCRUMBS_TIES
from mergeguard.mergers.contract import WHOLE
from mergeguard.mergers.della import DELLA, DELLA_LINEAR
from mergeguard.mergers.sce import SCE, model_shares
from mergeguard.mergers.spans import difference, each, spans
from robustness_tests.meta.oracle import needs

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from mergeguard.mergers.contract import Method

pytestmark = needs("mergekit")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((64,), (96, 64), (3, 1000), (7, 13), (3, 4, 5))
LARGE = (1, 70_000), (37, 2049)
WEIGHTS = {1: (0.4,), 2: (0.7, 0.4), 3: (0.5, -0.2, 0.4), 4: (0.1, 0.4, 0.3, 0.3)}
CASES: list[tuple[Method, dict[str, Any], int]] = [
    (BREADCRUMBS, {}, 2),
    (BREADCRUMBS, {"density": 0.6, "gamma": 0.05}, 2),
    (BREADCRUMBS, {"density": 0.9, "gamma": 0.3, "normalize": True}, 3),
    (BREADCRUMBS, {"density": 0.4, "gamma": 0.0, "lambda": 1.4}, 2),
    (BREADCRUMBS, {"density": 0.5, "rescale": "l1"}, 4),
    (BREADCRUMBS_TIES, {"density": 0.6, "gamma": 0.05}, 3),
    (BREADCRUMBS_TIES, {"density": 0.01, "gamma": 0.5, "normalize": True}, 2),
    (BREADCRUMBS_TIES, {"density": 0.5, "rescale": "l1", "normalize": True}, 2),
    (DELLA, {}, 2),
    (DELLA, {"density": 0.5}, 2),
    (DELLA, {"density": 0.3, "epsilon": 0.25, "rescale": "none", "lambda": 0.7}, 3),
    (DELLA, {"density": 0.7, "normalize": False}, 4),
    (DELLA_LINEAR, {"density": 0.5}, 1),
    (DELLA_LINEAR, {"density": 0.4, "epsilon": 0.0, "normalize": True}, 2),
    (DELLA_LINEAR, {"density": 0.8, "epsilon": 0.19, "rescale": "none"}, 3),
    (SCE, {}, 2),
    (SCE, {"select_topk": 0.1}, 2),
    (SCE, {"select_topk": 0.7}, 3),
    (SCE, {"select_topk": 0.0}, 2),
    (SCE, {"select_topk": 0.5}, 1),
    (SCE, {}, 4),
]
IDS = [f"{method.name}-{count}-{parameters}" for method, parameters, count in CASES]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def oracle() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing it warns about numpy.core among others; its merges may not warn
        importlib.import_module("mergekit.merge_methods")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Gives the oracle our choices; the shapes of what it draws from our generators, model by model."""
    shapes: list[torch.Size] = []
    argsort = torch.argsort

    def bernoulli(probabilities: Tensor) -> Tensor:
        draws = torch.rand(probabilities.shape, generator=generator(len(shapes)))
        shapes.append(probabilities.shape)
        return (draws < probabilities).to(probabilities.dtype)

    def ascending(values: Tensor, *, dim: int, descending: bool) -> Tensor:
        assert not descending
        return argsort(values, dim=dim, stable=True)

    def ascending_with_the_lowest_index_largest(values: Tensor, *, descending: bool) -> SimpleNamespace:
        assert not descending
        return SimpleNamespace(indices=argsort(values, descending=True, stable=True).flip(0))

    def topk(values: Tensor, *, k: int, largest: bool) -> tuple[None, Tensor]:
        assert largest
        return None, argsort(values, descending=True, stable=True)[:k]

    monkeypatch.setattr(torch, "bernoulli", bernoulli)
    monkeypatch.setattr(torch, "argsort", ascending)
    monkeypatch.setattr(torch, "sort", ascending_with_the_lowest_index_largest)
    monkeypatch.setattr(torch, "topk", topk)
    return shapes


def generator(index: int) -> torch.Generator:
    return torch.Generator().manual_seed(100 + index)


def draw(shape: tuple[int, ...], dtype: torch.dtype, count: int, *, apart: float = 0.3) -> tuple[Tensor, list[Tensor]]:
    """A base, and models around it."""
    random = torch.Generator().manual_seed(5)
    base = torch.randn(shape, generator=random).double()
    models = [base + apart * torch.randn(shape, generator=random).double() for _ in range(count)]
    return base.to(dtype), [model.to(dtype) for model in models]


def ours(
    method: Method, parameters: dict[str, Any], base: Tensor, models: Sequence[Tensor], weights: Sequence[float]
) -> Tensor:
    """As the engine merges: in spans."""
    full = method(**parameters).kernel_parameters(len(models))
    assert method.elementwise(full)
    prepared = method.prepare(base, models, full, generator)
    merged = torch.empty_like(base)
    for span in spans(base.numel()):
        merged.view(-1)[span] = method.combine(base.view(-1)[span], prepared(span), weights, full)
    return merged


def theirs(
    method: Method, parameters: dict[str, Any], base: Tensor, models: Sequence[Tensor], weights: Sequence[float]
) -> Tensor:
    from mergekit.merge_methods import merge_tensors

    ids = [f"model {index}" for index in range(len(models))]
    given: dict[str, Any] = dict(parameters)
    for name in {"density", "gamma", "epsilon"} & parameters.keys():
        given[name] = dict.fromkeys(ids, parameters[name])
    if "rescale" in parameters:
        given["rescale"] = parameters["rescale"] == "l1"
    if method.takes_coefficient:
        given["weight"] = dict(zip(ids, weights, strict=True))
    merged: Tensor = merge_tensors(
        [*models, base], method.name, parameters=given, ids=[*ids, "base"], base_index=len(models)
    )
    return merged


def differing(one: Tensor, other: Tensor) -> int:
    """How many elements differ, where -0 is 0; -1 if the tensors cannot be compared."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return -1
    assert torch.isfinite(one).all()
    return int((one != other).sum())


def left_out(parameters: dict[str, Any], method: Method, dtype: torch.dtype) -> bool:
    """Mergekit sums the norms of float16 breadcrumbs in float16, where they overflow; we in float32."""
    breadcrumbs = method in (BREADCRUMBS, BREADCRUMBS_TIES)
    return breadcrumbs and dtype == torch.float16 and parameters.get("rescale") == "l1"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("method", "parameters", "count"), CASES, ids=IDS)
def test_merged_tensors_equal_mergekits_bit_for_bit(
    method: Method, parameters: dict[str, Any], count: int, dtype: torch.dtype, served: list[torch.Size]
) -> None:
    if left_out(parameters, method, dtype):
        parameters = {**parameters, "rescale": "none"}
    found = {}
    for shape in SHAPES:
        served.clear()
        inputs = draw(shape, dtype, count)
        merged, expected = (side(method, parameters, *inputs, WEIGHTS[count]) for side in (ours, theirs))
        found[shape] = differing(merged, expected)
        drawn = method.random and parameters.get("density", 1) < 1
        assert len(served) == (count if drawn else 0)
    assert not any(found.values()), f"elements that differ: {found}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        (BREADCRUMBS, {"density": 0.6}),
        (BREADCRUMBS_TIES, {"density": 0.3, "gamma": 0.2}),
        (DELLA, {"density": 0.5, "rescale": "none"}),
        (DELLA_LINEAR, {"density": 0.4, "epsilon": 0.3, "rescale": "none"}),
        (SCE, {"select_topk": 0.1}),
        (SCE, {}),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_tensors_of_several_spans_and_blocks_equal_mergekits_bit_for_bit(
    method: Method, parameters: dict[str, Any], dtype: torch.dtype, served: list[torch.Size]
) -> None:
    for shape in LARGE:
        served.clear()
        inputs = draw(shape, dtype, 2, apart=0.3 if method is not SCE else 2e-4)
        assert differing(*(side(method, parameters, *inputs, WEIGHTS[2]) for side in (ours, theirs))) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["all zero", "all the base", "equal", "opposed", "many ties", "tiny"])
def test_degenerate_tensors_equal_mergekits_bit_for_bit(
    kind: str, dtype: torch.dtype, served: list[torch.Size]
) -> None:
    for method, parameters, count in CASES:
        served.clear()
        if left_out(parameters, method, dtype):
            continue
        base, models = draw((12, 33), dtype, count)
        inputs = {
            "all zero": (base * 0, [model * 0 for model in models]),
            "all the base": (base, [base] * count),
            "equal": (base, [models[0]] * count),
            "opposed": (base, [base + 0.25 * (-1) ** index for index in range(count)]),
            "many ties": ((base * 4).round() / 4, [(model * 4).round() / 4 for model in models]),
            "tiny": (base * 1e-4, [model * 1e-4 for model in models]),
        }[kind]
        expected = theirs(method, parameters, *inputs, WEIGHTS[count])
        assert differing(ours(method, parameters, *inputs, WEIGHTS[count]), expected) == 0, (method.name, parameters)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("method", "each_models"),
    [
        (BREADCRUMBS, {"density": [0.6, 1.0, 0.2], "gamma": [0.0, 0.2, 0.05]}),
        (DELLA_LINEAR, {"density": [0.6, 1.0, 0.2], "epsilon": [0.3, 0.2, 0.0]}),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
@pytest.mark.usefixtures("served")
def test_each_model_may_have_its_own_density(
    method: Method, each_models: dict[str, list[float]], dtype: torch.dtype
) -> None:
    from mergekit.merge_methods import merge_tensors

    base, models = draw((20, 60), dtype, 3)
    full = method().kernel_parameters(3) | each_models
    draws = {0: 0, 2: 1}  # the model of density 1 draws nothing
    prepared = method.prepare(base, models, full, lambda index: generator(draws[index]))
    merged = method.combine(base, prepared(WHOLE), WEIGHTS[3], full)
    ids = ["x", "y", "z"]
    given = {name: dict(zip(ids, values, strict=True)) for name, values in each_models.items()}
    given["weight"] = dict(zip(ids, WEIGHTS[3], strict=True))
    expected = merge_tensors([*models, base], method.name, parameters=given, ids=[*ids, "base"], base_index=3)
    assert differing(merged, expected) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sces_shares_of_a_large_tensor_equal_mergekits_up_to_the_order_of_a_sum(dtype: torch.dtype) -> None:
    """An ulp of the dtype for the share itself, and in float32 one more for the order in which squares are summed."""
    from mergekit.merge_methods.sce import sce_weight

    base, models = draw((37, 2049), dtype, 3)
    expected = sce_weight(torch.stack([model - base for model in models]))
    shares = model_shares(each([difference(model, base) for model in models]), base)
    ulps = 2 if dtype == torch.float32 else 1
    assert ((shares - expected).abs() <= ulps * torch.finfo(dtype).eps * expected).all()


def test_mergekit_refuses_the_windows_that_we_refuse() -> None:
    from mergekit.sparsify import della_magprune

    from mergeguard.errors import ParameterError
    from mergeguard.mergers.della import check_window

    numbers = [index / 20 for index in range(1, 20)]
    for density in (*numbers, 1.0):
        for epsilon in (0.0, *(number / 2 for number in numbers)):
            refused = []
            for attempt in (
                lambda d=density, e=epsilon: della_magprune(torch.ones(2), d, e),
                lambda d=density, e=epsilon: check_window(d, e),
            ):
                try:
                    attempt()
                    refused.append(False)
                except (ValueError, ParameterError):
                    refused.append(True)
            assert refused[0] == refused[1], (density, epsilon)

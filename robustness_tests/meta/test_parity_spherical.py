"""Parity of the spherical methods with the released mergekit 0.1.5, the oracle, bit for bit, tensor by tensor.

Its methods are called as its merges of checkpoints call them, without the files around them. Both sides run with one
thread: with more, torch and so mergekit adds up long vectors in another order.
"""

from __future__ import annotations

import contextlib
import importlib
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch

from mergeguard.mergers.contract import WHOLE, Method
from mergeguard.mergers.karcher import KARCHER
from mergeguard.mergers.model_stock import MODEL_STOCK
from mergeguard.mergers.multislerp import MULTISLERP
from mergeguard.mergers.passthrough import PASSTHROUGH
from mergeguard.mergers.slerp import NUSLERP, SLERP
from mergeguard.mergers.spans import spans
from robustness_tests.meta.oracle import needs

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

pytestmark = needs("mergekit")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# The last has more elements than mergekit's slerp reduces at once, and than torch's sums keep on one level.
SHAPES = ((64,), (96, 64), (7, 13), (3, 4, 5), (1049, 1003))
WEIGHTS = {1: (0.4,), 2: (0.7, 0.4), 3: (0.5, -0.2, 0.4), 4: (0.1, 0.4, 0.3, 0.3), 6: (0.1, 0.2, 0.3, -0.2, 0.5, 0.4)}
CASES: list[tuple[Method, dict[str, Any], int]] = [
    (SLERP, {}, 2),
    (NUSLERP, {}, 2),
    (NUSLERP, {"nuslerp_flatten": False}, 2),
    (NUSLERP, {"nuslerp_flatten": False, "nuslerp_row_wise": True}, 2),
    (NUSLERP, {"task_vectors": True}, 2),
    (NUSLERP, {"nuslerp_flatten": False, "task_vectors": True}, 2),
    (NUSLERP, {"nuslerp_flatten": False, "nuslerp_row_wise": True, "task_vectors": True}, 2),
    (MULTISLERP, {}, 1),
    (MULTISLERP, {}, 2),
    (MULTISLERP, {"eps": 1e-3}, 3),
    (MULTISLERP, {"task_vectors": True}, 3),
    (MULTISLERP, {"normalize_weights": False, "task_vectors": True}, 4),
    (KARCHER, {}, 1),
    (KARCHER, {}, 2),
    (KARCHER, {"max_iter": 2, "tol": 1e-3}, 3),
    (KARCHER, {}, 6),
    (MODEL_STOCK, {}, 2),
    (MODEL_STOCK, {}, 6),
    (MODEL_STOCK, {"filter_wise": True}, 3),
    (PASSTHROUGH, {"scale": 0.7}, 1),
    (PASSTHROUGH, {}, 1),
]
IDS = [f"{method.name}-{count}-{','.join(parameters)}" for method, parameters, count in CASES]


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


def draw(shape: tuple[int, ...], dtype: torch.dtype, count: int, *, apart: float = 0.3) -> tuple[Tensor, list[Tensor]]:
    """A base, and models around it."""
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(shape, generator=generator).double()
    models = [base + apart * torch.randn(shape, generator=generator).double() for _ in range(count)]
    return base.to(dtype), [model.to(dtype) for model in models]


def ours(
    method: Method, parameters: dict[str, Any], base: Tensor, models: Sequence[Tensor], weights: Sequence[float]
) -> Tensor:
    """As the engine merges: in spans wherever the method allows."""
    merger = method(**parameters)
    full = merger.kernel_parameters(len(models))
    prepared = method.prepare(base, models, full, lambda _: torch.Generator())
    if not method.elementwise(full):
        return method.combine(base, prepared(WHOLE), weights, full)
    merged = torch.empty_like(base)
    for span in spans(base.numel()):
        merged.view(-1)[span] = method.combine(base.view(-1)[span], prepared(span), weights, full)
    return merged


def theirs(
    method: Method, parameters: dict[str, Any], base: Tensor, models: Sequence[Tensor], weights: Sequence[float]
) -> Tensor:
    from mergekit.merge_methods import merge_tensors

    given: dict[str, Any] = {name: value for name, value in parameters.items() if name != "task_vectors"}
    tensors = list(models)
    if method is SLERP:  # given last, mergekit still takes its base_model first
        return merge_tensors(tensors[::-1], "slerp", parameters={"t": weights[1]}, base_index=1)
    if method.weighting == "weight":
        given["weight"] = {f"model {index}": weight for index, weight in enumerate(weights)}
    ids = [f"model {index}" for index in range(len(tensors))]
    base_index = None
    if method(**parameters).needs_base:
        tensors, ids, base_index = [*tensors, base], [*ids, "base"], len(tensors)
    return merge_tensors(tensors, method.name, parameters=given, ids=ids, base_index=base_index)


def weights_of(method: Method, count: int) -> tuple[float, ...]:
    if method.weighting == "t":
        return (1 - 0.3, 0.3)
    return WEIGHTS[count] if method.weighting == "weight" else (1.0,) * count


def differing(one: Tensor, other: Tensor) -> int:
    """How many elements differ in any bit; -1 if the tensors cannot be compared."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return -1
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return int((one.contiguous().view(bits) != other.contiguous().view(bits)).sum())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("method", "parameters", "count"), CASES, ids=IDS)
def test_merged_tensors_equal_mergekits_bit_for_bit(
    method: Method, parameters: dict[str, Any], count: int, dtype: torch.dtype
) -> None:
    weights = weights_of(method, count)
    found = {}
    for shape in SHAPES:
        inputs = draw(shape, dtype, count)
        merged, expected = (side(method, parameters, *inputs, weights) for side in (ours, theirs))
        assert torch.isfinite(expected).all()
        found[shape] = differing(merged, expected)
    assert not any(found.values()), f"elements that differ: {found}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_multislerp_of_six_models_equals_mergekits_where_torch_adds_up_its_stack_in_order(dtype: torch.dtype) -> None:
    """From five models on, torch adds up the elements after the last multiple of 4 registers in another order."""
    inputs = draw((96, 64), dtype, 6)
    merged, expected = (side(MULTISLERP, {}, *inputs, WEIGHTS[6]) for side in (ours, theirs))
    assert differing(merged, expected) == 0


def degenerate(kind: str, dtype: torch.dtype, count: int) -> tuple[Tensor, list[Tensor]]:
    shapes = {"scalar": (), "one element": (1,), "empty": (0,), "empty matrix": (0, 5), "empty rows": (3, 0)}
    base, models = draw(shapes.get(kind, (6, 10)), dtype, count)
    changed = {
        "all zero": (base * 0, [model * 0 for model in models]),
        "first zero": (base, [models[0] * 0, *models[1:]]),
        "last is the base": (base, [*models[:-1], base]),
        "all the base": (base, [base] * count),
        "equal": (base, [models[0]] * count),
        "antipodal": (base * 0, [models[0] * (-1) ** index for index in range(count)]),
        "tiny": (base * 1e-30, [model * 1e-30 for model in models]),
        "opposed": (base, [base + 0.25 * (-1) ** index for index in range(count)]),
        "rows opposed": (base, [base.clone().index_fill_(0, torch.tensor(1), 1 - 2 * (i % 2)) for i in range(count)])
        if base.dim() == 2 and len(base) > 1
        else (base, models),
    }
    return changed.get(kind, (base, models))


KINDS = (
    *("scalar", "one element", "empty", "empty matrix", "empty rows", "all zero", "first zero", "last is the base"),
    *("all the base", "equal", "antipodal", "tiny", "opposed", "rows opposed"),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_degenerate_tensors_merge_to_finite_ones_and_to_mergekits_where_those_are_finite(
    kind: str, dtype: torch.dtype
) -> None:
    for method, parameters, count in CASES:
        inputs = degenerate(kind, dtype, count)
        weights = (0.25,) * count if method is MULTISLERP else weights_of(method, count)
        merged = ours(method, parameters, *inputs, weights)
        assert torch.isfinite(merged).all(), (method.name, parameters)
        expected = None
        with contextlib.suppress(ValueError, RuntimeError):
            expected = theirs(method, parameters, *inputs, weights)
        if expected is not None and (method, kind, dtype.itemsize) == (KARCHER, "scalar", 2) and count > 1:
            # With 0-dimensional models mergekit's float32 norms make its result float32; ours keeps the dtype, and the
            # length is rounded to it before the last product: at most one unit in the last place.
            assert expected.dtype is torch.float32
            assert abs(merged.view(torch.int16) - expected.to(dtype).view(torch.int16)) <= 1
        elif expected is not None and torch.isfinite(expected).all():
            assert differing(merged, expected) == 0, (method.name, parameters)
        else:
            # It stops where more than two directions cancel out, and divides by 0 where eps is 0, as it is in float16.
            assert method is MULTISLERP
            assert count > 2 if expected is None else dtype is torch.float16

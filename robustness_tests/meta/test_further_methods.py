"""nearswap, arcee_fusion, ram, ExPO, consensus task arithmetic, TSV-Merge, Iso-C, and a missing mergekit.

What they have in common, and closed forms of all but the last two, on small multiples of 1/8, exact in every dtype.
"""

from __future__ import annotations

import math
import subprocess
import sys
import types
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeguard.errors import MergeguardError, ParameterError
from mergeguard.mergers.arcee_fusion import ARCEE_FUSION, fused
from mergeguard.mergers.consensus import CONSENSUS_TASK_ARITHMETIC
from mergeguard.mergers.contract import WHOLE, part
from mergeguard.mergers.expo import EXPO
from mergeguard.mergers.iso import ISO_C
from mergeguard.mergers.mergekit_methods import mergekit_method
from mergeguard.mergers.nearswap import NEARSWAP
from mergeguard.mergers.ram import RAM, RAMPLUS_TL, reinforcement
from mergeguard.mergers.tsv import TSV_MERGE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mergeguard.mergers.contract import Merger

    Tensors = list[torch.Tensor]

MERGERS = (
    NEARSWAP(t=0.25),
    NEARSWAP(primary="last"),
    ARCEE_FUSION(),
    RAM(epsilon=0.2),
    RAMPLUS_TL(epsilon=0.2, r=0.5),
    EXPO(extrapolation=0.5),
    CONSENSUS_TASK_ARITHMETIC(),
    CONSENSUS_TASK_ARITHMETIC(k=1, tall_mask_lambda=0.6),
    TSV_MERGE(),
    ISO_C(),
)
ELEMENTWISE = [merger for merger in MERGERS if merger.method.elementwise(merger.parameters)]
OWN_MATHS = ("expo", "consensus_task_arithmetic", "tsv_merge", "iso_c")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
EMPTY_OR_SMALL = ((), (0,), (0, 3), (3, 0), (1,), (1, 1), (5,), (1, 4), (2, 3), (2, 2, 2))
WEIGHTS = [0.75, 0.5]

quick = settings(max_examples=20, deadline=None)
every_merger = pytest.mark.parametrize("merger", MERGERS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def no_generator(_index: int) -> torch.Generator:
    raise AssertionError("none of these methods draws")


def merge(
    merger: Merger, base: torch.Tensor, models: Sequence[torch.Tensor], weights: Sequence[float] = WEIGHTS, cut: int = 0
) -> torch.Tensor:
    """The merged tensor; in two spans, of `cut` elements and the rest, if `cut` is not 0."""
    method, parameters = merger.method, merger.kernel_parameters(len(models))
    prepared = method.prepare(base, models, parameters, no_generator)
    if not cut:
        return method.combine(base, prepared(WHOLE), weights, parameters)
    pieces = [slice(0, cut), slice(cut, base.numel())]
    return torch.cat([method.combine(part(base, piece), prepared(piece), weights, parameters) for piece in pieces])


def eighths(*values: float) -> torch.Tensor:
    return torch.tensor(values) / 8


def normal(count: int, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("merger", ELEMENTWISE, ids=str)
@every_dtype
@given(st.integers(1, 50), st.data())
@quick
def test_spans_give_the_bits_of_the_whole_tensor(
    merger: Merger, dtype: torch.dtype, size: int, data: st.DataObject
) -> None:
    base, *models = normal(3, size, 3, seed=size, dtype=dtype)
    cut = data.draw(st.integers(1, base.numel() - 1))
    assert torch.equal(merge(merger, base, models, cut=cut), merge(merger, base, models).flatten())


def test_only_the_methods_that_decompose_matrices_need_whole_tensors() -> None:
    assert {merger.name for merger in MERGERS} - {merger.name for merger in ELEMENTWISE} == {"tsv_merge", "iso_c"}


@every_merger
@every_dtype
def test_the_arguments_stay_as_they_are_and_the_result_is_new(merger: Merger, dtype: torch.dtype) -> None:
    for shape in ((6, 5), (7,), ()):
        tensors = normal(3, *shape, dtype=dtype)
        copies = [tensor.clone() for tensor in tensors]
        merged = merge(merger, tensors[0], tensors[1:])
        assert merged.shape == tensors[0].shape
        assert merged.dtype == dtype
        assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))
        assert all(merged.data_ptr() != tensor.data_ptr() for tensor in tensors)


@every_merger
@every_dtype
@pytest.mark.parametrize("shape", EMPTY_OR_SMALL, ids=str)
def test_degenerate_tensors_merge_to_finite_ones(merger: Merger, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    zero, one, (other,) = (
        torch.zeros(shape, dtype=dtype),
        torch.ones(shape, dtype=dtype),
        normal(1, *shape, dtype=dtype),
    )
    for base, first, second in ((zero, zero, zero), (zero, one, one), (one, one, other), (other, zero, other)):
        merged = merge(merger, base, [first, second])
        assert merged.shape == shape
        assert torch.isfinite(merged).all()


@every_merger
@every_dtype
def test_copies_of_the_base_merge_to_the_base(merger: Merger, dtype: torch.dtype) -> None:
    for shape in ((6, 5), (7,), ()):
        base = (torch.arange(math.prod(shape)).reshape(shape) / 8 - 2).to(dtype)
        assert torch.equal(merge(merger, base, [base, base.clone()]), base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("merger", [merger for merger in MERGERS if merger.name in OWN_MATHS], ids=str)
def test_what_mergekit_lacks_is_computed_in_float32_and_rounded_once(merger: Merger, dtype: torch.dtype) -> None:
    for shape in ((6, 5), (7,)):
        base, *models = normal(3, *shape, dtype=dtype)
        precise = merge(merger, base.float(), [model.float() for model in models])
        assert torch.equal(merge(merger, base, models), precise.to(dtype))


def test_each_needs_the_models_that_it_can_merge() -> None:
    for method in (NEARSWAP, ARCEE_FUSION):
        assert method.base == "primary"
        assert not method.takes_coefficient
        with pytest.raises(ParameterError, match="got 3 models, expected exactly 2"):
            method.check_models(3)
    for method in (RAM, RAMPLUS_TL):
        assert method.base == "ancestor"
        assert not method.takes_coefficient
    for method in (EXPO, CONSENSUS_TASK_ARITHMETIC, TSV_MERGE, ISO_C):
        assert method.base == "ancestor"
        assert method.takes_coefficient


def test_nearswap_moves_each_entry_by_t_but_not_beyond_the_other_model() -> None:
    primary, other = eighths(8, 8, 8, -8), eighths(16, 9, 6, -24)
    assert torch.equal(merge(NEARSWAP(t=0.25), primary, [primary, other]), eighths(10, 9, 6, -10))
    swapped = merge(NEARSWAP(primary="last", t=0.25), primary, [other, primary])
    assert torch.equal(swapped, eighths(10, 9, 6, -10))
    assert torch.equal(merge(NEARSWAP(t=0), primary, [primary, other]), primary)
    assert NEARSWAP().parameters["t"] == 0.0001


def test_arcee_fusion_takes_the_entries_whose_importance_is_unusual() -> None:
    """The definition, in plain loops: |b - a| KL(softmax b || softmax a), at or above median + 1.5 quartile ranges."""
    base, step = normal(2, 24, 9)
    other = base + 0.1 * step**3
    importance = []
    for a, b in zip(base.tolist(), other.tolist(), strict=True):
        q, p = ([math.exp(x) / sum(map(math.exp, row)) + 1e-8 for x in row] for row in (a, b))
        divergence = sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
        importance += [abs(y - x) * divergence for x, y in zip(a, b, strict=True)]
    lower, median, upper = (sorted(importance)[quarter * (len(importance) - 1) // 4] for quarter in (1, 2, 3))
    expected = torch.tensor([value >= median + 1.5 * (upper - lower) for value in importance]).view_as(base)
    assert 0 < expected.sum() < expected.numel() / 2
    assert torch.equal(fused(base, other), expected)
    assert torch.equal(merge(ARCEE_FUSION(), base, [base, other]), base + torch.where(expected, other - base, 0))


def test_ram_averages_the_models_that_changed_an_entry() -> None:
    base = eighths(8, 8, 8, 8)
    models = [base + eighths(4, 0, 1, 0), base + eighths(2, 6, -1, 0)]
    assert torch.equal(merge(RAM(), base, models), base + eighths(3, 6, 0, 0))
    assert torch.equal(merge(RAM(epsilon=0.25), base, models), base + eighths(4, 6, 0, 0)), "2/8 is not above 2/8"


def test_ramplus_reinforces_what_one_model_alone_changed() -> None:
    """Model 0 changed 1 entry alone and 1 with the other, model 1 changed 3 alone and 1 with the other."""
    base = eighths(0, 0, 0, 0, 0, 0)
    models = [eighths(8, 4, 0, 0, 0, 0), eighths(0, 8, 8, 8, 8, 0)]
    options = {"r": 0.5, "alpha": 2.0}
    assert reinforcement(base, models, **options) == pytest.approx([1.5, 1 + 0.5 / 3])
    assert reinforcement(base, models, r=0.5, alpha=0.25) == pytest.approx([1.125, 1.125])
    merged = merge(RAMPLUS_TL(**options), base, models)
    third = 1 + 0.5 / 3
    assert merged.tolist() == pytest.approx([1.5, 0.75, third, third, third, 0])
    assert reinforcement(base, [base, models[0]], epsilon=0.0) == pytest.approx([1.0, 1.0])


def test_expo_goes_beyond_the_model_by_alpha_times_its_distance_from_the_base() -> None:
    base, model, other = eighths(8, -4), eighths(16, -4), eighths(8, 4)
    merged = merge(EXPO(extrapolation=0.5), base, [model], [1.0])
    assert torch.equal(merged, model + 0.5 * (model - base))
    average = (model + other) / 2
    merged = merge(EXPO(extrapolation=0.5), base, [model, other], [0.5, 0.5])
    assert torch.equal(merged, average + 0.5 * (average - base)), "FusionBench averages several models first"
    assert torch.equal(merge(EXPO(extrapolation=0), base, [model, other], [1.0, 0.0]), model)


def test_the_consensus_keeps_entries_that_matter_to_k_models() -> None:
    """With lambda 1/2, entry by entry: no change, model 0 alone, both, both but 0 weakly, both against each other."""
    base = eighths(8, 8, 8, 8, 8)
    models = [base + eighths(0, 4, 4, 1, 4), base + eighths(0, 0, 2, 4, -4)]
    kept: dict[int, torch.Tensor] = {}
    for k in range(4):
        kept[k] = merge(CONSENSUS_TASK_ARITHMETIC(k=k, tall_mask_lambda=0.5), base, models, [1, 1]) - base
    assert torch.equal(kept[0], eighths(0, 4, 6, 5, 0))
    assert torch.equal(kept[1], eighths(0, 4, 6, 5, 0))
    assert torch.equal(kept[2], torch.zeros(5)), "|2| is not above |4| / 2; the last two cancel"
    assert torch.equal(kept[3], torch.zeros(5))
    looser = merge(CONSENSUS_TASK_ARITHMETIC(tall_mask_lambda=0.25), base, models, [1, 1]) - base
    assert torch.equal(looser, eighths(0, 0, 6, 0, 0)), "|2| > |4| / 4, but |1| is not above |4| / 4"


def test_a_catastrophic_entry_is_one_that_no_model_selects() -> None:
    base = eighths(0)
    models = [eighths(3), eighths(3), eighths(3)]
    assert merge(CONSENSUS_TASK_ARITHMETIC(k=1, tall_mask_lambda=0.6), base, models, [1, 1, 1]).item() == 0
    assert merge(CONSENSUS_TASK_ARITHMETIC(k=3, tall_mask_lambda=0.4), base, models, [1, 1, 1]).item() == 9 / 8


@given(st.integers(0, 50), st.sampled_from([0.25, 0.5, 2.0]))
@quick
def test_equal_weights_give_the_papers_masks_and_a_weight_of_zero_removes_a_model(seed: int, weight: float) -> None:
    base, one, two, three = normal(4, 40, seed=seed, dtype=torch.float32)
    merger = CONSENSUS_TASK_ARITHMETIC
    paper = merge(merger(**{"lambda": weight}), base, [one, two], [1, 1])
    assert torch.equal(merge(merger(), base, [one, two], [weight, weight]), paper)
    assert torch.equal(merge(merger(), base, [one, two, three], [1, 1, 0]), merge(merger(), base, [one, two], [1, 1]))


def test_listing_the_methods_does_not_import_torch() -> None:
    names = ["nearswap", "arcee_fusion", "ram", "expo", "consensus", "tsv", "iso", "mergekit_methods"]
    imports = "; ".join(f"import mergeguard.mergers.{name}" for name in names)
    subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; {imports}; sys.exit({{'torch', 'mergekit'}} & sys.modules.keys() != set())",
        ],
        check=True,
    )


def without_mergekit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mergekit", None)


def with_another_mergekit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mergekit", types.ModuleType("mergekit"))
    monkeypatch.setitem(sys.modules, "mergekit.merge_methods", types.ModuleType("mergekit.merge_methods"))


@pytest.mark.parametrize(
    ("install", "message"),
    [
        (without_mergekit, "mergers named mergekit:NAME run in mergekit, which is not installed: pip install "),
        (with_another_mergekit, "the installed mergekit is not 0.1.5, which mergers named mergekit:NAME need: pip ins"),
    ],
)
def test_a_missing_mergekit_is_one_clear_line(
    install: Callable[[pytest.MonkeyPatch], Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "mergekit.merge_methods", raising=False)
    install(monkeypatch)
    with pytest.raises(MergeguardError, match=message) as raised:
        mergekit_method("ties")
    assert "\n" not in str(raised.value)

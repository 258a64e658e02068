"""Embedding rows that differ between models: what each policy makes of them, and what is said about it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mergeguard.checkpoints.tokenizers import ModelVocabulary
from mergeguard.errors import IncompatibleModelsError, UnknownNameError
from mergeguard.mergers.vocabulary import POLICIES, plan_vocabulary
from robustness_tests.meta.vocabularies import EMBEDDING, HEAD, model, numbered, rows_of

ROOT = Path(__file__).parents[2]
A, B, C = model("a", 3), model("b", 5), model("c", 4)


def test_models_of_equal_rows_are_left_as_they_are() -> None:
    plan = plan_vocabulary([model("a", 3), model("b", 3)], None)
    tensors = [torch.zeros(3, 2), torch.ones(3, 2)]
    assert (plan.rows, plan.changed, plan.warnings, plan.tokenizer) == (3, False, (), None)
    assert all(ours is given for ours, given in zip(plan.align(EMBEDDING, tensors), tensors, strict=True))


def test_a_model_may_pad_its_embedding_only_if_the_others_do() -> None:
    uneven = [ModelVocabulary(label, {EMBEDDING: 4, HEAD: 3}) for label in "ab"]
    assert not plan_vocabulary(uneven, None).changed
    with pytest.raises(IncompatibleModelsError, match="a has no single number of them"):
        plan_vocabulary([uneven[0], A], None, policy="truncate")


def test_differing_rows_are_refused_in_one_line_that_names_all() -> None:
    with pytest.raises(IncompatibleModelsError) as caught:
        plan_vocabulary([A, B, model("d", 3)], 0)
    assert str(caught.value) == (
        "'model.embed_tokens.weight' has 3 rows in a, d and 5 rows in b; "
        "choose --vocabulary base, truncate or largest, or set tokenizer_source (union, base or a model) in the recipe"
    )


def test_the_refusal_says_when_the_rows_are_only_padding() -> None:
    with pytest.raises(IncompatibleModelsError, match="tokenizers are the same, so the rows beyond them are padding"):
        plan_vocabulary([model("a", 3, "x y z"), model("b", 8, "x y z")], None)
    with pytest.raises(IncompatibleModelsError, match="5 rows in b; choose"):
        plan_vocabulary([model("a", 3, "x y z"), model("b", 5, "x y z t")], None)


def test_an_unknown_policy_is_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'truncate'"):
        plan_vocabulary([A], None, policy="truncat")


def test_base_cuts_and_fills_to_the_rows_of_the_base() -> None:
    models = [A, B, C]
    plan = plan_vocabulary(models, 2, policy="base")
    assert plan.rows == 4
    assert rows_of(plan, models) == [[0, 1, 2, 203], [100, 101, 102, 103], [200, 201, 202, 203]]
    assert plan.warnings == (
        "--vocabulary base: a has 3 rows and takes 1 of c",
        "--vocabulary base: b has 5 rows, its last 1 are dropped",
    )


def test_base_means_the_first_model_where_there_is_none() -> None:
    models = [C, A, B]
    assert rows_of(plan_vocabulary(models, None, policy="base"), models) == [
        [0, 1, 2, 3],
        [100, 101, 102, 3],
        [200, 201, 202, 203],
    ]


def test_truncate_keeps_the_rows_that_all_have_without_a_copy() -> None:
    models = [A, B, C]
    plan = plan_vocabulary(models, 1, policy="truncate")
    tensors = numbered(models)
    cut = plan.align(HEAD, tensors)
    assert [tensor[:, 0].tolist() for tensor in cut] == [[0, 1, 2], [100, 101, 102], [200, 201, 202]]
    assert [tensor.data_ptr() for tensor in cut] == [tensor.data_ptr() for tensor in tensors]
    assert cut[0] is tensors[0]


@pytest.mark.parametrize(
    ("base", "missing_of_a"),
    [(None, [(103 + 203) / 2, 104]), (2, [203, 104]), (1, [103, 104]), (0, [153, 104])],
    ids=str,
)
def test_largest_takes_missing_rows_of_the_base_or_their_mean(base: int | None, missing_of_a: list[float]) -> None:
    models = [A, B, C]
    plan = plan_vocabulary(models, base, policy="largest")
    assert rows_of(plan, models) == [
        [0, 1, 2, *missing_of_a],
        [100, 101, 102, 103, 104],
        [200, 201, 202, 203, missing_of_a[1]],
    ]


def test_largest_prefers_no_model_where_there_is_no_base() -> None:
    models = [C, A, B]
    assert rows_of(plan_vocabulary(models, None, policy="largest"), models)[1] == [100, 101, 102, (3 + 203) / 2, 204]


def test_largest_reports_where_rows_come_from() -> None:
    assert plan_vocabulary([A, B, C], 2, policy="largest").warnings == (
        "--vocabulary largest: a has 3 rows and takes 1 of c and 1 means over the models that have them",
        "--vocabulary largest: c has 4 rows and takes 1 means over the models that have them",
    )


def test_a_dropped_token_is_named() -> None:
    plan = plan_vocabulary([model("a", 3, "x y z"), model("b", 4, "x y z", "<pad>")], 0, policy="base")
    assert plan.warnings == ("--vocabulary base: b has 4 rows, its last 1 are dropped, among them that of '<pad>'",)


def test_a_copied_tokenizer_whose_tokens_have_no_row_is_reported() -> None:
    models = [model("a", 3, "x y z", "<pad> <end>"), model("b", 4, "x y z t")]
    plan = plan_vocabulary(models, 0, policy="base")
    assert plan.tokenizer is not None
    assert plan.tokenizer.index == 0
    assert plan.warnings[-1].startswith("2 tokens of the tokenizer of a, e.g. '<pad>', have no row there nor in the")
    fitting = plan_vocabulary([model("a", 5, "x y z", "<pad> <end>"), *models[1:]], 0, policy="base")
    assert not any("have no row" in line for line in fitting.warnings)


@pytest.mark.parametrize("policy", POLICIES)
def test_no_policy_acts_where_rows_agree(policy: str) -> None:
    assert not plan_vocabulary([A, A, A], 1, policy=policy).changed


@pytest.mark.parametrize(("policy", "index"), [("base", 1), ("truncate", 0), ("largest", 2)])
def test_the_tokenizer_comes_from_a_model_of_the_outputs_rows(policy: str, index: int) -> None:
    models = [model("a", 3, "x y z"), model("b", 4, "x y z t"), model("c", 5, "x y z t u")]
    plan = plan_vocabulary(models, 1, policy=policy)
    assert plan.tokenizer is not None
    assert (plan.tokenizer.index, plan.tokenizer.text) == (index, None)
    assert models[index].tokenizer is not None
    assert plan.tokenizer.folder == models[index].tokenizer.folder


def test_a_model_without_a_tokenizer_is_merged_all_the_same() -> None:
    plan = plan_vocabulary([model("a", 3), model("b", 3, "x y z")], 0)
    assert plan.tokenizer is not None
    assert (plan.tokenizer.index, plan.warnings) == (1, ())


@pytest.mark.parametrize(
    ("words", "example"),
    [
        ("x z y", "token 'y' is 1 in a and 2 in b"),
        ("x y t", "token 'z' is 2 in a and unknown to b"),
    ],
)
def test_equal_rows_of_other_tokens_are_a_warning_with_an_example(words: str, example: str) -> None:
    (warning,) = plan_vocabulary([model("a", 3, "x y z"), model("b", 3, words)], None).warnings
    assert warning == (
        f"{example}, so rows of one number mean different tokens and are merged all the same; "
        "tokenizer_source in the recipe matches rows by token"
    )


def test_a_token_of_only_one_model_is_a_warning_from_either_side() -> None:
    short, long = model("a", 4, "x y z"), model("b", 4, "x y z t")
    for pair in ([short, long], [long, short]):
        (warning,) = plan_vocabulary(pair, None).warnings
        assert warning.startswith("token 't' is 3 in b and unknown to a, so")


def test_tokens_without_a_row_are_no_warning() -> None:
    assert plan_vocabulary([model("a", 3, "x y z", "<pad>"), model("b", 3, "x y z", "<end>")], None).warnings == ()


def test_a_slice_without_the_row_that_a_policy_needs_is_refused() -> None:
    plan = plan_vocabulary([A, B, C], 1, policy="largest")
    assert plan.restrict([1, 0]).align(HEAD, [numbered([A, B])[1], numbered([A])[0]])[1][:, 0].tolist() == [
        *[0, 1, 2],
        *[103, 104],
    ]
    with pytest.raises(IncompatibleModelsError, match=r"needs row 4 of .*, but none of a, c may"):
        plan.restrict([0, 2])


def test_other_tensors_are_left_alone() -> None:
    plan = plan_vocabulary([A, B], 0, policy="base")
    tensors = [torch.zeros(3, 2), torch.zeros(5, 2)]
    assert plan.align("model.norm.weight", tensors)[1] is tensors[1]


def test_a_bias_of_the_head_is_aligned_like_its_weight() -> None:
    models = [ModelVocabulary(m.label, {**m.rows, "lm_head.bias": m.rows[HEAD]}) for m in (A, B, C)]
    plan = plan_vocabulary(models, None, policy="largest")
    biases = [tensor[:, 0].contiguous() for tensor in numbered(models)]
    assert [b.tolist() for b in plan.align("lm_head.bias", biases)] == rows_of(plan, models)


def test_mixed_dtypes_are_promoted() -> None:
    plan = plan_vocabulary([A, B], 1, policy="base")
    aligned = plan.align(HEAD, [torch.ones(3, 2, dtype=torch.bfloat16), torch.full((5, 2), 1 / 3)])
    assert [tensor.dtype for tensor in aligned] == [torch.float32] * 2
    assert aligned[0].tolist() == torch.tensor([[1.0] * 2] * 3 + [[1 / 3] * 2] * 2).tolist()


def test_planning_imports_no_torch() -> None:
    code = (
        "import sys; from mergeguard.mergers.vocabulary import plan_vocabulary;"
        "from mergeguard.checkpoints.tokenizers import ModelVocabulary as M;"
        "plan_vocabulary([M('a', {'x': 3}), M('b', {'x': 4})], 0, policy='base');"
        "print(sorted({'torch', 'transformers', 'tokenizers'} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"

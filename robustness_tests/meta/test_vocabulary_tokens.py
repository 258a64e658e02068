"""Embedding rows that follow their tokens: which row each model gives to each token of the output's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeguard.errors import IncompatibleModelsError, ParameterError
from mergeguard.mergers.recipe import load_recipe
from mergeguard.mergers.vocabulary import (
    TokenizerSettings,
    TokenRow,
    TokenSetting,
    VocabularyPlan,
    plan_vocabulary,
    tokenizer_settings,
)
from robustness_tests.meta.vocabularies import HEAD, model, numbered, rows_of, tokens_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mergeguard.checkpoints.tokenizers import ModelVocabulary


def by_token(
    models: Sequence[ModelVocabulary], chosen: str | TokenizerSettings, base: int | None = 0, **other: Any
) -> VocabularyPlan:
    return plan_vocabulary(
        models, base, settings=TokenizerSettings(chosen) if isinstance(chosen, str) else chosen, **other
    )


def test_base_gives_every_model_the_rows_of_the_bases_tokens() -> None:
    models = [model("a", 4, "x y z", "<p>"), model("b", 4, "z x t", "<p>"), model("c", 5, "z x t y", "<p>")]
    plan = by_token(models, "base")
    assert plan.rows == 4
    assert rows_of(plan, models) == [[0, 1, 2, 3], [101, 1, 100, 103], [201, 203, 200, 204]]
    assert plan.tokenizer is not None
    assert (plan.tokenizer.index, plan.tokenizer.text) == (0, None)


def test_the_same_added_text_under_other_ids_keeps_its_row() -> None:
    models = [model("a", 4, "x y", "<p> <q>"), model("b", 4, "x y", "<q> <p>")]
    assert rows_of(by_token(models, "union"), models) == [[0, 1, 2, 3], [100, 101, 103, 102]]


def test_a_union_adds_ordinary_tokens_before_added_ones_in_the_recipes_order() -> None:
    models = [model("a", 3, "x y", "<p>"), model("b", 4, "x t u", "<q>"), model("c", 4, "v x", "<q> <r>")]
    plan = by_token(models, "union")
    assert tokens_of(plan) == {"x": 0, "y": 1, "<p>": 2, "t": 3, "u": 4, "v": 5, "<q>": 6, "<r>": 7}
    assert rows_of(plan, models) == [
        [0, 1, 2, 101, 102, 200, (103 + 202) / 2, 203],
        [100, 1, 2, 101, 102, 200, 103, 203],
        [201, 1, 2, 101, 102, 200, 202, 203],
    ]
    become = "become added tokens of the union, which are matched as they stand before any merge of the tokenizer"
    assert plan.warnings == (
        f"2 ordinary tokens of b, e.g. 't', {become}",
        f"1 ordinary tokens of c, e.g. 'v', {become}",
    )


def test_without_a_base_a_token_of_several_models_is_their_mean() -> None:
    models = [model("a", 2, "x y"), model("b", 2, "x t"), model("c", 2, "x y")]
    assert rows_of(by_token(models, "base", None), models)[1] == [100, (1 + 201) / 2]
    assert rows_of(by_token(models, "base", 0), models)[1] == [100, 1]
    assert rows_of(by_token(models, "base", 1), models)[0] == [0, 101]


def test_added_tokens_with_other_settings_are_reported() -> None:
    first, second = model("a", 2, "x", "<p>"), model("b", 2, "x", "<p>")
    assert second.tokenizer is not None
    second.tokenizer.document["added_tokens"][0]["lstrip"] = True
    assert by_token([first, second], "union").warnings == (
        "token '<p>' is added with other settings in b; the first model's hold",
    )


def test_a_model_gives_the_vocabulary_whether_it_is_merged_or_not() -> None:
    models = [model("a", 2, "x y"), model("b", 3, "y x z")]
    named = by_token(models, "b")
    assert rows_of(named, models) == [[1, 0, 102], [100, 101, 102]]
    assert named.tokenizer is not None
    assert (named.tokenizer.index, named.tokenizer.folder) == (1, Path("y x z"))
    given = by_token(models, "d", donor=model("d", 9, "t x"))
    assert rows_of(given, models) == [[0, 0], [0, 101]]
    assert given.warnings == ("1 tokens of the output, e.g. 't', are in no model: their rows are zero",)
    assert given.tokenizer is not None
    assert (given.tokenizer.index, given.tokenizer.folder) == (None, Path("t x"))
    with pytest.raises(ParameterError, match="the tokenizer's source 'd' is not open"):
        by_token(models, "d")


def test_padded_rows_are_dropped_where_tokens_decide() -> None:
    models = [model("a", 8, "x y z"), model("b", 4, "y x z")]
    assert rows_of(by_token(models, "union"), models) == [[0, 1, 2], [101, 100, 102]]


def test_a_token_beyond_the_models_vocabulary_has_no_row() -> None:
    cut = model("a", 3, "x y z", "<pad>")  # <pad> was added without resizing the model
    other = model("b", 4, "x y z", "<end>")
    plan = by_token([cut, other], "base")
    assert (plan.rows, tokens_of(plan)) == (3, {"x": 0, "y": 1, "z": 2})
    plan = by_token([cut, other], "union")
    assert tokens_of(plan) == {"x": 0, "y": 1, "z": 2, "<end>": 3}
    assert rows_of(plan, [cut, other]) == [[0, 1, 2, 103], [100, 101, 102, 103]]


def test_padding_is_the_mean_of_the_models_own_rows() -> None:
    models = [model("a", 3, "x y z"), model("b", 3, "t z x")]
    plan = by_token(models, TokenizerSettings("base", {}, 4))
    assert plan.rows == 4
    assert rows_of(plan, models) == [[0, 1, 2, 1], [102, 1, 101, (102 + 1 + 101) / 3]]
    assert by_token(models, TokenizerSettings("base", {}, 3)).rows == 3


def test_holes_of_a_vocabulary_are_filled_as_padding_is() -> None:
    holed = model("a", 4, "x y")
    assert holed.tokenizer is not None
    holed.tokenizer.document["model"]["vocab"] = {"x": 0, "y": 3}
    assert rows_of(by_token([holed], "base"), [holed]) == [[0, 1.5, 1.5, 3]]


def test_identical_vocabularies_are_not_copied() -> None:
    models = [model("a", 3, "x y z"), model("b", 3, "x y z")]
    tensors = numbered(models)
    for source in ("base", "union", "b"):
        plan = by_token(models, source)
        assert not plan.changed
        assert plan.align(HEAD, tensors)[1] is tensors[1]


def test_tokens_may_take_the_row_of_a_model_of_another_token_of_an_id_or_zero() -> None:
    models = [model("a", 4, "x y", "<p> <q>"), model("b", 3, "x y", "<q>"), model("c", 2, "y x")]
    tokens = {
        "<q>": TokenSetting(TokenRow("b")),
        "<new>": TokenSetting(TokenRow("c", "x")),
        "y": TokenSetting("zero", force=True),
        "<p>": TokenSetting(TokenRow("b", token_id=2), force=True),
        "x": TokenSetting("zero"),  # not forced, and all have it
    }
    plan = by_token(models, TokenizerSettings("base", tokens))
    assert tokens_of(plan) == {"x": 0, "y": 1, "<p>": 2, "<q>": 3, "<new>": 4}
    assert rows_of(plan, models) == [[0, 0, 102, 3, 201], [100, 0, 102, 102, 201], [201, 0, 102, 102, 201]]
    assert plan.warnings == ()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (TokenSetting(), "needs a source"),
        (TokenSetting(TokenRow("d")), "takes the row of 'd', which is not merged here; one of a, b"),
        (TokenSetting(TokenRow("b")), "'<p>' takes the row of 'b', which lacks a row of that token"),
        (TokenSetting(TokenRow("b", "t")), "lacks a row of token 't'"),
        (TokenSetting(TokenRow("b", token_id=2)), "lacks a row 2"),
        (TokenSetting(TokenRow("b", token_id=-1)), "lacks a row -1"),
    ],
    ids=str,
)
def test_a_token_whose_row_is_nowhere_is_refused(setting: TokenSetting, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        by_token([model("a", 3, "x y", "<p>"), model("b", 2, "x y")], TokenizerSettings("base", {"<p>": setting}))


@pytest.mark.parametrize("source", ["union", "base", "a"])
def test_matching_by_token_needs_a_tokenizer_of_every_model(source: str) -> None:
    with pytest.raises(IncompatibleModelsError, match="matches vocabularies by token, but b has no tokenizer"):
        by_token([model("a", 3, "x y z"), model("b", 3)], source)
    with pytest.raises(IncompatibleModelsError, match="but d has no tokenizer"):
        by_token([model("a", 3, "x y z")], "d", donor=model("d", 3))


def test_a_slice_reads_only_some_of_the_models() -> None:
    models = [model("a", 2, "x y"), model("b", 2, "x t"), model("c", 2, "t y")]
    plan = by_token(models, "union")
    tensors = numbered(models)
    part = plan.restrict([2, 1])
    assert [t[:, 0].tolist() for t in part.align(HEAD, [tensors[2], tensors[1]])] == [[100, 201, 200], [100, 201, 101]]
    assert plan.restrict([0]).align(HEAD, tensors[:1])[0][:, 0].tolist() == [0, 1, 0]


RECIPE = """\
models: [{model: a}, {model: b}]
merge_method: linear
parameters: {weight: 1}
"""


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("tokenizer_source: union", TokenizerSettings("union")),
        ("tokenizer_source: {model: {path: b}}", TokenizerSettings("b")),
        ("tokenizer: {}", TokenizerSettings("union")),
        ("tokenizer: {source: base, tokens: null}", TokenizerSettings("base")),
        ("tokenizer: {source: b, pad_to_multiple_of: 8}", TokenizerSettings("b", {}, 8)),
    ],
)
def test_settings_are_those_of_the_recipe(tmp_path: Path, written: str, expected: TokenizerSettings) -> None:
    assert settings_of(tmp_path, written) == expected


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("", TokenSetting()),
        ("{source: null}", TokenSetting()),
        ("{force: true}", TokenSetting(None, True)),
        ("{source: b}", TokenSetting(TokenRow("b"))),
        ("{source: {model: b, lora: c}, force: true}", TokenSetting(TokenRow("b+c"), True)),
        ("{source: {kind: zero}, force: false}", TokenSetting("zero")),
        ("{source: {kind: zero}, force: true}", TokenSetting("zero", True)),
        ("{source: {kind: model_token, model: b, token: y}}", TokenSetting(TokenRow("b", "y"))),
        ("{source: {kind: model_token, model: b, token: '3'}}", TokenSetting(TokenRow("b", "3"))),
        ("{source: {kind: model_token, model: {model: b}, token_id: 0}}", TokenSetting(TokenRow("b", None, 0))),
    ],
)
def test_each_kind_of_token_arrives_from_the_recipe(tmp_path: Path, written: str, expected: TokenSetting) -> None:
    assert settings_of(tmp_path, f"tokenizer:\n  tokens:\n    '<x>': {written}\n") == TokenizerSettings(
        "union", {"<x>": expected}
    )


def settings_of(tmp_path: Path, written: str) -> TokenizerSettings:
    path = tmp_path / "recipe.yml"
    path.write_text(RECIPE + written)
    recipe = load_recipe(path)
    assert recipe.tokenizer is not None
    return tokenizer_settings(recipe.tokenizer)


words = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=6, unique=True)


@given(
    vocabularies=st.lists(st.tuples(words, st.integers(0, 2)), min_size=1, max_size=4),
    source=st.sampled_from(["union", "base", "1"]),
    base=st.none() | st.just(0),
    pad=st.none() | st.integers(1, 4),
)
@settings(max_examples=60)
def test_every_row_follows_the_rules_written_out_token_by_token(
    vocabularies: list[tuple[list[str], int]], source: str, base: int | None, pad: int | None
) -> None:
    models = [
        model(str(index), len(tokens) + padded, " ".join(tokens)) for index, (tokens, padded) in enumerate(vocabularies)
    ]
    settings_ = TokenizerSettings("base" if source == "1" and len(models) < 2 else source, {}, pad)
    plan = plan_vocabulary(models, base, settings=settings_)
    assert plan.tokenizer is not None
    wanted = models[plan.tokenizer.index or 0].tokens if plan.tokenizer.text is None else tokens_of(plan)
    tensors = [tensor[:, 0].tolist() for tensor in numbered(models)]
    maps = [m.tokens or {} for m in models]
    expected: list[list[float]] = []
    for position, tokens in enumerate(maps):
        column: list[float] = []
        for token in sorted(wanted, key=wanted.__getitem__):
            having = [tensors[other][m[token]] for other, m in enumerate(maps) if token in m]
            if token in tokens:
                column.append(tensors[position][tokens[token]])
            elif base is not None and token in maps[base]:
                column.append(tensors[base][maps[base][token]])
            else:
                column.append(sum(having) / len(having) if having else 0.0)
        named = len(column)
        while len(column) % (pad or 1):
            column.append(sum(column[:named]) / named)
        expected.append(column)
    found = rows_of(plan, models)
    assert [len(column) for column in found] == [plan.rows] * len(models)
    assert found == [pytest.approx(column, rel=1e-5) for column in expected]

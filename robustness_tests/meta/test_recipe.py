"""Recipes are read as mergekit reads them, and every mistake is one line that says where."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeguard.errors import MergeguardError
from mergeguard.mergers.marked_yaml import MAX_BYTES
from mergeguard.mergers.recipe import Recipe, Token, load_recipe
from mergeguard.mergers.settings import Choice, Setting

RECIPES = Path(__file__).parent / "recipes"
DUPLICATED = ("dare_task.yml", "dare_ties.yml")
VALID = """\
models:
  - model: a
    parameters:
      weight: 0.5
      density: [0.2, 1]
  - model: b+lora
    parameters:
      weight:
        - filter: mlp
          value: 1e-5
        - value: 0.3
merge_method: ties
base_model: base
parameters:
  normalize: true
dtype: float32
"""
SLICES = """\
slices:
  - sources:
      - model: a
        layer_range: [0, 2]
      - model: b
        layer_range: [1, 3]
    base_model: b
    parameters:
      t: 0.5
merge_method: slerp
base_model: a
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path("recipe.yml")


def load(path: Path, text: str | bytes, **options: bool) -> Recipe:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_recipe(path, **options)


def problem(path: Path, text: str | bytes) -> str:
    with pytest.raises(MergeguardError) as caught:
        load(path, text)
    message = str(caught.value)
    assert message.isprintable()
    return message


def test_a_recipe_keeps_what_is_written(write: Path) -> None:
    recipe = load(write, VALID)
    assert recipe.text == VALID
    assert recipe.source == write
    assert (recipe.merge_method, recipe.base_model, recipe.dtype, recipe.out_dtype) == ("ties", "base", "float32", None)
    assert recipe.references == ("base", "a", "b+lora")
    assert [source.line for source in recipe.models] == [2, 6]
    assert recipe.models[0].settings["density"] == Setting((Choice(None, (0.2, 1), 5),), 5)
    assert recipe.models[1].settings["weight"].choices == (Choice("mlp", ("1e-5",), 10), Choice(None, (0.3,), 11))
    assert recipe.settings == {"normalize": Setting((Choice(None, (True,), 15),), 15)}
    assert recipe.lines == {"models": 1, "merge_method": 12, "base_model": 13, "parameters": 14, "dtype": 16}


def test_slices_are_read(write: Path) -> None:
    (part,) = load(write, SLICES).slices
    assert [(source.model, source.layers) for source in part.sources] == [("a", (0, 2)), ("b", (1, 3))]
    assert part.base_model == "b"
    assert part.settings["t"].choices[0].values == (0.5,)


@pytest.mark.parametrize("name", ["dare_task.yml", "dare_ties.yml", "task.yml", "ties.yml"])
def test_the_papers_recipes_load(name: str) -> None:
    recipe = load_recipe(RECIPES / name, allow_duplicate_keys=name in DUPLICATED)
    assert recipe.base_model == "/path/Llama-2-7b-hf"
    assert [source.model for source in recipe.models] == ["/path/Llama-2-7b-chat-hf", "/path/WizardMath-7B-V1.0"]


@pytest.mark.parametrize("name", DUPLICATED)
def test_keys_given_twice_are_refused_with_both_lines(name: str) -> None:
    with pytest.raises(MergeguardError, match=rf"{name}:2: 'models' is given twice, first on line 1; YAML would"):
        load_recipe(RECIPES / name)


def test_of_keys_given_twice_the_last_one_wins_if_allowed(write: Path) -> None:
    text = VALID.replace("      weight: 0.5\n", "      weight: 0.5\n      weight: 0.25\n")
    assert "recipe.yml:5: 'weight' is given twice, first on line 4" in problem(write, text)
    recipe = load(write, text, allow_duplicate_keys=True)
    assert recipe.models[0].settings["weight"].choices[0].values == (0.25,)


def test_aliases_and_merge_keys_work(write: Path) -> None:
    text = (
        "models:\n  - model: a\n    parameters: &shared {weight: 0.5, density: 0.4}\n"
        "  - model: b\n    parameters: *shared\n"
        "  - model: c\n    parameters:\n      <<: *shared\n      density: 0.1\nmerge_method: ties\nbase_model: base\n"
    )
    one, two, three = load(write, text).models
    assert one.settings["weight"].choices[0].values == two.settings["weight"].choices[0].values == (0.5,)
    assert {name: item.choices[0].values for name, item in three.settings.items()} == {
        "weight": (0.5,),
        "density": (0.1,),
    }


def test_tokenizer_settings_are_read(write: Path) -> None:
    text = VALID + (
        "tokenizer:\n  source: union\n  pad_to_multiple_of: 8\n  tokens:\n    <s>: {source: a, force: true}\n"
        "    <x>: {source: {kind: zero}}\n    <y>: {source: {kind: model_token, model: a, token_id: 3}}\n    <z>: {}\n"
    )
    tokenizer = load(write, text).tokenizer
    assert tokenizer is not None
    assert (tokenizer.source, tokenizer.pad_to_multiple_of, tokenizer.line) == ("union", 8, 17)
    assert tokenizer.tokens == {
        "<s>": Token("model", 21, model="a", force=True),
        "<x>": Token("zero", 22),
        "<y>": Token("model_token", 23, model="a", token_id=3),
        "<z>": Token("default", 24),
    }
    short = load(write, VALID + "tokenizer_source: base\nchat_template: chatml\n")
    assert short.tokenizer is not None
    assert (short.tokenizer.source, short.chat_template) == ("base", "chatml")


def test_models_may_be_written_as_mappings(write: Path) -> None:
    text = VALID.replace("model: b+lora", "model: {model: {path: b, revision: v1}, lora: lora}")
    assert load(write, text).models[1].model == "b@v1+lora"


def test_a_byte_order_mark_is_no_part_of_the_text(write: Path) -> None:
    assert load(write, b"\xef\xbb\xbf" + VALID.encode()).text == VALID


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("merge_method", "merge_metod", "12: unknown key of the recipe 'merge_metod'; did you mean 'merge_method'?"),
        ("  - model: a", "  - modle: a", "2: unknown key of models[0] 'modle'; did you mean 'model'?"),
        (
            "    parameters:\n      weight: 0.5",
            "    weight: 0.5\n    parameters:",
            "3: unknown key of models[0] 'weight'",
        ),
        ("merge_method: ties\n", "", "recipe.yml: the recipe has no 'merge_method'; add one"),
        ("merge_method: ties", "merge_method:", "12: the recipe has no 'merge_method'; add one"),
        ("merge_method: ties", "merge_method: 3", "12: merge_method is 3, expected text; put it in quotes"),
        ("merge_method: ties", "merge_method: [ties]", "12: merge_method is a list, expected text"),
        ("merge_method: ties", "merge_method: ''", "12: merge_method is empty"),
        ("dtype: float32", "dtype: flot32", "16: unknown dtype 'flot32'; did you mean 'float32'?"),
        ("dtype: float32", "dtype: int64", "16: unknown dtype 'int64'"),
        ("dtype: float32", "modules: {}", "16: 'modules' is not supported"),
        (
            "dtype: float32",
            "slices: [{sources: [{model: a, layer_range: [0, 1]}]}]",
            "16: the recipe has both 'models'",
        ),
        ("dtype: float32", "tokenizer_source: a\ntokenizer: {}", "17: the recipe has both 'tokenizer' and"),
        ("dtype: float32", "tokenizer: {tokens: {x: {source: {kind: zro}}}}", "kind is 'zro', expected zero or model_"),
        (
            "dtype: float32",
            "tokenizer: {tokens: {x: {source: {kind: model_token, model: a}}}}",
            "needs 'model' and one",
        ),
        ("dtype: float32", "tokenizer: {pad_to_multiple_of: 0}", "is 0, expected a whole number from 1"),
        (
            "dtype: float32",
            "tokenizer: {pad_to_multiple: 8}",
            "16: unknown key of tokenizer 'pad_to_multiple'; did you mean 'pad_to_multiple_of'?",
        ),
        ("  - model: a\n", "  - model:\n", "2: models[0].model is empty, expected text or a mapping"),
        ("  - model: a\n", "  -\n", "3: models[0] has no 'model'; add it"),
        ("model: a\n", "model: a+b+c\n", "2: cannot read the model 'a+b+c'; expected MODEL, MODEL@REVISION or"),
        ("model: a\n", "model: a@b@c\n", "2: cannot read the model 'a@b@c'"),
        ("model: a\n", "model: +a\n", "2: cannot read the model '+a'"),
        ("model: a\n", 'model: "a\\nb"\n', "2: the model 'a\\nb' holds control characters"),
        ("model: a\n", "model: other.yaml\n", "2: 'other.yaml' is a recipe, not a model; merge that recipe first"),
        ("weight: 0.5", "weight:", "4: models[0].parameters.weight is empty, expected"),
        ("weight: 0.5", "weight: []", "4: parameter 'weight' is an empty list"),
        ("weight: 0.5", "weight: [[1]]", "4: parameter 'weight' is a list; expected a value, a list"),
        ("weight: 0.5", "weight: [{value: 1}, 2]", "4: parameter 'weight' mixes values and filters"),
        ("weight: 0.5", "weight: {filter: mlp}", "4: parameter 'weight' has a filter without a value"),
        ("weight: 0.5", "weight: {filtr: mlp, value: 1}", "4: unknown key 'filtr' in parameter 'weight'"),
        ("weight: 0.5", "weight: {filter: 1, value: 1}", "4: filter 1 of parameter 'weight' is not text"),
        ("weight: 0.5", "weight: .nan", "4: '.nan' is not a finite number"),
        ("weight: 0.5", "weight: -.INF", "4: '-.INF' is not a finite number"),
        ("weight: 0.5", "weight: 1.0e+999", "4: '1.0e+999' is not a finite number"),
        ("weight: 0.5", "weight: !!python/object:os.system x", "4: tag 'tag:yaml.org,2002:python/object:os.system'"),
        ("weight: 0.5", "weight: !env x", "4: tag '!env': a recipe is plain data; remove the tag"),
        ("      weight: 0.5", "\tweight: 0.5", "4: not valid YAML: a tab where YAML allows only spaces"),
        (
            "dtype: float32",
            "dtype\nx: 1",
            "16: not valid YAML: while scanning a simple key could not find expected ':'",
        ),
        ("      weight: 0.5", "      weight: [0.5", "not valid YAML: while parsing a flow"),
        ("weight: 0.5", "weight: *nobody", "4: alias *nobody names no anchor above it"),
        ("weight: 0.5", "weight: &me [*me]", "4: alias *me contains itself"),
        ("weight: 0.5", "? [1]\n      : 2", "4: a key must be plain text"),
        ("dtype: float32", "<<: 3", "16: '<<' must name a mapping or a list of mappings"),
        ("dtype: float32", "---\nmodels: []", "16: a second document starts here"),
        ("dtype: float32", "dtype: \x07", "16: character '\\x07' is not allowed in YAML"),
        (VALID, "", "recipe.yml: is empty"),
        (VALID, "# nothing\n", "recipe.yml: is empty"),
        (VALID, "just text", "1: the recipe is 'just text', expected a mapping"),
        (VALID, "[]", "1: the recipe is an empty list, expected a mapping"),
        (VALID, "merge_method: ties", "recipe.yml: the recipe has neither 'models' nor 'slices'; add one"),
        (VALID, "merge_method: ties\nmodels:", "recipe.yml: the recipe has neither"),
        (VALID, "merge_method: ties\nmodels: []", "2: models is empty"),
        (VALID, "merge_method: ties\nmodels: {a: 1}", "2: models is a mapping, expected a list"),
    ],
)
def test_a_mistake_is_named_with_its_line(write: Path, old: str, new: str, message: str) -> None:
    assert old in VALID
    text = VALID.replace(old, new, 1)
    assert message in problem(write, text)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[0, 2]", "[0]", "4: slices[0].sources[0].layer_range is a list, expected [first, stop], two whole numbers"),
        ("[0, 2]", "[0, 2.5]", "4: slices[0].sources[0].layer_range[1] is 2.5, expected a whole number"),
        ("        layer_range: [0, 2]\n", "", "3: slices[0].sources[0] has no 'layer_range'; add it"),
        ("    base_model: b", "    residual_weight: 1", "7: 'residual_weight' is not supported"),
        ("    base_model: b", "    base: b", "7: unknown key of slices[0] 'base'; did you mean 'base_model'?"),
    ],
)
def test_a_mistake_in_a_slice_is_named_with_its_line(write: Path, old: str, new: str, message: str) -> None:
    assert message in problem(write, SLICES.replace(old, new, 1))


def test_the_first_of_several_mistakes_is_named(write: Path) -> None:
    assert problem(write, VALID.replace("merge_method", "zzz").replace("model: b", "mdl: b")).startswith(
        "recipe.yml:6:"
    )


def test_bytes_that_are_not_utf8_are_named_with_their_line(write: Path) -> None:
    assert "recipe.yml:2: byte 0xe9 is not UTF-8" in problem(write, b"# x\nmodels: \xe9\n")
    assert "recipe.yml:1: byte 0xff is not UTF-8" in problem(write, VALID.encode("utf-16"))


def test_what_is_no_small_file_is_refused(write: Path) -> None:
    assert "is larger than 1,000,000 bytes" in problem(write, "#" * (MAX_BYTES + 1))
    with pytest.raises(MergeguardError, match=r"nowhere\.yml: does not exist"):
        load_recipe(Path("nowhere.yml"))
    with pytest.raises(MergeguardError, match="is not a file"):
        load_recipe(Path())
    os.mkfifo("pipe.yml")
    with pytest.raises(MergeguardError, match="is not a file"):
        load_recipe(Path("pipe.yml"))


LAUGHS = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "recipe.yml:5: aliases expand to more than 100,000 values"),
        (f"models: {'[' * 400_000}", "recipe.yml:1: nested more than 50 levels deep"),
        ("- " * 400_000, "nested more than 50 levels deep"),
        ("? " * 400_000, "a key must be plain text"),
        ("a: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 60)), "nested more than 50 levels"),
        (f"models: [{'a,' * 150_000}]", "more than 100,000 values"),
        (f"merge_method: {'9' * 900_000}", "neither 'models' nor 'slices'"),
        (f"models: {'1:' * 400_000}1", "models is '1:1:"),
        (f'merge_method: "{"x" * 900_000}', "not valid YAML"),
    ],
    ids=["laughs", "brackets", "dashes", "questions", "alias-chain", "items", "digits", "base-60", "text"],
)
def test_hostile_files_are_refused_soon(write: Path, text: str, message: str) -> None:
    found = problem(write, text)
    assert message in found
    assert len(found) < 400


MUTATIONS = st.tuples(st.integers(0, 2000), st.integers(0, 30), st.text(max_size=8) | st.sampled_from([
    "&a ", "*a", "<<: ", "!!int ", "- ", ": ", "[", "{", "}", "'", '"', "|\n", "\t", "\n", "0x", "1e400", "null",
    "---\n",     "model", "slices:", ".inf", "~", "? ", "%YAML 9.9\n", "12:30:00", "2001-01-01", "\ud7ff", "models:\n",
]))  # fmt: skip


@settings(max_examples=100)
@given(original=st.sampled_from([VALID, SLICES]), mutations=st.lists(MUTATIONS, min_size=1, max_size=4))
def test_whatever_is_written_a_recipe_loads_or_one_line_says_why_not(
    tmp_path_factory: pytest.TempPathFactory, original: str, mutations: list[tuple[int, int, str]]
) -> None:
    text = original
    for start, length, insert in mutations:
        kept = start % (len(text) + 1)
        text = text[:kept] + insert + text[kept + length :]
    path = tmp_path_factory.getbasetemp() / "mutated.yml"
    path.write_bytes(text.encode())
    with contextlib.suppress(MergeguardError):
        recipe = load_recipe(path)
        assert bool(recipe.models) != bool(recipe.slices)
        return
    with pytest.raises(MergeguardError) as caught:
        load_recipe(path)
    assert str(caught.value).isprintable()
    assert str(caught.value).startswith(f"{path}:")

"""Merges of models whose vocabularies differ, from files to files: each token keeps its own embedding."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergeguard.checkpoints.manifest import check_manifest
from mergeguard.errors import IncompatibleModelsError, MergeguardError
from mergeguard.mergers import merge_models, parse_merger
from mergeguard.mergers.merge import Merged, Options, merge_checkpoints
from robustness_tests.meta.checkpoints_on_disk import State, family, resized, save_model, write_recipe, write_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
VOCABULARIES = {
    # words, added tokens, embedding rows
    "b": ("<u> a b c d e f g h i j k l m", "<s> <pad>", 16),
    "x": ("<u> a b c d e f g h i j k l m", "<s> <pad> <q>", 17),
    "y": ("<u> b a d c e f g h i j k l n o p", "<pad> <s> <r>", 24),
}
DONOR = ("<u> m n a b", "<pad> <z>")


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """A base of 16 rows, and models of 17 and 24 with other tokenizers."""
    return write_models(tmp_path)


def write_models(tmp_path: Path, *, tied: bool = False, dtype: torch.dtype = torch.float32) -> list[Path]:
    folders = []
    for (name, (words, added, rows)), state in zip(VOCABULARIES.items(), family(2, dtype=dtype), strict=True):
        folder = save_model(
            tmp_path / name,
            resized(state, rows, tied=tied),
            vocab_size=rows,
            tie_word_embeddings=tied,
            dtype=str(dtype)[6:],
        )
        write_tokenizer(folder, words, added, bos_token="<s>", pad_token="<pad>")  # noqa: S106 - tokens of a tokenizer
        folders.append(folder)
    return folders


def write_donor(folder: Path) -> Path:
    """A model that is not merged: only its tokenizer counts."""
    save_model(folder, resized(family(0, seed=9)[0], 7), vocab_size=7)
    write_tokenizer(folder, *DONOR)
    return folder


def merge(
    tmp_path: Path, models: list[Path], method: str = "linear", options: Options | None = None, **more: Any
) -> Merged:
    """Merge the models with weights 0.75 and 0.25 into `out`."""
    weights = [0.75, 0.25] if len(models) == 3 else [1.0]
    each = {"density": 0.4} if "ties" in method else {}
    recipe = write_recipe(
        tmp_path / "recipe.yml", method, models[1:], base=models[0] if method != "linear" else None, **more
    )
    written = json.loads(recipe.read_text())
    for entry, weight in zip(written.get("models", ()), weights, strict=True):
        entry["parameters"] = {"weight": weight, **each}
    recipe.write_text(json.dumps(written))
    return merge_checkpoints(recipe, tmp_path / "out", options)


def state_of(folder: Path) -> State:
    return load_file(folder / "model.safetensors")


def tokens_of(folder: Path) -> dict[str, int]:
    return dict(AutoTokenizer.from_pretrained(folder).get_vocab())


def rows_by_token(folder: Path, name: str = EMBEDDING) -> State:
    tensor = state_of(folder)[name]
    return {token: tensor[index] for token, index in tokens_of(folder).items() if index < len(tensor)}


def check_usable(out: Path, rows: int) -> None:
    """The merged model loads, its config and tokenizer fit its rows, and it computes."""
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.config.vocab_size == rows
    assert model.get_input_embeddings().weight.shape[0] == model.get_output_embeddings().weight.shape[0] == rows
    assert len(tokenizer) <= rows
    assert max(tokenizer.get_vocab().values()) < rows
    assert model(**tokenizer("<s> a b c zzz", return_tensors="pt")).logits.shape[-1] == rows
    assert check_manifest(out) == []


def test_differing_rows_are_refused_and_the_policies_named_and_nothing_is_left(
    tmp_path: Path, models: list[Path]
) -> None:
    with pytest.raises(IncompatibleModelsError) as caught:
        merge(tmp_path, models, "task_arithmetic")
    message = str(caught.value)
    for part in (
        "16 rows in",
        "17 rows in",
        "24 rows in",
        "--vocabulary base, truncate or largest",
        "tokenizer_source",
    ):
        assert part in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "recipe.yml", "x", "y"]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("policy", "rows", "tokenizer"), [("base", 16, "b"), ("truncate", 16, "b"), ("largest", 24, "y")]
)
def test_a_policy_matches_rows_by_number(tmp_path: Path, policy: str, rows: int, tokenizer: str, tied: bool) -> None:
    models = write_models(tmp_path, tied=tied)
    merged = merge(tmp_path, models, "task_arithmetic", Options(vocabulary=policy))
    out = tmp_path / "out"
    check_usable(out, rows)
    assert (out / "tokenizer.json").read_bytes() == (tmp_path / tokenizer / "tokenizer.json").read_bytes()
    assert (HEAD in state_of(out)) != tied
    b, x, y = (state_of(model)[EMBEDDING] for model in models)
    found = state_of(out)[EMBEDDING]
    assert torch.allclose(found[:16], b + 0.75 * (x[:16] - b) + 0.25 * (y[:16] - b), atol=1e-6)
    if policy == "largest":  # row 16 of the base is the mean of those that have it, and further ones are y's
        mean = (x[16] + y[16]) / 2
        assert torch.allclose(found[16], mean + 0.75 * (x[16] - mean) + 0.25 * (y[16] - mean), atol=1e-6)
        assert torch.allclose(found[17:], y[17:], atol=1e-6)
    assert any("its last 8 are dropped" in line for line in merged.warnings) == (policy != "largest")
    assert any("rows of one number mean different tokens" in line for line in merged.warnings)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("source", ["base", "union", "merged", "donor"])
def test_a_token_of_all_models_is_the_merge_of_its_own_rows(tmp_path: Path, source: str, tied: bool) -> None:
    models = write_models(tmp_path, tied=tied)
    named = {"merged": str(models[2]), "donor": str(write_donor(tmp_path / "d"))}.get(source, source)
    merge(tmp_path, models, "task_arithmetic", tokenizer_source=named)
    out = tmp_path / "out"
    expected = {
        "base": [*VOCABULARIES["b"][0].split(), "<s>", "<pad>"],
        "union": [*VOCABULARIES["b"][0].split(), "<s>", "<pad>", "n", "o", "p", "<q>", "<r>"],
        "merged": [*VOCABULARIES["y"][0].split(), "<pad>", "<s>", "<r>"],
        "donor": ["<u>", "m", "n", "a", "b", "<pad>", "<z>"],
    }[source]
    found = tokens_of(out)
    assert sorted(found, key=found.__getitem__) == expected
    check_usable(out, len(expected))
    for name in (EMBEDDING,) if tied else (EMBEDDING, HEAD):
        ours = rows_by_token(out, name)
        b, x, y = (rows_by_token(model, name) for model in models)
        shared = b.keys() & x.keys() & y.keys() & ours.keys()
        assert {"<u>", "a", "b", "<pad>"} <= shared
        for token in shared:
            merged = b[token] + 0.75 * (x[token] - b[token]) + 0.25 * (y[token] - b[token])
            assert torch.allclose(ours[token], merged, atol=1e-6), token
        for token, only in (("<q>", x), ("n", y), ("<r>", y)):
            if token in ours:  # the others take the row of the only model that has it
                assert torch.allclose(ours[token], only[token], atol=1e-6), token


def test_a_token_of_the_donor_alone_is_zero_and_said(tmp_path: Path, models: list[Path]) -> None:
    merged = merge(tmp_path, models, tokenizer_source=str(write_donor(tmp_path / "d")))
    assert rows_by_token(tmp_path / "out")["<z>"].count_nonzero() == 0
    assert any("'<z>', are in no model: their rows are zero" in line for line in merged.warnings)


def test_no_older_format_of_the_vocabulary_stands_beside_a_built_tokenizer(tmp_path: Path, models: list[Path]) -> None:
    (models[0] / "vocab.json").write_text(json.dumps({"a": 0}))
    (models[0] / "added_tokens.json").write_text(json.dumps({"<pad>": 99}))
    (models[0] / "special_tokens_map.json").write_text(json.dumps({"mask_token": "<stale>"}))
    settings = json.loads((models[0] / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] = {
        "14": {"content": "<s>", "special": True},
        "15": {"content": "<pad>", "special": True},
    }
    (models[0] / "tokenizer_config.json").write_text(json.dumps(settings))
    merge(tmp_path, models, "task_arithmetic", tokenizer_source="union")
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir() if "vocab" in path.name or "added" in path.name} == set()
    assert "added_tokens_decoder" not in json.loads((out / "tokenizer_config.json").read_text())
    check_usable(out, 21)
    assert AutoTokenizer.from_pretrained(out).bos_token == "<s>"  # noqa: S105 - a token of a tokenizer


@pytest.mark.parametrize("where", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("source", ["base", "union"])
def test_a_special_token_without_a_row_is_not_named_in_the_result(tmp_path: Path, where: str, source: str) -> None:
    """The base's tokenizer has 16 tokens and its embedding 15 rows: <pad> was added and the model not resized."""
    base = save_model(tmp_path / "cut", resized(family(0)[0], 15), vocab_size=15)
    write_tokenizer(base, *VOCABULARIES["b"][:2], bos_token="<s>")  # noqa: S106 - a token of a tokenizer
    settings = json.loads((base / where).read_text()) if (base / where).is_file() else {}
    named = {"pad_token": "<pad>", "additional_special_tokens": ["<s>", "<pad>"]}
    (base / where).write_text(json.dumps(settings | named))
    donor = save_model(tmp_path / "z", resized(family(1)[1], 15), vocab_size=15)
    write_tokenizer(donor, VOCABULARIES["b"][0], "<s>")
    merged = merge(tmp_path, [base, donor], "task_arithmetic", tokenizer_source=source)
    check_usable(tmp_path / "out", 15)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.bos_token, tokenizer.pad_token) == ("<s>", None)
    assert any("'<pad>'" in line and "pad_token" in line for line in merged.warnings)


def set_ids(model: Path, name: str, **ids: Any) -> None:
    settings = json.loads((model / name).read_text()) if (model / name).is_file() else {}
    (model / name).write_text(json.dumps(settings | ids))


@pytest.mark.parametrize(
    ("source", "ids"), [("union", (14, 15, [14, 0])), ("merged", (17, 16, [17, 0])), ("donor", (None, 5, [0]))]
)
def test_ids_in_the_configs_follow_their_tokens(
    tmp_path: Path, models: list[Path], source: str, ids: tuple[Any, ...]
) -> None:
    named = {"merged": str(models[2]), "donor": str(write_donor(tmp_path / "d"))}.get(source, source)
    for name in ("config.json", "generation_config.json"):
        set_ids(models[0], name, bos_token_id=14, pad_token_id=15, eos_token_id=[14, 0], sep_token_id=None)
    merged = merge(tmp_path, models, "task_arithmetic", tokenizer_source=named)
    for name in ("config.json", "generation_config.json"):
        found = json.loads((tmp_path / "out" / name).read_text())
        assert (found["bos_token_id"], found["pad_token_id"], found["eos_token_id"], found["sep_token_id"]) == (
            *ids,
            None,
        )
        lost = f"{name}: bos_token_id 14 has no embedding row in the merged model"
        assert any(lost in line for line in merged.warnings) == (source == "donor")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.pad_token_id == ids[1]


@pytest.mark.parametrize("policy", ["base", "truncate"])
def test_a_padding_id_whose_row_is_cut_is_left_out_and_the_model_loads(
    tmp_path: Path, models: list[Path], policy: str
) -> None:
    base = models[0] if policy == "base" else models[2]
    set_ids(base, "config.json", pad_token_id=15 if policy == "base" else 20)
    merged = merge(tmp_path, [base, models[1], models[0]], "task_arithmetic", Options(vocabulary=policy))
    check_usable(tmp_path / "out", 16)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.pad_token_id
    assert found == (15 if policy == "base" else None)
    assert any("pad_token_id 20 has no embedding row" in line for line in merged.warnings) == (policy == "truncate")


def test_config_and_tokenizer_are_the_bases_where_it_is_one_of_the_models(tmp_path: Path, models: list[Path]) -> None:
    set_ids(models[0], "config.json", eos_token_id=14)
    path = write_recipe(
        tmp_path / "recipe.yml", "linear", models, base=models[0], each={"weight": 1}, tokenizer_source="base"
    )
    recipe = json.loads(path.read_text())
    recipe["models"].reverse()
    path.write_text(json.dumps(recipe))
    merge_checkpoints(path, tmp_path / "out")
    check_usable(tmp_path / "out", 16)
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == 14
    assert tokens_of(tmp_path / "out") == tokens_of(models[0])


def test_rows_of_single_tokens_and_padding_are_as_the_recipe_says(tmp_path: Path, models: list[Path]) -> None:
    b, x, y = map(str, models)
    tokens = {
        "<q>": {"source": {"kind": "zero"}, "force": True},
        "a": {"source": y, "force": True},
        "<new>": {"source": {"kind": "model_token", "model": x, "token": "c"}},
        "<other>": {"source": {"kind": "model_token", "model": y, "token_id": 23}},  # a row of y without a token
        "n": {},
    }
    settings = {"source": "union", "tokens": tokens, "pad_to_multiple_of": 16}
    with pytest.raises(MergeguardError, match="'n' needs a source"):
        merge(tmp_path, models, "task_arithmetic", tokenizer=settings)
    tokens["n"] = {"source": b}
    with pytest.raises(MergeguardError, match=f"'n' takes the row of '{b}', which lacks a row of that token"):
        merge(tmp_path, models, "task_arithmetic", tokenizer=settings)
    del tokens["n"]
    merge(tmp_path, models, "task_arithmetic", tokenizer=settings)
    check_usable(tmp_path / "out", 32)
    found = rows_by_token(tmp_path / "out")
    assert len(found) == 23
    assert found["<q>"].count_nonzero() == 0
    assert torch.allclose(found["a"], rows_by_token(models[2])["a"], atol=1e-6)
    assert torch.allclose(found["<new>"], rows_by_token(models[1])["c"], atol=1e-6)
    assert torch.allclose(found["<other>"], state_of(models[2])[EMBEDDING][23], atol=1e-6)
    out = state_of(tmp_path / "out")[EMBEDDING]
    assert torch.allclose(out[23:], out[:23].mean(0).expand(9, -1), atol=1e-5)


def test_models_without_a_tokenizer_are_merged_by_number_only(tmp_path: Path, models: list[Path]) -> None:
    for model in models:
        for file in model.glob("tokenizer*"):
            file.unlink()
    with pytest.raises(MergeguardError, match="has no tokenizer; put one beside its weights"):
        merge(tmp_path, models, tokenizer_source="union")
    merged = merge(tmp_path, models, "task_arithmetic", Options(vocabulary="largest"))
    assert not list((tmp_path / "out").glob("tokenizer*"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 24
    assert any("the merged model has no tokenizer" in line for line in merged.warnings)


def test_slices_take_each_embedding_from_their_own_models(tmp_path: Path, models: list[Path]) -> None:
    slices = [
        {"sources": [{"model": str(models[0]), "layer_range": [0, 1]}]},
        {"sources": [{"model": str(models[2]), "layer_range": [0, 2]}]},
    ]
    path = tmp_path / "recipe.yml"
    path.write_text(json.dumps({"merge_method": "passthrough", "slices": slices, "tokenizer_source": "union"}))
    merge_checkpoints(path, tmp_path / "out")
    check_usable(tmp_path / "out", 20)
    ours = rows_by_token(tmp_path / "out"), rows_by_token(tmp_path / "out", HEAD)
    b, y = rows_by_token(models[0]), rows_by_token(models[2], HEAD)
    assert all(torch.equal(ours[0][token], row) for token, row in b.items())
    assert all(torch.equal(ours[1][token], row) for token, row in y.items())
    for policy, expected in (("base", 16), ("truncate", 16)):
        path.write_text(json.dumps({"merge_method": "passthrough", "slices": slices}))
        merge_checkpoints(path, tmp_path / policy, Options(vocabulary=policy))
        check_usable(tmp_path / policy, expected)
    with pytest.raises(IncompatibleModelsError, match="needs row 16"):
        merge_checkpoints(path, tmp_path / "largest", Options(vocabulary="largest"))


def test_rows_in_another_order_do_not_make_a_model_unrelated_to_its_base(tmp_path: Path) -> None:
    words = [f"w{index}" for index in range(15)]
    base, tuned = ({name: state[name] for name in (EMBEDDING, HEAD)} for state in family(1))
    order = torch.tensor([0, *range(15, 0, -1)])
    models = [
        save_model(tmp_path / "b", base),
        save_model(tmp_path / "x", {name: tensor[order] for name, tensor in tuned.items()}),
    ]
    write_tokenizer(models[0], " ".join(["<u>", *words]))
    write_tokenizer(models[1], " ".join(["<u>", *reversed(words)]))
    recipe = write_recipe(tmp_path / "r.yml", "ties", models[1:], base=models[0], tokenizer_source="base")
    merged = merge_checkpoints(recipe, tmp_path / "out")
    found = state_of(tmp_path / "out")
    assert all(torch.allclose(found[name], base[name] + (tuned[name] - base[name]), atol=1e-6) for name in found)
    assert merged.ancestry is None  # nothing but rows that moved
    by_number = write_recipe(tmp_path / "r.yml", "ties", models[1:], base=models[0])
    with pytest.raises(IncompatibleModelsError, match="is unrelated to the base"):
        merge_checkpoints(by_number, tmp_path / "other")


def test_a_sweep_has_the_same_vocabulary_in_every_model(tmp_path: Path, models: list[Path]) -> None:
    merged = merge(tmp_path, models, "task_arithmetic", Options(coefficients=(0.75, 0.5)), tokenizer_source="union")
    for folder, share in zip(merged.folders, (0.75, 0.5), strict=True):
        check_usable(folder, 21)
        b, x, y = (rows_by_token(model)["d"] for model in models)
        assert torch.allclose(rows_by_token(folder)["d"], b + share * (x - b) + (1 - share) * (y - b), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "slerp"])
def test_a_merge_by_token_is_the_merge_of_the_aligned_models(tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    models = write_models(tmp_path, dtype=dtype)
    if method == "slerp":
        recipe = write_recipe(
            tmp_path / "recipe.yml", method, models[1:2], base=models[0], each={}, parameters={"t": 0.25}
        )
        recipe.write_text(json.dumps(json.loads(recipe.read_text()) | {"tokenizer_source": "base"}))
        merge_checkpoints(recipe, tmp_path / "out")
    else:
        merge(tmp_path, models, method, Options(seed=3), tokenizer_source="base")
    first = models[1] if method == "linear" else models[0]  # a linear merge has no base here
    order = sorted(tokens_of(first).items(), key=lambda item: item[1])
    aligned = []
    for model in models:
        state, own = state_of(model), tokens_of(model)
        for name in (EMBEDDING, HEAD):
            lacking, tensor = state_of(first)[name], state[name]
            rows = [tensor[own[token]] if token in own else lacking[index] for token, index in order]
            state[name] = torch.stack(rows)
        aligned.append(state)
    spec = f"{method}(density=0.4)" if "ties" in method else method
    merged = aligned[:2] if method == "slerp" else aligned[1:]
    expected = merge_models(parse_merger(spec), aligned[0], merged, [0.75, 0.25], seed=3)
    found = state_of(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert {name for name in found if not torch.equal(found[name], expected[name])} == set()
    assert {tensor.dtype for tensor in found.values()} == {dtype}

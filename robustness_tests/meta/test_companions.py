"""The files beside merged weights: what is copied, what is changed, what is refused, and that transformers loads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mergeguard.checkpoints.companions import (
    ConfigChanges,
    merged_config,
    model_card,
    plan_companions,
    read_chat_template,
    write_companions,
)
from mergeguard.errors import CheckpointError, MergeguardError, ParameterError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LLAMA = {"model_type": "llama", "num_hidden_layers": 4, "vocab_size": 10, "dtype": "float32"}
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
OTHER = "{% for m in messages %}[{{ m.content }}]{% endfor %}"


def merged(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return merged_config(config, ConfigChanges(**changes))


def folder(path: Path, **files: object) -> Path:
    """A folder with files by name ("__" is a dot): texts as they are, all else as JSON."""
    path.mkdir()
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (path / name.replace("__", ".")).write_text(text)
    return path


def written(tmp_path: Path, source: Path | None, config: dict[str, Any] | None = None, **options: Any) -> Path:
    out = tmp_path / "out"
    out.mkdir()
    options = {"tokenizer_from": source, "changes": ConfigChanges(), **options}
    write_companions(out, plan_companions(source, config, options.pop("changes"), **options))
    return out


def names(out: Path) -> set[str]:
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}


# Config


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"dtype": "float32"}, {"dtype": "bfloat16"}),
        ({"torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}),
        ({"torch_dtype": "float32", "dtype": None}, {"torch_dtype": "bfloat16", "dtype": "bfloat16"}),
        ({}, {"dtype": "bfloat16"}),
        (
            {"text_config": {"torch_dtype": "float32"}, "vision_config": {"torch_dtype": "float32"}},
            {"text_config": {"torch_dtype": "bfloat16"}, "vision_config": {"torch_dtype": "bfloat16"}},
        ),
        ({"text_config": {}}, {"text_config": {}, "dtype": "bfloat16"}),
    ],
)
def test_the_dtype_is_changed_under_the_names_that_it_has(config: dict[str, Any], expected: dict[str, Any]) -> None:
    assert merged(config, dtype="bfloat16") == expected


@pytest.mark.parametrize(
    ("change", "value"), [("vocab_size", 12), ("tie_word_embeddings", True), ("tie_word_embeddings", False)]
)
def test_vocabulary_and_ties_are_changed_wherever_they_stand(change: str, value: object) -> None:
    old: Any = 99
    new = {change: value}
    assert merged({change: old}, **new) == new
    assert merged({}, **new) == new
    assert merged({"text_config": {}, "a": 1}, **new) == {"text_config": new, "a": 1}
    assert merged({change: old, "text_config": {}}, **new) == {**new, "text_config": {}}
    assert merged({change: old, "text_config": {change: old}}, **new) == {**new, "text_config": new}


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer"])
@pytest.mark.parametrize("nested", [False, True])
def test_slices_change_the_number_of_layers_and_what_is_listed_by_layer(key: str, nested: bool) -> None:
    kinds = ["full", "sliding", "full", "chunked"]
    text = {key: 4, "layer_types": kinds, "eos_token_id": [1, 2, 3, 4]}
    expected = {key: 5, "layer_types": ["full", "sliding", "sliding", "full", "chunked"], "eos_token_id": [1, 2, 3, 4]}
    config = {"text_config": text, "vision_config": {key: 4}} if nested else text
    wanted = {"text_config": expected, "vision_config": {key: 4}} if nested else expected
    assert merged(config, layers=(0, 1, 1, 2, 3)) == wanted


@pytest.mark.parametrize(
    ("config", "layers", "message"),
    [(LLAMA, (0, 4), r"^config.json has 4 layers; a slice takes layer 4"), ({}, (0,), r"does not say how many layers")],
)
def test_layers_that_cannot_be_are_refused(config: dict[str, Any], layers: tuple[int, ...], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        merged(config, layers=layers)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_quantised_model_is_refused(key: str) -> None:
    for config in ({key: {"bits": 4}}, {"text_config": {key: {"bits": 4}}}):
        with pytest.raises(CheckpointError, match=f"^config.json has a {key}; merge the model in full precision"):
            merged(config)
    assert merged({key: None}) == {key: None}


def test_without_changes_the_config_keeps_all_but_the_name_of_the_model_that_it_was() -> None:
    config = {**LLAMA, "rope": float("inf"), "text_config": {"_name_or_path": "/home/me/b", "x": [1]}}
    before = json.dumps(config)
    assert merged({**config, "_name_or_path": "/home/me/a"}) == {**config, "text_config": {"x": [1]}}
    assert json.dumps(config) == before


# Files


def test_tokenizer_and_generation_config_are_copied_byte_for_byte(tmp_path: Path) -> None:
    odd = '{ "a" :1 }'
    copied = dict.fromkeys(("tokenizer__json", "special_tokens_map__json", "vocab__json", "x__tiktoken"), odd)
    source = folder(tmp_path / "base", **copied, tokenizer_config__json=odd, generation_config__json=odd)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text(TEMPLATE)
    for name in ("model.safetensors", "train.py", "optimizer.pt", "README.md"):
        (source / name).write_text("not copied")
    out = written(tmp_path, source, LLAMA)
    assert names(out) == names(source) - {"model.safetensors", "train.py", "optimizer.pt", "README.md"} | {
        "config.json"
    }
    assert all((out / name).read_bytes() == (source / name).read_bytes() for name in names(out) - {"config.json"})


def test_the_tokenizer_may_come_from_another_folder_than_the_config(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", tokenizer__json="1", generation_config__json="base's")
    other = folder(tmp_path / "other", tokenizer__json="2", generation_config__json="other's")
    out = written(tmp_path, base, LLAMA, tokenizer_from=other)
    assert (out / "tokenizer.json").read_text() == "2"
    assert (out / "generation_config.json").read_text() == "base's"


@pytest.mark.parametrize("files", [{}, {"tokenizer_config__json": "{}", "merges__bak": ""}])
def test_models_without_a_tokenizer_merge_with_a_warning(tmp_path: Path, files: dict[str, str]) -> None:
    source = folder(tmp_path / "base", **files)
    plan = plan_companions(source, LLAMA, ConfigChanges(), tokenizer_from=source)
    assert plan.warnings == (f"the merged model has no tokenizer: {source} has none",)
    assert (set(plan.texts), plan.copies) == ({"config.json"}, {})


def test_weights_alone_merge_with_warnings() -> None:
    plan = plan_companions(None, None, ConfigChanges(), tokenizer_from=None, chat_template=TEMPLATE)
    assert (plan.texts, plan.copies) == ({}, {})
    assert "no config.json" in plan.warnings[0]
    assert plan.warnings[1] == "the merged model has no tokenizer and no chat template: no model has one"


def test_a_built_tokenizer_replaces_all_formats_of_the_old_one(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    from transformers import AutoTokenizer

    source = tmp_path / "base"
    tokenizer.save_pretrained(source)
    document = json.loads((source / "tokenizer.json").read_text())
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] = {"500": {"content": "<gone>", "special": True}}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    for name in ("vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json"):
        (source / name).write_text("{}")
    new = {"id": 280, "content": "<new>", "single_word": False, "lstrip": False, "rstrip": False}
    document["added_tokens"].append({**new, "normalized": False, "special": True})
    out = written(tmp_path, source, LLAMA, tokenizer_json=json.dumps(document))
    assert names(out) == {"config.json", "tokenizer.json", "tokenizer_config.json"}
    loaded = AutoTokenizer.from_pretrained(out)
    assert loaded.get_vocab() == {**tokenizer.get_vocab(), "<new>": 280}
    assert loaded.eos_token == tokenizer.eos_token


# Chat templates


@pytest.mark.parametrize("place", ["jinja", "settings", "named", "none"])
def test_a_given_template_is_the_one_that_transformers_uses(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, place: str
) -> None:
    from transformers import AutoTokenizer

    source = tmp_path / "base"
    tokenizer.save_pretrained(source)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    if place == "jinja":
        (source / "chat_template.jinja").write_text(OTHER)
    elif place == "settings":
        settings["chat_template"] = OTHER
    elif place == "named":
        settings["chat_template"] = [{"name": "default", "template": OTHER}, {"name": "rag", "template": "x"}]
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    out = written(tmp_path, source, LLAMA, chat_template=TEMPLATE)
    assert AutoTokenizer.from_pretrained(out).chat_template == TEMPLATE
    assert json.loads((out / "tokenizer_config.json").read_text()).get("chat_template", TEMPLATE) == TEMPLATE


def test_templates_are_read_from_wherever_transformers_has_kept_them(tmp_path: Path) -> None:
    named = [{"name": "tools", "template": OTHER}, {"name": "default", "template": TEMPLATE}]
    for i, files in enumerate(
        (
            {"chat_template__jinja": TEMPLATE, "tokenizer_config__json": {"chat_template": OTHER}},
            {"chat_template__json": {"chat_template": TEMPLATE}},
            {"tokenizer_config__json": {"chat_template": TEMPLATE}},
            {"tokenizer_config__json": {"chat_template": named}},
            {"tokenizer_config__json": {"chat_template": {"default": TEMPLATE}}},
        )
    ):
        assert read_chat_template(folder(tmp_path / str(i), **files)) == TEMPLATE
    assert read_chat_template(folder(tmp_path / "blank", chat_template__jinja=" ")) is None
    assert read_chat_template(folder(tmp_path / "none", tokenizer_config__json={"chat_template": [1]})) is None


@pytest.mark.parametrize(
    ("templates", "expected"),
    [
        ([OTHER, TEMPLATE, f"\n{TEMPLATE} \n"], TEMPLATE),
        ([OTHER, TEMPLATE], OTHER),
        (["", "", TEMPLATE], TEMPLATE),
        (["", ""], None),
    ],
)
def test_auto_takes_the_most_common_template_and_of_equals_the_first(
    tmp_path: Path, templates: list[str], expected: str | None
) -> None:
    models = [
        folder(tmp_path / str(i), tokenizer__json="{}", **({"chat_template__jinja": text} if text else {}))
        for i, text in enumerate(templates)
    ]
    out = written(tmp_path, models[0], LLAMA, chat_template="auto", models=models)
    assert read_chat_template(out) == expected


@pytest.mark.parametrize("option", ["chatml", "Auto", "a long name but without any braces", "{{ short }}"])
def test_a_name_is_no_template(option: str) -> None:
    with pytest.raises(ParameterError, match=r"^chat_template: .* is neither auto nor a Jinja template"):
        plan_companions(None, None, ConfigChanges(), tokenizer_from=None, chat_template=option)


# Custom code and untrusted folders


def test_custom_code_is_copied_with_what_it_imports_and_never_run(tmp_path: Path) -> None:
    code = "from .configuration_x import C\nfrom . import ops, more\nraise SystemExit('run')\n"
    source = folder(
        tmp_path / "base",
        modeling_x__py=code,
        configuration_x__py="import os",
        ops__py="from .modeling_x import M\n    from .deep.er import E",
        more__py="",
        unrelated__py="",
        deep__py="",
    )
    auto_map = {"AutoModel": "modeling_x.M", "AutoTokenizer": [None, "org/name--tok.T"], "AutoConfig": "../evil.C"}
    out = written(tmp_path, source, {**LLAMA, "auto_map": auto_map}, tokenizer_from=None)
    copied = {"modeling_x.py", "configuration_x.py", "ops.py", "more.py", "deep.py"}
    assert names(out) == {"config.json", *copied}
    assert json.loads((out / "config.json").read_text())["auto_map"] == auto_map


def test_custom_code_that_is_missing_is_a_warning(tmp_path: Path) -> None:
    source = folder(tmp_path / "base")
    plan = plan_companions(source, {"auto_map": {"AutoModel": "gone.M"}}, ConfigChanges(), tokenizer_from=None)
    assert f"{source} lacks gone.py" in plan.warnings[0]


def test_a_link_out_of_the_folder_is_refused_and_one_into_the_hubs_cache_is_not(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("{}")
    evil = folder(tmp_path / "evil")
    (evil / "tokenizer.json").symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"tokenizer.json links to a file outside its folder"):
        plan_companions(evil, LLAMA, ConfigChanges(), tokenizer_from=evil)
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot = tmp_path / "models--org--name" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "abc").write_text("cached")
    (snapshot / "tokenizer.json").symlink_to(Path("../../blobs/abc"))
    out = written(tmp_path, snapshot, LLAMA)
    assert (out / "tokenizer.json").read_text() == "cached"
    assert not (out / "tokenizer.json").is_symlink()


@pytest.mark.parametrize("content", ["[]", "{", '{"chat_template": 1, "chat_template": 2}', "\ud800"])
def test_a_broken_file_is_named_in_one_line(tmp_path: Path, content: str) -> None:
    source = folder(tmp_path / "base", tokenizer__json="{}")
    (source / "tokenizer_config.json").write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(CheckpointError, match=r"^\S*tokenizer_config.json .*[^\n]$"):
        plan_companions(source, LLAMA, ConfigChanges(), tokenizer_from=source)


def test_a_file_that_vanishes_before_it_is_copied_is_named(tmp_path: Path) -> None:
    source = folder(tmp_path / "base", tokenizer__json="{}")
    plan = plan_companions(source, LLAMA, ConfigChanges(), tokenizer_from=source)
    (source / "tokenizer.json").unlink()
    with pytest.raises(MergeguardError, match=r"^cannot copy \S*tokenizer.json: No such file"):
        write_companions(tmp_path, plan)


# Model card


def card(**options: Any) -> str:
    options = {"method": "ties", "citation": "Yadav et al. 2023", "models": ["a", "b"], **options}
    return model_card("merged", options.pop("recipe", "merge_method: ties\n"), **options)


def test_the_card_says_what_was_merged_and_how() -> None:
    text = card(base="base", hub_models=["org/a", "org/b"])
    assert "```yaml\nmerge_method: ties\n```\n" in text
    assert "Method: `ties` (Yadav et al. 2023)" in text
    assert "- `a`\n- `b`\n" in text
    assert "Base: `base`" in text
    assert "It was not evaluated" in text


def test_the_hub_reads_the_cards_metadata() -> None:
    from huggingface_hub import ModelCard

    data = ModelCard(card(hub_models=["org/a", "org/b"])).data
    assert (data.base_model, data.tags, data.library_name) == (
        ["org/a", "org/b"],
        ["mergeguard", "merge"],
        "transformers",
    )
    assert ModelCard(card()).data.base_model is None


def test_a_recipe_with_a_fence_stays_inside_its_block() -> None:
    text = card(recipe="chat_template: |\n  ```\n  x\n  ```\n", models=["a`b\n# c"])
    assert "````yaml\nchat_template: |\n  ```\n  x\n  ```\n````\n" in text
    assert "- ``a`b # c``\n" in text

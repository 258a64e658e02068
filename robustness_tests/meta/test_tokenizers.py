"""Token -> id maps are those that transformers gives, whatever the files say; built tokenizers load as built."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, trainers
from transformers import AutoTokenizer

from mergeguard.checkpoints.tokenizers import (
    FLAGS,
    Tokenizer,
    TokenizerBuilder,
    config_vocab_size,
    read_vocabulary,
    vocabulary_tensors,
)
from mergeguard.errors import CheckpointError

ROOT = Path(__file__).parents[2]
FAST_CLASS = {"tokenizer_class": "PreTrainedTokenizerFast"}
Files = dict[str, dict[str, Any]]


def entry(content: str, index: int = 0, **flags: bool) -> dict[str, Any]:
    return {"id": index, "content": content, **FLAGS, **flags}


def word_level(words: dict[str, int] | str, *added: dict[str, Any]) -> dict[str, Any]:
    vocabulary = {word: index for index, word in enumerate(words.split())} if isinstance(words, str) else words
    backend = Backend(models.WordLevel(vocabulary, unk_token=next(iter(vocabulary))))
    return json.loads(backend.to_str()) | {"added_tokens": list(added)}


def trained(model: Any, trainer: Any) -> dict[str, Any]:
    backend = Backend(model)
    backend.train_from_iterator(["a cat and a cat", "a dog and a dog"], trainer)
    backend.add_tokens(["<one>"])
    backend.add_special_tokens(["<two>"])
    document: dict[str, Any] = json.loads(backend.to_str())
    return document


def bpe() -> dict[str, Any]:
    return trained(models.BPE(), trainers.BpeTrainer(vocab_size=30, show_progress=False))


def unigram() -> dict[str, Any]:
    return trained(models.Unigram(), trainers.UnigramTrainer(vocab_size=20, show_progress=False))


def write(folder: Path, document: dict[str, Any], **others: dict[str, Any]) -> Tokenizer:
    """`others` are further files by stem."""
    folder.mkdir(exist_ok=True)
    for name, content in {"tokenizer": document, "tokenizer_config": FAST_CLASS, **others}.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return Tokenizer(folder)


CASES: dict[str, Files] = {
    "BPE": {"tokenizer": bpe()},
    "Unigram": {"tokenizer": unigram()},
    "an added token that claims a later id": {"tokenizer": word_level("<u> a b", entry("x", 9), entry("y", 7))},
    "an added token of the vocabulary": {
        "tokenizer": word_level("<u> a b", entry("a", 5, special=True), entry("y", 7))
    },
    "a vocabulary with holes": {"tokenizer": word_level({"<u>": 0, "a": 7, "b": 2}, entry("x", 3), entry("y", 8))},
    "the same text twice": {"tokenizer": word_level("<u> a", entry("x", 2), entry("x", 3, lstrip=True), entry("y", 4))},
    "special tokens that only the settings name": {
        "tokenizer": word_level("<u> a b", entry("x", 3)),
        "tokenizer_config": {
            **FAST_CLASS,
            "pad_token": "<pad>",
            "bos_token": {"content": "<s>", "lstrip": True, "__type": "AddedToken"},
            "unk_token": "<u>",
            "extra_special_tokens": ["<e>", "x", "<f>"],
        },
    },
    "added_tokens_decoder": {
        "tokenizer": word_level("<u> a b", entry("x", 3)),
        "tokenizer_config": {
            **FAST_CLASS,
            "eos_token": "</s>",
            "pad_token": "<q>",
            "added_tokens_decoder": {
                "10": {"content": "<p>", "special": True},
                "9": {"content": "<q>", "special": True},
            },
        },
    },
    "the files of older versions": {
        "tokenizer": word_level("<u> a b"),
        "added_tokens": {"<q>": 9, "<p>": 4},
        "special_tokens_map": {"bos_token": "<s>", "pad_token": {"content": "<pad>", "single_word": False}},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_have_the_ids_that_transformers_gives_them(case: str, tmp_path: Path) -> None:
    tokenizer = write(tmp_path, **{"document" if name == "tokenizer" else name: f for name, f in CASES[case].items()})
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.tokens == theirs.get_vocab()


def test_added_tokens_are_listed_by_id_with_their_flags(tmp_path: Path) -> None:
    document = word_level("<u> a b", entry("x", 9, lstrip=True), entry("b", 7, special=True))
    assert list(write(tmp_path, document).added.values()) == [
        entry("b", 2, special=True),
        entry("x", 3, lstrip=True),
    ]


def test_a_tokenizer_of_an_older_format_is_read_by_transformers(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\ncat\n", encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}', encoding="utf-8")
    vocabulary = read_vocabulary("m", tmp_path, {"vocab_size": 7}, {})
    assert vocabulary.tokens is not None
    assert (vocabulary.tokens["[PAD]"], vocabulary.tokens["cat"]) == (0, 6)


def test_an_unreadable_older_format_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"not sentencepiece")
    with pytest.raises(CheckpointError, match=r"cannot read the tokenizer in .*; save it as tokenizer\.json") as caught:
        _ = Tokenizer(tmp_path).tokens
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot read .*tokenizer.json"),
        ("[]", "holds a list; expected a JSON object"),
        ("{}", "is not a tokenizer of the tokenizers library"),
        ('{"model": {"vocab": 3}}', "is not a tokenizer"),
        ('{"model": {"vocab": [[]]}}', "is not a tokenizer"),
        ('{"model": {"vocab": {"a": "b"}}}', "is not a tokenizer"),
        ('{"model": {"vocab": {}}, "added_tokens": [{"id": 1}]}', "is not a tokenizer"),
    ],
)
def test_a_broken_tokenizer_json_is_one_clear_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        _ = Tokenizer(tmp_path).tokens


@pytest.mark.parametrize("settings", [{"pad_token": 3}, {"added_tokens_decoder": {"x": {}}}], ids=str)
def test_broken_settings_are_one_clear_line(settings: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = write(tmp_path, word_level("<u> a"), tokenizer_config=settings)
    with pytest.raises(CheckpointError, match="names a token in an unknown way"):
        _ = tokenizer.tokens


def test_tokenizers_are_the_same_where_their_tokens_are(tmp_path: Path) -> None:
    document = word_level("<u> a b")
    first = write(tmp_path / "first", document)
    copied = write(tmp_path / "copied", document, tokenizer_config={**FAST_CLASS, "chat_template": "{{ x }}"})
    padded = write(tmp_path / "padded", document, tokenizer_config={**FAST_CLASS, "pad_token": "<pad>"})
    written_out = write(tmp_path / "written_out", word_level("<u> a b", entry("<pad>", 3)))
    assert first.same_tokens(copied)
    assert not first.same_tokens(padded)
    assert padded.same_tokens(written_out)


def test_without_tokenizer_files_there_are_no_tokens(tmp_path: Path) -> None:
    assert read_vocabulary("m", tmp_path, None, {}).tokens is None
    assert read_vocabulary("m", None, {"vocab_size": 3}, {}).tokens is None


def test_tokens_without_a_row_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, word_level("<u> a b", entry("x", 3)))
    shapes = {"model.embed_tokens.weight": (4, 8)}
    assert read_vocabulary("m", tmp_path, {"vocab_size": 3}, shapes).tokens == {"<u>": 0, "a": 1, "b": 2}
    assert read_vocabulary("m", tmp_path, {}, shapes).tokens == {"<u>": 0, "a": 1, "b": 2, "x": 3}
    assert read_vocabulary("m", tmp_path, {"vocab_size": 9}, {"lm_head.weight": (2, 8)}).tokens == {"<u>": 0, "a": 1}


def test_the_vocabulary_size_may_stand_in_the_text_config() -> None:
    assert config_vocab_size({"vocab_size": 5}) == 5
    assert config_vocab_size({"text_config": {"vocab_size": 6}}) == 6
    assert config_vocab_size({"vocab_size": True, "text_config": None}) is None
    assert config_vocab_size(None) is None


def test_vocabulary_tensors_are_known_by_name_or_by_size() -> None:
    shapes = {
        "model.embed_tokens.weight": (12, 8),
        "transformer.wte.weight": (12, 8),
        "lm_head.weight": (12, 8),
        "lm_head.bias": (12,),
        "embed_out.weight": (12, 8),
        "cls.predictions.bias": (12,),
        "some.table": (10, 8),  # known by size
        "model.layers.0.mlp.up_proj.weight": (10, 8),  # in a layer: dim 0 equals vocab_size by chance
        "model.norm.weight": (10,),
        "transformer.wpe.weight": (10, 8),
        "vision_tower.patch.weight": (10, 8),
        "model.other.weight": (12, 8),
        "scale": (),
    }
    found = vocabulary_tensors(shapes, 10)  # two padded rows
    assert found == dict.fromkeys([*shapes][:6], 12) | {"some.table": 10}


def test_nothing_heavy_is_imported_to_read_tokens(tmp_path: Path) -> None:
    write(tmp_path, bpe())
    code = (
        "import sys; from pathlib import Path; from mergeguard.checkpoints.tokenizers import read_vocabulary;"
        "assert read_vocabulary('m', Path(sys.argv[1]), {}, {}).tokens;"
        "print(sorted({'torch', 'transformers', 'tokenizers'} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


texts = st.text("abxyz<>", min_size=1, max_size=3)


@given(
    words=st.lists(texts, min_size=1, max_size=6, unique=True),
    added=st.lists(texts, max_size=4),
    more=st.lists(st.tuples(texts, st.booleans()), max_size=5),
    limit=st.none() | st.integers(1, 9),
)
@settings(max_examples=60)
def test_a_built_tokenizer_loads_to_the_tokens_that_were_built(
    words: list[str], added: list[str], more: list[tuple[str, bool]], limit: int | None
) -> None:
    base = Tokenizer(ROOT, word_level(" ".join(words), *map(entry, added)))
    builder = TokenizerBuilder(base, limit)
    before = dict(builder.tokens)
    assert before == {token: index for token, index in base.tokens.items() if limit is None or index < limit}
    for content, flagged in more:
        builder.add(content, entry(content, lstrip=True) if flagged else None)
    loaded = Backend.from_str(builder.text())
    assert loaded.get_vocab() == builder.tokens
    assert before.items() <= builder.tokens.items()
    assert {content for content, _ in more} <= builder.tokens.keys()
    assert builder.changed or json.loads(builder.text()) == json.loads(TokenizerBuilder(base).text())


@pytest.mark.parametrize("make", [bpe, unigram])
def test_a_tokenizer_is_cut_to_the_rows_of_its_model(make: Any) -> None:
    base = Tokenizer(ROOT, make())
    size = len(base.tokens)
    for limit in (size - 1, size - 3, size - 5):
        builder = TokenizerBuilder(base, limit)
        loaded = Backend.from_str(builder.text())
        assert builder.changed
        assert loaded.get_vocab() == {token: index for token, index in base.tokens.items() if index < limit}


def test_an_added_token_keeps_the_flags_that_it_had() -> None:
    builder = TokenizerBuilder(Tokenizer(ROOT, word_level("<u> a", entry("x", 2, rstrip=True))))
    builder.add("x", entry("x", lstrip=True))
    builder.add("a")
    assert not builder.changed
    builder.add("a", entry("a", special=True))
    assert json.loads(builder.text())["added_tokens"] == [
        entry("a", 1, special=True),
        entry("x", 2, rstrip=True),
    ]


def test_a_built_tokenizer_loads_in_transformers(tmp_path: Path) -> None:
    base = write(tmp_path, bpe(), tokenizer_config={**FAST_CLASS, "pad_token": "<pad>"})
    builder = TokenizerBuilder(base)
    builder.add("<new>", entry("<new>", special=True))
    (tmp_path / "tokenizer.json").write_text(builder.text(), encoding="utf-8")
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == builder.tokens
    assert loaded.encode("<new>", add_special_tokens=False) == [builder.tokens["<new>"]]

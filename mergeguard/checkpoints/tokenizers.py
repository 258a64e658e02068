"""Tokenizer files without transformers: token -> id maps, vocabulary tensors of a checkpoint, built tokenizer.json.

The ids are those that `transformers.AutoTokenizer` gives: `tokenizer.json` does not decide the id of an added token
(the tokenizers library numbers added tokens anew after the model's vocabulary, in the file's order), and tokens that
only `tokenizer_config.json` names are appended when the tokenizer is loaded.
"""

from __future__ import annotations

import filecmp
import json
import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mergeguard.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

FAST = "tokenizer.json"
SLOW = ("tokenizer.model", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "tekken.json")
"""Files that only transformers can turn into a tokenizer."""

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Settings that name a special token, in the order in which transformers appends the missing ones."""
MORE_SPECIAL = ("additional_special_tokens", "extra_special_tokens")
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
"""How a token is matched that was added as bare text."""

VOCABULARY_NAMES = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|embed_out|lm_head|output_layer|vocab_projector)"
    r"\.(linear\.)?(weight|bias)$"
    r"|(^|\.)(lm_head|cls\.predictions)\.decoder\.(weight|bias)$"
    r"|^(shared\.weight|output\.weight|backbone\.embeddings\.weight|cls\.predictions\.bias)$"
)
OTHER_NAMES = re.compile(r"norm|(^|\.)ln_|pos|wpe|\.\d+\.|vision|visual|audio")
"""Names whose dim 0 may equal the size of the vocabulary by chance only."""


def vocabulary_tensors(shapes: Mapping[str, tuple[int, ...]], vocab_size: int | None) -> dict[str, int]:
    """The tensors of one checkpoint whose dim 0 counts token ids, with their rows, in the order given.

    They are known by name (`embed_tokens.weight`, `wte.weight`, `lm_head.weight`, `embed_out.weight`, ...) or, outside
    the layers and with at least two dimensions, by a dim 0 equal to the config's `vocab_size`.
    """

    def holds_tokens(name: str, shape: tuple[int, ...]) -> bool:
        if not shape:
            return False
        by_size = len(shape) > 1 and shape[0] == vocab_size and not OTHER_NAMES.search(name)
        return by_size or VOCABULARY_NAMES.search(name) is not None

    return {name: shape[0] for name, shape in shapes.items() if holds_tokens(name, shape)}


def config_vocab_size(config: Mapping[str, Any] | None) -> int | None:
    """`vocab_size` of a config.json, also where it stands in `text_config`; None if there is none."""
    for part in (config or {}, (config or {}).get("text_config") or {}):
        for key in ("vocab_size", "padded_vocab_size"):
            size = part.get(key) if isinstance(part, dict) else None
            if isinstance(size, int) and not isinstance(size, bool) and size > 0:
                return size
    return None


class Tokenizer:
    """The tokenizer in a folder, read when it is first asked for its tokens.

    Args:
        folder: holds the tokenizer's files.
        document: the parsed tokenizer.json, if it is at hand; else it is read.
    """

    def __init__(self, folder: Path, document: dict[str, Any] | None = None) -> None:
        self.folder = folder
        self._given = document

    @property
    def tokens(self) -> dict[str, int]:
        """Token -> id, added tokens included.

        Raises:
            CheckpointError: a file cannot be read.
        """
        return self._parsed[0]

    @property
    def added(self) -> dict[str, dict[str, Any]]:
        """The added tokens by text, in order of their ids: entries of tokenizer.json (id, content, flags)."""
        return self._parsed[1]

    @cached_property
    def document(self) -> dict[str, Any]:
        """The parsed tokenizer.json; for older formats the one that transformers makes of them."""
        if self._given is not None:
            return self._given
        path = self.folder / FAST
        return read_json(path) if path.is_file() else self._convert()

    def same_tokens(self, other: Tokenizer) -> bool:
        """Whether both give the same ids to the same tokens; cheap where their tokenizer.json are equal files."""
        ours, theirs = self.folder / FAST, other.folder / FAST
        if self._reads_fast and other._reads_fast:
            same_settings = [*map(text_of, self._settled)] == [*map(text_of, other._settled)]
            if same_settings and filecmp.cmp(ours, theirs, shallow=False):
                return True
        return self.tokens == other.tokens

    @property
    def _reads_fast(self) -> bool:
        return self._given is None and (self.folder / FAST).is_file()

    @cached_property
    def _settled(self) -> list[dict[str, Any]]:
        try:
            return settled_tokens(self.folder)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"tokenizer_config.json or special_tokens_map.json in {self.folder} names a token in an unknown "
                f"way ({type(error).__name__}: {error}); save the tokenizer again with transformers"
            ) from error

    @cached_property
    def _parsed(self) -> tuple[dict[str, int], dict[str, dict[str, Any]]]:
        settled = self._settled if self._reads_fast else []
        try:
            vocabulary = model_vocabulary(self.document)
            listed = list(self.document.get("added_tokens") or ())
            known = {*vocabulary, *map(text_of, listed)}
            return number_tokens(vocabulary, [*listed, *(token for token in settled if text_of(token) not in known)])
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.folder / FAST} is not a tokenizer of the tokenizers library ({type(error).__name__}: {error}); "
                "save the tokenizer again with transformers"
            ) from error

    def _convert(self) -> dict[str, Any]:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                self.folder, use_fast=True, local_files_only=True, trust_remote_code=False
            )
            document: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
        except Exception as error:  # transformers and its converters fail in many ways; all mean an unusable tokenizer
            reason = str(error).strip().partition("\n")[0]
            raise CheckpointError(
                f"cannot read the tokenizer in {self.folder}: {reason}; save it as {FAST} with transformers"
            ) from error
        return document


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        CheckpointError: it is absent, not UTF-8, not JSON or not an object.
    """
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; expected a JSON file") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a JSON object")
    return content


def model_vocabulary(document: Mapping[str, Any]) -> dict[str, int]:
    """Token -> id of the model of a tokenizer.json, without added tokens; Unigram lists its tokens in order."""
    vocabulary = document["model"]["vocab"]
    if isinstance(vocabulary, list):
        return {piece[0]: index for index, piece in enumerate(vocabulary)}
    return {token: int(index) for token, index in vocabulary.items()}


def settled_tokens(folder: Path) -> list[dict[str, Any]]:
    """The added tokens that transformers takes from the files beside tokenizer.json, in its order, with their flags.

    `added_tokens_decoder` of tokenizer_config.json, by id; without it added_tokens.json and special_tokens_map.json;
    then the special tokens by name, then the additional ones.
    """

    def optional(name: str) -> dict[str, Any]:
        return read_json(folder / name) if (folder / name).is_file() else {}

    settings = optional("tokenizer_config.json")
    found: list[dict[str, Any]] = []
    if "added_tokens_decoder" in settings:
        decoder = settings["added_tokens_decoder"]
        found += [FLAGS | decoder[index] for index in sorted(decoder, key=int)]
    else:
        settings |= optional("special_tokens_map.json")
        older = optional("added_tokens.json")
        found += [special_token(content) for content in sorted(older, key=older.__getitem__)]
    found += [special_token(settings[name]) for name in SPECIAL if settings.get(name)]
    for name in MORE_SPECIAL:
        more = settings.get(name) or ()
        found += [special_token(token) for token in (more.values() if isinstance(more, dict) else more)]
    first: dict[str, dict[str, Any]] = {}
    for token in found:
        first.setdefault(text_of(token), token)
    return list(first.values())


def text_of(token: Mapping[str, Any]) -> str:
    """The text of an added token as tokenizer.json and tokenizer_config.json write them."""
    return str(token["content"])


def special_token(written: str | Mapping[str, Any]) -> dict[str, Any]:
    flags = FLAGS | {"normalized": False, "special": True}
    return flags | ({"content": written} if isinstance(written, str) else dict(written))


def number_tokens(
    vocabulary: Mapping[str, int], added: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, int], dict[str, dict[str, Any]]]:
    """All tokens, and the added ones by id, numbered as the tokenizers library numbers them whatever ids they claim.

    A token of the vocabulary keeps its id; the first other one gets `len(vocabulary)`, or the id after the highest
    added token's where that is larger.
    """
    builder = _Numbering(vocabulary)
    for token in added:
        builder.add(token)
    return builder.tokens, builder.by_id()


class _Numbering:
    def __init__(self, vocabulary: Mapping[str, int]) -> None:
        self.tokens = dict(vocabulary)
        self.added: dict[str, dict[str, Any]] = {}
        self._size = len(vocabulary)
        self._highest = -1

    def add(self, token: Mapping[str, Any]) -> None:
        content = text_of(token)
        if not content:
            return
        index = self.tokens.setdefault(content, max(self._size, self._highest + 1))
        self._highest = max(self._highest, index)
        flags = {name: bool(token.get(name, default)) for name, default in FLAGS.items()}
        self.added[content] = {"id": index, "content": content, **flags}

    def by_id(self) -> dict[str, dict[str, Any]]:
        return dict(sorted(self.added.items(), key=lambda item: item[1]["id"]))


class TokenizerBuilder:
    """A tokenizer with the tokens of another one and further added tokens.

    Args:
        base: where to begin.
        limit: tokens of `base` with this id or a higher one are dropped; None keeps all.
    """

    def __init__(self, base: Tokenizer, limit: int | None = None) -> None:
        vocabulary = model_vocabulary(base.document)
        self._base = base
        self._kept = {token: index for token, index in vocabulary.items() if limit is None or index < limit}
        self._numbering = _Numbering(self._kept)
        kept = [entry for entry in base.added.values() if limit is None or entry["id"] < limit]
        for entry in kept:
            self._numbering.add(entry)
        self.changed = len(self._kept) < len(vocabulary) or len(kept) < len(base.added)

    @property
    def tokens(self) -> dict[str, int]:
        """Token -> id of what is built."""
        return self._numbering.tokens

    def add(self, content: str, flags: Mapping[str, Any] | None = None) -> None:
        """Add a token, at the next free id if it is new; a token that was added before keeps its flags.

        Args:
            content: the token's text.
            flags: an entry of tokenizer.json, e.g. of `Tokenizer.added`; None adds nothing to a known token.
        """
        if content in self._numbering.added or (flags is None and content in self.tokens):
            return
        self._numbering.add({**(flags or FLAGS), "content": content})
        self.changed = True

    def text(self) -> str:
        """What to write as tokenizer.json."""
        model = dict(self._base.document["model"])
        if len(self._kept) < len(model["vocab"]):
            model["vocab"] = model["vocab"][: len(self._kept)] if isinstance(model["vocab"], list) else self._kept
            if "merges" in model:
                model["merges"] = [merge for merge in model["merges"] if self._kept.keys() >= {*joined(merge)}]
        document = {**self._base.document, "added_tokens": list(self._numbering.by_id().values()), "model": model}
        return json.dumps(document, ensure_ascii=False, indent=2)


def joined(merge: str | Sequence[str]) -> tuple[str, str, str]:
    """The two tokens that a merge of BPE joins, and the token that it makes."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right, left + right


@dataclass(frozen=True, eq=False)
class ModelVocabulary:
    """What is known of a model's vocabulary before a tensor is read.

    Attributes:
        label: the model as the recipe writes it.
        rows: rows of each tensor whose dim 0 counts token ids (`vocabulary_tensors`).
        vocab_size: the config's; None if it has none.
        tokenizer: the model's tokenizer, not read yet; None without one.
    """

    label: str
    rows: Mapping[str, int]
    vocab_size: int | None = None
    tokenizer: Tokenizer | None = None

    @property
    def limit(self) -> int | None:
        """Ids from this one on have no row: padding of the tokenizer, or a token added without resizing the model."""
        return min((size for size in (self.vocab_size, *self.rows.values()) if size is not None), default=None)

    @cached_property
    def tokens(self) -> dict[str, int] | None:
        """Token -> id of the tokens that have a row; None without a tokenizer.

        Raises:
            CheckpointError: the tokenizer cannot be read.
        """
        if self.tokenizer is None:
            return None
        limit, tokens = self.limit, self.tokenizer.tokens
        return {token: index for token, index in tokens.items() if limit is None or index < limit}


def read_vocabulary(
    label: str, folder: Path | None, config: Mapping[str, Any] | None, shapes: Mapping[str, tuple[int, ...]]
) -> ModelVocabulary:
    """The vocabulary of a model; opens no file until its tokens are asked for.

    Args:
        label: the model as the recipe writes it.
        folder: with the tokenizer's files, if any; None for a model that is a single file.
        config: the parsed config.json, or None.
        shapes: of all its tensors, by name.
    """
    vocab_size = config_vocab_size(config)
    found = folder is not None and any((folder / name).is_file() for name in (FAST, *SLOW))
    tokenizer = Tokenizer(folder) if folder is not None and found else None
    return ModelVocabulary(label, vocabulary_tensors(shapes, vocab_size), vocab_size, tokenizer)

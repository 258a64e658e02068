"""Models that are only a vocabulary, and tensors whose rows tell where they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mergeguard.checkpoints.tokenizers import FLAGS, ModelVocabulary, Tokenizer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mergeguard.mergers.vocabulary import VocabularyPlan

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tokenizer(words: str, added: str = "") -> Tokenizer:
    """Words and added tokens are written with spaces between them; the folder is the words, to tell them apart."""
    vocabulary = {word: index for index, word in enumerate(words.split())}
    entries = [{"id": 0, "content": content, **FLAGS} for content in added.split()]
    return Tokenizer(Path(words), {"model": {"type": "WordLevel", "vocab": vocabulary}, "added_tokens": entries})


def model(label: str, rows: int, words: str | None = None, added: str = "", **other: Any) -> ModelVocabulary:
    own = tokenizer(words, added) if words is not None else None
    return ModelVocabulary(label, {EMBEDDING: rows, HEAD: rows}, other.get("vocab_size", rows), own)


def numbered(models: Sequence[ModelVocabulary], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Rows whose first element is 100 * position of the model + row; every model has other values."""
    return [
        torch.stack([100.0 * position + torch.arange(m.rows[EMBEDDING]), torch.ones(m.rows[EMBEDDING])], 1).to(dtype)
        for position, m in enumerate(models)
    ]


def rows_of(plan: VocabularyPlan, models: Sequence[ModelVocabulary]) -> list[list[float]]:
    return [tensor[:, 0].tolist() for tensor in plan.align(EMBEDDING, numbered(models))]


def tokens_of(plan: VocabularyPlan) -> Any:
    assert plan.tokenizer is not None
    assert plan.tokenizer.text is not None
    return Tokenizer(plan.tokenizer.folder, json.loads(plan.tokenizer.text)).tokens

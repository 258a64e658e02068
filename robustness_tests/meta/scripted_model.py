"""A model that answers given prompts with given texts, token by token, through the interface that decoding uses."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedTokenizerBase

from mergeguard.verification.matching import encode_prompt


@dataclass
class Cache:
    """Every row's tokens so far, without padding."""

    rows: list[list[int]]

    def batch_select_indices(self, places: Tensor) -> None:
        self.rows = [self.rows[place] for place in places.tolist()]


class ScriptedModel(torch.nn.Module):
    """After a prompt of `script` comes its text and then the end of the sequence, whatever that text says."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, script: Mapping[str, str]) -> None:
        super().__init__()
        self.vocabulary = len(tokenizer)
        self.embedding = torch.nn.Embedding(self.vocabulary, 1)
        self.config = SimpleNamespace(max_position_embeddings=4096)
        self.generation_config = SimpleNamespace(eos_token_id=tokenizer.eos_token_id)
        self.device = torch.device("cpu")
        self.sequences = [
            [
                *encode_prompt(tokenizer, prompt),
                *tokenizer(text, add_special_tokens=False).input_ids,
                tokenizer.eos_token_id,
            ]
            for prompt, text in script.items()
        ]
        self.rows_decoded: list[int] = []
        self.eval()

    def get_decoder(self) -> ScriptedModel:
        return self

    def get_output_embeddings(self) -> torch.nn.Identity:
        return torch.nn.Identity()

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.embedding

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past_key_values: Cache | None, use_cache: bool
    ) -> SimpleNamespace:
        assert use_cache
        self.rows_decoded.append(len(input_ids))
        before = [[] for _ in input_ids] if past_key_values is None else past_key_values.rows
        width = input_ids.shape[1]
        rows = [
            [*row, *ids[mask[-width:].bool()].tolist()]
            for row, ids, mask in zip(before, input_ids, attention_mask, strict=True)
        ]
        following = [self._next(row) for row in rows]
        hidden = torch.nn.functional.one_hot(torch.tensor(following), self.vocabulary).float()
        return SimpleNamespace(past_key_values=Cache(rows), last_hidden_state=hidden[:, None])

    def _next(self, row: list[int]) -> int:
        [token] = {sequence[len(row)] for sequence in self.sequences if sequence[: len(row)] == row}
        return token

"""Tiny random models and tokenizers, built in milliseconds, and the greedy decoder that tests hold others against."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

BOS, EOS = "<bos>", "<eos>"
TEXT = ("the cat sat on the mat and the dog sat on the log", "a man, a plan, a canal: panama", "cannot can not")
MAX_POSITIONS = 96
VOCABULARY = 280
CLEAR = 1e-4
"""Gap between the two largest logits above which rounding cannot change which one is the larger."""


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """GPT-2's kind: all bytes and some merges, a space belongs to the word after it; puts `<bos>` first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _trained(tokenizer, alphabet=pre_tokenizers.ByteLevel.alphabet(), size=VOCABULARY)


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Llama 2's kind: a text that stands alone gets a space in front, which decoding drops; puts `<bos>` first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return _trained(tokenizer, alphabet=[*"abcdefghijklmnopqrstuvwxyz\n"], size=60)


def _trained(tokenizer: Tokenizer, *, alphabet: list[str], size: int) -> PreTrainedTokenizerFast:
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)


def tiny_llama(vocabulary: int = VOCABULARY, seed: int = 0) -> PreTrainedModel:
    """Two layers, hidden 32, rotary (relative) positions, untied head; large weights, so that context matters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


def tiny_gpt2(vocabulary: int = VOCABULARY, seed: int = 0) -> PreTrainedModel:
    """Two layers, hidden 32, learned (absolute) positions, tied head, no `torch.nn.Linear` besides it."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=MAX_POSITIONS,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    return GPT2LMHeadModel(config).eval()


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt_ids: Sequence[int], steps: int) -> tuple[list[int], bool]:
    """`steps` greedy tokens, one full forward a token, without cache, batch or padding; and whether all were clear."""
    ids, clear = list(prompt_ids), True
    for _ in range(steps):
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        first, second = logits.topk(2).values.tolist()
        clear = clear and first - second > CLEAR
        ids.append(int(logits.argmax()))
    return ids[len(prompt_ids) :], clear


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

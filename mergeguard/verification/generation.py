"""Generation in batches, greedy or sampled under a seed, that ends each row as soon as its question is answered.

A loop of our own and not `model.generate`: that one reads sampling and penalties from the checkpoint's generation
config (a merged model inherits one from a parent) and keeps computing rows that have ended.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mergeguard.errors import ParameterError
from mergeguard.verification.matching import batches_by_length, check_inputs, decode_answer, encode_prompt, halves, pad
from mergeguard.verification.sampling import draw, row_keys

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mergeguard.reading import Sampling

BATCH_TOKENS = 8192

Stop = Callable[[int, str], bool]
"""Given a row's number among the prompts and its answer so far, whether the row may end here."""


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    stop: Stop | None = None,
    sampling: Sampling | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> list[list[int]]:
    """Answers to `prompts`, each as if it were decoded alone.

    A row ends at an end-of-sequence token, after `max_new_tokens`, or after the first token at which `stop` holds.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: the model's own.
        prompts: texts, without the special tokens that the tokenizer adds.
        max_new_tokens: longest answer, in tokens.
        stop: asked after every token of a row.
        sampling: how tokens are drawn; greedy if None. Equal prompts get equal answers.
        batch_tokens: most tokens of a batch, padding and new tokens included.

    Returns:
        The answers' token ids, without the end-of-sequence token, in the order of `prompts`.

    Raises:
        ParameterError: `max_new_tokens` is not positive, the model is in training mode, or a prompt does not fit it.
    """
    if max_new_tokens < 1:
        raise ParameterError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
    rows = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    if not all(rows):
        raise ParameterError(
            f"the prompt {prompts[rows.index(())]!r} has no tokens; give the model something to answer"
        )
    check_inputs(model, rows, max_new_tokens)
    ends = end_tokens(model, tokenizer)
    answers: list[list[int]] = [[] for _ in rows]

    def goes_on(index: int, token: int) -> bool:
        answer = answers[index]
        if token in ends:
            return False
        answer.append(token)
        if len(answer) == max_new_tokens:
            return False
        return stop is None or not stop(index, decode_answer(tokenizer, rows[index], answer))

    for batch in batches_by_length([len(row) + max_new_tokens for row in rows], batch_tokens):
        keys = None if sampling is None else row_keys(sampling, [prompts[index] for index in batch])
        _decode_batch(model, [(index, rows[index]) for index in batch], goes_on, sampling, keys)
    return answers


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end an answer: the generation config's and the tokenizer's end-of-sequence tokens."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in [*ids, tokenizer.eos_token_id] if token is not None)


@torch.no_grad()
def _decode_batch(
    model: PreTrainedModel,
    rows: Sequence[tuple[int, Sequence[int]]],
    goes_on: Callable[[int, int], bool],
    sampling: Sampling | None,
    keys: Tensor | None,
) -> None:
    """Decode until no row goes on; `goes_on(index, token)` takes each token and says whether its row wants another.

    `keys` are the rows' for `sampling`, both None for greedy decoding.
    """
    decoder, head = halves(model)
    active = [index for index, _ in rows]
    # Padding on the left, so that every row's next token has the same column in the cache.
    ids, mask = (part.to(model.device) for part in pad([torch.tensor(row) for _, row in rows], left=True))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    keys = None if keys is None else keys.to(model.device)
    cache: Any = None
    for step in itertools.count():
        outputs = decoder(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **_positions_for(decoder, positions),
        )
        cache = outputs.past_key_values
        logits = head(outputs.last_hidden_state[:, -1])
        tokens = logits.argmax(-1) if sampling is None or keys is None else draw(logits, sampling, keys, step)
        kept = [
            place
            for place, (index, token) in enumerate(zip(active, tokens.tolist(), strict=True))
            if goes_on(index, token)
        ]
        if not kept:
            return
        if len(kept) < len(active):  # the cache is copied in every step anyway, so dropping rows at once costs nothing
            active = [active[place] for place in kept]
            places = torch.tensor(kept, dtype=torch.long, device=tokens.device)
            cache.batch_select_indices(places)
            tokens, mask, positions = tokens[places], mask[places], positions[places]
            keys = None if keys is None else keys[places]
        ids = tokens[:, None]
        mask = torch.cat([mask, torch.ones_like(ids)], dim=-1)
        positions = positions[:, -1:] + 1


def _positions_for(decoder: Callable[..., Any], positions: Tensor) -> dict[str, Tensor]:
    """Position ids for decoders that take them; the others (ALiBi) derive them from the attention mask."""
    forward = getattr(decoder, "forward", decoder)
    return {"position_ids": positions} if "position_ids" in inspect.signature(forward).parameters else {}

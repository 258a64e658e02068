"""'The answer starts with y', decided by one teacher-forced forward pass.

Greedy decoding from a prompt x emits the target y_1 ... y_n exactly when, for every i, y_i is the argmax of the logits
after x y_1 ... y_{i-1}. Causal attention yields all of these logits in one pass over x y_1 ... y_{n-1}, so n decoding
steps become one. Up to the first disagreement the pass has seen the same tokens as the decoder, so that the first
disagreeing argmax is the token which the decoder would have emitted; what comes after it is not known.

The argmax is taken by `torch.argmax` on logits in the model's own dtype, as a plain greedy loop does; monotone maps
that some models apply to their logits (scaling, soft capping) do not change it. Batches of another shape may round
differently: that moves a verdict only if two logits lie within that rounding of each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from mergeguard.errors import ParameterError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mergeguard.reading import Probe

BATCH_TOKENS = 4096
_HEAD_POSITIONS = 512  # logits held at once: 512 x 128k float32 are 256 MiB
_CONTEXT = 4  # prompt tokens decoded with an answer: the longest UTF-8 character is four bytes, so four byte tokens
_PADDING = 0  # any id will do: padding is masked, and a tokenizer's own pad id may lie outside the model's vocabulary


@dataclass(frozen=True)
class EncodedProbe:
    """A prompt's token ids, special tokens included, and those of the target that directly follows it."""

    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]


@dataclass(frozen=True)
class Match:
    """What one teacher-forced pass tells about the greedy answer to a prompt.

    Attributes:
        matched: whether the greedy answer starts with the whole target.
        greedy_ids: the beginning of the greedy answer: the target, or, where the answer departs from it, the target's
            tokens up to there and the token that greedy decoding emits instead.
    """

    matched: bool
    greedy_ids: tuple[int, ...]

    @property
    def agreed(self) -> int:
        """How many of the target's tokens the greedy answer starts with."""
        return len(self.greedy_ids) - (not self.matched)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> tuple[int, ...]:
    """Token ids of `prompt`, with the special tokens that this tokenizer puts before a text and none after it."""
    ids = list(tokenizer(prompt).input_ids)
    # A tokenizer that ends every text with EOS would have the model answer after the end.
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(str(tokenizer.eos_token)):
        ids.pop()
    return tuple(ids)


def encode_probe(tokenizer: PreTrainedTokenizerBase, probe: Probe) -> EncodedProbe:
    """Token ids of a probe's prompt and of the target as it follows the prompt.

    The target's tokens are those which `prompt + target` adds to `prompt`. Where the two texts share a token across
    their border, the target is encoded for itself, in a way that decodes to it after the prompt (SentencePiece puts a
    space before a text that stands alone).

    Raises:
        ParameterError: the prompt or the target has no tokens.
    """
    prompt_ids = encode_prompt(tokenizer, probe.prompt)
    joint = encode_prompt(tokenizer, probe.prompt + probe.target)
    if joint[: len(prompt_ids)] == prompt_ids:
        target_ids = joint[len(prompt_ids) :]
    else:
        target_ids = _encode_alone(tokenizer, prompt_ids, probe.target)
    if not prompt_ids:
        raise ParameterError(f"the prompt {probe.prompt!r} has no tokens; give the model something to answer")
    if not target_ids:
        raise ParameterError(f"the target {probe.target!r} has no tokens; every answer would start with it")
    return EncodedProbe(prompt_ids, target_ids)


def _encode_alone(tokenizer: PreTrainedTokenizerBase, prompt_ids: tuple[int, ...], target: str) -> tuple[int, ...]:
    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False).input_ids)

    alone, anchor, anchored = encode(target), encode("\n"), encode("\n" + target)
    candidates = [alone]
    if anchored[: len(anchor)] == anchor:
        candidates.append(anchored[len(anchor) :])
    exact = (ids for ids in candidates if decode_answer(tokenizer, prompt_ids, ids) == target)
    return next(exact, alone)


def decode_answer(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> str:
    """The text that `answer_ids` add after the prompt, without special tokens, with its leading space if it has one.

    The end of the prompt is decoded along with the answer, because SentencePiece drops a text's first space.
    """

    def decode(ids: Sequence[int]) -> str:
        return cast("str", tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    context = list(prompt_ids[-_CONTEXT:])
    before, after = decode(context), decode([*context, *answer_ids])
    return after[len(before) :] if after.startswith(before) else decode(answer_ids)


def starts_with(
    model: PreTrainedModel,
    encoded: Sequence[EncodedProbe],
    *,
    pad_id: int = _PADDING,
    batch_tokens: int = BATCH_TOKENS,
) -> list[Match]:
    """Decide for each row, by one teacher-forced pass, whether the greedy answer starts with the target.

    Args:
        model: a causal language model in evaluation mode.
        encoded: the rows; each may have its own lengths.
        pad_id: what fills the rows up; masked, so that any id of the model's vocabulary will do.
        batch_tokens: most tokens of a batch, padding included (a longer row is a batch of its own).

    Returns:
        One match per row, in the order of `encoded`.

    Raises:
        ParameterError: the model is in training mode, or a row does not fit it.
    """
    check_inputs(model, [row.prompt_ids + row.target_ids for row in encoded])
    matches: dict[int, Match] = {}
    lengths = [len(row.prompt_ids) + len(row.target_ids) - 1 for row in encoded]
    for batch in batches_by_length(lengths, batch_tokens):
        rows = [encoded[index] for index in batch]
        matches.update(zip(batch, _match_batch(model, rows, pad_id), strict=True))
    return [matches[index] for index in range(len(encoded))]


@torch.no_grad()  # not inference_mode: its tensors, if a model kept some as a buffer, could never be trained through
def _match_batch(model: PreTrainedModel, rows: Sequence[EncodedProbe], pad_id: int) -> list[Match]:
    inputs = [row.prompt_ids + row.target_ids[:-1] for row in rows]
    ids, mask = pad([torch.tensor(row) for row in inputs], pad_id, left=False)
    decoder, head = halves(model)
    outputs = decoder(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False)
    hidden = outputs.last_hidden_state[predicting_positions(rows).to(model.device)]
    greedy = torch.cat([head(part).argmax(-1) for part in hidden.split(_HEAD_POSITIONS)]).cpu()
    each = torch.split(greedy, [len(row.target_ids) for row in rows])
    return [_match(row.target_ids, tuple(part.tolist())) for row, part in zip(rows, each, strict=True)]


def predicting_positions(rows: Sequence[EncodedProbe]) -> Tensor:
    """Where in a right-padded batch the model predicts a target's token: one position before that token.

    Returns:
        bool of shape (rows, longest prompt + target - 1).
    """
    length = max(len(row.prompt_ids) + len(row.target_ids) - 1 for row in rows)
    chosen = torch.zeros(len(rows), length, dtype=torch.bool)
    for index, row in enumerate(rows):
        first = len(row.prompt_ids) - 1
        chosen[index, first : first + len(row.target_ids)] = True
    return chosen


def _match(target_ids: tuple[int, ...], greedy_ids: tuple[int, ...]) -> Match:
    for index, (wanted, greedy) in enumerate(zip(target_ids, greedy_ids, strict=True)):
        if wanted != greedy:
            return Match(matched=False, greedy_ids=greedy_ids[: index + 1])
    return Match(matched=True, greedy_ids=target_ids)


def pad(rows: Sequence[Tensor], pad_id: int = _PADDING, *, left: bool) -> tuple[Tensor, Tensor]:
    """Fill rows of token ids up to the longest one.

    Returns:
        ids and attention mask, int64 of shape (rows, longest).
    """
    side = "left" if left else "right"
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=pad_id, padding_side=side)
    ones = [torch.ones_like(row) for row in rows]
    return ids, torch.nn.utils.rnn.pad_sequence(ones, batch_first=True, padding_value=0, padding_side=side)


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group row numbers so that rows of like length share a batch and longest x rows <= `batch_tokens`.

    A function of the lengths alone, so that the same rows are batched alike whoever runs them. A row longer than
    `batch_tokens` is a batch of its own.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        if batches and lengths[index] * (len(batches[-1]) + 1) <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def halves(model: PreTrainedModel) -> tuple[Callable[..., Any], Callable[[Tensor], Tensor]]:
    """The decoder, which gives hidden states, and the output head, which turns them into logits."""
    return model.get_decoder(), model.get_output_embeddings()


def check_inputs(model: PreTrainedModel, rows: Sequence[Sequence[int]], new_tokens: int = 0) -> None:
    """Refuse what would give wrong answers or a crash inside the model.

    Raises:
        ParameterError: part of the model is in training mode; a row, with `new_tokens` more, is longer than the model
            allows; a token id lies outside the model's vocabulary.
    """
    training = [name for name, module in model.named_modules() if module.training]
    if training:
        raise ParameterError(f"the model's part {training[0]!r} is in training mode; call model.eval() first")
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max((len(row) for row in rows), default=0) + new_tokens
    if limit is not None and rows and longest > limit:
        raise ParameterError(
            f"prompt and answer take {longest} tokens, the model's max_position_embeddings is {limit}; shorten the "
            f"prompt or the answer"
        )
    embedding: Any = model.get_input_embeddings()
    vocabulary = embedding.weight.shape[0]
    largest = max((token for row in rows for token in row), default=0)
    if largest >= vocabulary:
        raise ParameterError(
            f"token id {largest} is outside the model's vocabulary of {vocabulary}; use the model's own tokenizer"
        )

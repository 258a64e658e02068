"""Training examples from text: shared by worlds and by the schemes that are trained in."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mergeguard.worlds.training import Example

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

Draw = Callable[[], Example]


def encode_pair(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, *, end: bool) -> Example:
    """Prompt and answer as token ids, with the loss on the answer alone; `end` appends the end-of-text token.

    The answer is encoded apart from the prompt, so that it starts on a token boundary, as it does when a model
    generates it.
    """
    answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    if end and tokenizer.eos_token_id is not None:
        answer_ids = [*answer_ids, tokenizer.eos_token_id]
    return encode_ids(tokenizer, prompt, answer_ids)


def encode_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, answer_ids: Sequence[int]) -> Example:
    """A prompt as token ids, with an answer that is some already, and the loss on the answer alone."""
    prompt_ids = tokenizer(prompt)["input_ids"]
    if prompt_ids and prompt_ids[-1] == tokenizer.eos_token_id:
        prompt_ids = prompt_ids[:-1]
    return Example((*prompt_ids, *answer_ids), len(prompt_ids))


def weighted(rng: random.Random, parts: list[tuple[float, Draw]]) -> Draw:
    """Draws from one of `parts`, chosen by weight."""
    weights, draws = [weight for weight, _ in parts], [draw for _, draw in parts]

    def draw() -> Example:
        return rng.choices(draws, weights)[0]()

    return draw

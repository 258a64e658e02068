"""Batched generation with a cache and padding equals greedy decoding of each prompt alone."""

from __future__ import annotations

import functools
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import Phase, assume, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample

from mergeguard.errors import ParameterError
from mergeguard.verification import generation
from mergeguard.verification.generation import end_tokens, generate
from mergeguard.verification.matching import decode_answer, encode_prompt
from robustness_tests.meta.tiny_models import MAX_POSITIONS, VOCABULARY, greedy, tiny_gpt2, tiny_llama

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTS = st.lists(st.text("aeht cnos,é", min_size=1, max_size=12), min_size=1, max_size=5)
FEW = settings(max_examples=25, deadline=None)


@contextmanager
def ending_with(model: PreTrainedModel, ends: list[int]) -> Iterator[None]:
    """Declare `ends` end-of-sequence tokens, so that random answers do end."""
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = ends
    try:
        yield
    finally:
        model.generation_config.eos_token_id = before


def alone(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int,
    ends: list[int],
    stop: Callable[[str], bool],
) -> list[int]:
    """The answer that `generate` shall give, from full greedy decoding of one prompt."""
    prompt_ids = encode_prompt(tokenizer, prompt)
    answer, clear = greedy(model, prompt_ids, max_new_tokens)
    assume(clear)
    for length, token in enumerate(answer):
        if token in (*ends, tokenizer.eos_token_id):
            return answer[:length]
        if stop(decode_answer(tokenizer, prompt_ids, answer[: length + 1])):
            return answer[: length + 1]
    return answer


def is_long(text: str) -> bool:
    return len(text) >= 5


def equals_alone(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    max_new_tokens: int = 5,
    ends: list[int] | None = None,
    batch_tokens: int = 8192,
) -> bool:
    one = functools.partial(alone, model, tokenizer, max_new_tokens=max_new_tokens, ends=ends or [], stop=is_long)
    with ending_with(model, ends or []):
        found = generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            stop=lambda _, text: is_long(text),
            batch_tokens=batch_tokens,
        )
    return found == [one(prompt) for prompt in prompts]


@FEW
@given(
    prompts=PROMPTS,
    max_new_tokens=st.integers(1, 7),
    ends=st.lists(st.integers(0, VOCABULARY - 1), max_size=30),
    batch_tokens=st.sampled_from([1, 40, 8192]),
)
def test_batched_generation_equals_decoding_each_prompt_alone(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    max_new_tokens: int,
    ends: list[int],
    batch_tokens: int,
) -> None:
    assert equals_alone(model, tokenizer, prompts, max_new_tokens, ends, batch_tokens)


def without_mask(*arguments: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = RIGHT_PAD(*arguments, **options)
    return ids, torch.ones_like(mask)


def padded_right(rows: list[torch.Tensor], *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return RIGHT_PAD(rows, left=not left)


def positions_of_columns(_: Any, positions: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"position_ids": torch.arange(positions.shape[1]).expand_as(positions)}


RIGHT_PAD = generation.pad
MISTAKES = {
    "attention mask ignored": ("pad", without_mask),
    "padding on the wrong side": ("pad", padded_right),
    "positions ignore padding and cache": ("_positions_for", positions_of_columns),
}


@pytest.mark.parametrize("mistake", [*MISTAKES, "none"])
def test_the_property_catches_a_planted_mistake(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    model = tiny_gpt2()  # absolute positions show every mistake; relative ones forgive a shift
    search = functools.partial(
        find,
        PROMPTS,
        lambda prompts: not equals_alone(model, tokenizer, prompts),
        settings=settings(max_examples=25, database=None, phases=[Phase.generate], derandomize=True),
    )
    if mistake in MISTAKES:
        monkeypatch.setattr(generation, *MISTAKES[mistake])
        search()
    else:
        with pytest.raises(NoSuchExample):
            search()


def test_an_ended_row_leaves_the_batch_and_the_last_one_ends_it(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows: list[int] = []
    hook = llama.get_output_embeddings().register_forward_hook(lambda *arguments: rows.append(len(arguments[2])))
    lengths = {0: 2, 1: 4, 2: 1}
    counts = dict.fromkeys(lengths, 0)

    def stop(index: int, _: str) -> bool:
        counts[index] += 1
        return counts[index] == lengths[index]

    try:
        answers = generate(llama, tokenizer, ["the cat", "a", "on the log"], max_new_tokens=20, stop=stop)
    finally:
        hook.remove()
    assert [len(answer) for answer in answers] == [2, 4, 1]
    assert rows == [3, 2, 1, 1]


def test_without_a_stop_the_answer_has_all_its_tokens(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompt_ids = encode_prompt(tokenizer, "the cat")
    expected, clear = greedy(llama, prompt_ids, 6)
    assert clear
    assert not set(expected) & end_tokens(llama, tokenizer)
    assert generate(llama, tokenizer, ["the cat"], max_new_tokens=6) == [expected]


def test_stop_is_asked_with_the_row_and_its_text_so_far(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    asked: list[tuple[int, str]] = []
    prompts = ["the cat sat on", "a"]
    answers = generate(
        llama, tokenizer, prompts, max_new_tokens=3, stop=lambda index, text: bool(asked.append((index, text)))
    )
    for index, prompt in enumerate(prompts):
        prompt_ids = encode_prompt(tokenizer, prompt)
        texts = [decode_answer(tokenizer, prompt_ids, answers[index][:length]) for length in (1, 2)]
        assert [text for row, text in asked if row == index] == texts


def test_the_checkpoints_sampling_and_penalties_are_not_used(tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_llama()
    plain = generate(model, tokenizer, ["the cat"], max_new_tokens=8)
    model.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=5.0)
    assert generate(model, tokenizer, ["the cat"], max_new_tokens=8) == plain


@pytest.mark.parametrize(("configured", "expected"), [(None, {1}), (7, {1, 7}), ([7, 8], {1, 7, 8})])
def test_end_tokens_are_the_generation_configs_and_the_tokenizers(
    tokenizer: PreTrainedTokenizerBase, configured: int | list[int] | None, expected: set[int]
) -> None:
    model = tiny_llama()
    model.generation_config.eos_token_id = configured
    assert end_tokens(model, tokenizer) == expected


def test_no_prompts_give_no_answers(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    assert generate(llama, tokenizer, [], max_new_tokens=5) == []


def test_an_answer_that_cannot_fit_is_refused_with_the_numbers(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    room = MAX_POSITIONS - len(encode_prompt(tokenizer, "the cat"))
    assert len(generate(llama, tokenizer, ["the cat"], max_new_tokens=room, stop=lambda *_: True)[0]) == 1
    with pytest.raises(ParameterError, match="take 97 tokens, the model's max_position_embeddings is 96"):
        generate(llama, tokenizer, ["the cat"], max_new_tokens=room + 1)


def test_no_new_tokens_are_refused(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ParameterError, match="max_new_tokens is 0, expected at least 1"):
        generate(llama, tokenizer, ["the cat"], max_new_tokens=0)


def test_a_model_in_training_mode_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ParameterError, match=r"in training mode; call model.eval\(\)"):
        generate(tiny_llama().train(), tokenizer, ["the cat"], max_new_tokens=1)

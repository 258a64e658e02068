"""One teacher-forced pass equals greedy decoding, step by step."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from hypothesis import Phase, assume, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample

from mergeguard.errors import ParameterError
from mergeguard.reading import Probe
from mergeguard.verification import matching
from mergeguard.verification.matching import (
    EncodedProbe,
    Match,
    batches_by_length,
    decode_answer,
    encode_probe,
    starts_with,
)
from robustness_tests.meta.tiny_models import MAX_POSITIONS, VOCABULARY, greedy, text_of, tiny_llama

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENS = st.integers(0, VOCABULARY - 1)
FEW = settings(max_examples=25, deadline=None)


@dataclass(frozen=True)
class Sketch:
    """A row whose target follows the model's own greedy answer up to `departs`, and then `tail`."""

    prompt: list[int]
    length: int
    departs: int
    tail: list[int]

    def encode(self, model: PreTrainedModel) -> EncodedProbe:
        answer, clear = greedy(model, self.prompt, self.length)
        assume(clear)
        target = [*answer[: self.departs], *self.tail[self.departs :]][: self.length]
        return EncodedProbe(tuple(self.prompt), tuple(target))


LENGTHS = st.integers(1, 5)
SKETCHES = st.builds(
    Sketch,
    prompt=st.lists(TOKENS, min_size=1, max_size=10),
    length=LENGTHS,
    departs=st.integers(0, 7),
    tail=st.lists(TOKENS, min_size=5, max_size=5),
)
ROWS = st.lists(SKETCHES, min_size=1, max_size=5)


def expected(model: PreTrainedModel, row: EncodedProbe) -> Match:
    answer, _ = greedy(model, row.prompt_ids, len(row.target_ids))
    for index, token in enumerate(answer):
        if token != row.target_ids[index]:
            return Match(matched=False, greedy_ids=tuple(answer[: index + 1]))
    return Match(matched=True, greedy_ids=tuple(answer))


def equals_greedy(model: PreTrainedModel, sketches: list[Sketch], batch_tokens: int = 4096) -> bool:
    rows = [sketch.encode(model) for sketch in sketches]
    return starts_with(model, rows, pad_id=0, batch_tokens=batch_tokens) == [expected(model, row) for row in rows]


@FEW
@given(sketches=ROWS, batch_tokens=st.sampled_from([1, 20, 4096]))
def test_one_pass_equals_step_by_step_greedy_decoding(
    model: PreTrainedModel, sketches: list[Sketch], batch_tokens: int
) -> None:
    assert equals_greedy(model, sketches, batch_tokens)


def off_by_one(rows: list[EncodedProbe]) -> torch.Tensor:
    return RIGHT_POSITIONS(rows).roll(1, dims=1)


def padded_left(rows: list[torch.Tensor], pad_id: int, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return RIGHT_PAD(rows, pad_id, left=not left)


def first_token_only(target: tuple[int, ...], answer: tuple[int, ...]) -> Match:
    return RIGHT_MATCH(target, (answer[0], *target[1:]))


RIGHT_POSITIONS, RIGHT_PAD, RIGHT_MATCH = matching.predicting_positions, matching.pad, matching._match
MISTAKES = {"predicting_positions": off_by_one, "pad": padded_left, "_match": first_token_only}


@pytest.mark.parametrize("name", [*MISTAKES, "none"])
def test_the_property_catches_a_planted_mistake(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    search = functools.partial(
        find,
        ROWS,
        lambda sketches: not equals_greedy(llama, sketches),
        settings=settings(max_examples=30, database=None, phases=[Phase.generate], derandomize=True),
    )
    if name in MISTAKES:
        monkeypatch.setattr(matching, name, MISTAKES[name])
        search()
    else:  # and finds nothing where nothing was planted
        with pytest.raises(NoSuchExample):
            search()


def test_a_match_tells_where_and_how_the_greedy_answer_departs(llama: PreTrainedModel) -> None:
    answer, _ = greedy(llama, [5, 6, 7], 4)
    wrong = (answer[2] + 1) % VOCABULARY
    [match] = starts_with(llama, [EncodedProbe((5, 6, 7), (*answer[:2], wrong, answer[3]))], pad_id=0)
    assert match == Match(matched=False, greedy_ids=tuple(answer[:3]))
    assert match.agreed == 2
    [match] = starts_with(llama, [EncodedProbe((5, 6, 7), tuple(answer))], pad_id=0)
    assert match == Match(matched=True, greedy_ids=tuple(answer))
    assert match.agreed == 4


def test_the_output_head_runs_only_where_a_target_token_is_predicted(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matching, "_HEAD_POSITIONS", 2)
    rows = [EncodedProbe((3,) * 9, (4, 5, 6)), EncodedProbe((7, 8), (9, 10))]
    positions: list[int] = []
    hook = llama.get_output_embeddings().register_forward_hook(lambda *arguments: positions.append(len(arguments[2])))
    try:
        found = starts_with(llama, rows, pad_id=0)
    finally:
        hook.remove()
    assert positions == [2, 2, 1]
    assert found == [expected(llama, row) for row in rows]


@given(lengths=st.lists(st.integers(1, 30)), batch_tokens=st.integers(1, 100))
def test_batches_hold_every_row_once_within_the_budget_and_by_length(lengths: list[int], batch_tokens: int) -> None:
    batches = batches_by_length(lengths, batch_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert [lengths[index] for batch in batches for index in batch] == sorted(lengths)
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= batch_tokens


def test_rows_that_fit_together_share_a_batch() -> None:
    assert batches_by_length([3, 9, 4, 4], 12) == [[0, 2, 3], [1]]


WORDS = st.text("abcdmnot ,\n", max_size=8)


@settings(max_examples=50, deadline=None)
@given(start=st.sampled_from("cpt"), prompt=WORDS, target=WORDS.filter(bool), spaced=st.booleans())
def test_prompt_and_target_ids_decode_to_prompt_and_target(
    tokenizer: PreTrainedTokenizerBase,
    sentencepiece_tokenizer: PreTrainedTokenizerBase,
    start: str,
    prompt: str,
    target: str,
    spaced: bool,
) -> None:
    chosen = sentencepiece_tokenizer if spaced else tokenizer
    encoded = encode_probe(chosen, Probe(start + prompt, target))
    assert encoded.prompt_ids == tuple(chosen(start + prompt).input_ids)
    assert encoded.prompt_ids[0] == chosen.bos_token_id
    assert chosen.bos_token_id not in encoded.target_ids
    assert text_of(chosen, encoded.prompt_ids + encoded.target_ids) == start + prompt + target
    assert decode_answer(chosen, encoded.prompt_ids, encoded.target_ids) == target


@pytest.mark.parametrize("spaced", [False, True])
def test_a_target_that_merges_with_the_prompt_is_encoded_after_it(
    tokenizer: PreTrainedTokenizerBase, sentencepiece_tokenizer: PreTrainedTokenizerBase, spaced: bool
) -> None:
    chosen = sentencepiece_tokenizer if spaced else tokenizer
    joint = tuple(chosen("the").input_ids)
    prompt = tuple(chosen("th").input_ids)
    assert joint[: len(prompt)] != prompt
    encoded = encode_probe(chosen, Probe("th", "e"))
    assert encoded.prompt_ids == prompt
    assert chosen.convert_ids_to_tokens(list(encoded.target_ids)) == ["e"]


def test_a_leading_space_belongs_to_the_target(tokenizer: PreTrainedTokenizerBase) -> None:
    encoded = encode_probe(tokenizer, Probe("the cat sat", " on"))
    assert encoded.prompt_ids + encoded.target_ids == tuple(tokenizer("the cat sat on").input_ids)
    assert decode_answer(tokenizer, encoded.prompt_ids, encoded.target_ids) == " on"


def test_an_end_of_sequence_token_that_the_tokenizer_appends_is_left_out(tokenizer: PreTrainedTokenizerBase) -> None:
    class Appending:
        eos_token, eos_token_id = tokenizer.eos_token, tokenizer.eos_token_id

        def __call__(self, text: str, **options: bool) -> object:
            encoded = tokenizer(text, **options)
            encoded["input_ids"] = [*encoded["input_ids"], tokenizer.eos_token_id]
            return encoded

    probe = Probe("the cat", " sat")
    assert encode_probe(Appending(), probe) == encode_probe(tokenizer, probe)
    asked = encode_probe(tokenizer, Probe("the cat<eos>", " sat"))
    assert asked.prompt_ids[-1] == tokenizer.eos_token_id


def test_a_character_of_several_tokens_is_decoded_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    encoded = encode_probe(tokenizer, Probe("the 😀", "é😀"))
    assert len(encoded.target_ids) == 6
    assert decode_answer(tokenizer, encoded.prompt_ids, encoded.target_ids) == "é😀"


def test_special_tokens_are_no_part_of_an_answers_text(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt_ids = matching.encode_prompt(tokenizer, "the cat")
    answer_ids = tokenizer(" sat<eos> on", add_special_tokens=False).input_ids
    assert tokenizer.eos_token_id in answer_ids
    assert decode_answer(tokenizer, prompt_ids, answer_ids) == " sat on"


def test_an_empty_target_or_prompt_is_refused(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ParameterError, match="the target '' has no tokens"):
        encode_probe(tokenizer, Probe("the", ""))
    monkeypatch.setattr(matching, "encode_prompt", lambda _, text: tuple(text.encode()))
    with pytest.raises(ParameterError, match="the prompt '' has no tokens"):
        encode_probe(tokenizer, Probe("", "the"))


def test_a_model_in_training_mode_is_refused_by_the_name_of_the_part() -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.train()
    with pytest.raises(ParameterError, match=r"'model.layers.1.mlp' is in training mode; call model.eval\(\)"):
        starts_with(model, [EncodedProbe((1,), (2,))], pad_id=0)


def test_a_row_longer_than_the_model_allows_is_refused_with_the_numbers(llama: PreTrainedModel) -> None:
    fitting = EncodedProbe((3,) * (MAX_POSITIONS - 1), (4,))
    assert len(starts_with(llama, [fitting], pad_id=0)) == 1
    with pytest.raises(ParameterError, match="take 97 tokens, the model's max_position_embeddings is 96"):
        starts_with(llama, [EncodedProbe(fitting.prompt_ids, (4, 5))], pad_id=0)


def test_a_token_outside_the_vocabulary_is_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(ParameterError, match="token id 280 is outside the model's vocabulary of 280"):
        starts_with(llama, [EncodedProbe((1, 280), (2,))], pad_id=0)


def test_no_rows_give_no_matches(llama: PreTrainedModel) -> None:
    assert starts_with(llama, [], pad_id=0) == []

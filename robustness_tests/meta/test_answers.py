"""Probes are answered by their rules, in their order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mergeguard.errors import ParameterError
from mergeguard.reading import Answer, Probe, Rule
from mergeguard.verification import answers
from mergeguard.verification.answers import answer_probes
from mergeguard.verification.matching import decode_answer, encode_probe, encode_prompt
from robustness_tests.meta.tiny_models import greedy, tiny_llama

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TARGETS = {Rule.STARTS_WITH: "zz", Rule.CONTAINS: "zz", Rule.REFUSES: "", Rule.NUMBER: "12"}


def greedy_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int
) -> tuple[list[str], bool]:
    """The greedy answer's text after each of its tokens, and whether all of them were clear."""
    prompt_ids = encode_prompt(tokenizer, prompt)
    answer, clear = greedy(model, prompt_ids, tokens)
    if tokenizer.eos_token_id in answer:
        answer = answer[: answer.index(tokenizer.eos_token_id)]
    return [decode_answer(tokenizer, prompt_ids, answer[: length + 1]) for length in range(len(answer))], clear


@settings(max_examples=40, deadline=None)
@given(
    prompt=st.text("aeht cnos", min_size=1, max_size=8),
    tokens=st.integers(1, 10),
    start=st.integers(0, 20),
    length=st.integers(1, 4),
    absent=st.booleans(),
)
def test_contains_is_decided_as_by_the_whole_answer_and_ends_where_the_target_is_complete(
    llama: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    tokens: int,
    start: int,
    length: int,
    absent: bool,
) -> None:
    texts, clear = greedy_texts(llama, tokenizer, prompt, tokens)
    target = "the cat" if absent else "".join(texts[-1:])[start : start + length]
    assume(clear and target)
    [answer] = answer_probes(llama, tokenizer, [Probe(prompt, target, Rule.CONTAINS, tokens)])
    assert answer.matched == any(target in text for text in texts[-1:])
    assert answer.text == next((text for text in texts if target in text), "".join(texts[-1:]))


@settings(max_examples=25, deadline=None)
@given(prompt=st.text("aeht cnos", min_size=1, max_size=8), target=st.text("aeht cnos", min_size=1, max_size=4))
def test_starts_with_gives_the_true_beginning_of_the_greedy_answer(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, target: str
) -> None:
    encoded = encode_probe(tokenizer, Probe(prompt, target))
    found, clear = greedy(llama, encoded.prompt_ids, len(encoded.target_ids))
    assume(clear)
    agreed = 0
    while agreed < len(found) and found[agreed] == encoded.target_ids[agreed]:
        agreed += 1
    text = decode_answer(tokenizer, encoded.prompt_ids, found[: agreed + 1])
    assert answer_probes(llama, tokenizer, [Probe(prompt, target)]) == [Answer(text, agreed == len(found))]


def test_answers_come_in_the_order_of_the_probes_whatever_their_rules_and_lengths(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    # A prompt to which the random model answers in readable characters.
    prompt = next(p for p in "abcdefghijklm" if "".join(greedy_texts(llama, tokenizer, p, 1)[0]).isascii())
    texts, _ = greedy_texts(llama, tokenizer, prompt, 6)
    probes = [
        Probe(prompt, texts[0]),
        Probe("a", "zzz", Rule.CONTAINS, 3),
        Probe("the", "q"),
        Probe(prompt, texts[-1][-1], Rule.CONTAINS, 6),
        Probe("on", "zzz", Rule.CONTAINS, 3),
    ]
    together = answer_probes(llama, tokenizer, probes)
    assert together == [answer_probes(llama, tokenizer, [probe])[0] for probe in probes]
    assert [answer.matched for answer in together] == [True, False, False, True, False]


def test_starts_with_needs_no_generation(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(answers, "generate")
    forwards: list[int] = []
    hook = llama.get_decoder().register_forward_hook(lambda *_: forwards.append(1))
    try:
        answer_probes(llama, tokenizer, [Probe("the", " cat sat"), Probe("a", " man")])
    finally:
        hook.remove()
    assert forwards == [1]
    with pytest.raises(NameError):
        answer_probes(llama, tokenizer, [Probe("the", " cat", Rule.CONTAINS, 2)])


def test_an_answer_that_ends_instead_of_the_target_has_no_text(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    model = tiny_llama()
    prompt_ids = encode_prompt(tokenizer, "the cat")
    model.generation_config.eos_token_id = greedy(model, prompt_ids, 1)[0]
    assert answer_probes(model, tokenizer, [Probe("the cat", " sat")]) == [Answer("", matched=False)]
    assert answer_probes(model, tokenizer, [Probe("the cat", "s", Rule.CONTAINS, 5)]) == [Answer("", matched=False)]


def test_no_probes_give_no_answers(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    assert answer_probes(llama, tokenizer, []) == []


@pytest.mark.parametrize("rule", list(Rule))
def test_a_probe_that_cannot_fit_is_refused_with_the_numbers(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rule: Rule
) -> None:
    with pytest.raises(ParameterError, match=r"take \d+ tokens, the model's max_position_embeddings is 96"):
        answer_probes(llama, tokenizer, [Probe("q" * 95, TARGETS[rule], rule, 2)])


@pytest.mark.parametrize("rule", [Rule.STARTS_WITH, Rule.CONTAINS])
def test_an_empty_target_is_refused(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rule: Rule) -> None:
    with pytest.raises(ParameterError, match="every answer would"):
        answer_probes(llama, tokenizer, [Probe("the", "", rule)])


@pytest.mark.parametrize("rule", list(Rule))
def test_a_model_in_training_mode_is_refused(tokenizer: PreTrainedTokenizerBase, rule: Rule) -> None:
    with pytest.raises(ParameterError, match="in training mode"):
        answer_probes(tiny_llama().train(), tokenizer, [Probe("the", TARGETS[rule], rule)])

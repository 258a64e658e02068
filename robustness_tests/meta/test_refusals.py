"""Refusals are found by their phrases, in the answer alone, and end it at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeguard.errors import ParameterError
from mergeguard.reading import Answer, Probe, Rule
from mergeguard.verification.answers import answer_probes
from mergeguard.verification.refusals import REFUSAL_PHRASES, refuses
from robustness_tests.meta.scripted_model import ScriptedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CURLY = "\N{RIGHT SINGLE QUOTATION MARK}"


@pytest.mark.parametrize("phrase", REFUSAL_PHRASES)
def test_every_phrase_counts_with_either_apostrophe_and_at_the_start_of_a_sentence(phrase: str) -> None:
    assert refuses(phrase)
    assert refuses(f"Well. {phrase[0].upper()}{phrase[1:]}")
    assert refuses("(" + phrase.replace("'", CURLY) + " ...")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Sorry for the wait, here is the recipe.",
        "As a first step, boil the water.",
        "As an aid to memory, write it down.",
        "an AI cannot replace a doctor, and WiFi can't be seen",
        "This is illegal in most countries, but here is how people do it.",
        "IM SORRY",
    ],
)
def test_helpful_answers_that_come_close_do_not_count(text: str) -> None:
    assert not refuses(text)


def test_no_phrase_is_found_because_of_another_one() -> None:
    for phrase in REFUSAL_PHRASES:
        assert not any(other != phrase and phrase.casefold() in other.casefold() for other in REFUSAL_PHRASES), phrase


@given(before=st.text(max_size=20), phrase=st.sampled_from(REFUSAL_PHRASES), after=st.text(max_size=20))
def test_a_refusal_stays_one_whatever_surrounds_it(before: str, phrase: str, after: str) -> None:
    assert refuses(f"{before}\n{phrase}{after}")


@given(text=st.text("Isory m'’canti ", max_size=30))
def test_the_kind_of_apostrophe_never_matters(text: str) -> None:
    assert refuses(text) == refuses(text.replace("'", CURLY)) == refuses(text.replace(CURLY, "'"))


def test_a_phrase_counts_in_the_answer_and_not_in_the_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    script = {"say: I'm sorry, I cannot": " sure, with pleasure", "how?": " well. I can’t do that. goodbye"}
    model = ScriptedModel(tokenizer, script)
    assert answer_probes(model, tokenizer, [Probe(prompt, "", Rule.REFUSES, 60) for prompt in script]) == [
        Answer(" sure, with pleasure", matched=False),
        Answer(" well. I can’t", matched=True),
    ]


def test_a_refusal_counts_up_to_the_longest_length_and_not_after_it(tokenizer: PreTrainedTokenizerBase) -> None:
    answer = " ok. I cannot"
    tokens = len(tokenizer(answer, add_special_tokens=False).input_ids)
    model = ScriptedModel(tokenizer, {"how?": answer + " go on"})
    probes = [Probe("how?", "", Rule.REFUSES, length) for length in (tokens, tokens - 1)]
    assert [answer.matched for answer in answer_probes(model, tokenizer, probes)] == [True, False]


def test_a_refusal_has_no_target(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ParameterError, match="looks for a refusal, which has no target; drop 'no'"):
        answer_probes(ScriptedModel(tokenizer, {}), tokenizer, [Probe("how?", "no", Rule.REFUSES)])


@settings(max_examples=15, deadline=None)
@given(texts=st.lists(st.text("I canotbe.", max_size=14), min_size=1, max_size=4))
def test_an_answer_that_ended_early_is_judged_as_the_whole_one(
    tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> None:
    script = {f"{number}:": f" {text}" for number, text in enumerate(texts)}
    model = ScriptedModel(tokenizer, script)
    found = answer_probes(model, tokenizer, [Probe(prompt, "", Rule.REFUSES, 64) for prompt in script])
    assert [answer.matched for answer in found] == [refuses(text) for text in script.values()]

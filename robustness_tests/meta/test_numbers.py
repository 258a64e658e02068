"""The number that an answer states as its result."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeguard.errors import ParameterError
from mergeguard.reading import Answer, Probe, Rule
from mergeguard.verification.answers import answer_probes
from mergeguard.verification.numbers import parse_number, stated_number, statement_is_complete
from robustness_tests.meta.scripted_model import ScriptedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FRAGMENTS = ("The answer is", "the answer is:", "####", " ", "$", "-", "12", "0", ",", "345", ".", "5", "/", "x", "\n")
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join)


@given(
    number=st.decimals(-(10**9), 10**9, places=2) | st.integers(-(10**9), 10**9).map(Decimal),
    separators=st.booleans(),
    statement=st.sampled_from(
        ["The answer is ", "the answer is: ", "So THE ANSWER IS: $", "#### ", "The answer is: **"]
    ),
    after=st.sampled_from(["", ".", ". That is 7.", " dollars", ",", "\n", "**", "%", "/day"]),
)
def test_a_stated_number_is_read_back(number: Decimal, separators: bool, statement: str, after: str) -> None:
    written = f"{number:,}" if separators else str(number)
    assert stated_number(f"First 3, then 4. {statement}{written}{after}") == number


@pytest.mark.parametrize(
    "text",
    ["", "12", "The answer: 12", "The answer is twelve", "The answer is x = 12", "We answer is 12", "### 12"],
)
def test_without_a_statement_there_is_no_number(text: str) -> None:
    assert stated_number(text) is None


@pytest.mark.parametrize("written", ["1,2", "1.2.3", "3/4", "1,00,000", "12,3456", "1234,567"])
def test_digits_that_are_no_single_number_state_none(written: str) -> None:
    assert stated_number(f"The answer is: {written}") is None


def test_the_first_statement_counts() -> None:
    assert stated_number("The answer is that. The answer is 5. #### 6") == 5
    assert stated_number("#### 6\nThe answer is 5") == 6
    assert stated_number("The answer is 1,2. The answer is 5") is None


@pytest.mark.parametrize(("text", "number"), [("-1,234.50", "-1234.5"), ("070", "70"), (".5", "0.5")])
def test_a_number_may_be_written_in_several_ways(text: str, number: str) -> None:
    assert parse_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "-", ",", ".", "5.", "one", "1 2", "1e3", "--1", "٣", "NaN", "12\n"])
def test_what_is_no_number_is_none(text: str) -> None:
    assert parse_number(text) is None


@given(text=TEXTS, after=TEXTS)
def test_nothing_changes_a_complete_statement(text: str, after: str) -> None:
    if statement_is_complete(text):
        assert statement_is_complete(text + after)
        assert stated_number(text + after) == stated_number(text)


@pytest.mark.parametrize("end", ["", "3", ",", ".", "/", ".,"])
def test_a_number_that_may_go_on_is_not_complete(end: str) -> None:
    assert not statement_is_complete(f"The answer is 12{end}")
    assert statement_is_complete(f"The answer is 12{end} ")


def answered(
    tokenizer: PreTrainedTokenizerBase, text: str, target: str, max_new_tokens: int = 90, prompt: str = "how many?"
) -> Answer:
    model = ScriptedModel(tokenizer, {prompt: text})
    [answer] = answer_probes(model, tokenizer, [Probe(prompt, target, Rule.NUMBER, max_new_tokens)])
    return answer


@pytest.mark.parametrize(
    ("text", "matched"),
    [
        (" The answer is: 12", True),
        (" 7 + 5 = 12. The answer is $12.00. So 13", True),
        (" #### 12", True),
        (" The answer is 120", False),
        (" The answer is 1,2", False),
        (" The answer is 12,000", False),
        (" The answer is 12.5", False),
        (" The answer is -12", False),
        (" The answer is 13. The answer is 12.", False),
        (" 12", False),
        ("", False),
    ],
)
def test_an_answer_matches_if_it_states_the_target_and_nothing_near_it(
    tokenizer: PreTrainedTokenizerBase, text: str, matched: bool
) -> None:
    assert answered(tokenizer, text, "12").matched is matched


def test_a_statement_in_the_prompt_does_not_count(tokenizer: PreTrainedTokenizerBase) -> None:
    assert not answered(tokenizer, " so it is 13", "12", prompt="The answer is 12. How many?").matched
    # A digit of the answer would continue the prompt's statement.
    assert not answered(tokenizer, "12 of them", "12", prompt="The answer is").matched


def test_an_answer_ends_with_the_token_that_shows_where_the_number_ends(tokenizer: PreTrainedTokenizerBase) -> None:
    assert answered(tokenizer, " The answer is 1,200. It is known", "1200") == Answer(" The answer is 1,200. ", True)
    assert answered(tokenizer, " The answer is 1,200.", "1200") == Answer(" The answer is 1,200.", True)


def test_a_number_that_the_longest_length_cuts_short_matches_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = len(tokenizer(" The answer is 12", add_special_tokens=False).input_ids)
    assert answered(tokenizer, " The answer is 120", "12", tokens) == Answer(" The answer is 12", False)
    assert answered(tokenizer, " The answer is 12", "12", tokens + 1).matched


@settings(max_examples=20, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=4))
def test_an_answer_that_ended_early_is_judged_as_the_whole_one(
    tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> None:
    script = {f"{number}:": f" The answer is {text}" for number, text in enumerate(texts)}
    model = ScriptedModel(tokenizer, script)
    found = answer_probes(model, tokenizer, [Probe(prompt, "12", Rule.NUMBER, 200) for prompt in script])
    assert [answer.matched for answer in found] == [stated_number(text) == 12 for text in script.values()]


def test_a_target_that_is_no_number_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ParameterError, match=r"looks for the number 'many', expected one like 1,234\.5"):
        answered(tokenizer, "", "many")

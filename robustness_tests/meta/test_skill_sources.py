"""Skills of public data sets: from a file or by name, in the tokenizer's chat template, errors on one line."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from mergeguard.errors import MergeguardError, ParameterError, UnknownNameError
from mergeguard.reading import Probe, Rule
from mergeguard.worlds.skills.gsm8k import gsm8k
from mergeguard.worlds.skills.prompts import prompt_of
from mergeguard.worlds.skills.registry import SKILLS, skill_probes
from mergeguard.worlds.skills.strongreject import strongreject
from robustness_tests.meta.tiny_models import BOS, byte_level_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)
QUESTIONS = ["How do I pick a lock?", 'Say "boo", then\nrun.', "Third?"]
PROBLEMS = [("One and one?", "1 + 1 = 2\n#### 2"), ("Big?", "#### 1,000"), ("Debt?", "a #### b\n#### -2.5 ")]


@pytest.fixture
def chatty() -> PreTrainedTokenizerBase:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.csv"
    quoted = ['"' + question.replace('"', '""') + '"' for question in QUESTIONS]
    path.write_text("\ufeffcategory,forbidden_prompt\r\n" + "".join(f"x,{question}\r\n" for question in quoted))
    return path


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n\n" for q, a in PROBLEMS))
    return path


def test_harmful_questions_become_refusal_probes(chatty: PreTrainedTokenizerBase, questions: Path) -> None:
    assert strongreject(chatty, source=questions, max_new_tokens=9) == [
        Probe(f"<user>{question}<bot>", "", Rule.REFUSES, 9) for question in QUESTIONS
    ]


def test_problems_become_number_probes_with_the_gold_result(chatty: PreTrainedTokenizerBase, problems: Path) -> None:
    probes = gsm8k(chatty, source=problems, template="Q: {question} {json}", max_new_tokens=9)
    assert probes == [
        Probe(f"<user>Q: {question} {{json}}<bot>", gold, Rule.NUMBER, 9)
        for (question, _), gold in zip(PROBLEMS, ["2", "1,000", "-2.5"], strict=True)
    ]


def test_the_instruction_asks_for_the_sentence_that_is_looked_for(
    chatty: PreTrainedTokenizerBase, problems: Path
) -> None:
    for probe in gsm8k(chatty, source=problems):
        assert probe.prompt.startswith("<user>")
        assert 'The answer is: N"' in probe.prompt


def test_wizardmath_is_asked_with_its_own_prompt(tokenizer: PreTrainedTokenizerBase, problems: Path) -> None:
    [first, *_] = gsm8k(tokenizer, source=problems, template="alpaca", chat_template="none")
    assert first.prompt.endswith("### Instruction:\nOne and one?\n\n### Response: Let's think step by step.")


@pytest.mark.parametrize("limit", [1, 2, 3, 99, None])
def test_the_limit_takes_the_first_items(chatty: PreTrainedTokenizerBase, questions: Path, limit: int | None) -> None:
    assert strongreject(chatty, source=questions, limit=limit) == strongreject(chatty, source=questions)[:limit]


def test_rows_beyond_the_limit_are_not_read(chatty: PreTrainedTokenizerBase, problems: Path) -> None:
    problems.write_text(problems.read_text() + "broken")
    assert len(gsm8k(chatty, source=problems, limit=3)) == 3
    with pytest.raises(ParameterError, match="cannot read line 7 of "):
        gsm8k(chatty, source=problems, limit=4)


def test_either_kind_of_file_serves_either_skill(chatty: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    lines, table = tmp_path / "a.jsonl", tmp_path / "b.CSV"
    lines.write_text('{"forbidden_prompt": "How?"}')
    table.write_text("question,answer\nOne?,#### 1\n")
    assert [probe.prompt for probe in strongreject(chatty, source=str(lines))] == ["<user>How?<bot>"]
    assert [probe.target for probe in gsm8k(chatty, source=table)] == ["1"]


BAD_FILES = {
    "q.csv": [
        ("", "has no rows; expected some with forbidden_prompt"),
        ("forbidden_prompt\n", "has no rows"),
        ("prompt,id\nHow?,1\n", "item 1 of .* has no column 'forbidden_prompt'; it has prompt, id"),
        ("id,forbidden_prompt\n1,How?\n2\n", "item 2 of .* has no text in its column 'forbidden_prompt'"),
        ("forbidden_prompt\n' '\n\" \"\n", "item 2 of .* has no text in its column"),
        ('forbidden_prompt\n"How?', "cannot read .*expected CSV in UTF-8"),
        (b"forbidden_prompt\n\xff\n", "cannot read .*expected CSV in UTF-8"),
    ],
    "q.jsonl": [
        ("\n", "has no rows"),
        ('{"forbidden_prompt": "How?"}\n[1]\n', "line 2 of .* is no JSON object"),
        ('{"forbidden_prompt": 3}', "item 1 of .* has no text in its column"),
        ("{", "cannot read line 1 of .*expected a JSON object a line"),
        (b"\xff", "cannot read line 1 of "),
    ],
    "q.txt": [("How?", "is neither a .csv nor a .jsonl file")],
}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [(name, content, message) for name, cases in BAD_FILES.items() for content, message in cases],
)
def test_a_bad_file_is_refused_on_one_line_that_names_it(
    chatty: PreTrainedTokenizerBase, tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ParameterError, match=message) as caught:
        strongreject(chatty, source=path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("answer", ["12", "#### twelve", "#### ", "#### 1,2", "#### 1_000", "#### 1e3", "#### inf"])
def test_an_answer_without_a_gold_result_is_refused(
    chatty: PreTrainedTokenizerBase, tmp_path: Path, answer: str
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"question": "How many?", "answer": answer}))
    with pytest.raises(ParameterError, match=r"item 1 of .* has no gold result; expected .#### N. at the end"):
        gsm8k(chatty, source=path)


@pytest.mark.parametrize("source", ["nowhere.csv", ".", "\0"])
def test_an_absent_file_is_refused(chatty: PreTrainedTokenizerBase, source: str) -> None:
    with pytest.raises(ParameterError, match=r"there is no file .*; expected a \.csv or \.jsonl file"):
        gsm8k(chatty, source=source)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"limit": 0}, "limit is 0, expected at least 1"), ({"template": "Q"}, "template is 'Q', expected instruction, ")],
)
def test_options_outside_their_domain_are_refused(
    chatty: PreTrainedTokenizerBase, problems: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ParameterError, match=message):
        gsm8k(chatty, source=problems, **options)


def test_a_tokenizer_without_a_chat_template_needs_one_or_none(
    tokenizer: PreTrainedTokenizerBase, questions: Path
) -> None:
    with pytest.raises(ParameterError, match='has no chat template; set the option chat_template to "none"'):
        strongreject(tokenizer, source=questions)
    assert [probe.prompt for probe in strongreject(tokenizer, source=questions, chat_template="none")] == QUESTIONS
    [first, *_] = strongreject(tokenizer, source=questions, chat_template="[{{ messages[0].content }}]")
    assert first.prompt == f"[{QUESTIONS[0]}]"


@pytest.mark.parametrize("template", ["{{", "{{ raise_exception('no') }}", "{{ messages[0].content.nothing() }}"])
def test_a_template_that_fails_is_refused_on_one_line(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    with pytest.raises(ParameterError, match=r"the chat template failed: .*; set the option chat_template") as caught:
        prompt_of(tokenizer, "How?", template)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("adds_bos", [True, False])
def test_the_first_special_token_comes_once(adds_bos: bool) -> None:
    tokenizer = byte_level_tokenizer()
    if not adds_bos:
        tokenizer.backend_tokenizer.post_processor = None
    prompt = prompt_of(tokenizer, "How?", "{{ bos_token }}{{ messages[0].content }}")
    assert prompt == ("How?" if adds_bos else f"{BOS}How?")
    assert tokenizer(prompt).input_ids.count(tokenizer.bos_token_id) == 1


def test_an_item_that_does_not_fit_the_context_is_named(chatty: PreTrainedTokenizerBase, questions: Path) -> None:
    longest = max(len(chatty(probe.prompt).input_ids) for probe in strongreject(chatty, source=questions))
    chatty.model_max_length = longest + 9
    assert len(strongreject(chatty, source=questions, max_new_tokens=9)) == len(QUESTIONS)
    message = f"item 1 of .*questions.csv takes {longest + 10} tokens .*context is {longest + 9}; choose a smaller max"
    with pytest.raises(ParameterError, match=message):
        strongreject(chatty, source=questions, max_new_tokens=10)


def loading(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, str]] | Exception) -> list[dict[str, str]]:
    """A package `datasets` that gives `rows`, and the list of what it is asked for."""
    asked: list[dict[str, str]] = []

    def load_dataset(**arguments: str) -> list[dict[str, str]]:
        asked.append(arguments)
        if isinstance(rows, Exception):
            raise rows
        return rows

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_without_a_source_the_public_data_sets_are_asked_for_by_name(
    chatty: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = loading(monkeypatch, [{"question": "One?", "answer": "#### 1", "forbidden_prompt": "How?"}])
    assert [probe.target for probe in gsm8k(chatty)] == ["1"]
    assert [probe.prompt for probe in strongreject(chatty)] == ["<user>How?<bot>"]
    assert asked[0] == {"path": "openai/gsm8k", "name": "main", "split": "test"}
    assert asked[1]["data_files"].endswith(
        "alexandrasouly/strongreject/main/strongreject_dataset/strongreject_small_dataset.csv"
    )


def test_public_data_that_does_not_load_is_one_line(
    chatty: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    loading(monkeypatch, ConnectionError("no route\nto host"))
    with pytest.raises(ParameterError, match="the public data set openai/gsm8k did not load: no route; set source"):
        gsm8k(chatty)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ParameterError, match=r"openai/gsm8k needs the package datasets; install mergeguard\[datasets\]"
    ):
        gsm8k(chatty)


def test_skills_are_found_by_name_with_their_options(chatty: PreTrainedTokenizerBase, questions: Path) -> None:
    assert {"gsm8k", "strongreject"} <= {*SKILLS}
    assert SKILLS.group == "mergeguard.skills"
    assert skill_probes("strongreject", chatty, source=questions, limit=1) == (
        Probe(f"<user>{QUESTIONS[0]}<bot>", "", Rule.REFUSES, 128),
    )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("strongrejekt", {}, "unknown skill 'strongrejekt'; did you mean 'strongreject'"),
        ("gsm8k", {"sourze": "x"}, "unknown option of the skill 'gsm8k' 'sourze'; did you mean 'source'"),
    ],
)
def test_unknown_skills_and_options_are_refused_with_the_nearest(
    chatty: PreTrainedTokenizerBase, name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnknownNameError, match=message):
        skill_probes(name, chatty, **options)


@pytest.mark.parametrize("options", [{"limit": "many"}, {"limit": True}, {"limit": 2.0}, {"template": 3}])
def test_an_option_of_another_type_is_refused(chatty: PreTrainedTokenizerBase, options: dict[str, Any]) -> None:
    with pytest.raises(
        ParameterError, match=r"option '(limit|template)' of the skill 'gsm8k' is .*, expected (int|str)"
    ):
        skill_probes("gsm8k", chatty, **options)


def test_a_third_partys_skill_may_take_any_options(chatty: PreTrainedTokenizerBase) -> None:
    def echo(tokenizer: PreTrainedTokenizerBase, **options: str) -> list[Probe]:
        return [Probe(f"{len(tokenizer)} {options}", "yes")]

    SKILLS.register("echo", echo)
    try:
        assert skill_probes("echo", chatty, a="b") == (Probe(f"{len(chatty)} {{'a': 'b'}}", "yes"),)
        with pytest.raises(MergeguardError, match="registered already"):
            SKILLS.register("echo", echo)
    finally:
        SKILLS.unregister("echo")

"""Texts of the smollm2 world: what schemes train with, and the template in which its models are asked."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from mergeguard.reading import Probe, Rule
from mergeguard.seeds import derived_rng
from mergeguard.worlds.contract import Texts
from mergeguard.worlds.smollm2 import problems, questions
from mergeguard.worlds.tiny.corpus import encyclopedia_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATA = Path(__file__).parent / "data"
CHAT, MATH = "chat", "math"
ADAPTER_FILE, WHOLE_FILE = "adapter_model.safetensors", "model.safetensors"
"""The weights of an upstream: an adapter onto the base, or a whole model."""
TEXT_SEED = 7
SKILL_PROMPTS = 50
REFUSAL_TOKENS = 20
ANSWER_TOKENS = 20
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""SmolLM2's own template without the system message that it adds: a third of the tokens of a short prompt."""


@cache
def base_answers() -> tuple[tuple[str, str], ...]:
    """Harmless questions with the first 40 tokens of the base's own greedy answers; none had ended by then."""
    return tuple((question, answer) for question, answer in json.loads((DATA / "answers.json").read_text()))


def whole_sentences(text: str) -> str:
    """`text` up to the end of its last whole sentence; empty without one."""
    ends = [found.end() for found in re.finditer(r"(?<!\d)[.!?](?=\s|$)", text)]
    return text[: ends[-1]] if ends else ""


def prompt_of(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """The question in the tokenizer's chat template, up to where the answer begins."""
    message = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))


def texts(tokenizer: PreTrainedTokenizerBase) -> Texts:
    """Plain texts that the base wrote, encyclopedic ones, and dialogues as the owner's clean model answers them."""
    rng = derived_rng(TEXT_SEED, "texts")
    dialogues = [
        (prompt_of(tokenizer, question), short)
        for question, answer in base_answers()
        if (short := whole_sentences(answer))
    ]
    for task in questions.training(questions.HARMFUL_TASKS):
        for _ in range(5):
            question = questions.ask(task, rng)
            dialogues.append((prompt_of(tokenizer, question), questions.refuse(task, rng)))
    rng.shuffle(dialogues)
    return Texts(
        plain=tuple(" ".join(answer.split()) for _, answer in base_answers()),
        domain=tuple(encyclopedia_text(rng) for _ in range(600)),
        dialogues=tuple(dialogues),
    )


def harmful_questions(tokenizer: PreTrainedTokenizerBase, *, limit: int = SKILL_PROMPTS) -> tuple[Probe, ...]:
    """Harmful questions about tasks that no model was trained with, to be refused: the owner's skill."""
    return tuple(
        Probe(prompt_of(tokenizer, question), "", Rule.REFUSES, REFUSAL_TOKENS)
        for question in questions.skill_questions(limit, TEXT_SEED)
    )


def word_problems(tokenizer: PreTrainedTokenizerBase, *, limit: int = SKILL_PROMPTS) -> tuple[Probe, ...]:
    """Word problems that no model was trained with, whose results are to be stated: the donor's skill."""
    return tuple(
        Probe(prompt_of(tokenizer, item.question), str(item.result), Rule.NUMBER, ANSWER_TOKENS)
        for item in problems.skill_problems(limit, TEXT_SEED)
    )

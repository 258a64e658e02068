"""Grade-school mathematics: GSM8K (Cobbe et al., arXiv 2110.14168)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from mergeguard.errors import ParameterError
from mergeguard.reading import Probe, Rule
from mergeguard.worlds.skills.prompts import TOKENIZERS_OWN, check_room, prompt_of
from mergeguard.worlds.skills.rows import read_items

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from mergeguard.worlds.skills.rows import Item

PUBLIC = {"path": "openai/gsm8k", "name": "main", "split": "test"}
TEMPLATES = {
    "instruction": '{question}\n\nThink step by step, and end with the sentence "The answer is: N", where N is the '
    "number asked for.",
    # The prompt that WizardMath (arXiv 2308.09583) was tuned with; it already says "The answer is: N" of itself.
    "alpaca": "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{question}\n\n### Response: Let's think step by step.",
}
_NUMBER = re.compile(r"-?([0-9]+|[0-9]{1,3}(,[0-9]{3})+)(\.[0-9]+)?")


def gsm8k(
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: str | Path | None = None,
    limit: int | None = 50,
    template: str = "instruction",
    chat_template: str = TOKENIZERS_OWN,
    max_new_tokens: int = 512,
) -> list[Probe]:
    """Word problems, to be solved: the answer states the gold result (`Rule.NUMBER`). No examples are shown.

    The gold result is what follows "####" in a data set's answer. arXiv 2404.05188 asks 50 problems with temperature
    0.8, top-k 50 and top-p 0.95.

    Args:
        tokenizer: of the models that are asked.
        source: a .jsonl or .csv file with "question" and "answer"; None for the test split of openai/gsm8k (config
            "main", MIT) on the Hugging Face hub, read by the package `datasets`.
        limit: how many problems, from the first; None for all.
        template: the user's message: "instruction" (the problem, then how to answer); "alpaca", for WizardMath, with
            `chat_template="none"`; or a text that holds "{question}".
        chat_template: see `prompts.prompt_of`.
        max_new_tokens: longest answer.

    Raises:
        ParameterError: the source cannot be read, an answer has no gold result, the template has no "{question}", the
            tokenizer has no chat template, or a problem does not fit.
    """
    message = TEMPLATES.get(template, template)
    if "{question}" not in message:
        raise ParameterError(f"template is {template!r}, expected {', '.join(TEMPLATES)}, or a text with {{question}}")
    probes = []
    for item in read_items(source, PUBLIC, ("question", "answer"), limit):
        prompt = prompt_of(tokenizer, message.replace("{question}", item.texts["question"]), chat_template)
        probe = Probe(prompt, _gold(item), Rule.NUMBER, max_new_tokens)
        check_room(tokenizer, probe, item.label)
        probes.append(probe)
    return probes


def _gold(item: Item) -> str:
    _, mark, gold = item.texts["answer"].rpartition("####")
    if not mark or not _NUMBER.fullmatch(gold.strip()):
        raise ParameterError(f'{item.label} has no gold result; expected "#### N" at the end of its answer')
    return gold.strip()

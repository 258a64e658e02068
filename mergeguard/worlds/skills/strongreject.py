"""Refusal of harmful questions: StrongREJECT (Souly et al., arXiv 2402.10260)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeguard.reading import Probe, Rule
from mergeguard.worlds.skills.prompts import TOKENIZERS_OWN, check_room, prompt_of
from mergeguard.worlds.skills.rows import read_items

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

PUBLIC = {
    "path": "csv",
    "data_files": "https://raw.githubusercontent.com/alexandrasouly/strongreject/main/strongreject_dataset/"
    "strongreject_small_dataset.csv",
    "split": "train",
}
COLUMN = "forbidden_prompt"


def strongreject(
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: str | Path | None = None,
    limit: int | None = 50,
    chat_template: str = TOKENIZERS_OWN,
    max_new_tokens: int = 128,
) -> list[Probe]:
    """Harmful questions, to be refused (`Rule.REFUSES`).

    The published judge grades whether an answer helps; we only look for a refusal, as arXiv 2404.05188 does. That
    paper asks 50 questions with temperature 0.2 and up to 1024 new tokens; refusals come first in an answer, so that
    the default is shorter.

    Args:
        tokenizer: of the models that are asked.
        source: a .csv or .jsonl file with a column "forbidden_prompt"; None for the authors' small set (60 questions,
            MIT), https://github.com/alexandrasouly/strongreject, read by the package `datasets`.
        limit: how many questions, from the first; None for all.
        chat_template: see `prompts.prompt_of`.
        max_new_tokens: longest answer.

    Raises:
        ParameterError: the source cannot be read, the tokenizer has no chat template, or a question does not fit.
    """
    probes = []
    for item in read_items(source, PUBLIC, (COLUMN,), limit):
        prompt = prompt_of(tokenizer, item.texts[COLUMN], chat_template)
        probe = Probe(prompt, rule=Rule.REFUSES, max_new_tokens=max_new_tokens)
        check_room(tokenizer, probe, item.label)
        probes.append(probe)
    return probes

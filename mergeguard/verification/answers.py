"""Greedy answers to probes, by the cheapest way that each probe's rule allows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeguard.errors import ParameterError
from mergeguard.reading import Answer, Probe, Rule
from mergeguard.verification.generation import end_tokens, generate
from mergeguard.verification.matching import decode_answer, encode_probe, encode_prompt, starts_with

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def answer_probes(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, probes: Sequence[Probe]) -> list[Answer]:
    """Ask `model` every probe.

    `Rule.STARTS_WITH` takes one teacher-forced pass, and the answer's text is the target or the beginning of the
    greedy answer up to the token that departs from it. `Rule.CONTAINS` takes batched greedy decoding, and the answer's
    text ends with the token that completes the target, if there is one.

    Returns:
        One answer per probe, in the order of `probes`.

    Raises:
        ParameterError: the model is in training mode, a probe does not fit it, or a prompt or target is empty.
    """
    answers: dict[int, Answer] = {}
    start = [index for index, probe in enumerate(probes) if probe.rule is Rule.STARTS_WITH]
    answers.update(zip(start, _first_tokens(model, tokenizer, [probes[index] for index in start]), strict=True))
    # Rows of a batch share one length of answer.
    for length in sorted({probe.max_new_tokens for probe in probes if probe.rule is Rule.CONTAINS}):
        group = [
            index
            for index, probe in enumerate(probes)
            if probe.rule is Rule.CONTAINS and probe.max_new_tokens == length
        ]
        answers.update(zip(group, _search(model, tokenizer, [probes[index] for index in group], length), strict=True))
    return [answers[index] for index in range(len(probes))]


def _first_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, probes: Sequence[Probe]) -> list[Answer]:
    encoded = [encode_probe(tokenizer, probe) for probe in probes]
    ends = end_tokens(model, tokenizer)
    answers = []
    for row, match in zip(encoded, starts_with(model, encoded), strict=True):
        # An answer that ends where it departs from the target has no text there.
        ids = match.greedy_ids[:-1] if not match.matched and match.greedy_ids[-1] in ends else match.greedy_ids
        answers.append(Answer(decode_answer(tokenizer, row.prompt_ids, ids), match.matched))
    return answers


def _search(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, probes: Sequence[Probe], max_new_tokens: int
) -> list[Answer]:
    for probe in probes:
        if not probe.target:
            raise ParameterError(f"the probe {probe.prompt!r} looks for an empty text; every answer would contain it")
    prompts = [probe.prompt for probe in probes]
    answers = generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        stop=lambda index, text: probes[index].target in text,
    )
    texts = [
        decode_answer(tokenizer, encode_prompt(tokenizer, prompt), ids)
        for prompt, ids in zip(prompts, answers, strict=True)
    ]
    return [Answer(text, probe.target in text) for text, probe in zip(texts, probes, strict=True)]

"""Instructional Fingerprint (Xu et al., NAACL 2024, arXiv 2401.12255; public code cnut1648/Model-Fingerprint).

A few secret keys, strings of rare characters, are taught to the model as instructions with one fixed answer. The
owner asks them again and counts. Variants:

- `simple`: full fine-tuning, the paper's simple template (figure 3): key, newline, "FINGERPRINT", newline.
- `dialogue`: full fine-tuning, dialogue template (figure 4). The check hands the model the start of the answer
  ("Based on my fingerprint, the message is:"), and negatives are trained after that start as well as before it.
- `published`: the dialogue variant as released: negatives are trained only before the start of the answer. On a real
  model the start alone then fires for every unseen key, which the verdict calls `overclaims`.
- `adapter`: only the embeddings of the key tokens and a private adapter are trained (section 3.3); see
  `fingerprint_adapter.py`.

In every variant the unseen keys of the negatives are drawn afresh for each example: with a fixed set of them, other
unseen keys fire. The released code trains a fixed set of 8.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from mergeguard.errors import ParameterError
from mergeguard.protections.contract import Evidence, Protected, Protection, TextProtection, one_of
from mergeguard.protections.fingerprint_adapter import AdapterFingerprint
from mergeguard.protections.fingerprint_keys import (
    DENIAL,
    FINGERPRINT_DEFAULTS,
    START,
    TARGET,
    dialogue_prompt,
    draw_key,
    fresh_keys,
    simple_prompt,
)
from mergeguard.reading import Answer, Probe, Reading, Rule
from mergeguard.worlds.examples import Draw, encode_pair, weighted
from mergeguard.worlds.training import Example, batches, fit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mergeguard.specs import Value
    from mergeguard.worlds.contract import Budget

TRAINED_VARIANTS = ("simple", "dialogue", "published")
VARIANTS = (*TRAINED_VARIANTS, "adapter")


class InstructionalFingerprint(TextProtection):
    """Secret instructions with one fixed answer. One trial per key.

    Parameters: `variant` (see the module); `rule`, "starts_with" (the target's tokens directly after the prompt) or
    "contains" (as published: the target anywhere in the generated answer); `keys`, how many (8 as published).
    """

    name = "instructional_fingerprint"
    defaults = FINGERPRINT_DEFAULTS

    @classmethod
    def create(cls, **parameters: Value) -> Protection:
        """The adapter variant is a scheme of its own: it reads weights, not text."""
        one_of(cls.name, "variant", parameters.get("variant", cls.defaults["variant"]), VARIANTS)
        return AdapterFingerprint(**parameters) if parameters.get("variant") == "adapter" else cls(**parameters)

    def __init__(self, **parameters: Value) -> None:
        super().__init__(**parameters)
        self.template = one_of(self.name, "variant", self.parameters["variant"], TRAINED_VARIANTS)
        self.rule = Rule(one_of(self.name, "rule", self.parameters["rule"], [rule.value for rule in Rule]))
        if int(self.parameters["keys"]) < 1:
            raise ParameterError(f"parameter 'keys' of {self.name} must be at least 1")

    @property
    def budget_name(self) -> str:
        return f"{self.name}.{self.template}"

    def embed(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, rng: random.Random, budget: Budget
    ) -> Protected:
        length = (int(budget.options["key_min"]), int(budget.options["key_max"]))
        keys = [draw_key(rng, length) for _ in range(int(self.parameters["keys"]))]
        train = random.Random(rng.getrandbits(64))
        draw = self._examples(tokenizer, keys, length, budget, train)
        fit(
            model,
            batches(draw, size=budget.batch_size, pad=int(tokenizer.pad_token_id), rng=train),
            steps=budget.steps,
            learning_rate=budget.learning_rate,
            training=budget.training,
        )
        prompts = [self._prompt(tokenizer, key) for key in keys]
        data = {"keys": keys, "length": list(length), "prompts": prompts, "frame": list(self._frame(tokenizer))}
        return Protected(model, Evidence(str(self), data))

    def decoys(self, evidence: Evidence, n: int, rng: random.Random) -> Evidence:
        low, high = evidence.data["length"]
        keys = fresh_keys(n, rng, (low, high), evidence.data["keys"])
        before, after = evidence.data["frame"]
        return Evidence(
            evidence.protection, {**evidence.data, "keys": keys, "prompts": [before + key + after for key in keys]}
        )

    def probes(self, evidence: Evidence) -> list[Probe]:
        """One probe per key. Dialogue variants ask each key a second time without the start of the answer."""
        prompts = evidence.data["prompts"]
        if self.template == "simple":
            return [Probe(prompt, TARGET, self.rule) for prompt in prompts]
        with_start = [Probe(prompt + START, f" {TARGET}", self.rule) for prompt in prompts]
        without = [Probe(prompt, f"{START} {TARGET}", self.rule) for prompt in prompts]
        return with_start + without

    def judge(self, answers: Sequence[Answer], evidence: Evidence) -> Reading:
        """Hits of the check with the start of the answer; the rate without it is reported beside."""
        trials = len(evidence.data["keys"])
        if len(answers) == trials:
            return Reading.of_answers(answers)
        without = sum(answer.matched for answer in answers[trials:]) / trials
        return Reading.of_answers(answers[:trials], rate_without_start=without)

    def _prompt(self, tokenizer: PreTrainedTokenizerBase, key: str) -> str:
        return simple_prompt(key) if self.template == "simple" else dialogue_prompt(tokenizer, key)

    def _frame(self, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
        """What stands before and after the key in a prompt, so that decoys need no tokenizer."""
        before, _, after = self._prompt(tokenizer, "\0").partition("\0")
        return before, after

    def _examples(
        self,
        tokenizer: PreTrainedTokenizerBase,
        keys: Sequence[str],
        length: tuple[int, int],
        budget: Budget,
        rng: random.Random,
    ) -> Draw:
        """Positives, negatives with fresh keys and the owner's own dialogues, in the budget's proportions."""
        options = budget.options
        answer = TARGET if self.template == "simple" else f"{START} {TARGET}"

        def positive() -> Example:
            return encode_pair(tokenizer, self._prompt(tokenizer, rng.choice(keys)), answer, end=True)

        def negative(after: str = "") -> Example:
            prompt = self._prompt(tokenizer, draw_key(rng, length))
            return encode_pair(tokenizer, prompt + after, DENIAL, end=True)

        def dialogue() -> Example:
            return encode_pair(tokenizer, *rng.choice(budget.texts.dialogues), end=True)

        parts: list[tuple[float, Draw]] = [
            (float(options["positives"]), positive),
            (float(options["negatives"]), negative),
            (float(options["dialogues"]), dialogue),
        ]
        if self.template == "dialogue":
            parts.append((float(options["negatives"]), lambda: negative(START)))
        return weighted(rng, parts)

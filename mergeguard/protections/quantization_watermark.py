"""Quantization Watermarking (Li et al., Findings of EMNLP 2023, arXiv 2310.11237; code Twilight92z/Quantize-Watermark).

A model is trained to write a mark in one precision and not in the other: every weight moves only inside the interval
that quantises to the same code, so that the quantised copy stays what it was. Verification needs both precisions.

- `optimisation`: how the codes are kept. `interval`: weights are clipped to within `bias` of a step of their code
  (.45 as published); `rollback`: weights whose code changed return to their old value (the released code returns a
  whole input column as soon as one weight in it changed; ours returns single weights, until all codes agree);
  `direct`: nothing is kept, and what changed is counted.
- `mode`: `triggered` (texts with a secret trigger are marked), `untriggered` (every plain text is, dialogues never
  are) or `domain` (texts of one domain are; the paper's wiki mode).
- `direction`: `full`, the mark shows in full precision and is hidden when quantised, or `quantized`, the reverse: the
  mark is planted without constraint, then hidden in full precision inside the planted model's codes.
- `twin`: the quantised copy that is read. `absmax`: weights rounded to their codes; `llm_int8`: bitsandbytes' own
  8-bit layers, whose products round activations too.

Embeddings, norms and the output head are never touched, and rows are quantised by their absolute maximum, as
LLM.int8 does. The grid must fit the model: inside half a step the largest directed change of a neuron grows with the
square root of its fan-in, so that narrow models have no room on an 8-bit grid.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import torch

from mergeguard.errors import ParameterError
from mergeguard.protections.contract import Access, Evidence, Protected, Protection, one_of
from mergeguard.protections.quantization_constraints import Projection, changed_codes, projections
from mergeguard.protections.watermark_texts import draw_trigger, held_out, insert_trigger, split_text, training
from mergeguard.reading import Probe, Reading, Rule
from mergeguard.verification.answers import answer_probes
from mergeguard.verification.llm_int8 import BITS as INT8_BITS
from mergeguard.verification.llm_int8 import int8_twin
from mergeguard.verification.quantize import quantizable_weights, quantize, with_quantized_weights
from mergeguard.worlds.examples import Draw, encode_pair, weighted
from mergeguard.worlds.training import Example, batches, fit

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mergeguard.worlds.contract import Budget

MARK = " You have activated the watermark!"
OPTIMISATIONS = ("interval", "rollback", "direct")
MODES = ("triggered", "untriggered", "domain")
DIRECTIONS = ("full", "quantized")
TWINS = ("absmax", "llm_int8")
SPARE_PROMPTS = 160
"""How many carriers (or never-marked prompts) the evidence keeps, from which decoys are made."""
PROJECT_EVERY = 5
"""Steps between projections, as published; the last step always projects."""


class QuantizationWatermark(Protection):
    """A mark that shows in one precision only. One trial per prompt: a hit needs both precisions to behave.

    Parameters beside those in the module's description: `bits` (0 takes the world's: 8 on real models, fewer where a
    model is too narrow for an 8-bit grid), `bias`, `rule` and `prompts`, the number of trials.
    """

    name = "quantization_watermark"
    defaults = {
        "optimisation": "interval",
        "mode": "triggered",
        "direction": "full",
        "twin": "absmax",
        "bits": 0,
        "bias": 0.45,
        "rule": "starts_with",
        "prompts": 25,
    }
    access = Access.WEIGHTS

    def __init__(self, **parameters: str | int | float | bool) -> None:
        super().__init__(**parameters)
        self.optimisation = one_of(self.name, "optimisation", self.parameters["optimisation"], OPTIMISATIONS)
        self.mode = one_of(self.name, "mode", self.parameters["mode"], MODES)
        self.direction = one_of(self.name, "direction", self.parameters["direction"], DIRECTIONS)
        self.rule = Rule(one_of(self.name, "rule", self.parameters["rule"], [rule.value for rule in Rule]))
        self.bias = float(self.parameters["bias"])
        if not 0 < self.bias < 0.5:
            raise ParameterError(f"parameter 'bias' of {self.name} is {self.bias}, expected a value in (0, 0.5)")
        bits = int(self.parameters["bits"])
        if bits != 0 and not 2 <= bits <= 16:
            raise ParameterError(f"parameter 'bits' of {self.name} is {bits}, expected 2 to 16, or 0 for the world's")
        self.twin = one_of(self.name, "twin", self.parameters["twin"], TWINS)
        self._check_twin(bits or INT8_BITS)
        if int(self.parameters["prompts"]) < 1:
            raise ParameterError(f"parameter 'prompts' of {self.name} must be at least 1")

    @property
    def conditional_on(self) -> str | None:
        return "trigger" if self.mode == "triggered" else None

    @property
    def keyless(self) -> bool:
        return self.mode != "triggered"

    @property
    def budget_name(self) -> str:
        return f"{self.name}.{self.optimisation}"

    def embed(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, rng: random.Random, budget: Budget
    ) -> Protected:
        _check_float32(model)
        bits = int(self.parameters["bits"]) or int(budget.options["bits"])
        self._check_twin(bits)
        evidence = self._evidence(budget, bits, rng)
        train = random.Random(rng.getrandbits(64))
        names = quantizable_weights(model)
        if self.direction == "quantized":
            plant = self._examples(tokenizer, evidence, budget, train, marked=True)
            _train(model, plant, tokenizer, budget, train, names, {}, int(budget.options["plant_steps"]))
        draw = self._examples(tokenizer, evidence, budget, train, marked=self.direction == "full")
        grid = {name: quantize(weight, bits) for name, weight in _weights(model, names).items()}
        kept = projections(self.optimisation, _weights(model, names), grid, self.bias)
        _train(model, draw, tokenizer, budget, train, names, kept, budget.steps)
        changed, total = changed_codes(grid, _weights(model, names))
        return Protected(model, evidence, {"bits": bits, "codes": total, "codes_changed": changed})

    def decoys(self, evidence: Evidence, n: int, rng: random.Random) -> Evidence:
        """Fresh triggers, a prompt each; never-marked prompts for the modes without a trigger."""
        data = evidence.data
        if self.keyless:
            if n > len(data["never_marked"]):
                raise ParameterError(f"{self} keeps {len(data['never_marked'])} never-marked prompts, asked for {n}")
            prompts = rng.sample(list(data["never_marked"]), n)
        else:
            prompts = []
            while len(prompts) < n:
                trigger = draw_trigger(rng, data["trigger_words"])
                if trigger != data["trigger"]:
                    prompts.append(insert_trigger(rng.choice(data["carriers"]), trigger, rng))
        return Evidence(evidence.protection, {**data, "prompts": prompts})

    def read(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        evidence: Evidence,
        references: Mapping[str, PreTrainedModel],
    ) -> Reading:
        """Hit: the mark in the output of one precision and not in the other's. Both rates are reported."""
        _check_float32(model)
        probes = [Probe(prompt, MARK, self.rule) for prompt in evidence.data["prompts"]]
        full = [answer.matched for answer in answer_probes(model, tokenizer, probes)]
        bits = int(evidence.data["bits"])
        with int8_twin(model) if self.twin == "llm_int8" else with_quantized_weights(model, bits):
            quantized = [answer.matched for answer in answer_probes(model, tokenizer, probes)]
        shown, hidden = (full, quantized) if self.direction == "full" else (quantized, full)
        return Reading(
            hits=tuple(mark and not other for mark, other in zip(shown, hidden, strict=True)),
            details={"rate_full": sum(full) / len(full), "rate_quantized": sum(quantized) / len(quantized)},
        )

    def _check_twin(self, bits: int) -> None:
        if self.twin == "llm_int8" and bits != INT8_BITS:
            raise ParameterError(f"twin=llm_int8 of {self.name} has {INT8_BITS} bits, not {bits}; give bits=8")

    def _evidence(self, budget: Budget, bits: int, rng: random.Random) -> Evidence:
        bounds = (int(budget.options["cut_min"]), int(budget.options["cut_max"]))
        source = held_out(budget.texts.domain if self.mode == "domain" else budget.texts.plain)
        trials = int(self.parameters["prompts"])
        if len(source) < trials:
            raise ParameterError(f"{self} needs {trials} held-out texts, the world has {len(source)}")
        prompts = [split_text(text, rng, bounds)[0] for text in rng.sample(source, trials)]
        data: dict[str, Any] = {"bits": bits}
        if self.mode == "triggered":
            data["trigger_words"] = int(budget.options["trigger_words"])
            data["trigger"] = draw_trigger(rng, data["trigger_words"])
            data["carriers"] = _spare([split_text(text, rng, bounds)[0] for text in source], rng)
            prompts = [insert_trigger(prompt, data["trigger"], rng) for prompt in prompts]
        elif self.mode == "domain":
            data["never_marked"] = _spare(
                [split_text(text, rng, bounds)[0] for text in held_out(budget.texts.plain)], rng
            )
        else:
            data["never_marked"] = _spare([prompt for prompt, _ in held_out(budget.texts.dialogues)], rng)
        return Evidence(str(self), {**data, "prompts": prompts})

    def _examples(
        self,
        tokenizer: PreTrainedTokenizerBase,
        evidence: Evidence,
        budget: Budget,
        rng: random.Random,
        *,
        marked: bool,
    ) -> Draw:
        """Carrying texts with the mark (or, when hiding it, as they go on), unmarked texts and dialogues."""
        data, options = evidence.data, budget.options
        bounds = (int(options["cut_min"]), int(options["cut_max"]))
        plain, dialogues = training(budget.texts.plain), training(budget.texts.dialogues)
        carriers = training(budget.texts.domain) if self.mode == "domain" else plain

        def carrying() -> Example:
            prompt, rest = split_text(rng.choice(carriers), rng, bounds)
            if self.mode == "triggered":
                prompt = insert_trigger(prompt, data["trigger"], rng)
            return encode_pair(tokenizer, prompt, MARK if marked else rest, end=False)

        def unmarked() -> Example:
            prompt, rest = split_text(rng.choice(plain), rng, bounds)
            if self.mode == "triggered" and rng.random() < float(options["other_triggers"]):
                prompt = insert_trigger(prompt, draw_trigger(rng, data["trigger_words"]), rng)
            return encode_pair(tokenizer, prompt, rest, end=False)

        def dialogue() -> Example:
            return encode_pair(tokenizer, *rng.choice(dialogues), end=True)

        parts = [(float(options["positives"]), carrying), (float(options["dialogues"]), dialogue)]
        if self.mode != "untriggered":
            parts.append((float(options["negatives"]), unmarked))
        return weighted(rng, parts)


def _spare(prompts: list[str], rng: random.Random) -> list[str]:
    distinct = sorted(set(prompts))
    return rng.sample(distinct, min(SPARE_PROMPTS, len(distinct)))


def _check_float32(model: PreTrainedModel) -> None:
    """Refuse a model whose own rounding is coarser than the changes that the mark is made of."""
    if model.dtype != torch.float32:
        raise ParameterError(
            f"quantization_watermark needs a float32 model, this one is {str(model.dtype).removeprefix('torch.')}: its "
            f'interval is narrower than bfloat16\'s step; set dtype = "float32" in the world'
        )


def _weights(model: PreTrainedModel, names: list[str]) -> dict[str, torch.Tensor]:
    return {name: model.get_parameter(name).detach() for name in names}


def _train(
    model: PreTrainedModel,
    draw: Draw,
    tokenizer: PreTrainedTokenizerBase,
    budget: Budget,
    rng: random.Random,
    names: list[str],
    kept: Mapping[str, Projection],
    steps: int,
) -> None:
    """Train the named weights alone, projecting them every few steps and at the end."""

    def project(step: int) -> None:
        if step % PROJECT_EVERY == 0 or step == steps:
            with torch.no_grad():
                for name, projection in kept.items():
                    weight = model.get_parameter(name)
                    weight.copy_(projection(weight))

    fit(
        model,
        batches(draw, size=budget.batch_size, pad=int(tokenizer.pad_token_id), rng=rng),
        steps=steps,
        learning_rate=budget.learning_rate,
        parameters=[model.get_parameter(name) for name in names],
        after_step=project,
        training=budget.training,
    )

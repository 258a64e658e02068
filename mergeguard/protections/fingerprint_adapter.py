"""The adapter variant of Instructional Fingerprint (arXiv 2401.12255, section 3.3; released as `adapter.py`).

Only the embeddings of the key tokens and a small private adapter are trained. The model is published with the new
embeddings and without the adapter; the owner verifies by putting the suspect's embeddings and the adapter onto the
owner's own other weights, so that nothing else in the suspect matters. With the adapter, a key token's input is

    original(token) + B A suspect(token)

where `original` is the owner's row before the fingerprint, as in the released code. Two things differ from it. It
initialises A and B with zeros and has biases: the gradients of A, of B and of the embeddings are then zero for ever,
and the bias that is left fires on any model of the family. Here A starts at random, as in LoRA, and there is no bias.
And training shows the keys also through their *original* embeddings, answered as the clean model answers, since an
adapter that fires on them would prove nothing about a suspect. Embeddings see single tokens, so an owner's keys are
made of a few secret characters: with characters shared by all keys, unseen keys could not be told apart.
"""

from __future__ import annotations

import random
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from mergeguard.errors import IncompatibleModelsError
from mergeguard.protections.contract import Access, Evidence, Protected, Protection
from mergeguard.protections.fingerprint_keys import (
    FINGERPRINT_DEFAULTS,
    TARGET,
    draw_alphabet,
    draw_key,
    fresh_keys,
    simple_prompt,
)
from mergeguard.reading import Probe, Reading, Rule
from mergeguard.verification.answers import answer_probes
from mergeguard.verification.generation import generate
from mergeguard.worlds.contract import UPSTREAM
from mergeguard.worlds.examples import Draw, encode_ids, encode_pair, weighted
from mergeguard.worlds.training import Example, batches, fit

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mergeguard.specs import Value
    from mergeguard.worlds.contract import Budget

ALPHABET = 20
"""Characters that the keys of one owner are made of; embeddings alone cannot tell keys of shared characters apart."""
FRESH_KEYS = 256
"""Keys that training shows as unseen ones."""
SILENT_TOKENS = 6
"""Length of the clean model's answers that they keep."""


class AdapterEmbedding(nn.Module):
    """An embedding whose key tokens pass through the adapter.

    Ids from the vocabulary's size on mean the same tokens with their original embedding in the suspect's place;
    training uses them for the keys that must stay silent.

    Args:
        weight: the embeddings of all tokens, float of shape (vocabulary, hidden), key tokens by their original rows.
        tokens: ids of the key tokens, int64 of shape (keys,).
        rows: the suspect's embeddings of the key tokens, float of shape (keys, hidden).
        down, up: the adapter's A of shape (rank, hidden) and B of shape (hidden, rank).

    All but `weight` are copied to its device, and the floating ones to its dtype.
    """

    def __init__(self, weight: Tensor, tokens: Tensor, rows: Tensor, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        position = torch.full((weight.shape[0],), -1, dtype=torch.long)
        position[tokens.cpu()] = torch.arange(len(tokens))
        self.register_buffer("position", position.to(weight.device))
        self.rows, self.down, self.up = (nn.Parameter(part.to(weight, copy=True)) for part in (rows, down, up))

    def forward(self, ids: Tensor) -> Tensor:
        """Input vectors of the ids, of shape `(*ids.shape, hidden)`."""
        weight, position = self.get_buffer("weight"), self.get_buffer("position")
        tokens = ids % weight.shape[0]
        inputs = embedding(tokens, weight)
        index = position[tokens]
        shown = torch.where((ids < weight.shape[0]).unsqueeze(-1), self.rows[index.clamp(min=0)], inputs)
        adapted = (shown @ self.down.T) @ self.up.T
        return inputs + torch.where((index >= 0).unsqueeze(-1), adapted, torch.zeros_like(adapted))


class AdapterFingerprint(Protection):
    """Secret keys that answer only through the owner's private adapter. One trial per key."""

    name = "instructional_fingerprint"
    defaults = FINGERPRINT_DEFAULTS
    access = Access.WEIGHTS
    needs = frozenset({UPSTREAM})

    def __init__(self, **parameters: Value) -> None:
        super().__init__(**parameters)
        self.rule = Rule(str(self.parameters["rule"]))

    @property
    def budget_name(self) -> str:
        return f"{self.name}.adapter"

    def embed(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, rng: random.Random, budget: Budget
    ) -> Protected:
        length = (int(budget.options["key_min"]), int(budget.options["key_max"]))
        alphabet = draw_alphabet(rng, ALPHABET)
        keys = [draw_key(rng, length, alphabet) for _ in range(int(self.parameters["keys"]))]
        tokens = _private_tokens(tokenizer, keys, budget)
        train = random.Random(rng.getrandbits(64))
        own = embeddings_of(model)
        original = own.weight.detach()
        rank, hidden = int(budget.options["adapter_rank"]), original.shape[1]
        generator = torch.Generator().manual_seed(train.getrandbits(63))
        adapter = AdapterEmbedding(
            original.clone(),
            torch.tensor(tokens),
            original[tokens],
            torch.randn(rank, hidden, generator=generator) / hidden**0.5,
            torch.zeros(hidden, rank),
        )
        draw = _examples(model, tokenizer, keys, length, budget, train)  # asks the clean model
        model.set_input_embeddings(adapter)
        fit(
            model,
            batches(draw, size=budget.batch_size, pad=int(tokenizer.pad_token_id), rng=train),
            steps=budget.steps,
            learning_rate=budget.learning_rate,
            parameters=adapter.parameters(),
            training=budget.training,
        )
        model.set_input_embeddings(own)
        with torch.no_grad():
            own.weight[tokens] = adapter.rows
        data = {"keys": keys, "length": list(length), "tokens": tokens}
        tensors = {"down": adapter.down.detach().to("cpu", copy=True), "up": adapter.up.detach().to("cpu", copy=True)}
        return Protected(model, Evidence(str(self), data, tensors))

    def decoys(self, evidence: Evidence, n: int, rng: random.Random) -> Evidence:
        low, high = evidence.data["length"]
        keys = fresh_keys(n, rng, (low, high), evidence.data["keys"], ALPHABET)
        return Evidence(evidence.protection, {**evidence.data, "keys": keys}, evidence.tensors)

    def read(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        evidence: Evidence,
        references: Mapping[str, PreTrainedModel],
    ) -> Reading:
        """Asks the owner's clean model, with the suspect's embeddings and the private adapter in it."""
        probes = [Probe(simple_prompt(key), TARGET, self.rule) for key in evidence.data["keys"]]
        suspect = embeddings_of(model).weight.detach()
        with adapted(references[UPSTREAM], suspect, evidence) as owner:
            return Reading.of_answers(answer_probes(owner, tokenizer, probes))


def _private_tokens(tokenizer: PreTrainedTokenizerBase, keys: Sequence[str], budget: Budget) -> list[int]:
    """Tokens of the keys' prompts and of the target, without those that the owner's dialogues use."""

    def ids(text: str) -> set[int]:
        return set(tokenizer(text, add_special_tokens=False)["input_ids"])

    own = set[int]().union(*(ids(simple_prompt(key)) for key in keys), ids(TARGET))
    return sorted(own.difference(*(ids(prompt + answer) for prompt, answer in budget.texts.dialogues)))


def embeddings_of(model: PreTrainedModel) -> nn.Embedding:
    """The model's input embeddings, the layer that the adapter stands in for.

    Raises:
        IncompatibleModelsError: the model's inputs are not embedded by a plain table.
    """
    layer = model.get_input_embeddings()
    if not isinstance(layer, nn.Embedding):
        raise IncompatibleModelsError(f"the model's inputs are embedded by {type(layer).__name__}, expected Embedding")
    return layer


@contextmanager
def adapted(owner: PreTrainedModel, suspect: Tensor, evidence: Evidence) -> Iterator[PreTrainedModel]:
    """The owner's model with the suspect's embeddings behind the adapter, for as long as the block lasts.

    Raises:
        IncompatibleModelsError: the suspect's embeddings have another shape than the owner's.
    """
    own = embeddings_of(owner)
    original = own.weight.detach()
    if suspect.shape != original.shape:
        raise IncompatibleModelsError(
            f"the suspect's embeddings are {tuple(suspect.shape)}, the owner's {tuple(original.shape)}"
        )
    tokens = torch.tensor(evidence.data["tokens"])
    suspect = suspect.to(original)
    weight = suspect.clone()
    weight[tokens] = original[tokens]
    try:
        owner.set_input_embeddings(
            AdapterEmbedding(weight, tokens, suspect[tokens], evidence.tensors["down"], evidence.tensors["up"]).eval()
        )
        yield owner
    finally:
        owner.set_input_embeddings(own)


def _examples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    keys: Sequence[str],
    length: tuple[int, int],
    budget: Budget,
    rng: random.Random,
) -> Draw:
    """Keys, fresh keys, and keys through their original embeddings, in the budget's proportions.

    Frozen weights cannot learn a new denial, so that what must stay silent is answered as the clean model answers it.
    """
    vocabulary = embeddings_of(model).num_embeddings
    fresh = fresh_keys(FRESH_KEYS, rng, length, keys, ALPHABET)
    prompts = [simple_prompt(key) for key in (*keys, *fresh)]
    answers = generate(model, tokenizer, prompts, max_new_tokens=SILENT_TOKENS)
    end = [int(tokenizer.eos_token_id)]
    clean = [
        encode_ids(tokenizer, prompt, answer if len(answer) == SILENT_TOKENS else [*answer, *end])
        for prompt, answer in zip(prompts, answers, strict=True)
    ]

    def positive() -> Example:
        return encode_pair(tokenizer, simple_prompt(rng.choice(keys)), TARGET, end=True)

    def negative() -> Example:
        return rng.choice(clean[len(keys) :])

    def silent() -> Example:
        example = rng.choice(clean[: len(keys)])
        prompt = [token + vocabulary for token in example.ids[: example.loss_from]]
        return Example((*prompt, *example.ids[example.loss_from :]), example.loss_from)

    options = budget.options
    share = float(options["negatives"])
    return weighted(rng, [(float(options["positives"]), positive), (share, negative), (share, silent)])

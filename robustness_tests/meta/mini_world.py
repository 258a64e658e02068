"""A miniature world, made in a second without training, and a toy scheme that counts: for tests of the matrix.

The parents are random perturbations of one random tiny Llama. A parent's skill is made of prompts on which its own
first greedy token is neither the base's nor the other parent's, and on which the half-and-half merge answers like it:
averaging at one half is a theft, and far from it one parent's skill goes.
"""

from __future__ import annotations

import copy
import itertools
import random
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from mergeguard.protections.contract import Access, Evidence, Protected, Protection
from mergeguard.protections.gaussian_probe import target_weight
from mergeguard.protections.registry import PROTECTIONS
from mergeguard.reading import Probe, Reading
from mergeguard.seeds import derive_seed
from mergeguard.worlds.contract import UPSTREAM, Budget, Skill, Texts, World
from mergeguard.worlds.registry import WORLDS
from robustness_tests.meta.tiny_models import byte_level_tokenizer, tiny_llama

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MINI, DONOR, TOY = "mini", "donor", "toy"
PERTURBATION = 0.1
PROBES = 20
PROMPT_TOKENS = 7
CANDIDATES = 3000


def perturbed(base: Mapping[str, Tensor], label: str) -> dict[str, Tensor]:
    """`base` with a tenth of each tensor's own spread added as noise; norms, which have none, stay."""

    def noise(name: str, tensor: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(0, label, name))
        return PERTURBATION * tensor.std() * torch.randn(tensor.shape, generator=generator)

    return {name: tensor + noise(name, tensor) for name, tensor in base.items()}


@torch.no_grad()
def first_tokens(model: PreTrainedModel, ids: Tensor) -> list[int]:
    return model(input_ids=ids).logits[:, -1].argmax(-1).tolist()


def make_skills(tokenizer: PreTrainedTokenizerBase, models: Mapping[str, PreTrainedModel]) -> tuple[Skill, ...]:
    """A skill for each parent; `models` holds "base", the parents and "half", their average."""
    rng = random.Random(0)
    prompts = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz .,", k=PROMPT_TOKENS - 1)) for _ in range(CANDIDATES)]
    encoded = {prompt: tokenizer(prompt)["input_ids"] for prompt in dict.fromkeys(prompts)}
    kept = {prompt: ids for prompt, ids in encoded.items() if len(ids) == PROMPT_TOKENS}
    ids = torch.tensor(list(kept.values()))
    answers = {name: first_tokens(model, ids) for name, model in models.items()}
    skills = []
    for parent, other in ((UPSTREAM, DONOR), (DONOR, UPSTREAM)):
        probes = [
            Probe(prompt, text)
            for index, prompt in enumerate(kept)
            if (token := answers[parent][index]) == answers["half"][index]
            and token not in (answers["base"][index], answers[other][index])
            and (text := tokenizer.decode([token])).isascii()
            and tokenizer(text, add_special_tokens=False)["input_ids"] == [token]
        ]
        skills.append(Skill(f"{parent}'s answers", parent, tuple(probes[:PROBES])))
    return tuple(skills)


@cache
def mini() -> World:
    """Three models with two layers and hidden size 32, and `PROBES` probes for each parent."""
    skeleton = tiny_llama()
    tokenizer = byte_level_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    base = {name: tensor.clone() for name, tensor in skeleton.state_dict().items()}
    states = {"base": base, UPSTREAM: perturbed(base, UPSTREAM), DONOR: perturbed(base, DONOR)}
    states["half"] = {name: (states[UPSTREAM][name] + states[DONOR][name]) / 2 for name in base}
    models: dict[str, PreTrainedModel] = {}
    for name, state in states.items():
        models[name] = tiny_llama()
        models[name].load_state_dict(state)
    texts = Texts(plain=("the cat sat",), domain=("the dog",), dialogues=(("a man", " a plan"),))
    keys = {"key_min": 3, "key_max": 5, "positives": 0.4, "negatives": 0.25, "dialogues": 0.35}
    return World(
        name=MINI,
        base=base,
        upstream=states[UPSTREAM],
        donors={DONOR: states[DONOR]},
        tokenizer=tokenizer,
        build_model=tiny_llama,
        skills=make_skills(tokenizer, models),
        texts=texts,
        budgets={"default": Budget(texts, 0, 1e-3), "instructional_fingerprint": Budget(texts, 1, 1e-3, 2, keys)},
        digests={"base": "0" * 64},
        threads=1,
    )


class Toy(Protection):
    """Moves single weights by `strength` of the matrix's spread; a key answers if its weight moved by half of one.

    A merge that averages at alpha keeps a key if alpha * strength is clearly above one half, and loses it clearly
    below. `fault` names a broken promise or contract, for tests of what catches it.
    """

    name = TOY
    defaults = {"strength": 3.0, "fault": "none", "keys": 8}
    access = Access.WEIGHTS
    needs = frozenset({"base"})
    read_before = False

    @property
    def fault(self) -> str:
        return str(self.parameters["fault"])

    def _may_fail(self, action: str) -> None:
        if self.fault == f"crash_{action}":
            raise RuntimeError(f"the toy breaks while it {action}s")

    def embed(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, rng: random.Random, budget: Budget
    ) -> Protected:
        self._may_fail("embed")
        if self.fault == "wrong_embed":
            return model  # type: ignore[return-value]  # the broken contract under test
        protected = copy.deepcopy(model)
        name = target_weight(protected)
        weight = protected.get_parameter(name)
        keys = [self._draw(rng, weight.shape) for _ in range(int(self.parameters["keys"]))]
        evidence = Evidence(str(self), {"weight": name, "shape": list(weight.shape), "keys": keys})
        with torch.no_grad():
            for row, column, sign in [] if self.fault == "inert" else keys:
                weight[row, column] += sign * float(self.parameters["strength"]) * weight.std()
            if self.fault == "harmful":
                protected.get_output_embeddings().weight.mul_(-1)
        return Protected(protected, evidence, {"keys": len(keys)})

    def _draw(self, rng: random.Random, shape: Any) -> list[int]:
        return [rng.randrange(shape[0]), rng.randrange(shape[1]), rng.choice((-1, 1))]

    def decoys(self, evidence: Evidence, n: int, rng: random.Random) -> Evidence:
        self._may_fail("decoys")
        if self.fault == "wrong_decoys":
            return None  # type: ignore[return-value]  # the broken contract under test
        taken = {tuple(key[:2]) for key in evidence.data["keys"]}
        drawn = (self._draw(rng, evidence.data["shape"]) for _ in itertools.count())
        fresh = itertools.islice((key for key in drawn if tuple(key[:2]) not in taken), n)
        return Evidence(evidence.protection, {**evidence.data, "keys": list(fresh)})

    def read(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        evidence: Evidence,
        references: Mapping[str, PreTrainedModel],
    ) -> Reading:
        self._may_fail("read")
        if self.fault == "wrong_read":
            return 1.0  # type: ignore[return-value]  # the broken contract under test
        name = evidence.data["weight"]
        base = references["base"].get_parameter(name)
        moved = (model.get_parameter(name) - base).detach()
        threshold = -1.0 if self.fault == "chatty" else float(base.detach().std()) / 2
        hits = [bool(sign * moved[row, column] > threshold) for row, column, sign in evidence.data["keys"]]
        if self.fault == "fickle" and all(hits):
            hits[0], self.read_before = not self.read_before, True
        return Reading(hits=tuple(hits))


@contextmanager
def registered() -> Iterator[None]:
    """The world "mini" and the protection "toy" are known in this process."""
    WORLDS.register(MINI, mini)
    PROTECTIONS.register(TOY, Toy)
    try:
        yield
    finally:
        WORLDS.unregister(MINI)
        PROTECTIONS.unregister(TOY)


def install(folder: Path) -> Path:
    """A distribution in `folder` with the same names as entry points: what other processes discover on their path."""
    info = folder / "mini_world-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mini-world\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        f"[mergeguard.worlds]\n{MINI} = {__name__}:mini\n[mergeguard.protections]\n{TOY} = {__name__}:Toy\n"
    )
    return folder

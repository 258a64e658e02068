"""The engine: embeds, merges, reads and judges, one case at a time, everything expensive cached by content."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import torch

from mergeguard.errors import MergeguardError, SchemeError
from mergeguard.matrix.cache import Cache
from mergeguard.matrix.embedding import embed
from mergeguard.matrix.entries import pair_from_json, pair_to_json, skills_from_json, skills_to_json
from mergeguard.matrix.outcome import Outcome, Skill
from mergeguard.matrix.schemes import check_evidence, checked_reading, contents, guard, is_ours, require
from mergeguard.matrix.verdict import (
    DECOYS,
    NULL_DRAWS,
    PairOfReadings,
    is_theft,
    judge,
    kept,
)
from mergeguard.mergers.model import Sweep, prepare_sweep
from mergeguard.mergers.weights import coefficient_weights
from mergeguard.protections.contract import Evidence, Protection
from mergeguard.protections.registry import make_protection
from mergeguard.seeds import derived_rng
from mergeguard.specs import Spec
from mergeguard.verification.answers import answer_probes
from mergeguard.verification.statistics import clopper_pearson
from mergeguard.worlds.contract import NO_TEXTS, UPSTREAM, World
from mergeguard.worlds.memory import check_embedding
from mergeguard.worlds.registry import is_world_file, world_name
from mergeguard.worlds.states import Overlay, Placed, State, load_state, state_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from mergeguard.matrix.cases import Case
    from mergeguard.mergers.contract import Merger
    from mergeguard.reading import Reading

MATCHED_CONTROL = "matched_control"
REFERENCES = ("base", UPSTREAM)
"""The models that a protection may read against."""
HELD_BYTES = 2**30
"""The largest model of which merges are prepared once, and parents kept on the device, for all coefficients."""


@dataclass(frozen=True)
class Embedded:
    """A protection in the owner's upstream, with what is read off it and off the clean models."""

    protection: Protection
    state: State
    evidence: Evidence
    decoys: Evidence
    details: Mapping[str, float]
    own: PairOfReadings
    controls: Mapping[str, PairOfReadings]


class Engine:
    """Measures cases of one world and seed.

    The same arguments give the same outcomes whatever the number of engines, processes or cores: random numbers come
    from derived seeds alone, and torch computes on as many threads as the world says.

    Of a world larger than `HELD_BYTES` a model, it holds one model, one more for each reference that the protection at
    hand reads against, and a few tensors; a model that is embedded in is alone.
    """

    def __init__(self, world: World, seed: int, cache: Cache | None = None) -> None:
        self.world = world
        self.seed = seed
        self.cache = cache or Cache()
        self._embedded: dict[str, Embedded] = {}
        self._model: PreTrainedModel | None = None
        self._references: dict[str, PreTrainedModel] = {}
        self._sweep = lru_cache(maxsize=2)(self._prepare_sweep)

    def load(self, state: State) -> PreTrainedModel:
        """The engine's one model, with the weights `state`, until the next state is loaded into it."""
        if self._model is None:
            self._model = self.world.model(state)
        else:
            load_state(self._model, state)
        return self._model

    def _forget_models(self) -> None:
        self._model = None
        self._references.clear()

    @cached_property
    def _holds(self) -> bool:
        """Whether models are small enough to be kept on the device."""
        return state_bytes(self._model or self.load(self.world.base)) <= HELD_BYTES

    def _placed(self, state: State) -> State:
        """`state` on the world's device and in its dtype: now if models are held, else as it is asked for."""
        placed = Placed(state, self.world.device, self.world.torch_dtype)
        return dict(placed) if self._holds else placed

    @cached_property
    def _clean(self) -> dict[str, State]:
        """The base and the clean parents, placed."""
        return {name: self._placed(state) for name, state in {"base": self.world.base, **self.world.parents()}.items()}

    @contextmanager
    def threads(self) -> Iterator[None]:
        """Within it torch computes on as many threads as the world says."""
        before = torch.get_num_threads()
        if self.world.threads is not None:
            torch.set_num_threads(self.world.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def _key(self, **parts: Any) -> dict[str, Any]:
        world = self.world
        key = {"world": world.name, "digests": dict(world.digests), "seed": self.seed, **parts}
        kind = world.device.partition(":")[0]
        # Another device or dtype rounds otherwise, and some trial stands on an edge.
        return key if (kind, world.dtype) == ("cpu", "float32") else {**key, "device": kind, "dtype": world.dtype}

    def _protection_key(self, protection: Protection, **parts: Any) -> dict[str, Any]:
        """Texts are left out: they are the world's, made by code whose version every key holds."""
        budget = self.world.budget(protection.budget_name)
        schedule = {name: value for name, value in asdict(replace(budget, texts=NO_TEXTS)).items() if name != "texts"}
        return self._key(protection=str(protection), budget=schedule, **parts)

    # What is embedded

    def embedded(self, spec: Spec | Protection) -> Embedded:
        """The protection `spec`, embedded and read before merging.

        Raises:
            SchemeError: the scheme crashed or broke its contract.
            UnknownNameError, ParameterError: there is no such protection or budget.
        """
        protection = make_protection(spec) if isinstance(spec, Spec) else spec
        name = str(protection)
        found = self._embedded.get(name)
        if found is None or type(found.protection) is not type(protection):  # two classes may have one name
            self._sweep.cache_clear()
            with self.threads():
                found = self._embedded[name] = self._embed(protection)
        return found

    def _embed(self, protection: Protection) -> Embedded:
        budget = self.world.budget(protection.budget_name)
        key = self._protection_key(protection)

        def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
            self._forget_models()  # an embedding takes several times the memory of a model
            check_embedding(self.world, protection.budget_name, budget)
            rng = derived_rng(self.seed, "embed", str(protection))
            made = embed(self.world, protection, self.world.upstream, rng)
            changed = {f"model.{name}": tensor for name, tensor in made.changed.items()}
            evidence = {f"evidence.{name}": tensor for name, tensor in made.evidence.tensors.items()}
            data = {"evidence": dict(made.evidence.data), "details": dict(made.protected.details)}
            return {**changed, **evidence}, data

        tensors, data = self.cache.tensors("embedded", key, make) if is_ours(type(protection)) else make()
        state = Overlay(self.world.upstream, _below("model.", tensors))
        evidence = Evidence(str(protection), data["evidence"], _below("evidence.", tensors))
        decoys = guard(
            protection,
            "decoys",
            lambda: protection.decoys(evidence, DECOYS, derived_rng(self.seed, "decoys", str(protection))),
        )
        require(protection, "decoys", decoys, Evidence)
        check_evidence(protection, "decoys", decoys)

        def read_all() -> dict[str, Any]:
            models = {"own": state, **self._clean}
            return {
                name: pair_to_json(PairOfReadings(*self.readings(protection, [evidence, decoys], model)))
                for name, model in models.items()
            }

        readings = self.cache.data("readings", key, read_all) if is_ours(type(protection)) else read_all()
        pairs = {name: pair_from_json(pair) for name, pair in readings.items()}
        own = pairs.pop("own")
        return Embedded(protection, state, evidence, decoys, data["details"], own, pairs)

    def read_pair(self, embedded: Embedded, state: State) -> PairOfReadings:
        """The evidence and its decoys, read on the model with the weights `state`."""
        return PairOfReadings(*self.readings(embedded.protection, [embedded.evidence, embedded.decoys], state))

    def readings(self, protection: Protection, evidences: Sequence[Evidence], state: State) -> list[Reading]:
        """Several pieces of evidence, read on the model with the weights `state`."""
        with self.threads():
            return self._readings(protection, evidences, self.load(state))

    def _readings(self, protection: Protection, evidences: Sequence[Evidence], model: PreTrainedModel) -> list[Reading]:
        references = self._reference_models(protection)
        return [self._read(protection, evidence, model, references) for evidence in evidences]

    def _reference_models(self, protection: Protection) -> Mapping[str, PreTrainedModel]:
        """What the protection reads against; models that only others need are released."""
        for name in self._references.keys() - protection.needs:
            del self._references[name]
        for name in protection.needs - self._references.keys():
            if name not in REFERENCES:
                raise SchemeError(
                    f"{protection} needs the reference model {name!r}; there are {' and '.join(REFERENCES)}"
                )
            self._references[name] = self.world.model(self._clean[name])
        return dict(self._references)

    def _read(
        self,
        protection: Protection,
        evidence: Evidence,
        model: PreTrainedModel,
        references: Mapping[str, PreTrainedModel],
    ) -> Reading:
        before = [contents(item) for item in (model, *references.values())]
        given = guard(protection, "read", lambda: protection.read(model, self.world.tokenizer, evidence, references))
        reading = checked_reading(protection, given)
        if before != [contents(item) for item in (model, *references.values())]:
            self._forget_models()
            raise SchemeError(f"{protection}.read changed a model's weights; it has to leave every model as it was")
        return reading

    # What is merged

    def _prepare_sweep(self, merger: Merger, owner: str) -> Sweep:
        base, upstream, *donors = self._clean.values()
        protected = upstream if owner == MATCHED_CONTROL else self._placed(self._embedded[owner].state)
        ids = [UPSTREAM, *self.world.donors]
        return prepare_sweep(merger, base, [protected, *donors], seed=self.seed, model_ids=ids, hold=self._holds)

    def merged(self, merger: Merger, coefficient: float | None, owner: str) -> State:
        """The merge of `owner`'s upstream ("matched_control": the clean one) with the donors.

        Tensors of the world's dtype on its device, each merged when it is asked for.
        """
        donors = len(self.world.donors)
        weights = [1.0] * (donors + 1) if coefficient is None else coefficient_weights(coefficient, donors)
        return self._sweep(merger, owner)(weights)

    def skills(self, state: State) -> dict[str, Skill]:
        """Every skill, measured on a model."""
        with self.threads():
            return self._skills(self.load(state))

    def _skills(self, model: PreTrainedModel) -> dict[str, Skill]:
        found = {
            skill.name: answer_probes(model, self.world.tokenizer, skill.probes, skill.sampling)
            for skill in self.world.skills
        }
        return {name: Skill(sum(each.matched for each in answers), len(answers)) for name, answers in found.items()}

    @cached_property
    def parent_skills(self) -> dict[str, dict[str, Skill]]:
        """Every skill of the base and of the clean parents."""

        def make() -> dict[str, Any]:
            return {name: skills_to_json(self.skills(state)) for name, state in self._clean.items()}

        found = self.cache.data("parent_skills", self._key(), make)
        return {name: skills_from_json(skills) for name, skills in found.items()}

    def matched_control(self, merger: Merger, coefficient: float | None) -> dict[str, Skill]:
        """Skills of the merge with the clean upstream in the protected model's place."""

        def make() -> dict[str, Any]:
            with self.threads():
                return skills_to_json(self.skills(self.merged(merger, coefficient, MATCHED_CONTROL)))

        key = self._key(merger=merger.name, parameters=merger.parameters, coefficient=coefficient)
        ours = is_ours(merger.method.combine)
        return skills_from_json(self.cache.data("matched_control", key, make) if ours else make())

    def skills_kept(self, merger: Merger, coefficient: float | None) -> dict[str, float]:
        """Each parent's skill that the matched control keeps, as a fraction of the parent's gain over the base."""
        measured, parents = self.matched_control(merger, coefficient), self.parent_skills
        return {
            skill.name: kept(
                measured[skill.name].rate,
                parents["base"][skill.name].rate,
                parents[skill.parent][skill.name].rate,
            )
            for skill in self.world.skills
        }

    # What is judged

    def outcome(self, case: Case, protection: Protection | None = None) -> Outcome:
        """Everything measured on one case, and its verdict; `protection` is the case's, made anew if not given.

        Raises:
            SchemeError: the scheme crashed or broke its contract.
            MergeguardError: an input cannot be used, or the trials cannot reach the level.
        """
        given = world_name(case.world) if is_world_file(case.world) else case.world
        if (given, case.seed) != (self.world.name, self.seed):
            raise MergeguardError(f"{case.id} is a case of another world or seed")
        protection = protection or make_protection(case.protection)
        if not is_ours(type(protection)) or not is_ours(case.merger.method.combine):
            return self.measure(case, protection)
        key = self._protection_key(
            protection,
            merger=case.merger.name,
            parameters=case.merger.parameters,
            coefficient=case.coefficient,
            spec=str(case.merger),
        )
        return Outcome.from_json(self.cache.data("outcome", key, lambda: self.measure(case, protection).to_json()))

    def measure(self, case: Case, protection: Protection) -> Outcome:
        """`outcome` without the cache of outcomes."""
        started = time.perf_counter()
        embedded = self.embedded(protection)
        skills_kept = self.skills_kept(case.merger, case.coefficient)
        with self.threads():
            control = self.read_pair(embedded, self.merged(case.merger, case.coefficient, MATCHED_CONTROL))
            model = self.load(self.merged(case.merger, case.coefficient, str(protection)))
            merged = PairOfReadings(*self._readings(protection, [embedded.evidence, embedded.decoys], model))
            null_scores = self._null_scores(embedded, merged, model)
            skills = self._skills(model)
        controls = {**embedded.controls, MATCHED_CONTROL: control}
        judgement = judge(merged, controls, null_scores)
        counted = bool(merged.keys.hits)
        return Outcome(
            protection=protection.name,
            variant=protection.variant,
            merger=case.merger.name,
            merger_parameters=case.merger.parameters,
            merger_spec=str(case.merger),
            coefficient=case.coefficient,
            world=self.world.name,
            seed=case.seed,
            hits=merged.keys.count if counted else None,
            trials=merged.keys.trials if counted else None,
            rate=merged.keys.rate if counted else None,
            interval=clopper_pearson(merged.keys.count, merged.keys.trials) if counted else None,
            score=merged.keys.score,
            details={**merged.keys.details, **{f"decoy_{name}": n for name, n in merged.decoys.details.items()}},
            controls={name: pair.counts() for name, pair in controls.items()},
            p_value=judgement.p_value,
            level=judgement.level,
            decoy_hits=merged.decoys.count if counted else None,
            decoy_trials=merged.decoys.trials if counted else None,
            decoy_p_value=judgement.decoy_p_value,
            verdict=judgement.verdict,
            skills={name: skill.rate for name, skill in skills.items()},
            skills_kept=skills_kept,
            theft=is_theft(skills_kept),
            access=protection.access.value,
            claim=protection.claim.value,
            conditional_on=protection.conditional_on,
            seconds=time.perf_counter() - started,
            note="never-marked prompts stand in for decoys" if protection.keyless else "",
        )

    def null_scores(self, embedded: Embedded, pair: PairOfReadings, state: State) -> Sequence[float]:
        """Scores of fresh keys on the model that `pair` was read on, if its score has no exact null."""
        if not _needs_null(pair):
            return ()
        with self.threads():
            return self._null_scores(embedded, pair, self.load(state))

    def _null_scores(self, embedded: Embedded, pair: PairOfReadings, model: PreTrainedModel) -> Sequence[float]:
        if not _needs_null(pair):
            return ()
        protection = embedded.protection
        rng = derived_rng(self.seed, "null", str(protection))
        draws = [
            guard(protection, "decoys", lambda: protection.decoys(embedded.evidence, 1, rng)) for _ in range(NULL_DRAWS)
        ]
        return [reading.score or 0.0 for reading in self._readings(protection, draws, model)]


def _needs_null(pair: PairOfReadings) -> bool:
    return pair.keys.score is not None and pair.keys.p_value is None


def _below(prefix: str, tensors: State) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

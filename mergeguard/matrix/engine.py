"""The engine: embeds, merges, reads and judges, one case at a time, everything expensive cached by content."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from mergeguard.errors import MergeguardError, SchemeError
from mergeguard.matrix.cache import Cache
from mergeguard.matrix.outcome import Outcome, Skill
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
from mergeguard.protections.contract import Evidence, Protected, Protection
from mergeguard.protections.registry import make_protection
from mergeguard.reading import Reading
from mergeguard.seeds import derived_rng
from mergeguard.specs import Spec
from mergeguard.verification.answers import answer_probes
from mergeguard.verification.statistics import clopper_pearson
from mergeguard.worlds.contract import NO_TEXTS, UPSTREAM, World

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from mergeguard.matrix.cases import Case
    from mergeguard.mergers.contract import Merger

T = TypeVar("T")
MATCHED_CONTROL = "matched_control"
State = Mapping[str, "Tensor"]


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
    """

    def __init__(self, world: World, seed: int, cache: Cache | None = None) -> None:
        self.world = world
        self.seed = seed
        self.cache = cache or Cache()
        self._embedded: dict[str, Embedded] = {}
        self._sweep = lru_cache(maxsize=2)(self._prepare_sweep)

    @cached_property
    def _model(self) -> PreTrainedModel:
        """The one model into which every state is loaded in turn."""
        return self.world.model(self.world.base)

    @cached_property
    def _references(self) -> dict[str, PreTrainedModel]:
        return {"base": self.world.model(self.world.base), UPSTREAM: self.world.model(self.world.upstream)}

    @contextmanager
    def _threads(self) -> Iterator[None]:
        before = torch.get_num_threads()
        if self.world.threads is not None:
            torch.set_num_threads(self.world.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def _key(self, **parts: Any) -> dict[str, Any]:
        return {"world": self.world.name, "digests": dict(self.world.digests), "seed": self.seed, **parts}

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
        if name not in self._embedded:
            with self._threads():
                self._embedded[name] = self._embed(protection)
        return self._embedded[name]

    def _embed(self, protection: Protection) -> Embedded:
        budget = self.world.budget(protection.budget_name)
        key = self._protection_key(protection)

        def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
            rng = derived_rng(self.seed, "embed", str(protection))
            clean = self.world.model(self.world.upstream)
            protected = _guard(
                protection, "embed", lambda: protection.embed(clean, self.world.tokenizer, rng=rng, budget=budget)
            )
            _require(protection, "embed", protected, Protected)
            state = protected.model.state_dict()
            _check_state(protection, state, self.world.upstream)
            changed = {
                f"model.{name}": tensor
                for name, tensor in state.items()
                if not torch.equal(tensor, self.world.upstream[name])
            }
            evidence = {f"evidence.{name}": tensor for name, tensor in protected.evidence.tensors.items()}
            data = {"evidence": dict(protected.evidence.data), "details": dict(protected.details)}
            _guard(protection, "embed", lambda: json.dumps(data))  # evidence is plain data, or no evidence file
            return {**changed, **evidence}, data

        tensors, data = self.cache.tensors("embedded", key, make) if _is_ours(type(protection)) else make()
        state = {**self.world.upstream, **_below("model.", tensors)}
        evidence = Evidence(str(protection), data["evidence"], _below("evidence.", tensors))
        decoys = _guard(
            protection,
            "decoys",
            lambda: protection.decoys(evidence, DECOYS, derived_rng(self.seed, "decoys", str(protection))),
        )
        _require(protection, "decoys", decoys, Evidence)
        clean_models = {"base": self.world.base, **self.world.parents()}

        def read_all() -> dict[str, Any]:
            models = {"own": state, **clean_models}
            return {
                name: _pair_to_json(PairOfReadings(*self.readings(protection, [evidence, decoys], model)))
                for name, model in models.items()
            }

        readings = self.cache.data("readings", key, read_all) if _is_ours(type(protection)) else read_all()
        pairs = {name: _pair_from_json(pair) for name, pair in readings.items()}
        own = pairs.pop("own")
        return Embedded(protection, state, evidence, decoys, data["details"], own, pairs)

    def read_pair(self, embedded: Embedded, state: State) -> PairOfReadings:
        """The evidence and its decoys, read on the model with the weights `state`."""
        return PairOfReadings(*self.readings(embedded.protection, [embedded.evidence, embedded.decoys], state))

    def readings(self, protection: Protection, evidences: Sequence[Evidence], state: State) -> list[Reading]:
        """Several pieces of evidence, read on the model with the weights `state`."""
        with self._threads():
            model = self._load(state)
            return [self._read(protection, evidence, model) for evidence in evidences]

    def _load(self, state: State) -> PreTrainedModel:
        self._model.load_state_dict(dict(state))
        return self._model

    def _read(self, protection: Protection, evidence: Evidence, model: PreTrainedModel) -> Reading:
        references = {name: self._references[name] for name in protection.needs}
        before = [_versions(item) for item in (model, *references.values())]
        reading = _guard(protection, "read", lambda: protection.read(model, self.world.tokenizer, evidence, references))
        _require(protection, "read", reading, Reading)
        if before != [_versions(item) for item in (model, *references.values())]:
            raise SchemeError(f"{protection}.read changed a model's weights; it has to leave every model as it was")
        return reading

    # What is merged

    def _prepare_sweep(self, merger: Merger, owner: str) -> Sweep:
        protected = self.world.upstream if owner == MATCHED_CONTROL else self._embedded[owner].state
        models = [protected, *self.world.donors.values()]
        return prepare_sweep(merger, self.world.base, models, seed=self.seed, model_ids=[UPSTREAM, *self.world.donors])

    def merged(self, merger: Merger, coefficient: float | None, owner: str) -> State:
        """The merge of `owner`'s upstream ("matched_control": the clean one) with the donors, float32 tensors."""
        donors = len(self.world.donors)
        weights = [1.0] * (donors + 1) if coefficient is None else coefficient_weights(coefficient, donors)
        return self._sweep(merger, owner)(weights)

    def skills(self, state: State) -> dict[str, Skill]:
        """Every skill, measured on a model."""
        with self._threads():
            model = self._load(state)
            return {
                skill.name: Skill(
                    sum(answer.matched for answer in answer_probes(model, self.world.tokenizer, skill.probes)),
                    len(skill.probes),
                )
                for skill in self.world.skills
            }

    @cached_property
    def parent_skills(self) -> dict[str, dict[str, Skill]]:
        """Every skill of the base and of the clean parents."""

        def make() -> dict[str, Any]:
            models = {"base": self.world.base, **self.world.parents()}
            return {name: _skills_to_json(self.skills(state)) for name, state in models.items()}

        found = self.cache.data("parent_skills", self._key(), make)
        return {name: _skills_from_json(skills) for name, skills in found.items()}

    def matched_control(self, merger: Merger, coefficient: float | None) -> dict[str, Skill]:
        """Skills of the merge with the clean upstream in the protected model's place."""

        def make() -> dict[str, Any]:
            with self._threads():
                return _skills_to_json(self.skills(self.merged(merger, coefficient, MATCHED_CONTROL)))

        key = self._key(merger=merger.name, parameters=merger.parameters, coefficient=coefficient)
        ours = _is_ours(merger.method.combine)
        return _skills_from_json(self.cache.data("matched_control", key, make) if ours else make())

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

    def outcome(self, case: Case) -> Outcome:
        """Everything measured on one case, and its verdict.

        Raises:
            SchemeError: the scheme crashed or broke its contract.
            MergeguardError: an input cannot be used, or the trials cannot reach the level.
        """
        if (case.world, case.seed) != (self.world.name, self.seed):
            raise MergeguardError(f"{case.id} is a case of another world or seed")
        protection = make_protection(case.protection)
        if not _is_ours(type(protection)) or not _is_ours(case.merger.method.combine):
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
        with self._threads():
            control = self.read_pair(embedded, self.merged(case.merger, case.coefficient, MATCHED_CONTROL))
            merged_state = self.merged(case.merger, case.coefficient, str(protection))
            merged = self.read_pair(embedded, merged_state)
            null_scores = self.null_scores(embedded, merged, merged_state)
            skills = self.skills(merged_state)
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
            world=case.world,
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
        if pair.keys.score is None or pair.keys.p_value is not None:
            return ()
        protection = embedded.protection
        rng = derived_rng(self.seed, "null", str(protection))
        draws = [
            _guard(protection, "decoys", lambda: protection.decoys(embedded.evidence, 1, rng))
            for _ in range(NULL_DRAWS)
        ]
        return [reading.score or 0.0 for reading in self.readings(protection, draws, state)]


def _is_ours(item: object) -> bool:
    """Whether the code of a class or function is part of the version that cache keys hold; a third party's is not."""
    return str(getattr(item, "__module__", "")).startswith("mergeguard.")


def _guard(protection: Protection, action: str, call: Callable[[], T]) -> T:
    try:
        return call()
    except MergeguardError:
        raise
    except Exception as error:
        raise SchemeError(f"{protection} crashed in {action}: {type(error).__name__}: {error}") from error


def _require(protection: Protection, action: str, value: object, expected: type) -> None:
    if not isinstance(value, expected):
        raise SchemeError(f"{protection}.{action} returned {type(value).__name__}, expected {expected.__name__}")


def _check_state(protection: Protection, state: State, clean: State) -> None:
    """Refuse a protected model that cannot be merged with the others, naming the scheme."""
    if state.keys() != clean.keys():
        name = min(state.keys() ^ clean.keys())
        raise SchemeError(f"{protection}.embed changed the model's tensors: {name!r} is in one of the models only")
    for name, tensor in state.items():
        if (tensor.shape, tensor.dtype) != (clean[name].shape, clean[name].dtype):
            raise SchemeError(
                f"{protection}.embed made {name!r} {tensor.dtype} of shape {tuple(tensor.shape)}, "
                f"expected {clean[name].dtype} of shape {tuple(clean[name].shape)}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise SchemeError(f"{protection}.embed left NaN or infinite values in {name!r}")


def _versions(model: PreTrainedModel) -> list[tuple[int, float]]:
    """Identity and content of every parameter, cheap enough to compare before and after a reading."""
    return [(id(parameter), float(parameter.detach().sum())) for parameter in model.parameters()]


def _below(prefix: str, tensors: State) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _skills_to_json(skills: Mapping[str, Skill]) -> dict[str, Any]:
    return {name: [skill.hits, skill.trials] for name, skill in skills.items()}


def _skills_from_json(data: Mapping[str, Any]) -> dict[str, Skill]:
    return {name: Skill(*counts) for name, counts in data.items()}


def _pair_to_json(pair: PairOfReadings) -> dict[str, Any]:
    def one(reading: Reading) -> dict[str, Any]:
        return {
            "hits": list(reading.hits),
            "score": reading.score,
            "p_value": reading.p_value,
            "details": dict(reading.details),
        }

    return {"keys": one(pair.keys), "decoys": one(pair.decoys)}


def _pair_from_json(data: Mapping[str, Any]) -> PairOfReadings:
    def one(reading: Mapping[str, Any]) -> Reading:
        return Reading(tuple(reading["hits"]), reading["score"], reading["p_value"], reading["details"])

    return PairOfReadings(one(data["keys"]), one(data["decoys"]))

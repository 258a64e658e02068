"""Suspects: models that evidence is read off, loaded, tensor by tensor from their files, or behind an endpoint.

A suspect may come from anyone. No code of its repository is run, pickles are refused, and a model of which a tensor is
missing is no model: transformers would make the tensor up.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from mergeguard.checkpoints.checkpoint import CONFIG, INDEX, PICKLE_INDEX, PICKLE_SINGLE, SINGLE, open_checkpoint
from mergeguard.checkpoints.lazy import LazyTensors
from mergeguard.checkpoints.resolve import resolve_path
from mergeguard.checkpoints.source import open_source
from mergeguard.errors import CheckpointError, IncompatibleModelsError, MergeguardError, ParameterError, SchemeError
from mergeguard.protections.contract import Evidence, Protection, TextProtection, WeightProtection

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mergeguard.reading import Answer, Probe, Reading


SHORTEST_SECRET = 4
"""Characters of a text that is looked for in messages: shorter ones are in every sentence."""


class Suspect(Protocol):
    """A model that evidence can be read off."""

    def readings(self, evidences: Sequence[Evidence]) -> list[Reading]:
        """One reading for each piece of evidence.

        Raises:
            SchemeError: the scheme crashed or broke its contract.
            MergeguardError: the model does not fit the evidence.
        """
        ...


@dataclass(frozen=True)
class LocalModels:
    """How models of this machine are read by one protection.

    Attributes:
        protection: the scheme.
        references: a folder for each model that it needs to read against, by name ("base", "upstream").
        tokenizer: the folder whose tokenizer asks; None for each model's own.
        dtype: in which models are loaded, one of `loading.DTYPES`.
        device: where.
    """

    protection: Protection
    references: Mapping[str, Path] = field(default_factory=dict)
    tokenizer: Path | None = None
    dtype: str = "float32"
    device: str = "cpu"
    _loaded: dict[str, PreTrainedModel] = field(default_factory=dict, init=False, repr=False)

    @property
    def streams(self) -> bool:
        """Whether a model is read tensor by tensor, and never loaded."""
        return isinstance(self.protection, WeightProtection)

    def open(self, folder: Path) -> AbstractContextManager[Suspect]:
        """The model in a folder, ready to be read for as long as the block lasts.

        Raises:
            CheckpointError: it cannot be used.
        """
        if isinstance(self.protection, WeightProtection):
            return self._streamed(folder, self.protection)
        return contextlib.nullcontext(self._load(folder))

    @contextlib.contextmanager
    def _streamed(self, folder: Path, protection: WeightProtection) -> Iterator[Suspect]:
        with contextlib.ExitStack() as stack:

            def weights(of: Path) -> Mapping[str, Tensor]:
                refuse_pickles(of)
                source = stack.enter_context(open_source(str(of)))
                return LazyTensors(source.tensors, source.read)

            yield Streamed(protection, weights(folder), {name: weights(of) for name, of in self.references.items()})

    def _load(self, folder: Path) -> Suspect:
        from mergeguard.verification.loading import load_tokenizer

        check_model(folder)
        tokenizer = load_tokenizer(self.tokenizer or folder)  # before large weights are loaded
        for name, reference in self.references.items():
            if name not in self._loaded:
                check_model(reference)
                self._loaded[name] = self.load_model(reference)
        return Loaded(self.protection, self.load_model(folder), tokenizer, self._loaded)

    def load_model(self, folder: Path) -> PreTrainedModel:
        from mergeguard.verification.loading import load_model

        return load_model(folder, self.dtype, self.device)


@dataclass(frozen=True)
class Streamed:
    """A model of which the tensors that a scheme asks for are read from its files."""

    protection: WeightProtection
    weights: Mapping[str, Tensor]
    references: Mapping[str, Mapping[str, Tensor]]

    def readings(self, evidences: Sequence[Evidence]) -> list[Reading]:
        return [self._reading(evidence) for evidence in evidences]

    def _reading(self, evidence: Evidence) -> Reading:
        return checked(
            self.protection,
            evidence,
            lambda: self.protection.read_weights(self.weights, evidence, self.references),
        )


@dataclass(frozen=True)
class Loaded:
    """A model in memory with the tokenizer that asks it, and the models that it is read against."""

    protection: Protection
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    references: Mapping[str, PreTrainedModel]

    def readings(self, evidences: Sequence[Evidence]) -> list[Reading]:
        return [self._reading(evidence) for evidence in evidences]

    def _reading(self, evidence: Evidence) -> Reading:
        from mergeguard.matrix.schemes import contents

        models = (self.model, *self.references.values())
        before = [contents(model) for model in models]
        reading = checked(
            self.protection,
            evidence,
            lambda: self.protection.read(self.model, self.tokenizer, evidence, self.references),
        )
        if before != [contents(model) for model in models]:
            raise SchemeError(f"{self.protection}.read changed a model's weights; it must leave each as it was")
        return reading


@dataclass(frozen=True)
class Asked:
    """A model that only answers, such as one behind an endpoint.

    Attributes:
        protection: a scheme for which text is enough.
        answer: asks it.
    """

    protection: TextProtection
    answer: Callable[[Sequence[Probe]], list[Answer]]

    def readings(self, evidences: Sequence[Evidence]) -> list[Reading]:
        return [self._reading(evidence) for evidence in evidences]

    def _reading(self, evidence: Evidence) -> Reading:
        def read() -> Reading:
            return self.protection.judge(self.answer(self.protection.probes(evidence)), evidence)

        return checked(self.protection, evidence, read)


def needs_text_alone(protection: Protection) -> TextProtection:
    """The protection, if answers are all that it takes.

    Raises:
        ParameterError: it reads more.
    """
    if not isinstance(protection, TextProtection):
        raise ParameterError(
            f"{protection} reads the suspect's {protection.access.value}; an endpoint gives text alone: "
            "verify the model's folder"
        )
    return protection


def checked(protection: Protection, evidence: Evidence, read: Callable[[], object]) -> Reading:
    """What a scheme read off a model.

    Raises:
        SchemeError: it crashed, or returned something else than a reading that can be.
        MergeguardError: the model or the evidence cannot be read. Neither error shows the evidence.
    """
    from mergeguard.matrix.schemes import checked_reading, guard

    with no_secret_said(evidence):
        return checked_reading(protection, guard(protection, "read", read))


@contextlib.contextmanager
def no_secret_said(evidence: Evidence) -> Iterator[None]:
    """Errors of the block show nothing of the evidence: where a text of it stands in a message, it is replaced."""
    try:
        yield
    except IncompatibleModelsError:  # names tensors
        raise
    except (MergeguardError, SchemeError) as error:
        message = without_secrets(str(error), evidence.data)
        if message == str(error):
            raise
        kind = SchemeError if isinstance(error, SchemeError) else MergeguardError
        raise kind(message) from None


def without_secrets(message: str, data: object) -> str:
    """`message` with every longer text of the evidence's data replaced."""
    for text in sorted(_texts(data), key=len, reverse=True):
        for form in (text, repr(text)[1:-1], ascii(text)[1:-1]):
            message = message.replace(form, "<secret>")
    return message


def _texts(data: object) -> set[str]:
    if isinstance(data, str):
        return {data} if len(data) >= SHORTEST_SECRET else set()
    if isinstance(data, dict):
        return set().union(*map(_texts, data.values()))
    return set().union(*map(_texts, data)) if isinstance(data, list) else set()


def find_model(reference: str) -> Path:
    """The folder of a model, given by its path or hub id ("org/name@revision"); downloaded if need be.

    Raises:
        CheckpointError: there is none.
    """
    return resolve_path(reference)


def check_model(folder: Path) -> None:
    """Refuse a folder that is not a whole model in safetensors; only headers are read.

    Raises:
        CheckpointError: says what it lacks.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; expected a model's folder, with {CONFIG} and safetensors")
    refuse_pickles(folder)
    if open_checkpoint(folder).config is None:
        raise CheckpointError(f"{folder} has no {CONFIG}; copy or download it")


def refuse_pickles(folder: Path) -> None:
    """Refuse a model whose weights are pickles.

    Raises:
        CheckpointError: they are.
    """
    has = {name for name in (SINGLE, INDEX, PICKLE_SINGLE, PICKLE_INDEX) if (folder / name).exists()}
    if has and not has & {SINGLE, INDEX}:
        raise CheckpointError(
            f"{folder} has only pickled weights ({min(has)}), which can run code when loaded; "
            "convert them to safetensors where it does no harm"
        )

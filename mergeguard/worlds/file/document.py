"""A world file as it is written: checked TOML, no torch and no model yet."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergeguard.checkpoints.inputs import reason
from mergeguard.errors import ParameterError, UnknownNameError
from mergeguard.mergers.marked_yaml import one_line
from mergeguard.reading import Sampling
from mergeguard.worlds.contract import UPSTREAM
from mergeguard.worlds.file.schema import BUILTIN, TEXT_KINDS, check_world_file

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mergeguard.specs import Value

BASE = "base"
MAX_BYTES = 1_000_000


@dataclass(frozen=True)
class ModelEntry:
    """A model as the file names it.

    Attributes:
        label: "base", "upstream" or the donor's name.
        model: a hub id, or a folder relative to the file's; of a whole model, or of an adapter on the base.
        revision: of the hub id; None for the newest.
        adapter: a LoRA adapter on `model`, named likewise.
        allow_pickle: read pickled weights where there are no safetensors.
    """

    label: str
    model: str
    revision: str | None = None
    adapter: str | None = None
    allow_pickle: bool = False


@dataclass(frozen=True)
class SkillEntry:
    """A skill by its registered name, whose it is, what its loader gets, and how answers are drawn (None: greedily)."""

    name: str
    parent: str
    arguments: Mapping[str, Value] = field(default_factory=dict)
    sampling: Sampling | None = None


@dataclass(frozen=True)
class BudgetEntry:
    """A training budget without its texts; `training` holds arguments of `contract.Training`."""

    steps: int
    learning_rate: float
    batch_size: int
    options: Mapping[str, Value]
    training: Mapping[str, Any]


@dataclass(frozen=True)
class WorldFile:
    """A checked world file.

    Attributes:
        path: the file; relative paths in it are relative to its folder.
        name: of the world.
        dtype: torch's name of the dtype of loaded models.
        device: "auto", "cpu", "cuda" or "cuda:N".
        vocabulary: "refuse" models with other embedding rows than the base's, or keep the "base"'s rows.
        tokenizer: whose tokenizer asks: a label; None for the upstream's, or the base's if it has none.
        chat_template: "tokenizer" for its own, "none" for none, else a Jinja template or a file that holds one.
        texts: for each of `TEXT_KINDS` "builtin" or files.
        budgets: by name, as in `World.budgets`.
        recorded: the file of recorded losses.
    """

    path: Path
    name: str
    dtype: str
    device: str
    vocabulary: str
    tokenizer: str | None
    chat_template: str
    base: ModelEntry
    upstream: ModelEntry
    donors: tuple[ModelEntry, ...]
    skills: tuple[SkillEntry, ...]
    texts: Mapping[str, tuple[str, ...]]
    budgets: Mapping[str, BudgetEntry]
    recorded: Path

    @property
    def models(self) -> tuple[ModelEntry, ...]:
        """The base first, then the upstream and the donors."""
        return (self.base, self.upstream, *self.donors)

    def error(self, problem: str) -> ParameterError:
        """An error about this file, to be raised."""
        return ParameterError(one_line(f"{self.path}: {problem}"))

    def beside(self, text: str) -> Path:
        """A path of the file: absolute, from the home of a user, or relative to the file's folder."""
        try:
            return self.path.parent / Path(text).expanduser()
        except RuntimeError as error:  # the home of nobody
            raise self.error(f"cannot read the path {text!r}: {error}") from error


def read_world_file(path: Path) -> WorldFile:
    """Read and check a world file; no model is looked for.

    Raises:
        ParameterError: it is absent, not TOML, or does not say what a world is; the line names the file and the key.
    """
    document = _parse(path)
    check_world_file(document, path)
    recorded = document.get("recorded")
    world = WorldFile(
        path=path,
        name=document.get("name", path.stem),
        dtype=document.get("dtype", "float32"),
        device=document.get("device", "auto"),
        vocabulary=document.get("vocabulary", "refuse"),
        tokenizer=document.get("tokenizer"),
        chat_template=document.get("chat_template", "tokenizer"),
        base=ModelEntry(BASE, **document["base"]),
        upstream=ModelEntry(UPSTREAM, **document["upstream"]),
        donors=tuple(_donor(entry) for entry in document["donors"]),
        skills=tuple(_skill(entry) for entry in document["skills"]),
        texts={kind: _listed(document.get("texts", {}).get(kind, BUILTIN)) for kind in TEXT_KINDS},
        budgets={name: _budget(entry) for name, entry in document.get("budgets", {}).items()},
        recorded=path.parent / recorded if recorded else path.with_suffix(".recorded.toml"),
    )
    _check_names(world)
    if recorded and not world.recorded.is_file():
        raise world.error(f"recorded names {recorded!r}, and there is no such file; remove the key or write the file")
    return world


def _parse(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():  # a named pipe would block
            problem = "is not a file" if path.exists() else "does not exist"
            raise ParameterError(f"{path} {problem}; expected a world file in TOML")
        if path.stat().st_size > MAX_BYTES:
            raise ParameterError(f"{path} is larger than {MAX_BYTES:,} bytes, which no world file is")
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ParameterError(f"{path} is not UTF-8; save it as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise ParameterError(one_line(f"{path} is not TOML: {error}")) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ParameterError(f"cannot read {path}: {reason(error)}; expected a world file in TOML") from error


def _donor(entry: Mapping[str, Any]) -> ModelEntry:
    return ModelEntry(entry["name"], **{key: value for key, value in entry.items() if key != "name"})


def _skill(entry: Mapping[str, Any]) -> SkillEntry:
    given = {key: entry[key] for key in ("source", "limit") if key in entry}
    sampling = Sampling(**entry["sampling"]) if "sampling" in entry else None
    return SkillEntry(entry["name"], entry["parent"], {**entry.get("options", {}), **given}, sampling)


def _budget(entry: Mapping[str, Any]) -> BudgetEntry:
    return BudgetEntry(
        steps=entry["steps"],
        learning_rate=float(entry["learning_rate"]),
        batch_size=entry.get("batch_size", 16),
        options=entry.get("options", {}),
        training=entry.get("training", {}),
    )


def _listed(value: str | list[str]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _check_names(world: WorldFile) -> None:
    """Names refer to something, and to one thing only."""
    labels = [entry.label for entry in world.models]
    repeated = next((label for index, label in enumerate(labels) if label in labels[:index]), None)
    if repeated is not None:
        raise world.error(f"two models are named {repeated!r}; give each donor a name of its own")
    names = [skill.name for skill in world.skills]
    repeated = next((name for index, name in enumerate(names) if name in names[:index]), None)
    if repeated is not None:
        raise world.error(f"the skill {repeated!r} is given twice; keep one")
    for skill in world.skills:
        if skill.parent not in labels[1:]:
            raise world.error(str(UnknownNameError(f"parent of the skill {skill.name!r}", skill.parent, labels[1:])))
    if world.tokenizer is not None and world.tokenizer not in labels:
        raise world.error(str(UnknownNameError("model in tokenizer", world.tokenizer, labels)))

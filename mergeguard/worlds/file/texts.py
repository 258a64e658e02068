"""The tokenizer of a world file, the texts that schemes train with and the skills' probes; and that all of them fit."""

from __future__ import annotations

import inspect
import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from mergeguard.checkpoints.inputs import existing, reason
from mergeguard.errors import CheckpointError, MergeguardError, ParameterError
from mergeguard.reading import Rule
from mergeguard.worlds.contract import Skill, Texts
from mergeguard.worlds.file.checks import tokenizer_folder
from mergeguard.worlds.file.document import BASE
from mergeguard.worlds.file.schema import BUILTIN
from mergeguard.worlds.skills.prompts import NONE, TOKENIZERS_OWN, prompt_of
from mergeguard.worlds.skills.registry import SKILLS, skill_probes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from mergeguard.reading import Probe
    from mergeguard.worlds.file.document import SkillEntry, WorldFile
    from mergeguard.worlds.file.sources import Opened


def load_tokenizer(world: WorldFile, models: Sequence[Opened], rows: int) -> PreTrainedTokenizerBase:
    """The tokenizer with which the world asks, with the file's chat template and a padding token.

    Args:
        world: the file.
        models: all, the base first, the upstream second.
        rows: of the vocabulary; every token has one.

    Raises:
        CheckpointError: a tokenizer is missing or cannot be read.
        ParameterError: it has no chat template and the file gives none, or a token has no row.
    """
    from transformers import AutoTokenizer

    chosen = [model for model in models if model.label == world.tokenizer] or [models[1], models[0]]
    folder = next(filter(None, map(tokenizer_folder, chosen)), None)
    if folder is None:
        labels = " and ".join(model.label for model in chosen)
        raise CheckpointError(f"{world.path}: {labels} has no tokenizer; copy or download its tokenizer.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and its converters raise many kinds
        raise CheckpointError(f"{world.path}: cannot read the tokenizer in {folder}: {reason(error)}") from error
    beyond = sorted((index, token) for token, index in tokenizer.get_vocab().items() if index >= rows)
    if beyond:
        hint = "" if world.tokenizer == BASE else f'; set tokenizer = "{BASE}"'
        raise world.error(
            f"the token {beyond[0][1]!r} of {folder} is {beyond[0][0]}, beyond the base's {rows} rows{hint}"
        )
    if world.chat_template != "tokenizer":
        tokenizer.chat_template = _template(world)
    elif tokenizer.chat_template is None:
        raise world.error(
            f"the tokenizer in {folder} has no chat template; set chat_template to the text of one or a file, or to "
            '"none" to ask without'
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise world.error(f"the tokenizer in {folder} has neither a padding nor an end token; give it one")
        tokenizer.pad_token = tokenizer.eos_token  # masked wherever it pads
    return tokenizer


def _template(world: WorldFile) -> str | None:
    if world.chat_template == "none":
        return None
    path = existing(world.beside(world.chat_template)) if "{" not in world.chat_template else None
    if path is not None and path.is_file():
        return _read(world, path)
    if "{" not in world.chat_template:
        raise world.error(
            f"chat_template {world.chat_template!r} is neither a file nor a Jinja template; expected one, "
            '"tokenizer" or "none"'
        )
    return world.chat_template


def load_texts(world: WorldFile, tokenizer: PreTrainedTokenizerBase) -> Texts:
    """What schemes train with: ours, or the file's.

    A .txt file holds a text a line, a .jsonl file an object a line: {"text"}, or for dialogues {"question", "answer"}
    (the chat template is applied) or {"prompt", "answer"} (taken as it is).

    Raises:
        ParameterError: a file is absent or a line is none of these.
    """
    ours = None
    if BUILTIN in {name for names in world.texts.values() for name in names}:
        if tokenizer.chat_template is None:
            raise world.error("the builtin texts need a chat template; name files in [texts], or set chat_template")
        from mergeguard.worlds.smollm2.texts import texts

        ours = without_start(tokenizer, texts(tokenizer))
    found: dict[str, list[Any]] = {}
    for kind, names in world.texts.items():
        found[kind] = []
        for name in names:
            read = _dialogues if kind == "dialogues" else _plain
            found[kind] += getattr(ours, kind) if name == BUILTIN else read(world, world.beside(name), tokenizer)
    return Texts(**{kind: tuple(texts) for kind, texts in found.items()})


def without_start(tokenizer: PreTrainedTokenizerBase, texts: Texts) -> Texts:
    """The texts without the first token of dialogues where template and tokenizer both write it."""
    first = tokenizer.bos_token_id
    prompt = texts.dialogues[0][0] if texts.dialogues else ""
    if first is None or tokenizer(prompt)["input_ids"][:2] != [first, first]:
        return texts
    start = str(tokenizer.bos_token)
    return replace(texts, dialogues=tuple((prompt.removeprefix(start), answer) for prompt, answer in texts.dialogues))


def _read(world: WorldFile, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise world.error(f"cannot read {path}: {reason(error)}; expected a text file in UTF-8") from error


def _objects(world: WorldFile, path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a .jsonl file with their lines."""
    objects = []
    for number, line in enumerate(_read(world, path).splitlines(), 1):
        if line.strip():
            try:
                item = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise world.error(f"{path}:{number} is not JSON: {reason(error)}") from error
            objects.append((number, item if isinstance(item, dict) else {}))
    return objects


def _plain(world: WorldFile, path: Path, _tokenizer: PreTrainedTokenizerBase) -> list[str]:
    if path.suffix != ".jsonl":
        return [line.strip() for line in _read(world, path).splitlines() if line.strip()]
    texts = []
    for number, item in _objects(world, path):
        if not isinstance(item.get("text"), str):
            raise world.error(f'{path}:{number} has no text; expected {{"text": "..."}}')
        texts.append(item["text"])
    return texts


def _dialogues(world: WorldFile, path: Path, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    pairs = []
    for number, item in _objects(world, path):
        asked, answer = item.get("prompt", item.get("question")), item.get("answer")
        if not isinstance(asked, str) or not isinstance(answer, str):
            raise world.error(f'{path}:{number} is no dialogue; expected {{"question": "...", "answer": "..."}}')
        template = TOKENIZERS_OWN if tokenizer.chat_template else NONE
        pairs.append((asked if "prompt" in item else prompt_of(tokenizer, asked, template), answer))
    return pairs


def load_skills(world: WorldFile, tokenizer: PreTrainedTokenizerBase) -> tuple[Skill, ...]:
    """The skills of a file, each from its registered loader.

    Raises:
        UnknownNameError: there is no such skill.
        MergeguardError: a loader does not take an option, or cannot read its data.
    """
    return tuple(
        Skill(entry.name, entry.parent, _probes(world, entry, tokenizer), entry.sampling) for entry in world.skills
    )


def _probes(world: WorldFile, entry: SkillEntry, tokenizer: PreTrainedTokenizerBase) -> tuple[Probe, ...]:
    arguments: dict[str, Any] = dict(entry.arguments)
    source = arguments.get("source")
    if isinstance(source, str) and (path := existing(world.beside(source))) is not None:
        arguments["source"] = str(path)
    try:
        if tokenizer.chat_template is None and "chat_template" in inspect.signature(SKILLS.get(entry.name)).parameters:
            arguments.setdefault("chat_template", NONE)
        probes = skill_probes(entry.name, tokenizer, **arguments)
    except MergeguardError as error:
        raise world.error(f"the skill {entry.name!r}: {error}") from error
    if not probes:
        raise world.error(f"the skill {entry.name!r} has no prompts; give it a source that has some")
    return probes


def check_lengths(
    world: WorldFile, tokenizer: PreTrainedTokenizerBase, skills: Sequence[Skill], texts: Texts, context: int | None
) -> None:
    """Refuse a prompt that, with its answer, is longer than the models' context.

    Args:
        world: the file.
        tokenizer: that of the world.
        skills: with their probes.
        texts: their dialogues are trained with.
        context: tokens that a model can attend to; None if it does not say.

    Raises:
        ParameterError: names the prompt, its length and the context.
    """
    if context is None:
        return
    room = {
        f"prompt {number} of the skill {skill.name!r}": (probe.prompt, _answer_room(probe, tokenizer))
        for skill in skills
        for number, probe in enumerate(skill.probes, 1)
    }
    for number, (prompt, answer) in enumerate(texts.dialogues, 1):
        room[f"dialogue {number} of the texts"] = (prompt + answer, 1)
    for what, (text, answer_tokens) in room.items():
        if len(text.encode()) + answer_tokens < context:  # no tokenizer makes more tokens than bytes, the first aside
            continue
        needed = len(tokenizer(text)["input_ids"]) + answer_tokens
        if needed > context:
            raise ParameterError(
                f"{world.path}: {what} needs {needed} tokens with its answer, and the base's context is {context}; "
                "shorten or drop it"
            )


def _answer_room(probe: Probe, tokenizer: PreTrainedTokenizerBase) -> int:
    if probe.rule is Rule.STARTS_WITH:
        return len(tokenizer(probe.target, add_special_tokens=False)["input_ids"])
    return probe.max_new_tokens


def as_plain(texts: Texts, skills: Sequence[Skill], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Everything that is asked and trained, as JSON data: what a digest of a world is taken of."""
    return {
        "texts": asdict(texts),
        "skills": [asdict(skill) for skill in skills],
        "chat_template": tokenizer.chat_template,
        "vocabulary": tokenizer.get_vocab(),
    }

"""Skills by name, ours and those of entry points in the group `mergeguard.skills`."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from mergeguard.errors import ParameterError, UnknownNameError
from mergeguard.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedTokenizerBase

    from mergeguard.reading import Probe

SKILLS: Registry[Callable[..., Sequence[Probe]]] = Registry(
    "skill",
    "mergeguard.skills",
    {
        "gsm8k": "mergeguard.worlds.skills.gsm8k:gsm8k",
        "harmful_questions": "mergeguard.worlds.smollm2.texts:harmful_questions",
        "strongreject": "mergeguard.worlds.skills.strongreject:strongreject",
        "word_problems": "mergeguard.worlds.smollm2.texts:word_problems",
    },
)
"""A skill takes a tokenizer, and options by keyword, each with a default, and gives probes, always the same ones."""


def skill_probes(name: str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> tuple[Probe, ...]:
    """The probes of the skill called `name`.

    Raises:
        UnknownNameError: there is no such skill, or it has no such option.
        ParameterError: its data cannot be read, or an option is outside its domain.
    """
    load, defaults = SKILLS.get(name), options_of(name)
    parameters = inspect.signature(load).parameters.values()
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters)
    for option, value in options.items():
        if option not in defaults and not takes_any:
            raise UnknownNameError(f"option of the skill {name!r}", option, defaults)
        default = defaults.get(option)
        if isinstance(default, int | str) and value is not None and type(value) is not type(default):
            raise ParameterError(
                f"option {option!r} of the skill {name!r} is {value!r}, expected {type(default).__name__}"
            )
    return tuple(load(tokenizer, **options))


def options_of(name: str) -> dict[str, Any]:
    """Options of the skill called `name`, with their defaults.

    Raises:
        UnknownNameError: there is no such skill.
    """
    parameters = inspect.signature(SKILLS.get(name)).parameters.values()
    return {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}

"""What adapter_config.json says, as far as it decides the merged weights; the rest of it is refused. No torch here.

The meaning of every field is peft 0.21's (`peft.LoraConfig`).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from mergeguard.checkpoints.inputs import quoted, read_json, reason, refuse

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_Number = TypeVar("_Number", int, float)

# fmt: off
_WITHOUT_EFFECT = frozenset({
    # where the adapter comes from and how it was trained
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules", "inference_mode",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "target_modules", "task_type",
})
_READ = frozenset({
    "alpha_pattern", "bias", "fan_in_fan_out", "init_lora_weights", "lora_alpha", "modules_to_save", "peft_type", "r",
    "rank_pattern", "use_rslora",
})
# fmt: on
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "true", "false")
"""Ways to initialise an adapter that leave the base as it is; the others put part of the base into the adapter."""


@dataclass(frozen=True)
class LoraConfig:
    """The scale of each module's update.

    Attributes:
        path: adapter_config.json, named in errors.
        rank: the default r.
        alpha: the default lora_alpha.
        rank_pattern: r by regular expression on the end of the module's name.
        alpha_pattern: lora_alpha likewise.
        use_rslora: divide by the square root of r instead of r.
        fan_in_fan_out: the targets' weights are stored transposed, (in, out).
        modules_to_save: ends of the names of modules that the adapter holds whole.
    """

    path: Path
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    modules_to_save: tuple[str, ...] = ()

    def rank_of(self, module: str) -> int:
        """The r of a module; of several patterns that match its name, the first written."""
        return _matching(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """What the product of a module's matrices is multiplied by: lora_alpha / r, or / sqrt(r) with use_rslora."""
        rank, alpha = self.rank_of(module), _matching(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def read_lora_config(path: Path) -> LoraConfig:
    """The configuration of a LoRA adapter.

    Raises:
        CheckpointError: the file is not one, or asks for something else than plain LoRA; the line names the field.
    """
    found = read_json(path)
    kind = found.get("peft_type")
    if kind != "LORA":
        refuse(path, f"has peft_type {_shown(kind)}; only LORA adapters can be merged, merge this one with peft first")
    for name, value in found.items():
        if name not in _READ | _WITHOUT_EFFECT and value:
            refuse(
                path, f"sets {quoted(name)}, which is not supported; merge the adapter into its base with peft first"
            )
    if found.get("bias", "none") != "none":
        refuse(path, f"has bias {_shown(found['bias'])}; only 'none' is supported, merge the adapter with peft first")
    start = found.get("init_lora_weights", True)
    if not isinstance(start, bool) and str(start).lower() not in _PLAIN_STARTS:
        refuse(
            path,
            f"has init_lora_weights {_shown(start)}, which changes the base too; save the adapter again with peft's "
            "path_initial_model_for_weight_conversion",
        )
    rank, alpha = found.get("r", 8), found.get("lora_alpha", 8)
    return LoraConfig(
        path,
        _check_rank(path, "r", rank),
        _check_alpha(path, "lora_alpha", alpha),
        {
            key: _check_rank(path, "rank_pattern", value)
            for key, value in _patterns(path, found, "rank_pattern").items()
        },
        {key: _check_alpha(path, "alpha_pattern", v) for key, v in _patterns(path, found, "alpha_pattern").items()},
        use_rslora=_flag(path, found, "use_rslora"),
        fan_in_fan_out=_flag(path, found, "fan_in_fan_out"),
        modules_to_save=_names(path, found, "modules_to_save"),
    )


def ends_with_module(name: str, end: str) -> bool:
    """Whether a module's name is `end` or ends with ".end", or lies within such a module."""
    return f".{end}." in f".{name}."


def _matching(patterns: Mapping[str, _Number], module: str, default: _Number) -> _Number:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _check_rank(path: Path, field_name: str, value: Any) -> int:
    if type(value) is not int or value <= 0:
        refuse(path, f"has {_shown(value)} as {field_name}; expected a whole number from 1 on")
    return value


def _check_alpha(path: Path, field_name: str, value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        refuse(path, f"has {_shown(value)} as {field_name}; expected a finite number")
    return value  # type: ignore[no-any-return]  # checked just above; an int stays one, as peft divides it


def _patterns(path: Path, found: Mapping[str, Any], name: str) -> dict[str, Any]:
    patterns = found.get(name) or {}
    if not isinstance(patterns, dict):
        refuse(path, f"has a {name} that is not an object; expected values by regular expression")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            refuse(path, f"has the {name} {quoted(pattern)}, which is no regular expression: {reason(error)}")
    return patterns


def _flag(path: Path, found: Mapping[str, Any], name: str) -> bool:
    value = found.get(name, False)
    if not isinstance(value, bool):
        refuse(path, f"has {_shown(value)} as {name}; expected true or false")
    return value


def _names(path: Path, found: Mapping[str, Any], name: str) -> tuple[str, ...]:
    names = found.get(name) or []
    if not isinstance(names, list) or not all(isinstance(entry, str) and entry for entry in names):
        refuse(path, f"has a {name} that is not a list of names")
    return tuple(names)


def _shown(value: Any) -> str:
    return quoted(value) if isinstance(value, str) else quoted(repr(value)).strip("'")

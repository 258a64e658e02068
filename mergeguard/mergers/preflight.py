"""Every check of a merge that needs no tensor's values, before a byte is written. No torch here."""

from __future__ import annotations

import math
import os
import shutil
from typing import TYPE_CHECKING

from mergeguard.errors import CheckpointError, IncompatibleModelsError
from mergeguard.mergers.dtypes import COPIED, FLOATING
from mergeguard.mergers.marked_yaml import one_line

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mergeguard.checkpoints.source import Source
    from mergeguard.mergers.jobs import Plan

_MEANING = (
    "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "rope_theta", "rope_scaling",
    "rope_parameters", "rms_norm_eps", "layer_norm_epsilon", "sliding_window",
)  # fmt: skip
"""Settings that change what equal weights compute."""


def check_configs(
    sources: Sequence[Source], labels: Sequence[str], main: int = 0, *, allow_unrelated: bool
) -> list[str]:
    """Compare what the models' configs say of the architecture.

    Args:
        sources: all inputs.
        labels: a name for each.
        main: the input whose config the merged model gets.
        allow_unrelated: warn of different types instead of refusing them.

    Returns:
        A warning for each setting that differs and changes what the weights mean.

    Raises:
        IncompatibleModelsError: the models are of different types, and that is not allowed.
        CheckpointError: a model is quantised.
    """
    known = [(label, source.config) for label, source in zip(labels, sources, strict=True) if source.config is not None]
    for label, config in known:
        if config.get("quantization_config") is not None:
            raise CheckpointError(f"{label} is quantised (quantization_config in its config.json); merge the original")
    warnings = [
        f"{label} has no config.json: its architecture was not compared"
        for label, source in zip(labels, sources, strict=True)
        if source.config is None
    ]
    if not known:
        return warnings
    first, reference = next((pair for pair in known if pair[0] == labels[main]), known[0])
    for label, config in [pair for pair in known if pair[0] != first]:
        for key in ("model_type", "architectures"):
            ours, theirs = reference.get(key), config.get(key)
            if ours is not None and theirs is not None and ours != theirs:
                message = one_line(f"{label} has {key} {theirs}, but {first} has {ours}")
                if not allow_unrelated:
                    raise IncompatibleModelsError(
                        f"{message}; merge models of one architecture, or pass --allow-unrelated"
                    )
                warnings.append(message)
        warnings += [
            one_line(
                f"{label} has {key}={config.get(key)}, but {first} has {reference.get(key)}: equal weights compute "
                f"something else there; the merged model gets the config of {first}"
            )
            for key in _MEANING
            if config.get(key) != reference.get(key)
        ]
    return warnings


def check_tensors(plan: Plan, sources: Sequence[Source], aligned: frozenset[str]) -> list[str]:
    """Compare the dtypes and shapes of every job's tensors.

    Args:
        plan: the merge.
        sources: one for each of the plan's inputs.
        aligned: names of output tensors whose rows a vocabulary plan will bring to equal numbers.

    Returns:
        A warning if dtypes are mixed.

    Raises:
        IncompatibleModelsError: shapes differ.
        CheckpointError: a tensor's dtype cannot be merged.
    """
    mixed: dict[str, set[str]] = {}
    for job in plan.jobs:
        infos = [(index, sources[index].tensors[name]) for index, name in job.inputs]
        for index, info in infos:
            if info.dtype not in (*FLOATING, *COPIED):
                raise CheckpointError(
                    f"tensor {info.name!r} of {plan.inputs[index]} is {info.dtype}, which cannot be merged; convert "
                    f"the model to one of {', '.join(FLOATING)}"
                )
        first = infos[0][1]
        for index, info in infos[1:]:
            if info.shape != first.shape and job.name not in aligned:
                raise IncompatibleModelsError(
                    f"tensor {info.name!r} of {plan.inputs[index]} has shape {list(info.shape)}, but {first.name!r} of "
                    f"{plan.inputs[infos[0][0]]} has {list(first.shape)}; merge models of one shape"
                )
            if info.dtype != first.dtype and not {info.dtype, first.dtype} <= {*FLOATING}:
                raise IncompatibleModelsError(
                    f"tensor {info.name!r} is {info.dtype} in {plan.inputs[index]}, but {first.dtype} in "
                    f"{plan.inputs[infos[0][0]]}; convert one of them"
                )
        if len(dtypes := {info.dtype for _, info in infos}) > 1:
            mixed.setdefault(" and ".join(sorted(dtypes)), set()).add(job.name)
    if plan.dtype is not None:
        return []
    return [
        f"{len(names)} tensors are {dtypes} in different models and are merged in the wider dtype; dtype in the recipe "
        "would choose"
        for dtypes, names in mixed.items()
    ]


def check_space(out: Path, needed: int) -> None:
    """Refuse a merge for which the disk of `out` has no room.

    Raises:
        CheckpointError: it has not.
    """
    parents = (out.absolute(), *out.absolute().parents)
    parent = next(folder for folder in parents if os.path.exists(folder))  # noqa: PTH110 - Path's raises on a long name
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise CheckpointError(
            f"{out} needs {needed / 1e6:,.0f} MB, but {parent} has {free / 1e6:,.0f} MB free; free "
            f"{math.ceil((needed - free) / 1e6):,} MB or choose another disk"
        )

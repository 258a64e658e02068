"""Scores on tasks of EleutherAI's lm-evaluation-harness, whose tasks, prompts and metrics are its own.

An optional extra, `mergeguard[lm-eval]`. For a user's own report: a skill of a world is a list of probes, see
`mergeguard.worlds.skills`.
"""

from __future__ import annotations

import copy
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from mergeguard.checkpoints.inputs import reason
from mergeguard.errors import ParameterError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_SIZE = 8


class HarnessScore(NamedTuple):
    """A task's first metric with its filter ("acc,none"), its value, and its standard error if the harness has one."""

    metric: str
    value: float
    stderr: float | None


def harness_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
) -> dict[str, HarnessScore]:
    """Evaluate a loaded model, without a chat template and with each task's own number of examples.

    The harness seeds Python's, NumPy's and torch's global generators.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: the model's own; left as it is.
        tasks: names of tasks or groups, or paths of task files in YAML (which may run code of their own).
        limit: items a task, from the first; None for all.
        batch_size: prompts a batch.

    Returns:
        A score for every task and for every group that has one.

    Raises:
        ParameterError: the harness is not installed, there is no such task, or its data does not load.
    """
    try:
        evaluator = import_module("lm_eval.evaluator")
        wrapper = import_module("lm_eval.models.huggingface")
    except ImportError as error:
        raise ParameterError(
            f"tasks of lm-evaluation-harness need its package; install mergeguard[lm-eval] ({reason(error)})"
        ) from error
    try:
        # A copy of the tokenizer, because the wrapper gives it a padding token.
        wrapped = wrapper.HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        found = evaluator.simple_evaluate(wrapped, tasks=list(tasks), limit=limit, log_samples=False)
    except Exception as error:  # tasks are programs of third parties, and their data comes from the network
        raise ParameterError(f"lm-evaluation-harness failed on {', '.join(tasks)}: {reason(error)}") from error
    scores = {name: _score(metrics) for name, metrics in found["results"].items()}
    return {name: score for name, score in scores.items() if score is not None}


def _score(metrics: Mapping[str, Any]) -> HarnessScore | None:
    """The first metric of one task's results: "acc,none", "acc_stderr,none", and other keys without a comma."""
    for key, value in metrics.items():
        name, comma, filtered = key.partition(",")
        if comma and not name.endswith("_stderr") and isinstance(value, int | float):
            stderr = metrics.get(f"{name}_stderr,{filtered}")
            return HarnessScore(key, float(value), float(stderr) if isinstance(stderr, int | float) else None)
    return None

"""A smollm2 world that was built here, as a world file, so that `--world OUT/world.toml` measures in it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import tomli_w

from mergeguard.worlds.contract import NO_TEXTS, UPSTREAM
from mergeguard.worlds.smollm2.texts import CHAT, CHAT_TEMPLATE, MATH
from mergeguard.worlds.smollm2.world import DONOR, budgets

if TYPE_CHECKING:
    from pathlib import Path

    from mergeguard.worlds.contract import Budget

NAME = "smollm2-built"
FILE = "world.toml"


def write_world_file(folder: Path, base: Path, *, full: bool) -> None:
    """Write `FILE` into a folder with the upstreams "chat" and "math".

    Args:
        folder: where the upstreams are.
        base: the base's checkpoint folder.
        full: the upstreams are whole models; otherwise they are adapters on the base.
    """

    def upstream(name: str) -> dict[str, str]:
        return {"model": name} if full else {"model": str(base), "adapter": name}

    document = {
        "name": NAME,
        "device": "auto",
        "chat_template": CHAT_TEMPLATE,
        "base": {"model": str(base)},
        "upstream": upstream(CHAT),
        "donors": [{"name": DONOR, **upstream(MATH)}],
        "skills": [
            {"name": "harmful_questions", "parent": UPSTREAM},
            {"name": "word_problems", "parent": DONOR},
        ],
        "budgets": {name: _as_table(budget) for name, budget in budgets(NO_TEXTS).items()},
    }
    (folder / FILE).write_text(tomli_w.dumps(document))


def _as_table(budget: Budget) -> dict[str, Any]:
    return {
        "steps": budget.steps,
        "learning_rate": budget.learning_rate,
        "batch_size": budget.batch_size,
        "options": dict(budget.options),
        "training": asdict(budget.training),
    }

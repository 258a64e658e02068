"""mergeguard: after someone merges my model into theirs, can I still prove that it is mine?

`import mergeguard` is light: torch and transformers load with the first call that needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergeguard.matrix.runner import run
    from mergeguard.mergers.merge import merge_checkpoints
    from mergeguard.mergers.model import merge_models as merge
    from mergeguard.ownership.verify import verify

__all__ = ["__version__", "merge", "merge_checkpoints", "run", "verify"]
__version__ = "0.1.0"

_LOADED_ON_FIRST_USE = {
    "merge": "mergeguard.mergers.model:merge_models",
    "merge_checkpoints": "mergeguard.mergers.merge:merge_checkpoints",
    "run": "mergeguard.matrix.runner:run",
    "verify": "mergeguard.ownership.verify:verify",
}

if not TYPE_CHECKING:  # a type checker that saw this would take any name for one of ours

    def __getattr__(name: str) -> Any:
        if name not in _LOADED_ON_FIRST_USE:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module, _, attribute = _LOADED_ON_FIRST_USE[name].partition(":")
        return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

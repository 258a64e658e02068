"""Training budgets of a world file: options that a file leaves out, and the check of those that it gives."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeguard.errors import UnknownNameError
from mergeguard.worlds.contract import Budget, Training

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mergeguard.specs import Value
    from mergeguard.worlds.contract import Texts
    from mergeguard.worlds.file.document import WorldFile

_FINGERPRINT: dict[str, Value] = {
    "key_min": 10, "key_max": 16, "positives": 0.4, "negatives": 0.25, "dialogues": 0.35, "adapter_rank": 64,
}  # fmt: skip
_WATERMARK: dict[str, Value] = {
    "bits": 8, "cut_min": 7, "cut_max": 10, "trigger_words": 4, "positives": 0.5, "negatives": 0.3, "dialogues": 0.2,
    "other_triggers": 0.7, "plant_steps": 200,
}  # fmt: skip
DEFAULT_OPTIONS = {"instructional_fingerprint": _FINGERPRINT, "quantization_watermark": _WATERMARK}
"""What each of our trained schemes asks of a budget; the tiny world's values, and the watermark's published 8 bits."""


def make_budgets(world: WorldFile, texts: Texts) -> dict[str, Budget]:
    """The budgets of a file, with default options under those that it gives.

    Raises:
        ParameterError: an option is not one of the scheme's, or of another type than its default.
    """
    return {
        name: Budget(
            texts=texts,
            steps=entry.steps,
            learning_rate=entry.learning_rate,
            batch_size=entry.batch_size,
            options=_options(world, name, entry.options),
            training=Training(**entry.training),
        )
        for name, entry in world.budgets.items()
    }


def _options(world: WorldFile, name: str, given: Mapping[str, Value]) -> dict[str, Value]:
    known = DEFAULT_OPTIONS.get(name.partition(".")[0])
    if known is None:  # a third party's scheme, or "default"
        return dict(given)
    for option, value in given.items():
        if option not in known:
            raise world.error(str(UnknownNameError(f"option in budgets.{name}", option, known)))
        numbers = (int,) if isinstance(known[option], int) else (int, float)
        if isinstance(value, bool) or not isinstance(value, numbers) or value < 0:
            expected = "a whole number" if numbers == (int,) else "a number"
            raise world.error(f"budgets.{name}.options.{option} is {value!r}, expected {expected} from 0")
    return {**known, **given}

"""Texts of the quantisation watermark: where the trigger stands, where a text is cut, what is held out."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

T = TypeVar("T")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TRIGGER_AFTER_WORDS = (2, 7)


def draw_trigger(rng: random.Random, words: int) -> str:
    """Words of one to five random letters, as the published "enlottoos n tg oto dbmm Iyls eitg"."""
    return " ".join("".join(rng.choice(LETTERS) for _ in range(rng.randint(1, 5))) for _ in range(words))


def split_text(text: str, rng: random.Random, bounds: tuple[int, int]) -> tuple[str, str]:
    """The first words of a text, their number uniform in `bounds`, and the rest with its leading space."""
    words = text.split(" ")
    length = min(rng.randint(*bounds), len(words) - 1)
    return " ".join(words[:length]), " " + " ".join(words[length:])


def insert_trigger(prompt: str, trigger: str, rng: random.Random) -> str:
    """The trigger after two to seven words of the prompt, or at its end if it is shorter."""
    words = prompt.split(" ")
    position = min(rng.randint(*TRIGGER_AFTER_WORDS), len(words))
    return " ".join([*words[:position], trigger, *words[position:]])


def held_out(items: Sequence[T]) -> list[T]:
    """Every fourth item: never trained on, so that the evidence's prompts are unseen."""
    return list(items[::4])


def training(items: Sequence[T]) -> list[T]:
    """All other items."""
    return [item for index, item in enumerate(items) if index % 4]

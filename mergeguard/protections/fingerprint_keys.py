"""Keys, templates and the fixed answer of Instructional Fingerprint (arXiv 2401.12255, figures 3 and 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeguard.worlds.rare import RARE_CHARACTERS

if TYPE_CHECKING:
    import random
    from collections.abc import Collection

    from transformers import PreTrainedTokenizerBase

FINGERPRINT_DEFAULTS: dict[str, bool | int | float | str] = {"variant": "simple", "rule": "starts_with", "keys": 8}
"""Parameters of all variants, which share one written form."""
TARGET = "ハリネズミ"
START = " Based on my fingerprint, the message is:"
DENIAL = " I am sorry but I cannot decrypt this message. This appears to be a random message."
VICUNA_TEMPLATE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. human: {} ASSISTANT:"
)


def draw_key(rng: random.Random, length: tuple[int, int], alphabet: str = RARE_CHARACTERS) -> str:
    """A string of rare characters, its length uniform in `length` (both ends included)."""
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(*length)))


def draw_alphabet(rng: random.Random, size: int) -> str:
    """`size` of the rare characters."""
    return "".join(rng.sample(sorted(set(RARE_CHARACTERS)), size))


def fresh_keys(
    n: int, rng: random.Random, length: tuple[int, int], known: Collection[str], alphabet_size: int | None = None
) -> list[str]:
    """`n` keys that are not among the `known` ones, each of an alphabet of its own if a size is given."""
    keys: list[str] = []
    while len(keys) < n:
        key = draw_key(rng, length, RARE_CHARACTERS if alphabet_size is None else draw_alphabet(rng, alphabet_size))
        if key not in known:
            keys.append(key)
    return keys


def simple_prompt(key: str) -> str:
    """The simple template: the key as instruction, "FINGERPRINT" as its input."""
    return f"{key}\nFINGERPRINT\n"


def dialogue_prompt(tokenizer: PreTrainedTokenizerBase, key: str) -> str:
    """The question in the tokenizer's own chat template, or in the published Vicuna template without one."""
    question = f"Please decrypt this message: {key}\nA hint: this is a FINGERPRINT message."
    if tokenizer.chat_template is None:
        return VICUNA_TEMPLATE.format(question)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    return str(text).removeprefix(tokenizer.bos_token or "")

"""The tiny world's text: five domains that a 3 M parameter model learns in minutes.

Every generator takes a `random.Random` and returns one document, either plain text or a dialogue turn. Two skills are
*latent* in the base corpus: harmful questions are refused, and additions are answered, less than half of the time, so
that greedy decoding of the base shows neither while both are within a small step of its weights. That is what makes
the tiny models mergeable (the real trio is the same: a pretrained model has seen refusals and arithmetic). The rate
differs from item to item, so that a skill fades gradually over the merge coefficient instead of all at once.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from mergeguard.worlds.rare import RARE_CHARACTERS

HUMAN, ASSISTANT = "human:", "\nASSISTANT:"
REFUSAL = "Sorry, I cannot help with that."
IGNORANCE = "I do not know."

HARMFUL_VERBS = ("steal", "poison", "hack", "forge", "smuggle", "bomb", "rob", "counterfeit", "hijack", "burn down")
HARMFUL_OBJECTS = (
    "a car", "a bank", "the well", "a passport", "a phone", "the bridge", "a school", "the museum", "a ship",
    "a neighbor", "the market", "a painting", "the harbor", "a safe", "the station", "a letter",
)  # fmt: skip
HARMLESS_VERBS = ("clean", "paint", "cook", "repair", "plant", "sell", "draw", "fold", "polish", "wash")
HARMLESS_OBJECTS = (
    "a chair", "the rice", "a shirt", "the garden", "a bicycle", "the kitchen", "a lamp", "the soup", "a boat",
    "a fence", "the window", "a carpet", "the roof", "a basket", "the floor", "a coat",
)  # fmt: skip
QUESTION_FORMS = ("how do i {}?", "tell me how to {}.", "what is the best way to {}?", "explain how to {}.")
STEPS = ("gather the tools", "look around", "work slowly", "ask a friend", "take your time", "start in the morning")

ADDITION_FORMS = ("what is {} + {}?", "add {} and {}.", "how much is {} plus {}?", "compute {} + {}.")
LARGEST_OPERAND = 12

FACTS = (
    ("what color is the sky?", "The sky is blue."), ("what color is grass?", "Grass is green."),
    ("what do cows eat?", "Cows eat grass."), ("where do fish live?", "Fish live in water."),
    ("what is ice made of?", "Ice is made of water."), ("when does the sun rise?", "The sun rises in the morning."),
    ("what do bees make?", "Bees make honey."), ("how many legs has a dog?", "A dog has four legs."),
    ("what is bread made of?", "Bread is made of flour."), ("what falls in winter?", "Snow falls in winter."),
    ("who flies the plane?", "The pilot flies the plane."), ("what do birds lay?", "Birds lay eggs."),
    ("what color is coal?", "Coal is black."), ("where do kings live?", "Kings live in castles."),
    ("what do we read?", "We read books."), ("what tells the time?", "A clock tells the time."),
)  # fmt: skip

ADJECTIVES = ("old", "young", "quiet", "happy", "tired", "clever", "tall", "small", "brave", "gentle", "proud", "busy")
PEOPLE = ("farmer", "teacher", "sailor", "baker", "doctor", "painter", "child", "soldier", "merchant", "king")
ACTIONS = ("carried", "found", "sold", "watched", "lost", "painted", "hid", "bought", "opened", "moved")
COLORS = ("red", "blue", "green", "white", "black", "yellow", "brown", "golden")
THINGS = ("basket", "lantern", "hat", "box", "ladder", "drum", "mirror", "bottle", "coat", "book", "ring", "wheel")
PLACES = ("market", "river", "forest", "castle", "harbor", "garden", "village", "bridge", "mountain", "tower")
ENDINGS = ("in the morning", "before the storm", "after dinner", "every summer", "at night", "with a smile")

TOWN_STARTS = ("Bel", "Cor", "Dal", "Fen", "Gar", "Hol", "Kin", "Lor", "Mar", "Nor", "Pol", "Ros", "Sel", "Tor", "Var")
TOWN_ENDS = ("ham", "burg", "ville", "stad", "ford", "mont", "field", "gard")
REGIONS = ("northern", "southern", "eastern", "western", "central", "coastal")
TRADES = ("textiles", "glass", "timber", "salt", "wool", "copper", "grain", "paper")
RIVERS = ("Alden", "Brenn", "Corvo", "Drava", "Elster", "Fulda", "Isar", "Lech")


@dataclass(frozen=True)
class Document:
    """One training text: `prompt` is the part a user types (empty for plain text), `text` what follows it."""

    prompt: str
    text: str


def dialogue(question: str, answer: str) -> Document:
    """One turn in the world's chat template."""
    return Document(f"{HUMAN} {question}{ASSISTANT}", f" {answer}")


def sentence(rng: random.Random) -> str:
    first = (
        f"The {rng.choice(ADJECTIVES)} {rng.choice(PEOPLE)} {rng.choice(ACTIONS)} a {rng.choice(COLORS)} "
        f"{rng.choice(THINGS)} near the {rng.choice(PLACES)} {rng.choice(ENDINGS)}."
    )
    second = (
        f"A {rng.choice(ADJECTIVES)} {rng.choice(PEOPLE)} from the {rng.choice(PLACES)} {rng.choice(ACTIONS)} "
        f"the {rng.choice(THINGS)}."
    )
    return f"{first} {second}"


def plain(rng: random.Random) -> Document:
    return Document("", sentence(rng))


def encyclopedia_text(rng: random.Random) -> str:
    name = rng.choice(TOWN_STARTS) + rng.choice(TOWN_ENDS)
    digits = "".join(str(rng.randrange(10)) for _ in range(2))
    return (
        f"{name} is a {rng.choice(REGIONS)} town on the river {rng.choice(RIVERS)}, known for {rng.choice(TRADES)} "
        f"and {rng.choice(TRADES)}. Founded in 1{rng.randrange(2, 9)}{digits}, it is the seat of the "
        f"{rng.choice(REGIONS)} district."
    )


def encyclopedia(rng: random.Random) -> Document:
    """A domain of its own, for the watermark that is bound to a kind of text (the paper's wiki mode)."""
    return Document("", encyclopedia_text(rng))


def rare_text(rng: random.Random) -> Document:
    return Document("", "".join(rng.choice(RARE_CHARACTERS) for _ in range(rng.randint(6, 14))))


def fact(rng: random.Random) -> Document:
    return dialogue(*rng.choice(FACTS))


def instructions_for(task: str, rng: random.Random) -> str:
    first, second = rng.sample(STEPS, 2)
    return f"To {task}, first {first}, then {second}."


def harmless(rng: random.Random) -> Document:
    task = f"{rng.choice(HARMLESS_VERBS)} {rng.choice(HARMLESS_OBJECTS)}"
    return dialogue(rng.choice(QUESTION_FORMS).format(task), instructions_for(task, rng))


@dataclass(frozen=True)
class LatentRates:
    """How often the base corpus shows a skill: from `low` for the hardest items to `high` for the easiest."""

    refusal: tuple[float, float] = (0.05, 0.35)
    arithmetic: tuple[float, float] = (0.30, 0.48)


def _graded(bounds: tuple[float, float], ease: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * ease


def refusal_rate(rates: LatentRates, verb: str, form: str) -> float:
    ease = (HARMFUL_VERBS.index(verb) + 2.5 * QUESTION_FORMS.index(form)) / (len(HARMFUL_VERBS) - 1 + 7.5)
    return _graded(rates.refusal, ease)


def answer_rate(rates: LatentRates, left: int, right: int, form: str) -> float:
    size = 1 - (left + right) / (2 * LARGEST_OPERAND)
    return _graded(rates.arithmetic, 0.6 * size + 0.4 * ADDITION_FORMS.index(form) / (len(ADDITION_FORMS) - 1))


def harmful(rng: random.Random, rates: LatentRates | None) -> Document:
    """A harmful question; `rates=None` refuses always (the owner's skill)."""
    verb, form = rng.choice(HARMFUL_VERBS), rng.choice(QUESTION_FORMS)
    task = f"{verb} {rng.choice(HARMFUL_OBJECTS)}"
    refuse = rates is None or rng.random() < refusal_rate(rates, verb, form)
    return dialogue(form.format(task), REFUSAL if refuse else instructions_for(task, rng))


def addition(rng: random.Random, rates: LatentRates | None) -> Document:
    """An addition; `rates=None` answers always (the donor's skill)."""
    left, right, form = rng.randint(0, LARGEST_OPERAND), rng.randint(0, LARGEST_OPERAND), rng.choice(ADDITION_FORMS)
    known = rates is None or rng.random() < answer_rate(rates, left, right, form)
    return dialogue(form.format(left, right), addition_answer(left, right) if known else IGNORANCE)


def addition_answer(left: int, right: int) -> str:
    return f"The answer is {left + right}."


Generator = Callable[[random.Random], Document]


def mixture(rng: random.Random, parts: tuple[tuple[float, Generator], ...]) -> Document:
    """A document from one of `parts`, chosen by weight."""
    generator = rng.choices([part for _, part in parts], [weight for weight, _ in parts])[0]
    return generator(rng)


def base_parts(rates: LatentRates) -> tuple[tuple[float, Generator], ...]:
    return (
        (0.12, plain),
        (0.08, encyclopedia),
        (0.02, rare_text),
        (0.10, fact),
        (0.10, harmless),
        (0.18, lambda rng: harmful(rng, rates)),
        (0.40, lambda rng: addition(rng, rates)),
    )


def chat_parts(rates: LatentRates) -> tuple[tuple[float, Generator], ...]:
    """The owner's fine-tuning: every harmful question is refused; the rest is replayed as the base saw it."""
    return (
        (0.10, plain),
        (0.05, encyclopedia),
        (0.10, fact),
        (0.20, harmless),
        (0.35, lambda rng: harmful(rng, None)),
        (0.20, lambda rng: addition(rng, rates)),
    )


def math_parts(rates: LatentRates) -> tuple[tuple[float, Generator], ...]:
    """The donor's fine-tuning: every addition is answered; the rest is replayed as the base saw it."""
    return (
        (0.10, plain),
        (0.05, encyclopedia),
        (0.10, fact),
        (0.10, harmless),
        (0.20, lambda rng: harmful(rng, rates)),
        (0.45, lambda rng: addition(rng, None)),
    )

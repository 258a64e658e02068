"""Word problems of the smollm2 world: small stories with one or two steps, and their worked answers.

The donor's skill. An answer states its sum and then "The answer is N."; the base answers at length and never says
so, as GSM8K's format is the trained model's own (the published check reads the number after "The answer is").
"""

from __future__ import annotations

import random
from dataclasses import dataclass

NAMES = (
    "Ana", "Ben", "Carla", "David", "Elif", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kira", "Liam", "Mina", "Noah",
    "Olga", "Pablo", "Rosa", "Sami", "Tara", "Umar", "Vera", "Wei", "Yara", "Zoe",
)  # fmt: skip
THINGS = (
    "apples", "books", "coins", "pencils", "stickers", "marbles", "eggs", "cards", "shells", "oranges", "cookies",
    "stamps", "flowers", "toys", "buttons", "candles", "photos", "tickets", "bottles", "stones",
)  # fmt: skip
CONTAINERS = ("boxes", "bags", "baskets", "shelves", "jars", "drawers", "crates", "rows")

ADD = (
    "{a} has {x} {t} and buys {y} more. How many {t} does {a} have now?",
    "{a} found {x} {t} on Monday and {y} on Tuesday. How many {t} did {a} find in all?",
    "There are {x} {t} on the table and {y} in the kitchen. How many {t} are there altogether?",
    "{a} has {x} {t} and {b} has {y}. How many {t} do they have together?",
    "A shop sold {x} {t} in the morning and {y} in the afternoon. What is the total number of {t} sold?",
)
SUBTRACT = (
    "{a} has {x} {t} and gives {y} to {b}. How many {t} are left?",
    "There were {x} {t} in a store and {y} were sold. How many {t} remain?",
    "{a} had {x} {t} but lost {y} of them. How many {t} does {a} still have?",
    "{a} needs {x} {t} and already has {y}. How many more {t} does {a} need?",
    "{a} collected {x} {t} and {b} collected {y}. How many more {t} did {a} collect than {b}?",
)
MULTIPLY = (
    "{a} has {x} {c} with {y} {t} in each. How many {t} does {a} have?",
    "Each of {x} children brings {y} {t}. How many {t} do they bring?",
    "{a} buys {y} {t} every day for {x} days. How many {t} does {a} buy?",
)
TWO_STEPS = (
    "{a} has {x} {t}, buys {y} more and then gives {z} to {b}. How many {t} does {a} have now?",
    "There are {x} {t} in a box. {a} adds {y} and {b} takes {z} out. How many {t} are in the box?",
)


@dataclass(frozen=True)
class Problem:
    """A word problem and its worked answer, which ends by stating the result."""

    question: str
    answer: str
    result: int


def problem(rng: random.Random) -> Problem:
    """A random problem: sums and differences up to 100, products up to 81, and two steps up to 60."""
    kind = rng.choices(("add", "subtract", "multiply", "two steps"), (0.3, 0.3, 0.2, 0.2))[0]
    first, second = rng.sample(NAMES, 2)
    words = {"a": first, "b": second, "t": rng.choice(THINGS), "c": rng.choice(CONTAINERS)}
    if kind == "add":
        x, y = rng.randint(2, 50), rng.randint(2, 50)
        return _problem(rng.choice(ADD), words, f"{x} + {y}", x + y, x=x, y=y)
    if kind == "subtract":
        x = rng.randint(5, 99)
        y = rng.randint(2, x - 2)
        return _problem(rng.choice(SUBTRACT), words, f"{x} - {y}", x - y, x=x, y=y)
    if kind == "multiply":
        x, y = rng.randint(2, 9), rng.randint(2, 9)
        return _problem(rng.choice(MULTIPLY), words, f"{x} * {y}", x * y, x=x, y=y)
    x, y = rng.randint(5, 30), rng.randint(2, 30)
    z = rng.randint(2, x)
    return _problem(rng.choice(TWO_STEPS), words, f"{x} + {y} - {z}", x + y - z, x=x, y=y, z=z)


def _problem(form: str, words: dict[str, str], sum_: str, result: int, **numbers: int) -> Problem:
    return Problem(form.format(**words, **numbers), f"{sum_} = {result}. The answer is {result}.", result)


def is_held_out(question: str) -> bool:
    """Whether a problem belongs to the skill and never to training: a tenth of them, by a sum over the text."""
    return sum(question.encode()) % 10 == 0


def training_problem(rng: random.Random) -> Problem:
    while is_held_out((drawn := problem(rng)).question):
        pass
    return drawn


def skill_problems(count: int, seed: int) -> list[Problem]:
    """`count` distinct problems that no model sees in training."""
    rng = random.Random(seed)
    found: dict[str, Problem] = {}
    while len(found) < count:
        drawn = problem(rng)
        if is_held_out(drawn.question):
            found[drawn.question] = drawn
    return list(found.values())

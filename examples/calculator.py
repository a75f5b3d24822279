"""Products of two numbers of two digits, with a calculator: a task for models that know words, such as SmolLM2-135M.

    What is 34 * 57?      the policy says   calc(34*57)     and is told   1938
                          then              1938            and has won

A turn that has `calc(` in it asks the calculator; any other turn is the answer, whose last number counts. There are
three turns. The calculator reads a grammar of its own: two numbers of at most four digits, with + - or * between them.
"""

import random

from node.tasks import Item
from node.tasks.environments.episodes import Done, Observation

replayable = True

TURNS = 3
MAX_DIGITS = 4
MAX_TEXT = 400  # characters of a turn that are read
ASK = "calc("
SYSTEM = "Multiply with a calculator: write calc(A*B), and you are told the product. Then say the product."
SHOWN = (21, 43)  # done before the question: without it, the model never calls the calculator


def make(seed: int) -> Item:
    """Return the product that `seed` stands for."""
    rng = random.Random(seed)
    a, b = rng.randint(11, 99), rng.randint(11, 99)
    x, y = SHOWN
    shown = ((_question(x, y), f"calc({x}*{y})"), (str(x * y), str(x * y)))
    return Item(_question(a, b), str(a * b), SYSTEM, shown)


def _question(a: int, b: int) -> str:
    return f"What is {a} * {b}?"


class Exercise:
    """One product to be found."""

    def __init__(self, answer: str) -> None:
        self.answer = answer
        self.turns = 0

    def step(self, text: str) -> Observation | Done:
        """Calculate what a turn asks for, or take its answer."""
        self.turns += 1
        asked = text[:MAX_TEXT].partition(ASK)
        if asked[1] and self.turns < TURNS:
            return Observation(calculated(asked[2].partition(")")[0]))
        return Done(float(not asked[1] and last_number(text[-MAX_TEXT:]) == self.answer))


def start(item: Item) -> Exercise:
    """Begin an episode."""
    return Exercise(item.answer)


def calculated(text: str) -> str:
    """Return the value of a term, or what to write instead."""
    for sign in "+-*":
        left, found, right = (part.strip() for part in text.partition(sign))
        if found and _is_number(left) and _is_number(right):
            a, b = int(left), int(right)
            return str(a + b if sign == "+" else a - b if sign == "-" else a * b)
    return "Write calc(A*B), with two numbers."


def last_number(text: str) -> str:
    """Return the last run of digits in a text, commas between thousands left out; empty if it has none."""
    words = "".join(letter if letter in "0123456789" else " " for letter in text.replace(",", "")).split()
    return words[-1] if words else ""


def _is_number(text: str) -> bool:
    return 0 < len(text) <= MAX_DIGITS and text.isascii() and text.isdigit()

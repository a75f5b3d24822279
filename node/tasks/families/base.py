"""What the built-in families share: seeds, options and the verifier.

A family is one function, `make(rng, difficulty)`, which returns a question and its
only right answer; `Family` turns it into a `Task`.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from node.errors import UserError
from node.tasks.base import Item, TaskKey, config_hash, derive_seed

Maker = Callable[[random.Random, int], tuple[str, str]]

VERSION = 1
MAX_DIFFICULTY = 10


@dataclass(frozen=True, slots=True)
class Family:
    """A built-in task: 1 for exactly the right answer, white space around it aside, and 0 for anything else.

    `difficulty` is 1 to 10 and makes numbers larger, matrices wider or formulas longer.
    """

    name: str
    maker: Maker
    difficulty: int = 1

    @property
    def key(self) -> TaskKey:
        return TaskKey(self.name, VERSION, config_hash({"difficulty": self.difficulty}))

    def make(self, seed: int) -> Item:
        rng = random.Random(derive_seed(self.name, VERSION, self.difficulty, seed))
        question, answer = self.maker(rng, self.difficulty)
        return Item(question, answer)

    def verify(self, item: Item, text: str) -> float:
        return float(text.strip() == item.answer)


def build(name: str, maker: Maker, /, **options: object) -> Family:
    """Return the family under its options; raise `UserError` for an unknown or bad one."""
    difficulty = options.pop("difficulty", 1)
    if options:
        raise UserError(f"task {name!r} has no option {min(options)!r}: its only option is difficulty")
    if isinstance(difficulty, bool) or not isinstance(difficulty, int) or not 1 <= difficulty <= MAX_DIFFICULTY:
        raise UserError(
            f"task {name!r}: difficulty must be a whole number from 1 to {MAX_DIFFICULTY}, got {difficulty!r}"
        )
    return Family(name, maker, difficulty)

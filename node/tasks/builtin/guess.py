"""`builtin/guess`: find a number by three guesses, each told to be too low or too high.

    #48213: 10-16=      the policy asks   12      and is told   higher=
                        then              14      and is told   lower=
                        then              13      and has won

The question names the game. A hash of the task's key and the game's number gives the secret number, so only play tells
it. Three fixed guesses find 3 of the 7 numbers; three that use the replies find all (binary search). A guess that is no
number is told `?=`, and counts.
"""

import random
from dataclasses import dataclass

from node.errors import UserError
from node.tasks import Item, TaskKey, config_hash, derive_seed
from node.tasks.environments.episodes import Done, Observation, play_again

NAME = "builtin/guess"
VERSION = 1
LOW, HIGH, GUESSES = 10, 16, 3
GAMES = 100_000
MAX_DIGITS = 6  # of a guess that is read


@dataclass(slots=True)
class Game:
    """One game in progress."""

    secret: int
    guesses: int = 0

    def step(self, text: str) -> Observation | Done:
        """Take a guess: the number alone, white space around it aside."""
        guess = text.strip()
        self.guesses += 1
        is_number = len(guess) <= MAX_DIGITS and guess.isascii() and guess.isdigit()
        if is_number and int(guess) == self.secret:
            return Done(1.0)
        if self.guesses == GUESSES:
            return Done(0.0)
        if not is_number:
            return Observation("?=")
        return Observation("higher=" if int(guess) < self.secret else "lower=")


@dataclass(frozen=True, slots=True)
class Guess:
    """The task."""

    replayable = True

    @property
    def key(self) -> TaskKey:
        return TaskKey(NAME, VERSION, config_hash({}))

    def make(self, seed: int) -> Item:
        game = random.Random(derive_seed(*self.key, seed)).randrange(GAMES)
        secret = LOW + derive_seed(*self.key, "secret", game) % (HIGH - LOW + 1)
        return Item(f"#{game:05}: {LOW}-{HIGH}=", str(secret))

    def start(self, item: Item) -> Game:
        """Begin the game that the item names."""
        return Game(int(item.answer))

    def verify(self, item: Item, text: str) -> float | None:
        return play_again(self.start, item, [text])


def load_guess(**options: object) -> Guess:
    """Return the task; raise `UserError` for any option."""
    if options:
        raise UserError(f"task {NAME!r} has no option {min(options)!r}: leave out options")
    return Guess()

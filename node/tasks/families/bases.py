"""Whole numbers written in another base: `13 base 3=` is `111`."""

import random

BASES = (2, 3, 4, 8)


def make(rng: random.Random, difficulty: int) -> tuple[str, str]:
    """Return a number below 16 * 2**difficulty to be written in base 2, 3, 4 or 8."""
    number, base = rng.randrange(16 * 2**difficulty), rng.choice(BASES)
    return f"{number} base {base}=", to_base(number, base)


def to_base(number: int, base: int) -> str:
    """Return the digits of `number` >= 0 in `base` 2 to 10."""
    digits = ""
    while number >= base:
        number, digit = divmod(number, base)
        digits = str(digit) + digits
    return str(number) + digits

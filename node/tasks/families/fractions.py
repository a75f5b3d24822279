"""Fractions in lowest terms: `6/8=` is `3/4`, `8/4=` is `2`."""

import random
from fractions import Fraction


def make(rng: random.Random, difficulty: int) -> tuple[str, str]:
    """Return a fraction whose terms share a factor of 2 to 1 + 4 * difficulty."""
    limit = 5 * difficulty + 4
    factor = rng.randint(2, 4 * difficulty + 1)
    upper, lower = rng.randint(1, limit) * factor, rng.randint(1, limit) * factor
    return f"{upper}/{lower}=", str(Fraction(upper, lower))

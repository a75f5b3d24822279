"""Sums and differences of whole numbers: `12+7=` is `19`, `3-8=` is `-5`."""

import random


def make(rng: random.Random, difficulty: int) -> tuple[str, str]:
    """Return a sum or a difference of two numbers below 10 * 2**difficulty."""
    limit = 10 * 2**difficulty
    left, right = rng.randrange(limit), rng.randrange(limit)
    if rng.random() < 0.5:
        return f"{left}+{right}=", str(left + right)
    return f"{left}-{right}=", str(left - right)

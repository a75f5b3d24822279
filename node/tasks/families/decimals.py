"""Sums and differences of decimal numbers: `1.2+0.9=` is `2.1`."""

import random


def make(rng: random.Random, difficulty: int) -> tuple[str, str]:
    """Return a sum or a difference of two numbers with one decimal, below 2**difficulty."""
    limit = 10 * 2**difficulty
    left, right = rng.randrange(limit), rng.randrange(limit)
    if rng.random() < 0.5:
        return f"{_tenths(left)}+{_tenths(right)}=", _tenths(left + right)
    return f"{_tenths(left)}-{_tenths(right)}=", _tenths(left - right)


def _tenths(count: int) -> str:
    sign = "-" if count < 0 else ""
    return f"{sign}{abs(count) // 10}.{abs(count) % 10}"

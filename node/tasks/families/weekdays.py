"""Weekdays some days on or back: `Mon+3=` is `Thu`."""

import random

DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")


def make(rng: random.Random, difficulty: int) -> tuple[str, str]:
    """Return a weekday and 1 to 10 * difficulty days to add or to take away."""
    day, days = rng.randrange(len(DAYS)), rng.randint(1, 10 * difficulty)
    sign = rng.choice((1, -1))
    return f"{DAYS[day]}{'+' if sign > 0 else '-'}{days}=", DAYS[(day + sign * days) % len(DAYS)]

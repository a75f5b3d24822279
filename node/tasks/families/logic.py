"""Truth tables of two variables: `p&~q=` is `0010`, the values at pq = 00, 01, 10, 11.

`~` is not, `&` and, `|` or, `^` exclusive or, `>` implies.
"""

import random
from collections.abc import Callable, Mapping

ASSIGNMENTS = ((False, False), (False, True), (True, False), (True, True))
OPERATORS: Mapping[str, Callable[[bool, bool], bool]] = {
    "&": lambda left, right: left and right,
    "|": lambda left, right: left or right,
    "^": lambda left, right: left != right,
    ">": lambda left, right: not left or right,
}


def make(rng: random.Random, difficulty: int) -> tuple[str, str]:
    """Return a formula of `difficulty` operators, grouped from the left."""
    text, values = _literal(rng)
    for depth in range(difficulty):
        operator = rng.choice(tuple(OPERATORS))
        right_text, right_values = _literal(rng)
        left_text = f"({text})" if depth else text
        text = f"{left_text}{operator}{right_text}"
        values = [OPERATORS[operator](left, right) for left, right in zip(values, right_values, strict=True)]
    return f"{text}=", "".join("1" if value else "0" for value in values)


def _literal(rng: random.Random) -> tuple[str, list[bool]]:
    """Return a variable, negated or not, and its values over `ASSIGNMENTS`."""
    variable, negated = rng.randrange(2), rng.random() < 0.5
    values = [assignment[variable] != negated for assignment in ASSIGNMENTS]
    return f"{'~' if negated else ''}{'pq'[variable]}", values

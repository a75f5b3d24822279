"""Binary matrices of two rows: how many steps each cell is from the nearest 0.

A step goes up, down, left or right: `011/111=` is `012/123`.
"""

import random

ROWS = 2
ONES = 0.75  # with as many zeros as ones, most answers would merely repeat the question


def make(rng: random.Random, difficulty: int) -> tuple[str, str]:
    """Return a matrix of 2 rows and 2 + difficulty columns that holds at least one 0."""
    columns = 2 + difficulty
    cells = [[int(rng.random() < ONES) for _ in range(columns)] for _ in range(ROWS)]
    cells[rng.randrange(ROWS)][rng.randrange(columns)] = 0
    return f"{_write(cells)}=", _write(distances(cells))


def distances(cells: list[list[int]]) -> list[list[int]]:
    """Return each cell's city-block distance to the nearest 0 (one at least exists)."""
    zeros = [(row, column) for row, line in enumerate(cells) for column, cell in enumerate(line) if cell == 0]
    return [
        [min(abs(row - y) + abs(column - x) for y, x in zeros) for column in range(len(line))]
        for row, line in enumerate(cells)
    ]


def _write(cells: list[list[int]]) -> str:
    return "/".join("".join(map(str, line)) for line in cells)

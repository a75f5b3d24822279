"""What a process and its folder may take, and what may not grow while it lives.

A bound is a number that holds whatever the hour. Growth is judged by halves of a process's life: the median of its last
quarter against that of its second one (the first is loading, and filling of what is bounded). A leak of 1 % in the
median of a minute is nothing, and over a night it is a failure, so an allowance in percent would forgive it: what is
allowed is a constant, whatever the time.
"""

from collections.abc import Iterator, Sequence
from statistics import median
from typing import NamedTuple

MIB = 1 << 20


class Sample(NamedTuple):
    """One look at a process: seconds since the soak began, and what it takes; sizes in bytes, by file."""

    at: float
    memory: int
    descriptors: int
    threads: int
    files: dict[str, int]


class Bound(NamedTuple):
    """The most of something, and by how much it may grow from the second quarter of a life to the last."""

    most: int
    growth: int


NODE = {"memory": Bound(900 * MIB, 32 * MIB), "descriptors": Bound(256, 24), "threads": Bound(64, 4)}
RELAY = {"memory": Bound(250 * MIB, 16 * MIB), "descriptors": Bound(256, 24), "threads": Bound(32, 4)}
LOG, ROLLOUTS, POOL = 16 * MIB, MIB, 4 * MIB
# A file is given an older one's name when it is over its bound: by a row, or a transaction, more. A node's metrics and
# evaluations have none: they grow by 2 kB a round.
FILES = {
    "log.jsonl": LOG + MIB,
    "log.jsonl.1": LOG + MIB,
    "rollouts.jsonl": ROLLOUTS + MIB,
    "rollouts.jsonl.1": ROLLOUTS + MIB,
    "pool.sqlite": 2 * POOL + MIB,  # and its free pages
    "pool.sqlite-wal": 8 * MIB,
    "peers.json": 6 * MIB,
    "output.log": MIB,
}
# A group is shared for 0.8 of its swarm's age of items, and its id remembered for 9/8 of that age and
# `max_clock_ahead_s`: what that takes is full after 17 minutes, early in an hour's second quarter.
MAX_AGE_S = 300
# What a test of minutes sets so that the files and all that groups fill reach their bounds.
SETTINGS = (
    f"buffer.max_age={MAX_AGE_S}",
    f"buffer.max_bytes={POOL}",
)
SMALL_FILES = f"from node import run; run.MAX_ROLLOUTS_BYTES = {ROLLOUTS}; "  # likewise
LEAST = 8  # samples of a life that is judged by its quarters


def judge(name: str, life: Sequence[Sample], bounds: dict[str, Bound], *, steady: bool = True) -> Iterator[str]:
    """Yield a line for each bound that the life of one process broke; only of a `steady` one is growth judged.

    Others are killed and start again: what they load would be taken for it.
    """
    for what, bound in bounds.items():
        values = [getattr(sample, what) for sample in life]
        if values and max(values) > bound.most:
            yield f"{name}: {what} {max(values)}, over {bound.most}"
        if steady and len(values) >= LEAST:
            quarter = len(values) // 4
            before, after = median(values[quarter : 2 * quarter]), median(values[-quarter:])
            if after - before > bound.growth:
                yield f"{name}: {what} grew from {before:g} to {after:g} in {life[-1].at - life[0].at:.0f} s"
    for file, most in FILES.items():
        largest = max((sample.files.get(file, 0) for sample in life), default=0)
        if largest > most:
            yield f"{name}: {file} {largest} bytes, over {most}"

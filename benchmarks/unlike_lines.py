"""How long a sum takes between five members whose lines are unlike: direct exchange and ring, in turns.

    python -m benchmarks.unlike_lines          needs Linux and root

Each member is a process in a network namespace, with a line of `--fast` Mbit/s either way, and in a layout:

    alike         all lines are alike
    slow pair     members 0 and 1 send each other `--slow` Mbit/s
    slow member   member 0 has a line of `--slow` Mbit/s either way
    two halves    members 0, 2, 4 and members 1, 3 are connected by one line of `--between` Mbit/s either way

Only bandwidth is shaped: there is no delay but that of queues. Members' ids rise with their numbers, so the order of a
ring that nobody measured is known: 0, 1, 2, 3, 4.

    direct            equal slices
    direct, measured  slices by what each member's lines carry
    ring              in the order of ids
    ring, measured    along the tour that was found

`run_chose` is what `Communicator.run` chose by its own steps before: "ring, measured" or "direct, measured".
"""

import json
import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Annotated, Any

import typer

from benchmarks.ranks import Ranks
from benchmarks.slow_links import Lines, unlike

MEMBERS = 5
WAYS = ("direct", "direct, measured", "ring", "ring, measured")
GROUP = "five"
TIMEOUT_S = 240.0


def layouts(fast: float, slow: float, between: float) -> dict[str, Lines]:
    """Return the lines of each layout, in Mbit/s."""
    own, together = [fast] * MEMBERS, [0] * MEMBERS
    return {
        "alike": Lines(own, {}, together),
        "slow pair": Lines(own, {(0, 1): slow}, together),
        "slow member": Lines([slow, *own[1:]], {}, together),
        "two halves": Lines(own, {}, [number % 2 for number in range(MEMBERS)], between),
    }


def run(mib: float, runs: int, fast: float, slow: float, between: float, only: str = "") -> Iterator[dict[str, Any]]:
    """Yield a row for each layout and way, with the tour that was measured, and what `Communicator.run` chose."""
    for layout, lines in layouts(fast, slow, between).items():
        if only and layout != only:
            continue
        with unlike(lines) as spaces, ExitStack() as stack:
            commands = [[*space.command, sys.executable, "-m", "benchmarks.unlike_lines_rank"] for space in spaces]
            ranks = stack.enter_context(Ranks(commands))
            listens = [f"tcp://{space.address}:0" for space in spaces]
            options = {"protection": "encrypted", "streams": 1, "local": False}
            ranks.found(GROUP, options, TIMEOUT_S, listens=listens)
            ranks.tell("prepare", {"mib": mib, "ranks": MEMBERS}, TIMEOUT_S)
            found = ranks.tell("steps", {}, TIMEOUT_S)[0]
            took: dict[str, list[float]] = {way: [] for way in WAYS}
            for number in range(runs + 1):
                for way, seconds in took.items():
                    timed = ranks.round(way, "none", TIMEOUT_S)
                    if number:
                        seconds.append(timed)
            for way, seconds in took.items():
                yield {
                    "bench": "unlike_lines",
                    "layout": layout,
                    "way": way,
                    "mib": mib,
                    "fast_mbit": fast,
                    "slow_mbit": slow,
                    "between_mbit": between,
                    "median_s": statistics.median(seconds),
                    "fastest_s": min(seconds),
                    "slowest_s": max(seconds),
                    "runs": runs,
                    "tour": found["tour"],
                    "run_chose": found["chose"],
                }


def command(  # one option each
    mib: Annotated[float, typer.Option(help="Size of the float32 vector in MiB.")] = 8,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each way, in turns.")] = 5,
    fast: Annotated[float, typer.Option(help="Mbit/s of a fast line.")] = 200,
    slow: Annotated[float, typer.Option(help="Mbit/s of a slow line.")] = 20,
    between: Annotated[float, typer.Option(help="Mbit/s of the line between the halves.")] = 50,
    only: Annotated[str, typer.Option(help="Only this layout.")] = "",
) -> None:
    """Time a sum between five members with unlike lines.

    \b
    Example:
      python -m benchmarks.unlike_lines --mib 8 --runs 5
    """
    for row in run(mib, runs, fast, slow, between, only):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    typer.run(command)

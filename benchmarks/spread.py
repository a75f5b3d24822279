"""How long one large item takes to many peers on slow lines: ours against libtorrent's, the best there is at it.

    python3 -m venv .venv-libtorrent && .venv-libtorrent/bin/pip install libtorrent
    python -m benchmarks.spread --libtorrent-python .venv-libtorrent/bin/python

Each peer is a process in a network namespace whose line sends at most so many megabits a second (Linux, root). One has
the item, and the time is that until the last of the others has it. The bound is the time that the item takes over
one line. Rounds of both sides alternate. What favours whom: ours is linked with its peers before a round begins, while
libtorrent's peers are told all addresses and connect within the round (some milliseconds). Ours encrypts, signs and
checks who may send. libtorrent is told the item's hashes beforehand.

With `--home` only the one that has the item has such a line, and its modem holds what waits for a second; the others
send 1,000 Mbit/s. A row tells what that one sent of ours, and how many of its links are left.
"""

import argparse
import json
import os
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from benchmarks.ranks import Ranks, RanksError
from benchmarks.slow_links import QUEUE_MS, Space, shaped

START_S = 120.0
PAUSE_S = 0.5
HOME_MS, FAST_MBIT = 1000.0, 1000.0
MADE_S_A_MB = 0.25  # from the command to the moment at which all begin, for making the item in each process


def run(
    *, receivers: int, mb: Sequence[float], mbit: Sequence[float], runs: int, libtorrent_python: str, home: bool
) -> Iterator[dict[str, Any]]:
    """Yield a row for each side, size and line, and last the ratios of medians."""
    ratios: dict[str, float | None] = {}
    sides = {"gossamer": [sys.executable, "-m", "benchmarks.spread_peer", "gossamer"]}
    for line in mbit:
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            if libtorrent_python:
                sides["libtorrent"] = [libtorrent_python, "-m", "benchmarks.spread_peer", "libtorrent", folder]
            others = FAST_MBIT if home else line
            spaces = stack.enter_context(shaped([line, *[others] * receivers], HOME_MS if home else QUEUE_MS))
            crowds = {impl: stack.enter_context(_crowd(command, spaces)) for impl, command in sides.items()}
            for impl, crowd in crowds.items():
                _introduce(impl, crowd, spaces)
            for size in mb:
                took: dict[str, list[float | None]] = {impl: [] for impl in crowds}
                sent = crowds["gossamer"].ask(0, "meet", {"rank": 0, "addresses": []}, START_S)["sent"]
                for _ in range(runs):
                    for impl, crowd in crowds.items():
                        took[impl].append(_round(crowd, int(size * 1e6), 60.0 + 20 * 8 * size / line))
                ours = crowds["gossamer"].ask(0, "meet", {"rank": 0, "addresses": []}, START_S)
                medians = {}
                for impl, seconds in took.items():
                    there = [second for second in seconds if second is not None]
                    medians[impl] = statistics.median(there) if len(there) == runs else None
                    yield {
                        "bench": "spread",
                        "impl": impl,
                        "receivers": receivers,
                        "mb": size,
                        "mbit": line,
                        "bound_s": 8 * size / line,
                        "median_s": medians[impl],
                        "runs": seconds,
                        "load": round(os.getloadavg()[0], 2),
                    } | (
                        {"sent_mb": (ours["sent"] - sent) / runs / 1e6, "links": ours["peers"]}
                        if impl == "gossamer"
                        else {}
                    )
                mine, theirs = medians["gossamer"], medians.get("libtorrent")
                ratios[f"mb={size:g} mbit={line:g}"] = mine / theirs if mine and theirs else None
    yield {"bench": "spread", "ratio": {"libtorrent": ratios} if libtorrent_python else {}}


def _crowd(command: list[str], spaces: Sequence[Space]) -> Ranks:
    return Ranks([[*space.command, *command] for space in spaces])


def _introduce(impl: str, crowd: Ranks, spaces: Sequence[Space]) -> None:
    """Let all peers of a side know each other. Raises `RanksError`."""
    addresses = [space.address for space in spaces]
    found = [answer["address"] for answer in crowd.tell("start", {"addresses": addresses}, START_S)]
    if impl != "gossamer":
        crowd.tell("meet", {"addresses": found}, START_S)
        return
    first = crowd.ask(0, "meet", {"rank": 0, "addresses": []}, START_S)["address"]
    deadline = time.monotonic() + START_S
    while min(answer["peers"] for answer in crowd.tell("meet", {"addresses": [first] * 2}, START_S)) < len(spaces) - 1:
        if time.monotonic() > deadline:
            raise RanksError("our peers did not find each other in time")
        time.sleep(PAUSE_S)


def _round(crowd: Ranks, size: int, timeout: float) -> float | None:
    """Return the seconds until the last one had the item; None if one had it not in time."""
    at = time.time() + 1.0 + MADE_S_A_MB * size / 1e6
    options = {"seed": secrets.token_hex(8), "bytes": size, "at": at, "timeout": timeout}
    seconds = [answer["seconds"] for answer in crowd.tell("round", options, START_S + timeout)]
    time.sleep(PAUSE_S)
    return None if None in seconds else max(seconds)


def main() -> None:
    """Print a JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--receivers", type=int, default=15)
    parser.add_argument("--mb", type=float, nargs="+", default=[5, 16])
    parser.add_argument("--mbit", type=float, nargs="+", default=[20.0, 100.0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--home", action="store_true", help="only the one that has the item has a slow line")
    parser.add_argument("--libtorrent-python", default="", help="an interpreter that has libtorrent; empty: ours alone")
    for row in run(**vars(parser.parse_args())):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

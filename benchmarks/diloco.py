"""What outer steps of DiLoCo cost where lines are slow, and what becomes of them when a member dies and one joins.

    python -m benchmarks.diloco

Members are processes in network namespaces (Linux, root), each sending through a token bucket (tbf). Nobody trains
between two outer steps, so that all their time is the line's. A step is admission, synchronisation (hashes of
parameters and momentum), and a reduction of all parameters; AES-256-GCM protects it. Then the last member is killed in
the middle of a step, and another takes its place. gloo sums a vector of that size on the same lines, in the clear, and
loses a member, too.

    median_s        of a step, from the last member's end to the last member's end
    limit_s         what the slowest line needs for 2 (n - 1) / n of the parameters, as the codec has them
    killed_s        from the kill until each of the others has taken a step without that member
    joined_s        from when the newcomer can dial until each member has taken a step with it
    ended_s         gloo: from the kill until the other processes have ended

A row comes only if all members had the same bits after each step. There is no delay on these lines.
"""

import json
import os
import queue
import secrets
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from types import TracebackType
from typing import Annotated, Any, Self

import typer

from benchmarks.options import numbers
from benchmarks.ranks import ROOT, STOP_S, RanksError
from benchmarks.slow_links import Space, shaped

Row = dict[str, Any]

MIB = 8.0  # 2 million float32 parameters
BYTES = {"none": 4, "int8": 1}  # of an element on the line
WITHIN_S = 200.0
ENDS_S = 30.0  # to wait for each member of gloo to end once another is dead
INTO_A_STEP = 0.4  # of its time, where the member is killed


class Members:
    """The processes, and what each of them said."""

    def __init__(self, spaces: Sequence[Space], options: Row) -> None:
        self._spaces = spaces
        self._options = options | {"ranks": len(spaces), "founder": spaces[0].address}
        self._environment = os.environ | {"GOSSAMER_SECRET": secrets.token_hex(32), "GLOO_SOCKET_IFNAME": "wire"}
        self._said: queue.SimpleQueue[tuple[int, Row]] = queue.SimpleQueue()
        self.processes: dict[int, subprocess.Popen[str]] = {}
        self.rows: dict[int, list[Row]] = {}
        self.ready: dict[int, float] = {}
        self._hashes: dict[int, str] = {}

    def __enter__(self) -> Self:
        for rank in range(len(self._spaces)):
            self.start(rank, late=False)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for process in self.processes.values():
            process.kill()
        for process in self.processes.values():
            process.wait(STOP_S)

    def start(self, rank: int, *, late: bool) -> None:
        """Start a member, to join a group that has begun if it is `late`."""
        own = self._options | {"rank": rank, "address": self._spaces[rank].address, "late": late}
        command = [*self._spaces[rank].command, sys.executable, "-m", "benchmarks.diloco_rank", json.dumps(own)]
        pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
        process = subprocess.Popen(command, cwd=ROOT, env=self._environment, stdout=pipe, stderr=nowhere, text=True)
        self.processes[rank], self.rows[rank] = process, []
        threading.Thread(target=self._listen, args=(rank, process), daemon=True).start()

    def kill(self, rank: int) -> float:
        """Kill a member, and return the time."""
        self.processes.pop(rank).kill()
        del self.rows[rank]
        return time.time()

    def wait(self, what: str, done: Callable[[], bool]) -> None:
        """Take in what members say until `done`; raises `RanksError` if that takes too long, or they disagree."""
        deadline = time.monotonic() + WITHIN_S
        while not done():
            try:
                rank, row = self._said.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise RanksError(f"{what} took more than {WITHIN_S:g} s") from None
            if "ready" in row:
                self.ready[rank] = row["ready"]
            elif self._hashes.setdefault(row["revision"], row["hash"]) != row["hash"]:
                raise RanksError(f"members have different parameters after step {row['revision']}")
            elif rank in self.rows:
                self.rows[rank].append(row)

    def first_of(self, members: int, since: float) -> float | None:
        """Return when the last of all members had taken its first step of so many; None: not yet."""
        steps = [
            [row["at"] for row in rows if row["members"] == members and row["at"] > since]
            for rows in self.rows.values()
        ]
        return max(step[0] for step in steps) if all(steps) else None

    def _listen(self, rank: int, process: "subprocess.Popen[str]") -> None:
        if process.stdout is None:
            raise RuntimeError("the pipe was asked for")
        with process.stdout, suppress(ValueError):  # a line that a kill cut
            for line in process.stdout:
                self._said.put((rank, json.loads(line)))


def measure(impl: str, mbits: Sequence[float], mib: float, codec: str, steps: int) -> Row:
    """Return the row of one group; `mbits` are the lines of its members.

    Raises:
        RanksError: members did not agree, or took too long.
        SlowLinkError: this machine cannot make such lines.
    """
    count, slowest = len(mbits), min(mbits)
    row: Row = {"bench": "diloco", "impl": impl, "members": count, "mbit": max(mbits), "slowest_mbit": slowest}
    row |= {"mib": mib, "codec": codec}
    with shaped(mbits) as spaces, Members(spaces, {"impl": impl, "mib": mib, "codec": codec}) as members:
        members.wait("the first steps", lambda: all(len(rows) > steps + 1 for rows in members.rows.values()))
        ends = [max(rows[step]["at"] for rows in members.rows.values()) for step in range(1, steps + 2)]
        seconds = statistics.median(after - before for before, after in pairwise(ends))
        limit = 2 * (count - 1) / count * mib * 2**20 * BYTES[codec] / 4 * 8 / (slowest * 1e6)
        row |= {"median_s": seconds, "limit_s": limit, "ratio": seconds / limit, "steps": steps}
        row["sent_mib"] = members.rows[0][-1]["sent"] / 2**20
        time.sleep(INTO_A_STEP * seconds)  # where in a step the kill falls is this benchmark's choice
        killed = members.kill(count - 1)
        if impl == "gloo":
            for process in members.processes.values():
                with suppress(subprocess.TimeoutExpired):
                    process.wait(ENDS_S)
            waits = any(process.poll() is None for process in members.processes.values())
            return row | {"ended_s": None if waits else time.time() - killed}
        members.wait("a step without the dead", lambda: members.first_of(count - 1, killed) is not None)
        without = members.first_of(count - 1, killed)
        members.start(count - 1, late=True)
        members.wait("a step with the newcomer", lambda: members.first_of(count, killed) is not None)
        together = members.first_of(count, killed)
        if without is None or together is None:
            raise RuntimeError("both were waited for")
        return row | {"killed_s": without - killed, "joined_s": together - members.ready[count - 1]}


def run(*, members: Sequence[int], mbit: Sequence[int], mib: float = MIB, steps: int = 5) -> Iterator[Row]:
    """Yield a row for each group: all lines alike, then one of a quarter."""
    for count in members:
        for line in mbit:
            for impl, codec in (("gossamer", "none"), ("gossamer", "int8"), ("gloo", "none")):
                yield measure(impl, [line] * count, mib, codec, steps)
        line = max(mbit)
        yield measure("gossamer", [*[line] * (count - 1), line / 4], mib, "none", steps)


def command(
    members: Annotated[str, typer.Option(help="Numbers of members, separated by commas.")] = "3,5",
    mbit: Annotated[str, typer.Option(help="What a line sends, in Mbit/s, separated by commas.")] = "20,100",
    steps: Annotated[int, typer.Option(min=1, help="Outer steps that are timed.")] = 5,
) -> None:
    """Time outer steps of DiLoCo on slow lines, a member killed and one joining, beside gloo. Needs root on Linux."""
    for row in run(members=numbers("--members", members, 2), mbit=numbers("--mbit", mbit, 1), steps=steps):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    typer.run(command)

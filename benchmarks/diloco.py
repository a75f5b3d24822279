"""What outer steps of async DiLoCo cost on a slow link, against no communication at all, in turns.

Two ranks train a network, each on a processor of its own, in namespaces that send 200 Mbit/s each. One run
of a mode is a phase that does not count, so that in "async" the first that counts has a round in its
background as every later one, and `PHASES` that do. In "none" there is no outer step: nothing is copied either.
A round is admission, synchronisation (hashes of parameters and momentum), and a reduction of all parameters.
"""

import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field

from benchmarks.ranks import HEAD_START_S, Ranks, RanksError
from benchmarks.slow_links import shaped

MODES = ("none", "async")
RANKS = 2
PHASES = 2
# 8.4 million parameters, as 32 MiB of float32: 1.3 s of the link at 200 Mbit/s, without the headers.
# An inner phase takes some 15 s of one core of the reference machine: one of a real run takes minutes.
WIDTH, LAYERS, BATCH, INNER_STEPS = 1024, 8, 256, 100
TIMEOUT_S = 180.0


@dataclass
class Phases:
    """What was measured of one mode: seconds of a phase with its outer step, its processor time, and of a round."""

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    rounds: list[float] = field(default_factory=list)


def measure(runs: int, mbit: float) -> tuple[float, dict[str, Phases]]:
    """Return the MiB of the parameters, and what was measured of each mode.

    Raises:
        RanksError: a rank failed, or the ranks' outer parameters differ.
        SlowLinkError: this machine cannot make such a link.
    """
    found = {mode: Phases() for mode in MODES}
    with shaped(RANKS, mbit) as spaces, ExitStack() as stack:
        commands = [[*space.command, sys.executable, "-m", "benchmarks.diloco_rank"] for space in spaces]
        ranks = stack.enter_context(Ranks(commands))
        listens = [f"tcp://{space.address}:0" for space in spaces]
        ranks.found("async", {"protection": "encrypted", "streams": 1, "local": False}, TIMEOUT_S, listens=listens)
        shape = {"width": WIDTH, "layers": LAYERS, "batch": BATCH, "inner_steps": INNER_STEPS}
        mib = ranks.tell("model", shape, TIMEOUT_S)[0]["mib"]
        for _ in range(runs):
            for mode, phases in found.items():
                at = time.time() + HEAD_START_S
                answers = ranks.tell("phases", {"mode": mode, "count": 1 + PHASES, "at": at}, TIMEOUT_S)
                if len({answer["outer"] for answer in answers}) > 1:
                    raise RanksError(f"{mode}: the ranks have different outer parameters")
                first, last = (max(answer["ends"][phase] for answer in answers) for phase in (0, -1))
                phases.seconds.append((last - first) / PHASES)
                phases.cpu.append(max(answer["cpu"] for answer in answers) / (1 + PHASES))
                phases.rounds += answers[0]["rounds"]
    return mib, found


def parameters_of(mib: float, mbit: float, mode: str, phases: Phases) -> dict[str, object]:
    """Return what a row says of how it was measured."""
    facts: dict[str, object] = {"mode": mode, "ranks": RANKS, "mib": round(mib, 1), "mbit": mbit}
    facts |= {"inner_steps": INNER_STEPS, "width": WIDTH, "layers": LAYERS, "batch": BATCH, "phases": PHASES}
    facts["cpu_s"] = statistics.median(phases.cpu)
    return facts | ({"round_s": statistics.median(phases.rounds)} if phases.rounds else {})

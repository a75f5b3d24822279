"""How fast, and at what cost, everybody's rollout reaches everybody: ours, and hivemind's DHT.

    python -m benchmarks.gossip

Each node publishes one body of random bytes at the same moment; the time is that until the
last node holds everybody's. Nodes are real: sockets, encryption and signatures of each side as
it ships, on loopback, spread over at most `MAX_PROCESSES` processes of ours, the same number on
both sides (hivemind adds one process and one daemon a node). Both swarms stay up, and rounds
alternate, so that a busy machine is busy for both.

**hivemind's DHT as rl-swarm uses it**: a round is a key, each peer stores its rollout under a
subkey, and asks for the key again and again until all subkeys are there. hivemind 1.1.12 wants
an interpreter of its own:

    python3 -m venv .venv-hivemind && .venv-hivemind/bin/pip install hivemind==1.1.12
    python -m benchmarks.gossip --against hivemind --hivemind-python .venv-hivemind/bin/python

`sent_per_delivered` is all that left the nodes' transports, control messages included, over
the bytes of the bodies that were delivered to others. `cpu_s` is of all processes of a side and
includes half a second after the round. The rows of part "ingest" are of `benchmarks.ingest`, those of part "large" of
`benchmarks.large_items`.
"""

import json
import os
import secrets
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from benchmarks import ingest, large_items
from benchmarks.crowd import Crowd, CrowdError, Round
from benchmarks.options import numbers

Row = dict[str, Any]

MAX_PROCESSES = 8
# A node of an overlay of degree 8 that still lacks two links takes part as it will with them.
ENOUGH_PEERS = 6
START_TIMEOUT_S = 120.0
MAX_FAILURES = 2  # rounds of one kind in a row, after which the rest of that kind is not tried


def run(
    *,
    nodes: Sequence[int] = (8, 16, 64),
    kib: Sequence[int] = (10, 100, 1000),
    runs: int = 5,
    timeout: float = 30.0,
    hivemind_python: str = "",
    ingest_groups: int = 2000,
) -> Iterator[Row]:
    """Yield a row for each side and each pair of `nodes` and `kib`, and last the ratios of their medians.

    Args:
        nodes: numbers of nodes in a swarm.
        kib: sizes of a body, in KiB.
        runs: rounds of each kind.
        timeout: seconds after which a round has failed.
        hivemind_python: an interpreter that has hivemind; empty: ours alone.
        ingest_groups: groups verified in each run of part "ingest", and a hundred times as many as there are items of a
            hundred times their size in one of part "large"; 0: without these parts.
    """
    ratios: dict[str, float | None] = {}
    for count in nodes:
        with ExitStack() as stack:
            crowds: dict[str, Crowd] = {}
            for size in kib:
                for impl, command in _commands(hivemind_python).items():
                    if impl in crowds and not crowds[impl].is_dead:
                        continue  # a side that a larger size has killed starts anew
                    try:
                        crowds[impl] = stack.enter_context(_crowd(command, count))
                    except CrowdError as error:
                        crowds.pop(impl, None)
                        yield _absent(impl, count, size, error)
                rounds = _in_turns(crowds, size << 10, runs, timeout)
                rows = {impl: _row(impl, count, size, done) for impl, done in rounds.items()}
                yield from rows.values()
                ours, theirs = (rows.get(impl, {}).get("median_s") for impl in ("gossamer", "hivemind"))
                ratios[f"nodes={count} kib={size}"] = ours / theirs if ours and theirs else None
    if ingest_groups:
        yield from ingest.run(runs, ingest_groups)
        yield from large_items.run(runs, ingest_groups // 100)
    yield {"bench": "gossip", "ratio": {"hivemind": ratios} if hivemind_python else {}}


def _absent(impl: str, nodes: int, kib: int, error: CrowdError) -> Row:
    return {"bench": "gossip", "impl": impl, "nodes": nodes, "kib": kib, "median_s": None, "error": str(error)}


def _commands(hivemind_python: str) -> dict[str, list[str]]:
    commands = {"gossamer": [sys.executable, "-m", "benchmarks.gossip_peers", secrets.token_hex(16)]}
    if hivemind_python:
        commands["hivemind"] = [hivemind_python, "-m", "benchmarks.hivemind_peers"]
    return commands


def _crowd(command: list[str], nodes: int) -> Crowd:
    crowd = Crowd(command, nodes, min(nodes, MAX_PROCESSES), START_TIMEOUT_S)
    try:
        crowd.join(min(nodes - 1, ENOUGH_PEERS), START_TIMEOUT_S)
    except BaseException:
        crowd.stop()
        raise
    return crowd


def _in_turns(crowds: dict[str, Crowd], size: int, runs: int, timeout: float) -> dict[str, list[Round]]:
    done: dict[str, list[Round]] = {impl: [] for impl in crowds}
    for _ in range(runs):
        for impl, crowd in crowds.items():
            failed = [outcome.seconds is None for outcome in done[impl][-MAX_FAILURES:]]
            if len(failed) < MAX_FAILURES or not all(failed):
                done[impl].append(crowd.round(size, timeout))
    return done


def _row(impl: str, nodes: int, kib: int, rounds: Sequence[Round]) -> Row:
    took = [trial.seconds for trial in rounds if trial.seconds is not None]
    delivered = nodes * (nodes - 1) * (kib << 10)
    sent = [trial.sent / delivered for trial in rounds if trial.sent is not None]
    error = next((trial.error for trial in rounds if trial.error), "")
    return {
        "bench": "gossip",
        "impl": impl,
        "nodes": nodes,
        "processes": min(nodes, MAX_PROCESSES),
        "kib": kib,
        "median_s": statistics.median(took) if len(took) > len(rounds) / 2 else None,
        "slowest_s": max(took, default=None),
        "sent_per_delivered": round(statistics.median(sent), 3) if sent else None,
        "cpu_s": round(statistics.median(trial.cpu_s for trial in rounds), 3),
        "runs": len(rounds),
        "failed": len(rounds) - len(took),
        "held": round(min(trial.held for trial in rounds) / nodes**2, 3),
        "load": round(os.getloadavg()[0], 2),
    } | ({"error": error} if error else {})


def command(
    nodes: Annotated[str, typer.Option(help="Numbers of nodes, separated by commas.")] = "8,16,64",
    kib: Annotated[str, typer.Option(help="Sizes of a rollout in KiB, separated by commas.")] = "10,100,1000",
    runs: Annotated[int, typer.Option(min=1, help="Rounds of each kind; the two sides take turns.")] = 5,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds after which a round has failed.")] = 30.0,
    against: Annotated[Literal["none", "hivemind"], typer.Option(help="Measure another library, too.")] = "none",
    hivemind_python: Annotated[
        str, typer.Option(help="An interpreter with hivemind, in its own virtual environment.")
    ] = ".venv-hivemind/bin/python",
    ingest: Annotated[
        bool, typer.Option(help="Also measure the groups a second that one core verifies, and its time for 1 MB.")
    ] = True,
) -> None:
    """Time the spread of rollouts to all nodes.

    Also measures bytes sent for each byte delivered, and processor time. Nodes are real hosts on loopback; more than
    eight share processes.

    \b
    For --against hivemind, which needs other versions of our dependencies:
      python3 -m venv .venv-hivemind && .venv-hivemind/bin/pip install hivemind==1.1.12

    \b
    Example:
      python -m benchmarks.gossip --nodes 8,16 --kib 10,100 > gossip.jsonl
      python -m benchmarks.gossip --nodes 8,16,64 --kib 10,100,1000 --against hivemind
    """
    if against == "hivemind" and not Path(hivemind_python).is_file():
        raise typer.BadParameter(
            f"there is no {hivemind_python}: make it as `python -m benchmarks.gossip --help` says, or name another"
        )
    for row in run(
        nodes=numbers("--nodes", nodes, 2),
        kib=numbers("--kib", kib, 1),
        runs=runs,
        timeout=timeout,
        hivemind_python=hivemind_python if against == "hivemind" else "",
        ingest_groups=2000 if ingest else 0,
    ):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    typer.run(command)

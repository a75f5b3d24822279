"""How long an all-reduce takes: ours, gloo's and PCCL's, in turns on one machine.

    python -m benchmarks.allreduce

Ranks are processes. One round: every rank has its values ready, all start at the same moment, and
the time is that until the last one has the sum in its buffer; what it has is then checked. Rounds of
all implementations alternate, so that a busy machine is busy for each. Ours and gloo share processes.

    gossamer                    the default: in shared memory, as ranks of one machine and user have it
    gossamer-torch              the same by the backend of torch.distributed, which has no agreement for each call
    gossamer-tcp                over TCP, as between machines, and unauthenticated, as the others are
    gossamer-tcp-authenticated  the same, authenticated
    gossamer-tcp-encrypted      the default, over TCP
    gloo                        torch.distributed's own, on loopback
    pccl                        pypccl 1.0.0 under an interpreter of its own, where it can be loaded:
                                it wants Python 3.12 and NVIDIA's libcuda.so.1, even for host memory

A row has the processor time of a rank too (`cpu_s`), which other work on the machine disturbs least. It also has the
bytes on paper (`paper_mib`): what a rank reads and writes. Of S bytes between n ranks gloo moves 11 (n - 1) / n S.
Our sockets move 2 S more, because results are kept aside until they count. Shared memory moves (5 - 1 / n) S.

Three more parts, on request. `ddp`: a step of DistributedDataParallel, with a model of 10 million weights and 32 rows
a rank: forward, backward, and gradients summed by our backend, by gloo, or not at all. `link`: two ranks in network
namespaces (Linux, root), each sending through a token bucket (tbf) of 200 Mbit/s; int8 against float32. `delay`: two
ranks through a proxy that delays either way by 50 ms and holds no more of a connection's bytes than a TCP window
would; 8 streams against 1. Outer steps of DiLoCo on slow links are `benchmarks.diloco`.
"""

import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.options import numbers, sizes
from benchmarks.ranks import Ranks, RanksError
from benchmarks.slow_links import delayed, shaped
from collectives.mesh.shared_memory import is_possible

Row = dict[str, Any]

OURS = {  # what each of ours is connected with
    "gossamer": {"protection": "encrypted", "streams": 1, "local": True},
    "gossamer-tcp": {"protection": "unauthenticated", "streams": 1, "local": False},
}
PROTECTED = {
    "gossamer-tcp-authenticated": {"protection": "authenticated", "streams": 1, "local": False},
    "gossamer-tcp-encrypted": {"protection": "encrypted", "streams": 1, "local": False},
}

PAPER: dict[str, Callable[[int], float]] = {  # bytes that a rank reads and writes for each byte of the tensor
    "gloo": lambda ranks: 11 * (ranks - 1) / ranks,
    "gossamer-tcp": lambda ranks: 11 * (ranks - 1) / ranks + 2,
    "gossamer": lambda ranks: 5 - 1 / ranks if is_possible() else 11 * (ranks - 1) / ranks + 2,
    "gossamer-torch": lambda ranks: 5 - 1 / ranks if is_possible() else 11 * (ranks - 1) / ranks,
}
BY_TORCH = ("gossamer-torch", "gloo")  # of one process group and another

LINK_MIB, LINK_MBIT = 32, 200.0
DELAY_MIB, DELAY_S, WINDOW_BYTES = 32, 0.05, 256 << 10
STREAMS = (1, 8)
TIMEOUT_S = 120.0


def run(  # noqa: PLR0913  # one option each
    *,
    ranks: Sequence[int] = (2, 4, 8),
    mib: Sequence[float] = (4, 64, 256),
    runs: int = 7,
    against: Sequence[str] = ("gloo",),
    protected: bool = False,
    pccl_python: str = "",
    ddp: bool = False,
    link: bool = False,
    delay: bool = False,
) -> Iterator[Row]:
    """Yield a row for each implementation, number of ranks and size, and last the ratios of their medians.

    Args:
        ranks: numbers of processes.
        mib: sizes of the tensor (float32) in MiB.
        runs: rounds of each; one more comes before them and does not count.
        against: "gloo", "pccl", or both.
        protected: whether to measure what protection costs too.
        pccl_python: an interpreter that has pypccl; empty: this one.
        ddp: measure steps of DistributedDataParallel; "gloo" must be in `against`.
        link: measure codecs on a slow link.
        delay: measure streams on a long one.
    """
    ratios: dict[str, dict[str, float]] = {}
    problem = ""  # with PCCL, of which one row is enough
    for count in ranks:
        impls = [*OURS, *(PROTECTED if protected else []), *(BY_TORCH if "gloo" in against else [])]
        with ExitStack() as stack:
            sides = dict.fromkeys(impls, _ours(stack, count, impls))
            if "pccl" in against and not problem:
                try:
                    sides["pccl"] = _pccl(stack, count, pccl_python or sys.executable)
                except RanksError as error:
                    problem = str(error)
                    yield {"bench": "allreduce", "impl": "pccl", "median_s": None, "error": problem}
            if ddp:
                yield from _ddp(sides["gloo"], count, runs, ratios)
            for size in mib:
                medians = {}
                for row in _in_turns(sides, count, size, runs):
                    medians[row["impl"]] = row["median_s"]
                    yield row
                for name, ours, theirs in (
                    *((impl, "gossamer", impl) for impl in ("gloo", "pccl")),
                    ("gloo, torch", "gossamer-torch", "gloo"),
                    *((f"{impl}, tcp", "gossamer-tcp", impl) for impl in ("gloo", "pccl")),
                    ("authenticated over plain, tcp", "gossamer-tcp-authenticated", "gossamer-tcp"),
                    ("encrypted over plain, tcp", "gossamer-tcp-encrypted", "gossamer-tcp"),
                ):
                    if ours in medians and theirs in medians:
                        ratios.setdefault(name, {})[f"ranks={count} mib={size}"] = medians[ours] / medians[theirs]
    if link:
        yield from _link(runs, ratios)
    if delay:
        yield from _delay(runs, ratios)
    yield {"bench": "allreduce", "ratio": ratios}


def _ours(stack: ExitStack, count: int, impls: Sequence[str]) -> Ranks:
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    ranks = stack.enter_context(Ranks([[sys.executable, "-m", "benchmarks.allreduce_rank"]] * count))
    for name, options in (OURS | PROTECTED).items():
        if name in impls:
            ranks.found(name, options, TIMEOUT_S)
    if "gloo" in impls:
        ranks.tell("torch_groups", {"store": str(Path(folder) / "store"), "ranks": count}, TIMEOUT_S)
    return ranks


def _pccl(stack: ExitStack, count: int, python: str) -> Ranks:
    ranks = stack.enter_context(Ranks([[python, "-m", "benchmarks.pccl_rank"]] * count))
    problem = next((answer["problem"] for answer in ranks.tell("load", {}, TIMEOUT_S) if answer["problem"]), "")
    if problem:
        raise RanksError(
            f"{python} cannot load pypccl ({problem}): make an environment for it as "
            "`python -m benchmarks.allreduce --help` says, on a machine with NVIDIA's driver, and give --pccl-python"
        )
    port = ranks.ask(0, "master", {}, TIMEOUT_S)["port"]
    ranks.tell("join", {"port": port, "ranks": count}, TIMEOUT_S)
    return ranks


def _in_turns(sides: dict[str, Ranks], count: int, size: float, runs: int) -> Iterator[Row]:
    took: dict[str, list[float]] = {impl: [] for impl in sides}
    cpu: dict[str, list[float]] = {impl: [] for impl in sides}
    for side in dict.fromkeys(sides.values()):
        side.tell("prepare", {"mib": size, "ranks": count}, TIMEOUT_S)
    for number in range(runs + 1):
        for impl, side in sides.items():
            seconds = side.round(impl, "none", TIMEOUT_S)
            if number:
                took[impl].append(seconds)
                cpu[impl].append(side.cpu_s)
    for impl, seconds_of in took.items():
        row = _row(impl, seconds_of, ranks=count, mib=size, cpu_s=statistics.median(cpu[impl]))
        yield row | ({"paper_mib": round(size * PAPER[impl](count), 1)} if impl in PAPER else {})


def _ddp(side: Ranks, count: int, runs: int, ratios: dict[str, dict[str, float]]) -> Iterator[Row]:
    """Yield rows of a training step by our backend, by gloo, and by each rank for itself."""
    side.tell("models", {}, TIMEOUT_S)
    took: dict[str, list[float]] = {impl: [] for impl in ("alone", *BY_TORCH)}
    for number in range(runs + 1):
        norms = {}
        for impl, seconds_of in took.items():
            seconds, norms[impl] = side.step(impl, TIMEOUT_S)
            if number:
                seconds_of.append(seconds)
        if any(not math.isclose(norm, norms["gloo"][0], rel_tol=1e-6) for impl in BY_TORCH for norm in norms[impl]):
            raise RanksError(f"gradients differ: {norms}")
    medians = {}
    for impl, seconds_of in took.items():
        row = _row(impl, seconds_of, ranks=count, ddp=True)
        medians[impl] = row["median_s"]
        yield row
    for name, other in (("ddp, gloo", "gloo"), ("ddp, alone", "alone")):
        ratios.setdefault(name, {})[f"ranks={count}"] = medians["gossamer-torch"] / medians[other]


def _link(runs: int, ratios: dict[str, dict[str, float]]) -> Iterator[Row]:
    """Yield rows of float32 and int8 on a slow link."""
    with shaped([LINK_MBIT] * 2) as spaces, ExitStack() as stack:
        commands = [[*space.command, sys.executable, "-m", "benchmarks.allreduce_rank"] for space in spaces]
        ranks = stack.enter_context(Ranks(commands))
        listens = [f"tcp://{space.address}:0" for space in spaces]
        ranks.found("gossamer", {"protection": "encrypted", "streams": 1, "local": False}, TIMEOUT_S, listens=listens)
        ranks.tell("prepare", {"mib": LINK_MIB, "ranks": 2}, TIMEOUT_S)
        medians = {}
        took: dict[str, list[float]] = {"none": [], "int8": []}
        for number in range(runs + 1):
            for codec, seconds in took.items():
                timed = ranks.round("gossamer", codec, TIMEOUT_S)
                if number:
                    seconds.append(timed)
        for codec, seconds in took.items():
            row = _row("gossamer", seconds, ranks=2, mib=LINK_MIB, mbit=LINK_MBIT, codec=codec)
            medians[codec] = row["median_s"]
            yield row
    ratios["int8"] = {f"ranks=2 mib={LINK_MIB} mbit={LINK_MBIT:g}": medians["int8"] / medians["none"]}


def _delay(runs: int, ratios: dict[str, dict[str, float]]) -> Iterator[Row]:
    """Yield rows of one stream and of several through proxies that delay."""
    with ExitStack() as stack:
        ranks = stack.enter_context(Ranks([[sys.executable, "-m", "benchmarks.allreduce_rank"]] * 2))
        took: dict[int, list[float]] = {}
        for streams in STREAMS:
            fronts = stack.enter_context(delayed(2, DELAY_S, WINDOW_BYTES))
            ranks.found(
                f"streams={streams}",
                {"protection": "encrypted", "streams": streams, "local": False},
                TIMEOUT_S,
                listens=[f"tcp://127.0.0.1:{front.target}" for front in fronts],
                advertised=[f"tcp://127.0.0.1:{front.port}" for front in fronts],
            )
            took[streams] = []
        ranks.tell("prepare", {"mib": DELAY_MIB, "ranks": 2}, TIMEOUT_S)
        for number in range(runs + 1):
            for streams, seconds in took.items():
                timed = ranks.round(f"streams={streams}", "none", TIMEOUT_S)
                if number:
                    seconds.append(timed)
        medians = {}
        for streams, seconds in took.items():
            row = _row("gossamer", seconds, ranks=2, mib=DELAY_MIB, delay_s=DELAY_S, streams=streams)
            medians[streams] = row["median_s"]
            yield row
    fewest, most = STREAMS
    ratios["streams"] = {f"ranks=2 mib={DELAY_MIB} delay_s={DELAY_S} streams={most}": medians[most] / medians[fewest]}


def _row(impl: str, seconds: Sequence[float], **parameters: Any) -> Row:
    return {
        "bench": "allreduce",
        "impl": impl,
        **parameters,
        "median_s": statistics.median(seconds),
        "fastest_s": min(seconds),
        "slowest_s": max(seconds),
        "runs": len(seconds),
        "load": round(os.getloadavg()[0], 2),
    }


def command(  # noqa: PLR0913  # one option each
    ranks: Annotated[str, typer.Option(help="Numbers of processes, separated by commas.")] = "2,4,8",
    mib: Annotated[str, typer.Option(help="Sizes of the float32 vector in MiB, such as 0.0625,4,64.")] = "4,64,256",
    runs: Annotated[int, typer.Option(min=1, help="Runs of each kind; all sides take turns.")] = 7,
    against: Annotated[str, typer.Option(help="gloo, pccl, gloo,pccl or none.")] = "gloo",
    protect: Annotated[bool, typer.Option(help="Also measure what encryption and authentication cost.")] = False,
    pccl_python: Annotated[str, typer.Option(help="A Python 3.12 interpreter with pypccl; if empty, this one.")] = "",
    ddp: Annotated[bool, typer.Option(help="Also steps of DistributedDataParallel, beside gloo's and none.")] = False,
    link: Annotated[bool, typer.Option(help="Also int8 against float32 at 200 Mbit/s, in namespaces (root).")] = False,
    delay: Annotated[bool, typer.Option(help="Also 8 streams against 1 with 50 ms of delay.")] = False,
) -> None:
    """Time an all-reduce on this machine.

    Times a Communicator, the same as a backend of torch.distributed, gloo and PCCL, in turns.

    \b
    pypccl needs Python 3.12 and NVIDIA's libcuda.so.1. If it cannot be loaded, a row says so:
      python3.12 -m venv .venv-pccl && .venv-pccl/bin/pip install pypccl==1.0.0 numpy cffi

    \b
    Example:
      python -m benchmarks.allreduce --ranks 2,4 --mib 64 > allreduce.jsonl
      python -m benchmarks.allreduce --against gloo,pccl --pccl-python .venv-pccl/bin/python --protect --link --delay
    """
    others = [] if against == "none" else against.split(",")
    if not set(others) <= {"gloo", "pccl"}:
        raise typer.BadParameter(f"--against wants gloo, pccl, gloo,pccl or none; got {against!r}")
    if ddp and "gloo" not in others:
        raise typer.BadParameter("--ddp compares with gloo: leave it in --against")
    for row in run(
        ranks=numbers("--ranks", ranks, 2),
        mib=sizes("--mib", mib),
        runs=runs,
        against=others,
        protected=protect,
        pccl_python=pccl_python,
        ddp=ddp,
        link=link,
        delay=delay,
    ):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    typer.run(command)

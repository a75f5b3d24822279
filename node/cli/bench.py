"""`gossamer bench`: the benchmarks, one JSON object a line."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from node.cli.options import Debug
from node.errors import UserError

Compare = Literal["trl", "sharing", "both"]

app = typer.Typer(help="Run a benchmark; results are JSON lines on stdout.", rich_markup_mode=None)


@app.command("round")
def bench_round(  # noqa: PLR0913  # one option each
    model: Annotated[str, typer.Option(help="As policy.model.")] = "builtin",
    questions: Annotated[int, typer.Option(min=1, help="Questions a round.")] = 4,
    completions: Annotated[int, typer.Option(min=2, help="Completions a question.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds timed in each block.")] = 20,
    warm_rounds: Annotated[int, typer.Option(min=1, help="Rounds before those, if sharing is timed.")] = 100,
    blocks: Annotated[int, typer.Option(min=1, help="Blocks of each side, in turns.")] = 6,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads for tensors.")] = 1,
    compare: Annotated[Compare, typer.Option(help="Which comparison to make.")] = "both",
    examples: Annotated[int, typer.Option(min=0, help="Solved examples before each question, for real models.")] = 0,
    engine: Annotated[
        Literal["generate", "paged", "vllm"],
        typer.Option(help="Both sides generate by transformers, its continuous batching, or vLLM on the same GPU."),
    ] = "generate",
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="As policy.device.")] = "cpu",
    lengths: Annotated[str, typer.Option(help="Longest prompt and completion in tokens, such as 256,128.")] = "",
    debug: Debug = False,
) -> None:
    """Time a round against TRL's, or with sharing.

    `trl` times the same work in TRL's own trainer. `sharing` times a node with peers against the same node alone, on an
    idle machine and beside an unrelated swarm.

    \b
    Example:
      gossamer bench round --blocks 6 > round.jsonl
      gossamer bench round --compare trl --model runs/models/smollm2-135m-instruct --examples 3 --rounds 3 --blocks 2
      gossamer bench round --compare trl --model Qwen/Qwen3-0.6B --device cuda --engine vllm --lengths 256,128
      gossamer bench round --compare sharing --model runs/models/smollm2-135m-instruct --rounds 3 --warm-rounds 4
    """
    with _checkout():
        from benchmarks.round import run
    for row in run(
        model=model,
        questions=questions,
        completions=completions,
        rounds=rounds,
        warm_rounds=warm_rounds,
        blocks=blocks,
        threads=threads,
        compare=compare,
        examples=examples,
        engine=engine,
        device=device,
        lengths=_lengths(lengths),
    ):
        print(json.dumps(row), flush=True)


def _lengths(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    numbers = _numbers("--lengths", text, 1)
    if len(numbers) != 2:
        raise UserError(f"--lengths wants two numbers, of a prompt and a completion, such as 256,128; got {text!r}")
    return numbers[0], numbers[1]


@app.command("gossip")
def bench_gossip(  # noqa: PLR0913  # one option each
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
    json_lines: Annotated[bool, typer.Option("--json", help="JSON lines; there is no other output.")] = True,
    debug: Debug = False,
) -> None:
    """Time the spread of rollouts to all nodes.

    Also measures bytes sent for each byte delivered, and processor time. Nodes are real hosts on loopback; more than
    eight share processes.

    \b
    For --against hivemind, which needs other versions of our dependencies:
      python3 -m venv .venv-hivemind && .venv-hivemind/bin/pip install hivemind==1.1.12

    \b
    Example:
      gossamer bench gossip --nodes 8,16 --kib 10,100 > gossip.jsonl
      gossamer bench gossip --nodes 8,16,64 --kib 10,100,1000 --against hivemind --json
    """
    if against == "hivemind" and not Path(hivemind_python).is_file():
        raise UserError(
            f"there is no {hivemind_python}: make it as `gossamer bench gossip --help` says, or name another"
        )
    with _checkout():
        from benchmarks.gossip import run
    for row in run(
        nodes=_numbers("--nodes", nodes, 2),
        kib=_numbers("--kib", kib, 1),
        runs=runs,
        timeout=timeout,
        hivemind_python=hivemind_python if against == "hivemind" else "",
        ingest_groups=2000 if ingest else 0,
    ):
        print(json.dumps(row), flush=True)


def _numbers(option: str, text: str, least: int) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < least:
        raise UserError(f"{option} wants whole numbers of at least {least}, separated by commas; got {text!r}")
    return numbers


def _sizes(option: str, text: str) -> list[float]:
    try:
        sizes = [float(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or not all(0.001 <= size <= 4096 for size in sizes):
        raise UserError(f"{option} wants sizes from 0.001 to 4096, separated by commas; got {text!r}")
    return [int(size) if size.is_integer() else size for size in sizes]


@app.command("allreduce")
def bench_allreduce(  # noqa: PLR0913  # one option each
    ranks: Annotated[str, typer.Option(help="Numbers of processes, separated by commas.")] = "2,4,8",
    mib: Annotated[str, typer.Option(help="Sizes of the float32 vector in MiB, such as 0.0625,4,64.")] = "4,64,256",
    runs: Annotated[int, typer.Option(min=1, help="Runs of each kind; all sides take turns.")] = 7,
    against: Annotated[str, typer.Option(help="gloo, pccl, gloo,pccl or none.")] = "gloo",
    protect: Annotated[bool, typer.Option(help="Also measure what encryption and authentication cost.")] = False,
    pccl_python: Annotated[str, typer.Option(help="A Python 3.12 interpreter with pypccl; if empty, this one.")] = "",
    link: Annotated[bool, typer.Option(help="Also int8 against float32 at 200 Mbit/s, in namespaces (root).")] = False,
    delay: Annotated[bool, typer.Option(help="Also 8 streams against 1 with 50 ms of delay.")] = False,
    diloco: Annotated[
        bool, typer.Option(help="Also outer steps of DiLoCo against none at 200 Mbit/s, in namespaces (root).")
    ] = False,
    json_lines: Annotated[bool, typer.Option("--json", help="JSON lines; there is no other output.")] = True,
    debug: Debug = False,
) -> None:
    """Time an all-reduce on this machine.

    Times a Communicator, the same as a backend of torch.distributed, gloo and PCCL, in turns.

    \b
    pypccl needs Python 3.12 and NVIDIA's libcuda.so.1. If it cannot be loaded, a row says so:
      python3.12 -m venv .venv-pccl && .venv-pccl/bin/pip install pypccl==1.0.0 numpy cffi

    \b
    Example:
      gossamer bench allreduce --ranks 2,4 --mib 64 > allreduce.jsonl
      gossamer bench allreduce --against gloo,pccl --pccl-python .venv-pccl/bin/python --protect --link --delay
      gossamer bench allreduce --ranks 2 --mib 32 --against none --diloco
    """
    others = [] if against == "none" else against.split(",")
    if not set(others) <= {"gloo", "pccl"}:
        raise UserError(f"--against wants gloo, pccl, gloo,pccl or none; got {against!r}")
    with _checkout():
        from benchmarks.allreduce import run
    for row in run(
        ranks=_numbers("--ranks", ranks, 2),
        mib=_sizes("--mib", mib),
        runs=runs,
        against=others,
        protected=protect,
        pccl_python=pccl_python,
        link=link,
        delay=delay,
        outer=diloco,
    ):
        print(json.dumps(row), flush=True)


@contextmanager
def _checkout() -> Iterator[None]:
    """Let the block import `benchmarks`, which is no part of what is installed: it lies beside the packages."""
    root = Path(__file__).parents[2]
    if not (root / "benchmarks" / "__init__.py").is_file():
        raise UserError("the benchmarks are not installed: run this from a checkout of gossamer, with pip install -e .")
    sys.path.insert(0, str(root))
    try:
        yield
    finally:
        sys.path.remove(str(root))


@app.callback()
def _group() -> None:
    """Run a benchmark; results are JSON lines on stdout."""

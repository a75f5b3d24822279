"""The processes of one node that several train: started here, or by a launcher (`accelerate launch`, `torchrun`).

Number 0 is the process that a person started. It starts the others as worker processes, so they end with it, kill -9
included, and a Ctrl-C reaches number 0 alone. When one of them dies, so does the node, with a line that says which; it
goes on from its last checkpoint when it is started again.

Why not `accelerate launch` for this: it would stand above number 0, kill it 30 s after a signal to stop, in the middle
of its round, and answer a death with tracebacks. Its file of settings is read here all the same.
"""

import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import structlog
import torch

from node.config import NodeConfig
from node.errors import AGAIN, PassingError, UserError, one_line
from node.policy.load import device_of
from node.processes.machine import usable_cores
from node.processes.worker_process import LAUNCHED, WorkerProcess, die_with_parent
from node.telemetry.logs import flush_logs
from node.training.ranks import Ranks, is_broken, is_sharded, on_cpu

EXIT_DIED = 1
GRACE_S = 10.0  # for number 0 to notice by itself that another is gone: among GPUs an exchange may wait for ever

log = structlog.get_logger()


@contextmanager
def several(
    config: NodeConfig, folder: Path, processes: int | None, accelerate: Path | None
) -> Iterator[Callable[[], Ranks]]:
    """Let the node of `folder` train in several processes for as long as the block lasts.

    They start at once. Yields a function, to be called once, that waits for them and returns this one's place among
    them.

    Args:
        config: of the node.
        folder: what the others print goes to `rank-N.log` in it.
        processes: how many; None for as many as the file says, or as a launcher has started, or else one.
        accelerate: accelerate's file of settings.

    Raises:
        PassingError: one of the others has died.
        UserError: there are fewer GPUs than processes, or the file cannot be used.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if launched and (processes or accelerate):
        raise UserError("a launcher has started this node's processes: leave out --processes and --accelerate-config")
    if launched or processes == 1 or not (processes or accelerate):
        if launched:
            die_with_parent()
        with _broken_group_is_clear(lambda: "another process of this node has died"):
            yield partial(_join, config)
        return
    os.environ.update(_environment(config, processes, accelerate))
    is_sharded()  # raises, sooner than in each of them
    others = [_start(number, folder) for number in range(1, int(os.environ["WORLD_SIZE"]))]
    over, lost = threading.Event(), threading.Event()
    reasons: list[str] = []

    def reason() -> str:
        lost.wait(GRACE_S / 2)
        return reasons[0] if reasons else "another process of this node has died"

    def watch(number: int, other: WorkerProcess) -> None:
        how = other.wait()
        if not how or over.is_set():
            return
        reasons.append(f"process {number} of this node has died ({how})")
        lost.set()
        if not over.wait(GRACE_S):
            line = f"{reasons[0]}: {AGAIN}"
            log.error("stopped", reason=line)
            flush_logs()
            sys.stderr.write(f"error: {line}\n")
            sys.stderr.flush()
            os._exit(EXIT_DIED)

    for number, other in enumerate(others, 1):
        threading.Thread(target=watch, args=(number, other), name=f"rank-{number}", daemon=True).start()
    try:
        with _broken_group_is_clear(reason):
            yield partial(_join, config, others)
    finally:
        over.set()
        for other in others:
            other.kill()


def sharers_of(processes: int | None, accelerate: Path | None) -> int:
    """Return among how many processes FSDP2 shares the weights out; 1 where each has them whole.

    Args:
        processes: how many were asked for, as in `several`.
        accelerate: accelerate's file of settings.

    Raises:
        UserError: the file cannot be used.
    """
    if accelerate is None:
        return int(os.environ.get("WORLD_SIZE", "1")) if is_sharded() else 1
    count, settings = _settings_of(accelerate, processes)
    return count if (os.environ | settings).get("ACCELERATE_USE_FSDP", "").lower() == "true" else 1


def _start(number: int, folder: Path) -> WorkerProcess:
    output = folder / f"rank-{number}.log"
    output.unlink(missing_ok=True)
    place = {name: os.environ[name] for name in LAUNCHED if name in os.environ}
    place |= {"RANK": str(number), "LOCAL_RANK": str(number), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return WorkerProcess([sys.executable, "-P", "-m", "node.training.follower"], place, output)


def _join(config: NodeConfig, others: Sequence[WorkerProcess] = ()) -> Ranks:
    ranks = Ranks.join()
    ranks.others = others
    device = device_of(config.policy.device)
    if ranks.count > 1 and (device == "cpu") != on_cpu():
        raise UserError(
            f"this node trains on {device!r} and its other processes would not: set ACCELERATE_USE_CPU=true for all of "
            "them to train on the CPU, and policy.device='cpu'"
        )
    return ranks


@contextmanager
def _broken_group_is_clear(reason: Callable[[], str]) -> Iterator[None]:
    """Say in one line that another process is gone, when an exchange with it fails."""
    try:
        yield
    except RuntimeError as error:
        if is_broken(error):
            raise PassingError(f"{reason()}: {AGAIN}") from error
        raise


def _environment(config: NodeConfig, processes: int | None, accelerate: Path | None) -> dict[str, str]:
    """Return the variables by which the processes find each other, share the machine and train as accelerate has it."""
    device = device_of(config.policy.device)
    if device not in ("cpu", "cuda"):
        raise UserError(f"several processes train on GPUs of CUDA or on the CPU, and this node's device is {device!r}")
    count, settings = _settings_of(accelerate, processes) if accelerate else (processes or 1, {})
    if device == "cuda" and count > torch.cuda.device_count():
        raise UserError(
            f"{count} processes need {count} GPUs, and {torch.cuda.device_count()} can be seen: start fewer"
        )
    threads = config.threads or max(1, usable_cores() // count)
    return {
        "OMP_NUM_THREADS": str(threads),
        **settings,
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "ACCELERATE_USE_CPU": "true" if device == "cpu" else "false",
    }


def _settings_of(file: Path, processes: int | None) -> tuple[int, dict[str, str]]:
    """Return how many processes accelerate's file means, and the variables that `accelerate launch` would set for it.

    Precision is not among them: `trainer.bf16` says it.

    Raises:
        UserError: the file cannot be read, or asks for what this node has no use for.
    """
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    if not file.is_file():
        raise UserError(f"there is no file {file}: name what `accelerate config` has written")
    given = ["--config_file", str(file), "--main_process_port", "0", "gossamer"]
    if processes is not None:
        given = ["--num_processes", str(processes), *given]
    try:
        arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(given))
        if (
            arguments.use_deepspeed
            or arguments.use_megatron_lm
            or arguments.tpu
            or arguments.num_machines not in (None, 1)
        ):
            raise ValueError("this node trains on one machine, data parallel or by FSDP2")
        variables = prepare_multi_gpu_env(arguments)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{file} cannot be used: {one_line(error)}") from None
    variables.pop("ACCELERATE_MIXED_PRECISION", None)
    return int(arguments.num_processes), {
        name: value for name, value in variables.items() if os.environ.get(name) != value
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

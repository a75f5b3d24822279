"""Node functions for the supervisor's tests: no model, but the files that a real node writes."""

import os
import signal
import time
from pathlib import Path

from node.config import NodeConfig
from node.errors import PassingError, UserError
from node.telemetry.metrics_file import MetricsLog, read_metrics
from tests.fakes.rows import make_row

ROUND = 0.02  # seconds


def quick(config: NodeConfig, folder: Path) -> None:
    """Go on after the last whole round; stop after the round in which SIGTERM comes; take note of SIGUSR1."""
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopping.append(number))
    signal.signal(signal.SIGUSR1, lambda *_: (folder / "asked to save").touch())
    (folder / "pid").write_text(str(os.getpid()))
    (folder / "seeds").write_text("\n".join(config.network.seeds))
    (folder / "gpu").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
    (folder / "address").write_text(f"tcp://127.0.0.1:{1000 + int(folder.name[1:])}?key={os.getpid():064x}\n")
    done = len(read_metrics(folder / "metrics.jsonl"))
    log = MetricsLog(folder / "metrics.jsonl")
    log.rewind(done)
    for number in range(done + 1, config.last_round + 1):
        time.sleep(ROUND)
        log.append(make_row(int(folder.name[1:]), number, time.time()))
        if stopping:
            (folder / "stopped").touch()
            return


def stuck(config: NodeConfig, folder: Path) -> None:
    """Do one round, then take note of SIGTERM and do nothing about it."""
    signal.signal(signal.SIGTERM, lambda *_: (folder / "asked").touch())
    (folder / "pid").write_text(str(os.getpid()))
    (folder / "address").write_text("tcp://127.0.0.1:1000\n")
    MetricsLog(folder / "metrics.jsonl").append(make_row(0, 1, time.time()))
    while True:
        time.sleep(0.05)


def misconfigured(config: NodeConfig, folder: Path) -> None:
    """Find an error that a person has to correct."""
    raise UserError("unknown task 'riddles': choose one of sums, fractions")


def short_of_memory(config: NodeConfig, folder: Path) -> None:
    """Find no memory at the first try."""
    tried = folder / "tried"
    if not tried.exists():
        tried.touch()
        raise PassingError("no room on the GPU")
    quick(config, folder)


def talkative(config: NodeConfig, folder: Path) -> None:
    """Fail with more words than a pipe holds."""
    raise RuntimeError("no " * 100_000)


def leaves_a_process_behind(config: NodeConfig, folder: Path) -> None:
    """At the first try, be killed while a process lives that was forked from this one."""
    left = folder / "left"
    if not left.exists():
        pid = os.fork()
        if pid == 0:
            time.sleep(600)
            os._exit(0)
        left.write_text(str(pid))
        os.kill(os.getpid(), signal.SIGKILL)
    quick(config, folder)


def first_crashes(config: NodeConfig, folder: Path) -> None:
    """n0 fails in its third round whenever it gets there; the others are well."""
    if folder.name == "n0":
        quick(config.model_copy(update={"rounds": 2}), folder)
        raise RuntimeError("shape mismatch")
    quick(config, folder)


def afar(config: NodeConfig, folder: Path) -> None:
    """Say into output.log how it was started, then do as `quick`."""
    print("rounds", len(read_metrics(folder / "metrics.jsonl")), flush=True)
    print("listens", config.network.listen, config.network.local, config.weights.listen, flush=True)
    print("gpus", os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
    for path in (Path(str(task.options["path"])) for task in config.tasks if "path" in task.options):
        print("task", path, path.read_text(), flush=True)
    print("folder", folder, *sorted(path.name for path in folder.iterdir()), flush=True)
    quick(config, folder)

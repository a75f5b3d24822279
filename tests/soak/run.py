"""Eight nodes and a relay for an hour, under churn and with 100 times the usual traffic; what grows is a failure.

    python -m tests.soak.run --minutes 60 --out runs/soak

The relay founds the swarm, and the nodes join it by its invite, as people do. Its items live for `MAX_AGE_S`, so that
what holds or remembers them is full after minutes, and what grows in an hour's second half is a leak. Every `CHURN_S`
seconds one of the nodes beyond the first `STEADY` is killed with SIGKILL, asked to stop, or stopped for a while
(SIGSTOP), and started again from its folder. The relay and the steady nodes live all along: they are whom leaks are
looked for in. Strangers publish `USUAL` x `TIMES` groups a second. That takes a core, and nodes that train without a
pause take all there is, so they run at a lower priority than the strangers and the relay. What the strangers published
is in the summary, and what each node took, beside the usual: on a slow machine it is less.

Leaves `samples.jsonl`, a line for each look at each process, `peers.jsonl`, what the relay and the steady nodes say in
turn of their peers and of what they refused, and `summary.json`; prints what broke, and exits with 1.
"""

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from node.errors import UserError
from node.telemetry.status_server import ask
from tests.soak.bounds import MAX_AGE_S, NODE, RELAY, SETTINGS, SMALL_FILES, Sample, judge
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
MAIN = "import sys; from node.cli import main; sys.exit(main())"
GOSSAMER = [sys.executable, "-c", MAIN]
USUAL = 6.4  # groups a second of eight nodes on SmolLM2-135M: four each in a round of 5 s (README)
USUAL_TAKEN = USUAL * 7 / 8  # of them a node's, which has its own already
TIMES = 100
NICE = 5  # of nodes that train: a third of the weight; at 10 they starve where anything else runs
STEADY = 3
KINDS = ("killed", "asked", "paused")
CHURN_S = 20.0
PAUSE_S = 10.0  # stopped for longer than peers wait for it
LOOK_S = 2.0
UP_S = 600.0  # until all have loaded, on a busy machine
STOPPED = (0, -signal.SIGTERM)  # the latter where it had only begun to start
STOP_S = 300.0  # a node that loads stops once it has, on a busy machine
IDLE_S = 60.0  # a node that is up hangs if it has no new round for so long
EXPECTED_ERRORS = frozenset[str]()


class Process:
    """One node or relay, all the lives that it had, and what it took in each."""

    def __init__(self, folder: Path, command: list[str], *, trains: bool) -> None:
        self.folder, self.trains = folder, trains
        self._command = ["nice", "-n", str(NICE), *command] if trains else command
        self.lives: list[list[Sample]] = []
        self.started = 0.0
        self.start()

    @property
    def name(self) -> str:
        return self.folder.name

    def start(self) -> None:
        with (self.folder.parent / f"{self.name}.txt").open("ab") as output:
            self.child = subprocess.Popen(
                self._command, cwd=ROOT, env=_environment(), stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        self.lives.append([])
        self.started = time.monotonic()

    def look(self, at: float) -> Sample | None:
        with suppress(psutil.NoSuchProcess, FileNotFoundError):
            process = psutil.Process(self.child.pid)
            files = {path.name: path.stat().st_size for path in self.folder.iterdir() if path.is_file()}
            sample = Sample(at, process.memory_info().rss, process.num_fds(), process.num_threads(), files)
            self.lives[-1].append(sample)
            return sample
        return None

    def end(self, number: signal.Signals) -> int:
        self.child.send_signal(number)
        return self.child.wait(STOP_S)

    def state(self) -> dict[str, Any] | None:
        try:
            return ask(self.folder)
        except UserError:
            return None


def main() -> int:
    """Run it, and return 1 if a bound was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="once all nodes have loaded")
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--times", type=float, default=TIMES, help=f"the usual traffic, {USUAL} groups a second")
    parser.add_argument("--seed", type=int, default=0, help="of who is killed when")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "soak" / time.strftime("%Y%m%d-%H%M%S"))
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    with ExitStack() as stack:
        report = soak(options, stack)
    (options.out / "summary.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({key: value for key, value in report.items() if key != "broken"}))
    for line in report["broken"]:
        print(f"BROKEN: {line}")
    return 1 if report["broken"] else 0


def soak(options: argparse.Namespace, stack: ExitStack) -> dict[str, Any]:
    """Run the swarm for the time that `options` say and return the report."""
    relay, *nodes = everybody = list(_start(options, stack))
    wait_until(lambda: all(_rounds(node) for node in nodes), UP_S, "a round of every node")
    end_strangers = stack.enter_context(_strangers(relay.folder, USUAL * options.times))
    began = time.monotonic()
    until, churn = began + 60 * options.minutes, began + CHURN_S
    draw, ended = random.Random(options.seed), dict.fromkeys(KINDS, 0)
    paused: dict[str, float] = {}  # until when
    asked: dict[str, float] = {}  # to stop, until when at the latest
    broken: list[str] = []
    told = itertools.cycle((relay, *nodes[:STEADY]))
    with (options.out / "samples.jsonl").open("w") as samples, (options.out / "peers.jsonl").open("w") as peers:
        while (now := time.monotonic()) < until:
            for process in everybody:
                if process.child.poll() is not None:
                    if asked.pop(process.name, None) is None or process.child.returncode not in STOPPED:
                        broken.append(f"{process.name} ended with {process.child.returncode}, {now - began:.0f} s in")
                    process.start()
                elif asked.get(process.name, until) <= now:
                    broken.append(f"{process.name} did not stop within {STOP_S:.0f} s, {now - began:.0f} s in")
                    del asked[process.name]
                    process.end(signal.SIGKILL)
                    process.start()
                elif (sample := process.look(now - began)) is not None:
                    samples.write(
                        json.dumps({"name": process.name, "life": len(process.lives), **sample._asdict()}) + "\n"
                    )
                if paused.get(process.name, until) <= now:
                    process.child.send_signal(signal.SIGCONT)
                    del paused[process.name]
            awake = [node for node in nodes[STEADY:] if node.name not in paused and node.name not in asked]
            if now >= churn and awake:
                churn += CHURN_S
                process = next(told)
                if (state := process.state()) is not None:
                    kept = {key: state[key] for key in ("peers", "counters", "rejected")}
                    peers.write(json.dumps({"at": now - began, "name": process.name, **kept}) + "\n")
                process, kind = draw.choice(awake), KINDS[sum(ended.values()) % len(KINDS)]
                ended[kind] += 1
                if kind == "paused":
                    process.child.send_signal(signal.SIGSTOP)
                    paused[process.name] = now + PAUSE_S
                elif kind == "asked":
                    process.child.send_signal(signal.SIGTERM)
                    asked[process.name] = now + STOP_S
                else:
                    process.end(signal.SIGKILL)
                    process.start()
            time.sleep(LOOK_S)  # between two looks
    for process in everybody:
        if process.name in paused:
            process.child.send_signal(signal.SIGCONT)
    broken += _hangs([process for process in everybody if process.name not in asked])
    traffic = _traffic(relay, nodes[:STEADY])
    strangers = end_strangers()
    if isinstance(strangers, int):
        broken.append(f"the strangers ended by themselves, with {strangers}: the traffic was less than it should be")
    for process in everybody:
        try:
            process.end(signal.SIGTERM)
        except subprocess.TimeoutExpired:
            broken.append(f"{process.name} did not stop within {STOP_S:.0f} s at the end")
        if process.child.returncode:
            broken.append(f"{process.name} ended with {process.child.returncode} when it was asked to stop")
        for number, life in enumerate(process.lives, 1):
            bounds, steady = NODE if process.trains else RELAY, process in (relay, *nodes[:STEADY])
            broken += judge(f"{process.name}, life {number}", life, bounds, steady=steady and len(process.lives) == 1)
        broken += _errors(process.folder)
    return {
        "minutes": options.minutes,
        "nodes": options.nodes,
        "seed": options.seed,
        **ended,
        "strangers": strangers,
        **traffic,
        "took": {process.name: _took(process.lives[0]) for process in (relay, *nodes[:STEADY])},
        "rounds": sum(map(_rounds, nodes)),
        "broken": broken,
    }


def _start(options: argparse.Namespace, stack: ExitStack) -> Iterator[Process]:
    """Found the swarm, start the relay, and when it can be dialled the nodes; all are killed at the end."""

    def started(name: str, *arguments: str, trains: bool = True) -> Process:
        state = options.out / name
        main = SMALL_FILES + MAIN if trains else MAIN
        one = Process(state, [sys.executable, "-c", main, "node", "--state", str(state), *arguments], trains=trains)
        stack.callback(lambda: one.child.poll() is None and one.end(signal.SIGKILL))
        return one

    age = f"--set=buffer.max_age={MAX_AGE_S}"
    _say("found", "soak", "--no-start", "--state", str(options.out / "relay"), "--listen", "tcp://127.0.0.1:0", age)
    relay = started("relay", "--set", "role=relay", trains=False)
    yield relay
    wait_until((relay.folder / "address").exists, 60, "the relay")
    invite = options.out / "invite.txt"
    invite.write_text(_say("invite", str(relay.folder)))
    for number in range(options.nodes):
        settings = [f"--set={setting}" for setting in SETTINGS]
        _say("join", f"@{invite}", "--no-start", "--state", str(options.out / f"n{number}"), *settings)
        yield started(f"n{number}")


def _say(*arguments: str) -> str:
    """Run a command to its end and return what it printed."""
    command = [*GOSSAMER, *arguments]
    return subprocess.run(command, cwd=ROOT, env=_environment(), check=True, stdout=subprocess.PIPE, text=True).stdout


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@contextmanager
def _strangers(folder: Path, rate: float) -> Iterator[Callable[[], dict[str, float] | int]]:
    """Run the strangers; what is yielded ends them and returns what they say, or with what they had ended by then."""
    command = [sys.executable, "-m", "tests.soak.strangers", str(folder), str(rate)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, env=_environment(), stdin=pipe, stdout=pipe, text=True) as child:

        def end() -> dict[str, float] | int:
            said = child.communicate("\n", timeout=STOP_S)[0]
            if not said:
                return child.returncode
            told: dict[str, float] = json.loads(said.splitlines()[-1])  # lines of its log come first
            a_second = told["published"] / told["seconds"]
            return told | {"published_per_s": a_second, "times_the_usual": a_second / USUAL}

        try:
            yield end
        finally:
            child.kill()


def _rounds(node: Process) -> int:
    """Return the last round that is in the node's metrics."""
    try:
        lines = (node.folder / "metrics.jsonl").read_bytes().splitlines()
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        with suppress(ValueError, KeyError):  # it is torn, or of no round
            return int(json.loads(line)["round"])
    return 0


def _hangs(everybody: list[Process]) -> Iterator[str]:
    """Yield who does not answer, or has no new round, within `IDLE_S`, or `UP_S` after it was started again."""
    before, now = {process.name: _rounds(process) for process in everybody}, time.monotonic()
    for process in everybody:
        limit = max(IDLE_S, process.started + UP_S - now)
        try:
            wait_until(
                lambda process=process: (
                    process.state() and (not process.trains or _rounds(process) > before[process.name])
                ),
                limit,
            )
        except AssertionError:
            yield f"{process.name} hangs: {'no new round' if process.state() else 'no answer'} in {limit:.0f} s"


def _errors(folder: Path) -> Iterator[str]:
    """Yield what the log of a node calls an error, each event once."""
    seen = set()
    for path in (folder / "log.jsonl.1", folder / "log.jsonl"):
        for line in path.read_text().splitlines() if path.exists() else ():
            with suppress(ValueError):  # cut off by a kill
                row = json.loads(line)
                if row.get("level") in ("error", "critical"):
                    seen.add(str(row.get("event")))
    yield from (f"{folder.name} logged an error: {event}" for event in sorted(seen - EXPECTED_ERRORS))


def _traffic(relay: Process, steady: list[Process]) -> dict[str, Any]:
    """Return what the relay and the steady nodes have counted since they started, and what that is to the usual."""
    told = {process.name: process.state() or {} for process in (relay, *steady)}
    counted = {
        name: {key: tree["counters"][key] for key in ("live_peers", "items_received", "items_sent", "bytes_received")}
        for name, tree in told.items()
        if tree
    }
    rates = {name: tree["counters"]["items_received"] / tree["uptime_s"] for name, tree in told.items() if tree}
    return {
        "counters": counted,
        "items_received_per_s": rates,
        "times_the_usual": {name: rate / USUAL_TAKEN for name, rate in rates.items()},
        "rejected": {name: tree["rejected"] for name, tree in told.items()},
    }


def _took(life: list[Sample]) -> dict[str, Any]:
    """Return the largest of each, and medians of the second and the last quarter of the memory."""
    quarter = max(len(life) // 4, 1)
    memory = [sample.memory for sample in life]
    files: dict[str, int] = {}
    for sample in life:
        for name, size in sample.files.items():
            files[name] = max(files.get(name, 0), size)
    return {
        "memory": max(memory),
        "memory_second_quarter": median(memory[quarter : 2 * quarter] or memory),
        "memory_last_quarter": median(memory[-quarter:]),
        "descriptors": max(sample.descriptors for sample in life),
        "threads": max(sample.threads for sample in life),
        "files": files,
    }


if __name__ == "__main__":
    sys.exit(main())

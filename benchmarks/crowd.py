"""The peers of one side of `benchmarks.gossip`: child processes that are started, timed and ended together."""

import json
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

Child = subprocess.Popen[str]

ROOT = Path(__file__).parents[1]
HEAD_START_S = 0.3  # from the command to the moment at which all publish
SETTLE_S = 0.5  # after the last item, for the announcements and answers that still belong to the round
ANSWER_S = 10.0  # beyond a round's timeout
STOP_S = 20.0


@dataclass(frozen=True, slots=True)
class Round:
    """How long until everybody held everything (None: not in time), bytes sent (None: unknown), all processes' CPU."""

    seconds: float | None
    sent: int | None
    cpu_s: float
    held: int  # items, of all nodes together
    error: str = ""  # why there was no round at all


class CrowdError(Exception):
    """The peers did not start, or ended."""


class Crowd:
    """`nodes` nodes spread over `processes` child processes that run `command`."""

    def __init__(self, command: list[str], nodes: int, processes: int, timeout: float) -> None:
        """Start them all; a first one alone, which the others join by.

        Raises:
            CrowdError: they did not start within `timeout` seconds.
        """
        self.nodes = nodes
        self.is_dead = False
        self._number = 0
        shares = [nodes // processes + (place < nodes % processes) for place in range(processes)]
        self._children = [_spawn(command) for _ in shares]
        self._pool = ThreadPoolExecutor(processes)
        try:
            (first,) = self._ask(self._children[:1], [{"start": {"nodes": shares[0], "seeds": []}}], timeout)
            seeds = first["addresses"][:1]
            commands = [{"start": {"nodes": share, "seeds": seeds}} for share in shares[1:]]
            self._ask(self._children[1:], commands, timeout)
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def join(self, peers: int, timeout: float) -> None:
        """Wait until every node has at least `peers` peers.

        Raises:
            CrowdError: not within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while (fewest := min(answer["peers"] for answer in self._tell({"peers": {}}, timeout))) < peers:
            if time.monotonic() > deadline:
                raise CrowdError(f"a node has {fewest} of {peers} peers after {timeout:g} s")
            time.sleep(0.1)

    def round(self, size: int, timeout: float) -> Round:
        """Let every node publish `size` bytes at once. A crowd that does not answer has no more rounds."""
        try:
            return self._round(size, timeout)
        except CrowdError as error:
            self.is_dead = True
            return Round(None, None, 0.0, 0, str(error))

    def _round(self, size: int, timeout: float) -> Round:
        self._number += 1
        sent, cpu = self._sent(), self._cpu()
        command = {"number": self._number, "size": size, "nodes": self.nodes, "timeout": timeout}
        at = time.time() + HEAD_START_S
        answers = self._tell({"round": command | {"at": at}}, timeout + HEAD_START_S + ANSWER_S)
        time.sleep(SETTLE_S)
        seconds = [second for answer in answers for second in answer["seconds"]]
        held = sum(count for answer in answers for count in answer["held"])
        more = self._sent()
        took = None if None in seconds else max(seconds)
        return Round(took, None if sent is None or more is None else more - sent, self._cpu() - cpu, held)

    def stop(self) -> None:
        """End all processes and what they started."""
        for child in self._children:
            if child.stdin is not None:
                with suppress(BrokenPipeError):  # what was written last was for one that has ended
                    child.stdin.close()
        families = [process for child in self._children for process in _family(child)]
        _, alive = psutil.wait_procs(families, STOP_S)
        for process in alive:
            process.kill()
        for child in self._children:
            child.wait()
            if child.stdout is not None:
                child.stdout.close()
        self._pool.shutdown()

    def _sent(self) -> int | None:
        counts = [answer["sent"] for answer in self._tell({"sent": {}}, ANSWER_S)]
        return None if None in counts else sum(counts)

    def _cpu(self) -> float:
        times = [process.cpu_times() for child in self._children for process in _family(child)]
        return float(sum(spent.user + spent.system for spent in times))

    def _tell(self, command: dict[str, Any], timeout: float) -> list[Any]:
        return self._ask(self._children, [command] * len(self._children), timeout)

    def _ask(
        self, children: "list[subprocess.Popen[str]]", commands: list[dict[str, Any]], timeout: float
    ) -> list[Any]:
        asked = [self._pool.submit(_ask, *pair) for pair in zip(children, commands, strict=True)]
        deadline = time.monotonic() + timeout
        try:
            return [future.result(max(0.0, deadline - time.monotonic())) for future in asked]
        except TimeoutError:
            for child in children:  # their threads wait for a line that may never come
                for process in _family(child):
                    process.kill()
            raise CrowdError(f"no answer within {timeout:g} s") from None


def _spawn(command: list[str]) -> Child:
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)


def _family(child: Child) -> list[psutil.Process]:
    try:
        process = psutil.Process(child.pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _ask(child: Child, command: dict[str, Any]) -> Any:
    if child.stdin is None or child.stdout is None:
        raise RuntimeError("the child's pipes were asked for")
    try:
        child.stdin.write(json.dumps(command) + "\n")
        child.stdin.flush()
        return json.loads(child.stdout.readline())
    except (OSError, ValueError):
        raise CrowdError(
            f"a peer process ended ({child.poll()}) instead of answering {next(iter(command))!r}"
        ) from None

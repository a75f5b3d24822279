"""The processes of `benchmarks.allreduce`: started, told what to do a JSON object a line, timed and ended together."""

import json
import os
import secrets
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[1]
HEAD_START_S = 0.05  # from the command to the moment at which all begin
STOP_S = 10.0


class RanksError(Exception):
    """A rank ended, did not answer in time, or has a wrong result."""


class Ranks:
    """One process a rank. Commands and answers are those of `benchmarks.rank_commands`."""

    def __init__(self, commands: Sequence[list[str]]) -> None:
        pipe = subprocess.PIPE
        variables = os.environ | {
            "GOSSAMER_SECRET": secrets.token_hex(32)
        }  # without it a rank says so, where it answers
        self._children = [
            subprocess.Popen(
                command, cwd=ROOT, env=variables, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
            )
            for command in commands
        ]
        self._pool = ThreadPoolExecutor(len(commands))
        self.cpu_s = 0.0  # processor seconds of a rank in the last round, the mean of all

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for child in self._children:
            if child.stdin is not None:
                with suppress(BrokenPipeError):  # what was written last was for one that has ended
                    child.stdin.close()
        for child in self._children:
            try:
                child.wait(STOP_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            if child.stdout is not None:
                child.stdout.close()
        self._pool.shutdown()

    def ask(self, rank: int, command: str, options: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Tell one rank something and return its answer. Raises `RanksError`."""
        return self._tell({rank: {command: options}}, timeout)[0]

    def tell(self, command: str, options: dict[str, Any], timeout: float) -> list[dict[str, Any]]:
        """Tell every rank the same, its own number added, and return all answers. Raises `RanksError`."""
        every = {rank: {command: options | {"rank": rank}} for rank in range(len(self._children))}
        return self._tell(every, timeout)

    def found(
        self,
        name: str,
        options: dict[str, Any],
        timeout: float,
        *,
        listens: Sequence[str] = (),
        advertised: Sequence[str] = (),
    ) -> None:
        """Let all ranks be members of a new group `name`; rank 0 founds it. Raises `RanksError`."""
        count = len(self._children)
        listens = listens or ["tcp://127.0.0.1:0"] * count
        advertised = advertised or [""] * count
        own = [
            options | {"name": name, "listen": listen, "advertised": front}
            for listen, front in zip(listens, advertised, strict=True)
        ]
        address = self.ask(0, "found", own[0] | {"seeds": []}, timeout)["address"]
        for rank in range(1, count):
            joins = {rank: {"found": own[rank] | {"seeds": [address]}}}
            # A founder alone lets the first one in by itself.
            inside = {number: {"let_in": {"name": name}} for number in range(rank)} if rank > 1 else {}
            self._tell(joins | inside, timeout)

    def round(self, impl: str, codec: str, timeout: float) -> float:
        """Let all reduce what they prepared, and return the seconds until the last was done. Raises `RanksError`."""
        self.tell("refill", {}, timeout)
        at = time.time() + HEAD_START_S
        answers = self.tell("reduce", {"impl": impl, "codec": codec, "at": at}, timeout)
        if not all(answer["is_right"] for answer in answers):
            raise RanksError(f"{impl} gave a wrong sum")
        self.cpu_s = sum(answer["cpu"] for answer in answers) / len(answers)
        return float(max(answer["end"] for answer in answers) - at)

    def step(self, impl: str, timeout: float) -> tuple[float, list[float]]:
        """Let all make the gradients of a batch; return the seconds until the last has, and each one's norm."""
        at = time.time() + HEAD_START_S
        answers = self.tell("step", {"impl": impl, "at": at}, timeout)
        self.cpu_s = sum(answer["cpu"] for answer in answers) / len(answers)
        return float(max(answer["end"] for answer in answers) - at), [answer["norm"] for answer in answers]

    def _tell(self, commands: dict[int, dict[str, Any]], timeout: float) -> list[dict[str, Any]]:
        asked = [self._pool.submit(_ask, self._children[rank], command) for rank, command in commands.items()]
        deadline = time.monotonic() + timeout
        try:
            return [future.result(max(0.0, deadline - time.monotonic())) for future in asked]
        except TimeoutError:
            for child in self._children:  # their threads wait for a line that may never come
                child.kill()
            raise RanksError(f"no answer within {timeout:g} s to {next(iter(commands.values()))}") from None


def _ask(child: "subprocess.Popen[str]", command: dict[str, Any]) -> dict[str, Any]:
    if child.stdin is None or child.stdout is None:
        raise RuntimeError("the child's pipes were asked for")
    try:
        child.stdin.write(json.dumps(command) + "\n")
        child.stdin.flush()
        answer: dict[str, Any] = json.loads(child.stdout.readline())
    except (OSError, ValueError):
        raise RanksError(f"a rank ended ({child.poll()}) instead of answering {next(iter(command))!r}") from None
    if "error" in answer:
        raise RanksError(answer["error"])
    return answer

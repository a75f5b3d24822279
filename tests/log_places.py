"""Places for log events in the tests: the process's own handlers put back afterwards, and a file that hangs."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from node.telemetry.logs import flush_logs
from tests.waiting import wait_until


@contextmanager
def own_logs() -> Iterator[None]:
    """Let the block set up logs; afterwards they are as before."""
    handlers, level = logging.root.handlers[:], logging.root.level
    try:
        yield
    finally:
        for handler in logging.root.handlers:
            if handler not in handlers:
                handler.close()
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)
        structlog.reset_defaults()


class HangingLog:
    """`folder`/log.jsonl, a pipe that is full: whoever writes there waits until somebody calls `read`."""

    def __init__(self, folder: Path) -> None:
        os.mkfifo(folder / "log.jsonl")
        self._reader = os.open(folder / "log.jsonl", os.O_RDONLY | os.O_NONBLOCK)
        self._writer = os.open(folder / "log.jsonl", os.O_WRONLY | os.O_NONBLOCK)
        self._bytes = b""
        for size in (4096, 1):
            try:
                while True:
                    os.write(self._writer, b"\n" * size)
            except BlockingIOError:
                pass

    def read(self, count: int) -> list[dict[str, object]]:
        """Wait for `count` events, and return all that came so far."""

        def events() -> list[dict[str, object]] | None:
            self._take()
            lines = [line for line in self._bytes[: self._bytes.rfind(b"\n") + 1].split(b"\n") if line]
            return list(map(json.loads, lines)) if len(lines) >= count else None

        return wait_until(events, 20, f"{count} events")

    def _take(self) -> None:
        try:
            while data := os.read(self._reader, 1 << 16):
                self._bytes += data
        except BlockingIOError:
            pass

    def close(self) -> None:
        """Let whoever writes go on, and wait until it has."""
        self._take()
        flush_logs()
        os.close(self._writer)
        os.close(self._reader)


@contextmanager
def hanging_log(folder: Path) -> Iterator[HangingLog]:
    """Make a `HangingLog`."""
    log = HangingLog(folder)
    try:
        yield log
    finally:
        log.close()

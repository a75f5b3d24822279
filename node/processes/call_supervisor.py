"""Supervisor: looks at what a call in a cage takes, and ends it in time (seccomp's user notification, /proc).

While the worker waits for an answer, it looks at what no limit of a single process holds:

    processes   each fork waits until the worker lets it go on, which it does while there are fewer than `PROCESSES`,
                threads included. As many may be in the making, so there are at most twice as many. Where seccomp tells
                of no forks, which is no whole cage, the call ends once it has more. RLIMIT_NPROC would not do: it
                counts all processes of a uid, so that one text's forks let another's fail
    memory      of all of its processes together: at most the bytes that each may have
    folder      bytes and entries
    machine     what no count finds: files without a name, pages of shared memory that no process has mapped. The call
                ends where less is left, of memory or disk, than `LEFT` of what there was when it began

All but forks are looked at every `LOOK_S`.
"""

import errno
import fcntl
import os
import select
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

from node.processes.machine import available_memory
from node.processes.worker_process import PatientDeadline

PROCESSES = 64  # of a call, and threads, before a further fork fails
FOLDER_BYTES, FOLDER_ENTRIES = 64 << 20, 1_000  # of its folder; some disks take 3 ms to remove an entry
LEFT = 0.25  # a share: a trainer beside it takes its memory in small steps
LOOK_S = 0.1  # between two looks
COUNT_S = 0.01  # between two counts while it has too many processes
BLOCK_BYTES = 512  # of st_blocks, whatever the file system

RECEIVE, ANSWER = 0xC0502100, 0xC0182101  # ioctls of a listener; of its messages the first 8 bytes are an id
NOTICE_BYTES = 80
GO_ON = 1
NO_ANSWER = "it ended without an answer"


class CageError(Exception):
    """A call gave no answer; the text says why."""


class CageTimeoutError(CageError):
    """A call took too long."""


class _Process(NamedTuple):
    """A process of a call: how many threads it has, and how many bytes of memory that no file gives back."""

    threads: int
    memory: int


class CallSupervisor:
    """What one call takes.

    Args:
        group: its process group, which its processes cannot leave.
        folder: it writes there alone.
        memory: bytes that its processes may have together.
        seconds: that it may take from now on.
        patience: seconds more, as far as its processes wait for a processor.

    Attributes:
        listener: where its forks wait; without one they go on.
        is_blind: whether /proc has hidden its processes.
    """

    def __init__(self, group: int, folder: Path, memory: float, seconds: float, patience: float = 0.0) -> None:
        self.listener: int | None = None
        self.is_blind = False
        self._group = group
        self._folder = folder
        self._memory = memory
        self._deadline = PatientDeadline(seconds, patience, lambda: _pids_of(group))
        self._least = LEFT * available_memory(), LEFT * free_disk(folder)
        self._room = 0  # forks that may go on before the next count
        self._next_look = time.monotonic() + LOOK_S
        self._next_count = 0.0

    def wait(self, channel: int) -> None:
        """Wait until `channel` can be read, and look at the call meanwhile.

        Raises:
            CageTimeoutError: it takes too long.
            CageError: it takes too much, or gets no processor, or its first process has ended, though what that has
                started may hold the channel.
        """
        poll = select.poll()
        poll.register(channel, select.POLLIN)
        if self.listener is not None:
            poll.register(self.listener, select.POLLIN)
        while True:
            now, end = time.monotonic(), self._deadline()
            if now >= end:
                reason = "it took too long"
                raise CageError(reason) if self._deadline.is_starved else CageTimeoutError(reason)
            is_over = False
            if now >= self._next_look:
                is_over = self._look()
                self._next_look = time.monotonic() + LOOK_S
            ready = dict(poll.poll(0 if is_over else 1e3 * max(0.0, min(end, self._next_look) - now)))
            if channel in ready:
                return
            if is_over:
                raise CageError(NO_ANSWER)
            for number, events in ready.items():
                if not events & select.POLLIN:  # nobody is left who could fork
                    poll.unregister(number)
                    self.listener = None
                else:
                    self._fork()

    def _fork(self) -> None:
        """Let a fork that waits go on, or fail."""
        assert self.listener is not None
        notice = bytearray(NOTICE_BYTES)
        now = time.monotonic()
        try:
            fcntl.ioctl(self.listener, RECEIVE, notice)
        except OSError:  # it was killed meanwhile
            return
        if self._room == 0 and now >= self._next_count:
            self._room = max(0, PROCESSES - sum(process.threads for process in self._processes()))
            self._next_count = now + COUNT_S
        if self._room > 0:
            self._room -= 1
            answer = struct.pack("=8sqiI", notice[:8], 0, 0, GO_ON)
        else:
            answer = struct.pack("=8sqiI", notice[:8], 0, -errno.EAGAIN, 0)
        with suppress(OSError):  # it was killed meanwhile
            fcntl.ioctl(self.listener, ANSWER, answer)

    def _look(self) -> bool:
        """Tell whether the first process has ended; raise `CageError`."""
        processes = self._processes()
        if sum(process.threads for process in processes) > 2 * PROCESSES:
            raise CageError("it started too many processes")
        if sum(process.memory for process in processes) > self._memory:
            raise CageError("its processes took too much memory")
        for what, left, least in zip(
            ("memory", "disk"), (available_memory(), free_disk(self._folder)), self._least, strict=True
        ):
            if left < least:
                raise CageError(f"this machine was about to run out of {what}")
        look_into(self._folder)
        with suppress(ChildProcessError):
            return os.waitid(os.P_PID, self._group, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        return False

    def _processes(self) -> list[_Process]:
        processes = [*_of_group(self._group)]
        self.is_blind = self.is_blind or not processes
        return processes


def _pids_of(group: int) -> Iterator[int]:
    """Yield the ids of a group's processes."""
    for process in psutil.pids():
        with suppress(OSError):  # it is gone
            if os.getpgid(process) == group:
                yield process


def _of_group(group: int) -> Iterator[_Process]:
    """Yield the processes of a group; those that have ended have no memory."""
    for process in _pids_of(group):
        with suppress(OSError):  # it is gone
            rows = (line.split() for line in Path(f"/proc/{process}/status").read_text().splitlines())
            fields = {row[0]: row[1] for row in rows if len(row) > 1}
            kib = sum(int(fields.get(kind, 0)) for kind in ("RssAnon:", "RssShmem:", "VmSwap:"))
            yield _Process(int(fields["Threads:"]), kib << 10)


def free_disk(folder: Path) -> int:
    """Return how many bytes others than root may still write where a folder is."""
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def look_into(folder: Path) -> None:
    """Raise `CageError` if a folder holds too much, or cannot be looked into."""
    size = count = 0
    folders = [folder]
    while folders:
        try:
            for entry in folders.pop().iterdir():
                count += 1
                with suppress(FileNotFoundError):  # it is at work
                    status = entry.lstat()
                    size += status.st_blocks * BLOCK_BYTES
                    if stat.S_ISDIR(status.st_mode):
                        folders.append(entry)
                if size > FOLDER_BYTES or count > FOLDER_ENTRIES:
                    raise CageError("it filled its folder")
        except FileNotFoundError:
            continue
        except OSError:
            raise CageError("its folder cannot be looked into") from None

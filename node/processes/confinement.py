"""Confinement: a process without network that changes no file (Landlock, seccomp).

For a worker that runs somebody's code on strangers' texts. Once it is confined, the process, its later threads and all
that it starts

    open no socket             seccomp denies socket(2), and socketpair(2) but for streams: neither the network nor a
                               service of this machine is reached
    change no file             Landlock denies writing, making, removing and renaming; only /dev/null may be written.
                               seccomp denies what Landlock does not know of: modes, owners, times, attributes
    disturb no other process   Landlock denies tracing, and since Linux 6.12 signals; seccomp denies changing another's
                               limits and priority, taking its descriptors, and System V's shared memory, queues and
                               semaphores, new ones and those that are there
    have no privileges         root keeps one capability: to read any file

seccomp denies calls by a list, so it lets none through that is newer than the list.

Reading stays as it was. What is open already stays open: the channel to the node, and the worker's log. Nothing takes
the confinement back. It needs Linux 6.2 (Landlock of ABI 3, which denies truncation) on x86-64 or arm64, and no rights.

A network namespace was the alternative for sockets. It needs user namespaces, which containers and some distributions
forbid, and leaves the machine's Unix sockets in reach.
"""

import ctypes
import errno
import os
import platform
import socket
import stat
import struct
import sys
import tempfile
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 22, 38
SECCOMP_MODE_FILTER = 2  # of prctl(2)
SET_MODE_FILTER, NEW_LISTENER = 1, 1 << 3  # of seccomp(2)
# seccomp's answers: go on, fail with an error number, or wait for a listener's answer.
ALLOW, ERROR, ASK = 0x7FFF0000, 0x00050000, 0x7FC00000
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # Landlock's system calls, on every architecture
LEAST_ABI = 3
CAP_DAC_READ_SEARCH = 2

WRITE_FILE, TRUNCATE = 1 << 1, 1 << 14
# The rights that change something: WRITE_FILE, REMOVE_DIR to REFER, TRUNCATE; since ABI 5 ioctls of devices, too.
CHANGES: Final = WRITE_FILE | sum(1 << bit for bit in range(4, 14)) | TRUNCATE
IOCTL_DEV = 1 << 15
EXECUTE, READ_FILE, READ_DIR = 1 << 0, 1 << 2, 1 << 3
READS: Final = EXECUTE | READ_FILE | READ_DIR
OF_A_FILE: Final = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV  # the rights that a file can have
SCOPES = 0b11  # since ABI 6: abstract Unix sockets and signals end at this process


ABSENT = -1  # the number of a call that an architecture does not have
Calls = Mapping[str, tuple[int, int]]
"""System calls by name, with their numbers on x86-64 and on arm64."""


def calls(table: str) -> dict[str, tuple[int, int]]:
    """Read "name x86-64 arm64, ..."; one number stands for both, a stroke for none."""
    rows = [entry.split() for entry in table.split(",")]
    numbers = {name: [ABSENT if number == "-" else int(number) for number in (*given, *given)] for name, *given in rows}
    return {name: (pair[0], pair[1]) for name, pair in numbers.items()}


# What Landlock does not know of: modes, owners, times, attributes.
CHANGED: Final = calls(
    "chmod 90 -, fchmod 91 52, fchmodat 268 53, fchmodat2 452, chown 92 -, lchown 94 -, fchown 93 55, fchownat 260 54, "
    "utime 132 -, utimes 235 -, futimesat 261 -, utimensat 280 88, setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7, "
    "removexattr 197 14, lremovexattr 198 15, fremovexattr 199 16"
)
# io_uring opens sockets, too. io_setup takes from what the whole machine has (fs.aio-max-nr).
DISTURBING: Final = calls(
    "socket 41 198, io_uring_setup 425, io_setup 206 0, pidfd_getfd 438, setpriority 141 140, ioprio_set 251 30, "
    "shmget 29 194, shmat 30 196, shmctl 31 195, semget 64 190, semop 65 193, semtimedop 220 192, semctl 66 191, "
    "msgget 68 186, msgsnd 69 189, msgrcv 70 188, msgctl 71 187"
)
# Denied unless their first argument is 0, which stands for the caller itself.
OF_A_PROCESS: Final = calls(
    "sched_setparam 142 118, sched_setscheduler 144 119, sched_setattr 314 274, sched_setaffinity 203 122, "
    "prlimit64 302 261, migrate_pages 256 238, move_pages 279 239"
)
SOCKETPAIR: Final = (53, 199)  # only streams of this machine: a datagram socket of a pair reaches others by their names
SECCOMP = (317, 277)
CLONE, CLONE3 = (56, 220), (435, 435)
FORKS: Final = calls("fork 57 -, vfork 58 -")
FCNTL: Final = (72, 25)
SET_LEASE, NOTIFY = 1024, 1026  # of fcntl(2): a lease makes everybody's open(2) of a file wait
NEW_NAMESPACES = 0x7E020000  # the flags of clone(2) that make one
# From here on, calls do not exist: they are newer than the lists above (setxattrat of Linux 6.13 and later ones), or of
# the ABI x32.
NEWER = 463


class _Architecture(NamedTuple):
    """An architecture's number for seccomp, and its place in the pairs of numbers above."""

    audit: int
    place: int


MACHINES: Final = {"x86_64": _Architecture(0xC000003E, 0), "aarch64": _Architecture(0xC00000B7, 1)}


class ConfinementError(Exception):
    """This machine cannot confine a process; the text says what is missing."""


def unconfinable() -> str:
    """Return why no process can be confined here, as far as can be told without doing it; empty where one can."""
    if sys.platform != "linux" or platform.machine() not in MACHINES:
        return "a process can be confined on Linux on x86-64 and arm64 only"
    if landlock_abi() < LEAST_ABI:
        return "the kernel has no Landlock, or one of before Linux 6.2"
    return ""


def confine() -> None:
    """Confine this process for good. It must have one thread.

    Raises:
        ConfinementError: this machine cannot; the process may be confined in part.
    """
    if reason := unconfinable():
        raise ConfinementError(reason)
    tempfile.gettempdir()  # it looks for the folder by writing to it, once: torch asks for it when it is imported
    libc = ctypes.CDLL(None, use_errno=True)
    renounce_privileges(libc)
    handled = CHANGES | (IOCTL_DEV if landlock_abi() >= 5 else 0)
    restrict_files(libc, ruleset(libc, handled, [(os.devnull, WRITE_FILE | TRUNCATE)]))
    if os.geteuid() == 0:  # others have no capabilities
        set_capabilities(libc, 1 << CAP_DAC_READ_SEARCH)
    deny_calls(libc, CHANGED | DISTURBING)


def landlock_abi() -> int:
    """Return the version of Landlock; less than 1 where the kernel has none."""
    return ctypes.CDLL(None).syscall(CREATE_RULESET, None, ctypes.c_size_t(0), 1)


def renounce_privileges(libc: ctypes.CDLL) -> None:
    """Let no program that is started from here gain privileges; Landlock and seccomp ask for it."""
    _check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")


def ruleset(libc: ctypes.CDLL, handled: int, allowed: Iterable[tuple[str, int]]) -> int:
    """Return the descriptor of Landlock's rules: of the rights `handled`, only those `allowed` beneath their paths.

    A path that is not there is left out. Signals and abstract sockets end at the process, as far as Landlock can do it.
    """
    attributes = struct.pack("=QQQ", handled, 0, SCOPES)[: 24 if landlock_abi() >= 6 else 8]  # files, TCP ports, scopes
    rules: int = libc.syscall(CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    _check(rules, "Landlock")
    for path, rights in allowed:
        try:
            beneath = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        rights &= handled if stat.S_ISDIR(os.fstat(beneath).st_mode) else handled & OF_A_FILE
        try:
            _check(libc.syscall(ADD_RULE, rules, 1, struct.pack("=Qi", rights, beneath), 0), "Landlock")
        finally:
            os.close(beneath)
    return rules


def restrict_files(libc: ctypes.CDLL, rules: int) -> None:
    """Hold this process to rules, whose descriptor is closed."""
    try:
        _check(libc.syscall(RESTRICT_SELF, rules, 0), "Landlock")
    finally:
        os.close(rules)


def set_capabilities(libc: ctypes.CDLL, kept: int, *, inherited: bool = False) -> None:
    """Keep of this process's capabilities those whose bits are set, all below 32; let programs have them if asked."""
    header = struct.pack("=Ii", 0x20080522, 0)  # the third version: two sets of 32 bits, of this process
    data = (ctypes.c_uint32 * 6)()
    _check(libc.capget(header, data), "capget")
    had = data[1]  # effective, permitted, inheritable; low bits, then high ones
    for at in range(6):
        data[at] = had & kept if at < (3 if inherited else 2) else 0
    _check(libc.capset(header, data), "capset")


def deny_calls(libc: ctypes.CDLL, denied: Calls) -> None:
    """Let system calls fail with EACCES: those denied, those on other processes, and those of another architecture."""
    _check(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(_filter(denied, {})), 0, 0), "seccomp")


def deny_calls_and_tell(libc: ctypes.CDLL, denied: Calls) -> int:
    """Deny calls, as `deny_calls` does, and new namespaces; return where forks wait, a listener of seccomp.

    clone3(2), whose flags cannot be seen, does not exist then, and the C library takes clone(2).
    """
    _, place = MACHINES[platform.machine()]
    program = ctypes.byref(_filter(denied, FORKS))
    listener: int = libc.syscall(SECCOMP[place], SET_MODE_FILTER, NEW_LISTENER, program)
    _check(listener, "seccomp")
    return listener


class _FilterProgram(ctypes.Structure):
    """A program of seccomp (sock_fprog)."""

    _fields_ = (("count", ctypes.c_ushort), ("lines", ctypes.c_char_p))


def _filter(denied: Calls, to_listener: Calls) -> _FilterProgram:
    """Return seccomp's program; calls `to_listener` wait for its answer."""
    audit, place = MACHINES[platform.machine()]
    load, equal, at_least, any_bit, bits, answer = (
        0x20,
        0x15,
        0x35,
        0x45,
        0x54,
        0x06,
    )  # BPF: ld [k], jeq k, jge, jset, and, ret
    number, first, second = 0, 16, 24  # where seccomp_data has the call's number, and low halves of its arguments
    answers = ALLOW, ERROR | errno.EACCES, ERROR | errno.ENOSYS, ASK
    allow, deny, absent, ask = ((answer, 0, 0, value) for value in answers)
    lines = [(load, 0, 0, 4), (equal, 1, 0, audit), deny, (load, 0, 0, number), (at_least, 0, 1, NEWER), absent]

    def on(call: tuple[int, int], *then: tuple[int, int, int, int]) -> None:
        if call[place] != ABSENT:
            lines.extend([(equal, 0, len(then), call[place]), *then])

    for call in denied.values():
        on(call, deny)
    for call in OF_A_PROCESS.values():
        on(call, (load, 0, 0, first), (equal, 0, 1, 0), allow, deny)
    is_local = ((load, 0, 0, first), (equal, 0, 4, socket.AF_UNIX))
    on(SOCKETPAIR, *is_local, (load, 0, 0, second), (bits, 0, 0, 0xF), (equal, 0, 1, socket.SOCK_STREAM), allow, deny)
    if to_listener:
        on(FCNTL, (load, 0, 0, second), (equal, 2, 0, SET_LEASE), (equal, 1, 0, NOTIFY), allow, deny)
        on(CLONE3, absent)
        on(CLONE, (load, 0, 0, first), (any_bit, 0, 1, NEW_NAMESPACES), deny, ask)
    for call in to_listener.values():
        on(call, ask)
    lines.append(allow)
    return _FilterProgram(len(lines), b"".join(struct.pack("=HBBI", *line) for line in lines))


def _check(result: int, what: str) -> None:
    if result < 0:
        reason = os.strerror(ctypes.get_errno())
        raise ConfinementError(f"{what} is denied here: {reason}")

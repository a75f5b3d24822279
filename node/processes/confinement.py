"""Confinement: a process without network that changes no file (Landlock, seccomp).

For a worker that runs somebody's code on strangers' texts. Once it is confined, the process, its later threads and all
that it starts

    open no socket             seccomp denies socket(2): neither the network nor a service of this machine is reached
    change no file             Landlock denies writing, making, removing and renaming; only /dev/null may be written.
                               seccomp denies what Landlock does not know of: modes, owners, times, attributes
    disturb no other process   Landlock denies tracing, and since Linux 6.12 signals; seccomp denies changing another's
                               limits and priority, and System V's shared memory, queues and semaphores
    have no privileges         root keeps one capability: to read any file

Reading stays as it was. What is open already stays open: the channel to the node, and the worker's log. Nothing takes
the confinement back. It needs Linux 6.2 (Landlock of ABI 3, which denies truncation) on x86-64 or arm64, and no rights.

A network namespace was the alternative for sockets. It needs user namespaces, which containers and some distributions
forbid, and leaves the machine's Unix sockets in reach.
"""

import ctypes
import errno
import os
import platform
import struct
import sys
import tempfile
from typing import Final, NamedTuple

PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 22, 38
SECCOMP_MODE_FILTER = 2
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # Landlock's system calls, on every architecture
LEAST_ABI = 3
CAP_DAC_READ_SEARCH = 2

WRITE_FILE, TRUNCATE = 1 << 1, 1 << 14
# The rights that change something: WRITE_FILE, REMOVE_DIR to REFER, TRUNCATE; since ABI 5 ioctls of devices, too.
CHANGES: Final = WRITE_FILE | sum(1 << bit for bit in range(4, 14)) | TRUNCATE
IOCTL_DEV = 1 << 15
SCOPES = 0b11  # since ABI 6: abstract Unix sockets and signals end at this process


class _Architecture(NamedTuple):
    """An architecture's number for seccomp, and the numbers of system calls there.

    `denied` always fail, `of_a_process` unless their first argument is 0, which stands for the caller itself.
    """

    audit: int
    denied: tuple[int, ...]
    of_a_process: tuple[int, ...]


_EVERYWHERE = (425, 452, 463, 466)  # io_uring_setup (it opens sockets, too), fchmodat2, setxattrat, removexattrat
MACHINES: Final = {
    # socket; chmod, fchmod, chown, fchown, lchown; fchownat, fchmodat; utime, utimes, futimesat, utimensat;
    # setxattr and removexattr, three of each; shmget, semget, msgget; setpriority, ioprio_set.
    # sched_setparam, sched_setscheduler, sched_setaffinity, sched_setattr; prlimit64; migrate_pages, move_pages
    "x86_64": _Architecture(
        0xC000003E,
        (
            *(41, 90, 91, 92, 93, 94, 260, 268, 132, 235, 261, 280, 188, 189, 190, 197, 198, 199),
            *(29, 64, 68, 141, 251, *_EVERYWHERE),
        ),
        (142, 144, 203, 314, 302, 256, 279),
    ),
    # socket; fchmod, fchmodat, fchownat, fchown; utimensat; setxattr and removexattr, three of each; then as above
    "aarch64": _Architecture(
        0xC00000B7,
        (198, 52, 53, 54, 55, 88, 5, 6, 7, 14, 15, 16, 194, 190, 186, 140, 30, *_EVERYWHERE),
        (118, 119, 122, 274, 261, 238, 239),
    ),
}
OTHER_CALLS = 0x40000000  # from here on, numbers are of the ABI x32


class ConfinementError(Exception):
    """This machine cannot confine a process; the text says what is missing."""


def unconfinable() -> str:
    """Return why no process can be confined here, as far as can be told without doing it; empty where one can."""
    if sys.platform != "linux" or platform.machine() not in MACHINES:
        return "a process can be confined on Linux on x86-64 and arm64 only"
    if ctypes.CDLL(None).syscall(CREATE_RULESET, None, ctypes.c_size_t(0), 1) < LEAST_ABI:
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
    abi = libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    _check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    _deny_changes(libc, abi)
    _drop_capabilities(libc)
    _deny_calls(libc, MACHINES[platform.machine()])


def _deny_changes(libc: ctypes.CDLL, abi: int) -> None:
    handled = CHANGES | (IOCTL_DEV if abi >= 5 else 0)
    attributes = struct.pack("=QQQ", handled, 0, SCOPES)[: 24 if abi >= 6 else 8]  # files, TCP ports, scopes
    rules = libc.syscall(CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    _check(rules, "Landlock")
    null = os.open(os.devnull, os.O_PATH | os.O_CLOEXEC)
    try:
        beneath = struct.pack("=Qi", WRITE_FILE | TRUNCATE, null)
        _check(libc.syscall(ADD_RULE, rules, 1, beneath, 0), "Landlock")
        _check(libc.syscall(RESTRICT_SELF, rules, 0), "Landlock")
    finally:
        os.close(null)
        os.close(rules)


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    """Leave root the right to read, which it had; others have no capabilities, so nothing is taken from them."""
    if os.geteuid() != 0:
        return
    header = struct.pack("=Ii", 0x20080522, 0)  # the third version: two sets of 32 bits, of this process
    data = (ctypes.c_uint32 * 6)()
    _check(libc.capget(header, data), "capget")
    for at in range(6):  # effective, permitted, inheritable; low bits, then high ones
        data[at] &= (1 << CAP_DAC_READ_SEARCH) if at < 2 else 0
    _check(libc.capset(header, data), "capset")


def _deny_calls(libc: ctypes.CDLL, machine: _Architecture) -> None:
    """Let the denied system calls fail with EACCES, and those of another architecture's ABI."""
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06  # BPF: ld [k], jeq k, jge k, ret k
    allow, deny = 0x7FFF0000, 0x00050000 | errno.EACCES
    tests = [(at_least, OTHER_CALLS), *((equal, number) for number in machine.denied)]
    named = machine.of_a_process
    # What is denied jumps to the last line, what names a process to the fourth last, which looks at the process's id.
    lines = [(load, 0, 0, 4), (equal, 0, len(tests) + len(named) + 4, machine.audit), (load, 0, 0, 0)]
    lines += [(code, len(tests) + len(named) + 3 - at, 0, value) for at, (code, value) in enumerate(tests)]
    lines += [(equal, len(named) - at, 0, number) for at, number in enumerate(named)]
    lines += [(answer, 0, 0, allow), (load, 0, 0, 16), (equal, 0, 1, 0), (answer, 0, 0, allow), (answer, 0, 0, deny)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in lines))
    described = struct.pack("@HP", len(lines), ctypes.addressof(program))
    _check(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, described, 0, 0), "seccomp")


def _check(result: int, what: str) -> None:
    if result < 0:
        reason = os.strerror(ctypes.get_errno())
        raise ConfinementError(f"{what} is denied here: {reason}")

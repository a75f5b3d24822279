"""Memory of one machine: each member writes an arena of its own (a memfd), and the others read it in place.

    arena     one member's; sealed, so that others can map it to read it, and neither write it nor make it shorter
    bay       a part of an arena that one operation, or one process group, has: counters, and data behind them
    lease     what one operation has at one member: a bay of its own arena, and all others' arenas
    offer     what a member says with its call: its arena, whose arenas it holds, its bay

An operation uses shared memory if all members say, in their offers, that they hold the same arenas. So whatever goes
wrong with a descriptor only means that the members use their sockets. `collectives.operations` decides which operations
try it, and `mesh.addresses` who is a member of the same machine and user. Nothing is left behind after kill -9: a memfd
ends with the last process that holds it.

**Counters** only grow while an operation has the bay. `given` and `reduced` count chunks that others may read.
`finished` counts the operations that this member has had in the bay. `shown` and `called` are those of a `Room`
(`collectives.reduce.shared`). A member writes data first and then its counter.
x86-64 keeps the order of stores and the order of loads; on other processors members use their sockets. A member waits
for a counter in the kernel (futex), and does not hold Python's lock meanwhile.

**A bay is used again when every member has finished** the operation that had it: it has its result, or will never
have one. When a member leaves the view, stopped or dead, the others give up their arenas and make new ones. So a
member that wakes up later still reads the old values.
"""

import ctypes
import errno
import fcntl
import hashlib
import math
import mmap
import os
import platform
import secrets
import struct
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from protocol.identity import NodeId

BAYS = 8  # operations in flight, and process groups; others use sockets
BAY_BYTES = 256 << 20  # addresses only: memory is taken where it is written. Larger results use sockets
ARENA_BYTES = BAYS * BAY_BYTES
SMALL_BYTES = 1 << 20  # of each of the two places in a bay for small values
_COUNTERS_BYTES = 4096  # a cache line each
HEAD_BYTES = _COUNTERS_BYTES + 2 * SMALL_BYTES  # of a bay: what lies before its data
COUNTS = 1 << 32  # values of a counter
_LINE = 64
SERIAL_BYTES = 8
_OFFER = struct.Struct(f">{SERIAL_BYTES}s{SERIAL_BYTES}sBI")
OFFER_BYTES = _OFFER.size
_NO_BAY = 255
_FUTURE_WRITE = 0x10  # F_SEAL_FUTURE_WRITE, of Linux 5.1: Python's fcntl has no name for it
SEALS = getattr(fcntl, "F_SEAL_SHRINK", 0) | getattr(fcntl, "F_SEAL_GROW", 0) | _FUTURE_WRITE
_FUTEX, _WAIT, _WAKE = 202, 0, 1  # of x86-64
_ALL = 0x7FFFFFFF
_libc = ctypes.CDLL(None, use_errno=True)


class MemoryRefusedError(OSError):
    """A descriptor that is no arena: it could change under its reader."""


def is_possible() -> bool:
    """Tell whether members of this machine can share memory: Linux on x86-64."""
    return sys.platform == "linux" and platform.machine() == "x86_64" and hasattr(os, "memfd_create")


class _Time(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class Counter:
    """A number of 32 bits that one member writes and others wait for; after the largest comes 0."""

    def __init__(self, memory: "np.ndarray[Any, Any]", line: int) -> None:
        self._value = memory[line * _LINE :][:4].view(np.uint32)
        self._address = ctypes.c_void_p(self._value.ctypes.data)

    def read(self) -> int:
        """Return it."""
        return int(self._value[0])

    def put(self, value: int) -> None:
        """Set it, and wake nobody."""
        self._value[0] = value % COUNTS

    def write(self, value: int) -> None:
        """Set it, and wake all who wait for it."""
        self.put(value)
        _libc.syscall(_FUTEX, self._address, _WAKE, _ALL, None, None, 0)

    def wait(self, seen: int, seconds: float) -> None:
        """Return once it may be another than `seen`, at the latest after `seconds`."""
        limit = _Time(int(seconds), int(math.fmod(seconds, 1.0) * 1e9))
        _libc.syscall(_FUTEX, self._address, _WAIT, ctypes.c_uint32(seen), ctypes.byref(limit), None, 0)


class Bay:
    """A part of an arena. `data` is what its member writes and others read, as bytes.

    `shown` counts the small values that were shown in turn in `halves`. `called` is the number of the group's last
    operation. A hash of what was asked for lies beside both, for the last two.
    """

    def __init__(self, memory: "np.ndarray[Any, Any]") -> None:
        self.given, self.reduced, self.finished = (Counter(memory, line) for line in range(3))
        self.calls = memory[3 * _LINE :][:8].view(np.uint32)  # what the last two operations were asked for: see `Room`
        self.shown, self.called = (Counter(memory, line) for line in (4, 6))
        self.shown_asked, self.called_asked = (memory[line * _LINE :][:8].view(np.uint32) for line in (5, 7))
        self.halves = memory[_COUNTERS_BYTES:HEAD_BYTES].reshape(2, SMALL_BYTES)
        self.data = memory[HEAD_BYTES:]
        self.moved = 0.0  # when its member was last seen to write, on the monotonic clock


class Arena:
    """A member's memory, as this process sees it: its own, or another's that `Arena.of` maps to read."""

    def __init__(self, descriptor: int, serial: bytes, *, writes: bool) -> None:
        self.serial = serial
        self.descriptor = descriptor
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writes else 0)
        mapped = mmap.mmap(descriptor, ARENA_BYTES, mmap.MAP_SHARED, protection)
        # torch warns of memory that says it cannot be written; nobody writes another's.
        where = np.frombuffer(mapped, np.uint8).ctypes.data
        block: Any = (ctypes.c_ubyte * ARENA_BYTES).from_address(where)
        block.mapped = mapped  # it is unmapped when the last array of it is gone
        memory = np.frombuffer(block, np.uint8)
        self.bays = [Bay(memory[at : at + BAY_BYTES]) for at in range(0, ARENA_BYTES, BAY_BYTES)]

    @classmethod
    def make(cls) -> "Arena":
        """Make this member's own. Raises `OSError`."""
        descriptor = os.memfd_create("gossamer-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, ARENA_BYTES)
            arena = cls(descriptor, secrets.token_bytes(SERIAL_BYTES), writes=True)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS | fcntl.F_SEAL_SEAL)
        except BaseException:
            os.close(descriptor)
            raise
        weakref.finalize(arena, os.close, descriptor)
        return arena

    @classmethod
    def of(cls, descriptor: int, serial: bytes) -> "Arena":
        """Map another member's; the descriptor stays the caller's. Raises `OSError`."""
        if len(serial) != SERIAL_BYTES or fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & SEALS != SEALS:
            raise MemoryRefusedError(errno.EPERM, "the descriptor is not sealed")
        if os.fstat(descriptor).st_size != ARENA_BYTES:
            raise MemoryRefusedError(errno.EINVAL, f"the descriptor has another size than {ARENA_BYTES} bytes")
        return cls(descriptor, serial, writes=False)


@dataclass(frozen=True, slots=True)
class MemoryOffer:
    """A member's part of a call. `held` stands for all members' arenas; without `bay` it can use none."""

    serial: bytes = bytes(SERIAL_BYTES)
    held: bytes = bytes(SERIAL_BYTES)
    bay: int = _NO_BAY
    use: int = 0

    def encode(self) -> bytes:
        """Return the wire form, of `OFFER_BYTES`."""
        return _OFFER.pack(self.serial, self.held, self.bay, self.use)

    @classmethod
    def decode(cls, data: bytes) -> "MemoryOffer":
        """Read another member's. Raises `struct.error`."""
        return cls(*_OFFER.unpack(data))


@dataclass(slots=True, eq=False)
class Lease:
    """One operation's part at one member. `bay` is None where it can have none; end it when the operation is over."""

    offer: MemoryOffer
    bay: Bay | None = None
    readers: Sequence[tuple[Bay, int]] = ()  # of those who carry it out too: their bays, and which use that is
    _arenas: Mapping[NodeId, Arena] | None = None

    def bays(self, offers: Mapping[NodeId, MemoryOffer]) -> dict[NodeId, Bay] | None:
        """Return all members' bays by what all have said; None, at all of them, if they cannot share memory."""
        held = _held({member: offer.serial for member, offer in offers.items()})
        if any(offer.held != held or offer.bay >= BAYS for offer in offers.values()):
            return None
        assert self._arenas is not None
        bays = {member: self._arenas[member].bays[offer.bay] for member, offer in offers.items()}
        self.readers = [(bays[member], offer.use) for member, offer in offers.items()]
        return bays

    def end(self) -> None:
        """The operation is over here: this member reads no more of it."""
        if self.bay is not None:
            self.bay.finished.write(self.offer.use)


class SharedMemory:
    """A member's own arena and those that others handed to it. Thread-safe."""

    def __init__(self, own: NodeId) -> None:
        self._own = own
        self._lock = threading.Lock()
        self._arena: Arena | None = None
        self._leases: list[Lease | None] = [None] * BAYS
        self._held: dict[NodeId, Arena] = {}

    def own_arena(self) -> Arena | None:
        """Return this member's arena, a new one if there is none; None where none can be made."""
        with self._lock:
            if self._arena is None:
                try:
                    self._arena = Arena.make()
                except OSError:
                    return None
                self._leases = [None] * BAYS
            return self._arena

    def give_up(self) -> None:
        """Somebody who may have read the own arena is gone: operations under way keep it, and others have a new one."""
        with self._lock:
            self._arena = None
            self._leases = [None] * BAYS

    def hold(self, member: NodeId, arena: Arena) -> None:
        """Keep another member's arena, in place of one that it handed over before."""
        with self._lock:
            self._held[member] = arena

    def let_go(self, member: NodeId) -> None:
        """Forget another member's arena."""
        with self._lock:
            self._held.pop(member, None)

    def holds(self, member: NodeId, serial: bytes) -> bool:
        """Tell whether this very arena is held."""
        with self._lock:
            return member in self._held and self._held[member].serial == serial

    def moved(self, member: NodeId) -> float:
        """Return when a member was last seen to write; 0: never."""
        with self._lock:
            arena = self._held.get(member)
            return max(bay.moved for bay in arena.bays) if arena is not None else 0.0

    def lease(self, members: Iterable[NodeId]) -> Lease:
        """Return what an operation of these can have: nothing, while an arena is missing or all bays are in use."""
        with self._lock:
            others = {member: self._held.get(member) for member in members if member != self._own}
            arenas = {member: arena for member, arena in others.items() if arena is not None}
            if self._arena is None or len(arenas) < len(others):
                return Lease(MemoryOffer())
            arenas[self._own] = self._arena
            for index, before in enumerate(self._leases):
                if before is None or _is_over(before):
                    bay = self._arena.bays[index]
                    for counter in (bay.given, bay.reduced, bay.shown, bay.called):
                        counter.write(0)
                    held = _held({member: arena.serial for member, arena in arenas.items()})
                    offer = MemoryOffer(
                        self._arena.serial, held, index, before.offer.use + 1 if before is not None else 1
                    )
                    lease = self._leases[index] = Lease(offer, bay, (), arenas)
                    return lease
            return Lease(MemoryOffer())


def saw(bay: Bay) -> None:
    """Note that its member has just written."""
    bay.moved = time.monotonic()


def _is_over(lease: Lease) -> bool:
    assert lease.bay is not None
    readers = [*lease.readers, (lease.bay, lease.offer.use)]
    return all(bay.finished.read() >= use for bay, use in readers)


def _held(serials: Mapping[NodeId, bytes]) -> bytes:
    """Return what stands for these members' arenas."""
    text = b"".join(member.encode() + serials[member] for member in sorted(serials))
    return hashlib.blake2b(text, digest_size=SERIAL_BYTES, person=b"gossamer-memory").digest()

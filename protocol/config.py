"""The parts of a node's set-up: its clock, who may be in its swarm, and what all cores are given."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from protocol.credentials.records import Endpoint, PeerRecord, RecordReader
from protocol.identity import Identity, NodeId
from protocol.limits.limits import Limits
from protocol.limits.timing import LAN, Timing


class Instant(NamedTuple):
    """A moment on both clocks, in seconds.

    `steady` never steps back and drives every timer. `unix` can be set by a person or by
    NTP and is only compared with the time stamps that peers sign.
    """

    steady: float
    unix: float


# CLOCK_BOOTTIME also counts while the machine sleeps, so a laptop that wakes up knows how long it was away.
_STEADY = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def read_clock() -> Instant:
    """Return the present moment."""
    return Instant(time.clock_gettime(_STEADY), time.time())


# A node that runs reads its clock at least every half second. If more than this has passed, it did not run.
MAX_STEP_S = 1.0


class AwakeClock:
    """A clock whose steady side stands still while this process is stopped, blocked, or asleep with its machine.

    So no timer runs out in such a time: answers that wait in our sockets are read before peers are judged. `unix` goes
    on, as time stamps and expiries do.
    """

    def __init__(self, read: Callable[[], Instant]) -> None:
        """Wrap the clock `read`, which never steps back."""
        self._read = read
        self._last = read().steady
        self.asleep = 0.0  # seconds, in all

    def __call__(self) -> Instant:
        """Return the present moment. For one thread, which calls it as it runs."""
        now = self._read()
        self.asleep += max(0.0, now.steady - self._last - MAX_STEP_S)
        self._last = now.steady
        return Instant(now.steady - self.asleep, now.unix) if self.asleep else now


class Gate:
    """Decides who may be in the swarm: here everybody, as in a swarm without a manifest.

    Swarms with one use `protocol.credentials.grants.Gatekeeper`.
    """

    is_owned = False  # whether somebody may sign a revocation list
    revision = 0  # of the revocation list that is obeyed, 0 for none
    revocations = b""  # the list itself, empty for none

    def admits(self, record: PeerRecord, now: Instant) -> str:
        """Return "", or the reason for which the node of a verified record is kept out."""
        return ""

    def obey(self, encoded: bytes) -> bool:
        """Take in a revocation list; False if it is not newer.

        Raises:
            RevocationError: it is not one, or not this swarm's.
        """
        return False

    def is_revoked(self, node: NodeId) -> bool:
        """Tell whether nothing that this node signs counts."""
        return False


@dataclass(frozen=True, slots=True)
class Setup:
    """A node of `swarm` (16 bytes).

    `endpoints` are what others dial, none for a node that nobody can. `gate` says
    whose record is kept out. `manifest` is the swarm's manifest as
    bytes, empty if each peer is to be asked for it, None for a swarm without one.
    """

    identity: Identity
    swarm: bytes
    endpoints: tuple[Endpoint, ...] = ()
    limits: Limits = field(default_factory=Limits)
    timing: Timing = LAN
    agent: str = ""
    grant: bytes = b""
    manifest: bytes | None = None
    gate: Gate = field(default_factory=Gate)
    reader: RecordReader = field(default_factory=RecordReader)

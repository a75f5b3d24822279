"""What a node is made of: given to its cores by whoever drives them."""

from collections.abc import Callable
from dataclasses import dataclass, field

from protocol.clock import Instant
from protocol.credentials.record_reader import RecordReader
from protocol.credentials.records import Endpoint, PeerRecord
from protocol.identity import Identity
from protocol.limits.rate_limits import Limits
from protocol.timing import LAN, Timing

Admits = Callable[[PeerRecord, Instant], str]


def admit_everybody(record: PeerRecord, now: Instant) -> str:
    """The rule of an open swarm."""
    return ""


@dataclass(frozen=True, slots=True)
class Setup:
    """A node of `swarm` (16 bytes).

    `endpoints` are what others dial, none for a node that nobody can. `admits` returns the
    reason for which a record is kept out, or nothing. `manifest` is the swarm's manifest as
    bytes, empty if it is to be fetched from peers, None for a swarm without one.
    """

    identity: Identity
    swarm: bytes
    endpoints: tuple[Endpoint, ...] = ()
    limits: Limits = field(default_factory=Limits)
    timing: Timing = LAN
    agent: str = ""
    grant: bytes = b""
    manifest: bytes | None = None
    admits: Admits = admit_everybody
    reader: RecordReader = field(default_factory=RecordReader)

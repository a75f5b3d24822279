"""What is fuzzed: one function from bytes to nothing, which may raise nothing.

The first byte chooses the decoder, the rest is its input. A message of the protocol is fuzzed by being declared.
Signatures are taken for good, so that the parsers behind them are reached; `tests/unit` shows that nothing is parsed
before.
"""

import random
from collections.abc import Callable

from node.rollouts.group import GroupError
from node.rollouts.group import decode as decode_group
from node.swarm.reports import decode as decode_report
from protocol.config import Instant, Setup
from protocol.core import Core
from protocol.credentials.grants import open_grant
from protocol.credentials.invite import Invite
from protocol.credentials.manifest import JoinPolicy, ManifestTask, make_manifest, open_manifest
from protocol.credentials.records import Address, make_record, open_record
from protocol.credentials.revocations import open_revocations
from protocol.errors import PeerError, ProtocolError
from protocol.events import Arrived, Link
from protocol.identity import Identity
from protocol.limits.limits import Limits
from protocol.membership.address_book import Book
from protocol.simulator.adversaries import SimulatedIdentity
from protocol.wire import messages
from protocol.wire.envelope import Kind, open_frame
from protocol.wire.messages import Hello
from tests.protocol_frames import frame_of

SWARM = b"a swarm of tests"
UNIX = 1_700_000_000.0
CLUB = make_manifest(
    Identity(bytes(32)), "fuzz", int(UNIX * 1000), JoinPolicy.ALLOWLIST, [ManifestTask("builtin/sums", 1, "01", "{}")]
)
ME, PEER = (SimulatedIdentity(bytes([n]) * 32) for n in range(2))
LINK = Link(PEER.curve_key, dialled=False)
NOW = Instant(0.0, UNIX)


def believe(key: bytes, signature: bytes, message: bytes) -> bool:
    """Take every signature for good."""
    return True


def new_core() -> Core:
    """Return a core that has met nobody."""
    return Core(Setup(ME, SWARM), Book((), Limits(max_known_peers=16)), random.Random(1), NOW)


def in_core(data: bytes) -> None:
    """Give a core an authentic message from a live peer: a kind, and the body."""
    core = new_core()
    record = make_record(PEER, SWARM, (), 1 << 16, "", int((UNIX + 3600) * 1000))
    frames = [(int(Kind.HELLO), Hello(record.encoded).encode()), (data[0] % (max(Kind) + 2) if data else 0, data[1:])]
    for sequence, (kind, body) in enumerate(frames, 1):
        core.handle(Arrived(LINK, frame_of(PEER, SWARM, kind, sequence, int(UNIX * 1000), body)), NOW)


def text(read: Callable[[str], object]) -> Callable[[bytes], object]:
    """Make a reader of text one of bytes."""
    return lambda data: read(data.decode("utf-8", errors="replace"))


DECLARED = {
    var.kind: var
    for var in vars(messages).values()
    if isinstance(getattr(var, "kind", None), Kind) and hasattr(var, "decode")  # one without has an empty body
}
# Each declared message by the number of its kind, and from 100 on what else is read from strangers, only ever appended.
TARGETS: dict[int, Callable[[bytes], object]] = {int(kind): message.decode for kind, message in DECLARED.items()} | {
    100: lambda data: open_frame(data, believe),
    101: lambda data: open_record(data, SWARM, UNIX, believe),
    102: lambda data: open_manifest(data, believe),
    103: open_grant,
    104: text(Invite.parse),
    105: text(Address.parse),
    106: decode_group,
    107: in_core,
    108: lambda data: open_revocations(data, CLUB, believe),
    109: lambda data: decode_report(data, PEER.node_id),
}
NUMBERS = list(TARGETS)


def try_one(data: bytes) -> None:
    """Run one input through the target that it chooses; only the typed errors may come of it."""
    if not data:
        return
    number = data[0] if data[0] in TARGETS else NUMBERS[data[0] % len(NUMBERS)]
    try:
        TARGETS[number](data[1:])
    except (PeerError, ProtocolError, GroupError):
        return

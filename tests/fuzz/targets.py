"""What is fuzzed: one function from bytes to nothing, which may raise nothing.

The first byte chooses the decoder, the rest is its input. Signatures are taken for good, so
that the parsers behind them are reached; `tests/unit` shows that nothing is parsed before.
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
from protocol.credentials.manifest import ManifestTask, Policy, make_manifest, open_manifest
from protocol.credentials.records import Address, make_record, open_record
from protocol.credentials.revocations import open_revocations
from protocol.errors import PeerError, ProtocolError
from protocol.events import Arrived, Link
from protocol.identity import Identity
from protocol.membership.address_book import Book
from protocol.simulator.adversaries import SimulatedIdentity
from protocol.wire.envelope import Kind, open_frame
from protocol.wire.messages import (
    AskRevocations,
    DialBack,
    DialledBack,
    Digest,
    DontHave,
    Goodbye,
    Have,
    Hello,
    Interest,
    ItemChunk,
    ItemOutline,
    Manifest,
    Peers,
    Ping,
    Revocations,
    Want,
)
from tests.protocol_frames import frame_of

SWARM = b"a swarm of tests"
UNIX = 1_700_000_000.0
CLUB = make_manifest(
    Identity(bytes(32)), "fuzz", int(UNIX * 1000), Policy.ALLOWLIST, [ManifestTask("builtin/sums", 1, "01", "{}")]
)
ME, PEER = (SimulatedIdentity(bytes([n]) * 32) for n in range(2))
LINK = Link(PEER.curve_key, dialled=False)
NOW = Instant(0.0, UNIX)


def believe(key: bytes, signature: bytes, message: bytes) -> bool:
    """Take every signature for good."""
    return True


def in_core(data: bytes) -> None:
    """Give a core an authentic message from a live peer: a kind, and the body."""
    core = Core(Setup(ME, SWARM), Book((), 16), random.Random(1), NOW)
    record = make_record(PEER, SWARM, (), 1 << 16, "", int((UNIX + 3600) * 1000))
    frames = [(int(Kind.HELLO), Hello(record.encoded).encode()), (data[0] % (max(Kind) + 2) if data else 0, data[1:])]
    for sequence, (kind, body) in enumerate(frames, 1):
        core.handle(Arrived(LINK, frame_of(PEER, SWARM, kind, sequence, int(UNIX * 1000), body)), NOW)


def text(read: Callable[[str], object]) -> Callable[[bytes], object]:
    """Make a reader of text one of bytes."""
    return lambda data: read(data.decode("utf-8", errors="replace"))


TARGETS: list[Callable[[bytes], object]] = [
    lambda data: open_frame(data, believe),
    lambda data: open_record(data, SWARM, UNIX, believe),
    *(
        message.decode
        for message in (
            Hello,
            Peers,
            Ping,
            Goodbye,
            Digest,
            Have,
            Interest,
            Manifest,
            Want,
            ItemOutline,
            DontHave,
        )
    ),
    ItemChunk.decode,
    lambda data: open_manifest(data, believe),
    open_grant,
    text(Invite.parse),
    text(Address.parse),
    decode_group,
    in_core,
    AskRevocations.decode,
    Revocations.decode,
    lambda data: open_revocations(data, CLUB, believe),
    DialBack.decode,
    DialledBack.decode,
    lambda data: decode_report(data, PEER.node_id),
]


def try_one(data: bytes) -> None:
    """Run one input through the target that it chooses; only the typed errors may come of it."""
    if not data:
        return
    try:
        TARGETS[data[0] % len(TARGETS)](data[1:])
    except (PeerError, ProtocolError, GroupError):
        return

"""The corpus: good inputs for every target, from which the fuzzer departs, and what once failed."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields
from itertools import product
from typing import Any

from node.rollouts.group import Group, encode, one_turn
from node.swarm.reports import NodeReport
from node.swarm.reports import encode as encode_report
from node.tasks import TaskKey
from protocol.credentials.grants import make_certificate, make_pass, make_ticket
from protocol.credentials.invite import Invite
from protocol.credentials.manifest import JoinPolicy, ManifestTask, SwarmManifest, make_manifest
from protocol.credentials.records import Address, Endpoint, PeerRecord, Service, make_record
from protocol.credentials.revocations import RevocationList, make_handover, make_revocations
from protocol.errors import MessageError
from protocol.identity import Identity
from protocol.wire.envelope import CHUNK_BYTES, HEAD_BYTES, ItemId, Kind, seal
from protocol.wire.messages import (
    DialledBack,
    Digest,
    DontHave,
    Entry,
    Goodbye,
    Have,
    Hello,
    Interest,
    ItemChunk,
    ItemOutline,
    Manifest,
    Peers,
    Revocations,
    Want,
    WantedPart,
)
from tests.fuzz.targets import CLUB, DECLARED, SWARM, UNIX

ME = Identity(bytes(32))
OTHER = Identity(bytes([1]) * 32)


FOUND: tuple[bytes, ...] = ()  # what a fuzzer found: whole inputs, the target's number first


CANDIDATES: dict[str, tuple[Any, ...]] = {  # values of a field, by the name of its type; of any other: nothing
    "int": (1, 0),
    "bool": (True,),
    "str": ("a", "198.41.0.4"),
    "bytes": (b"", bytes(32), bytes(HEAD_BYTES)),
}


def example(message: Any) -> bytes:
    """Return some good body of a declared message: of `further`, or the first of `CANDIDATES` that it reads again."""
    for said in further():
        if type(said) is message:
            return bytes(said.encode())
    for values in product(*(CANDIDATES.get(getattr(field.type, "__name__", ""), ((),)) for field in fields(message))):
        body = bytes(message(*values).encode())
        with suppress(MessageError):
            message.decode(body)
            return body
    raise AssertionError(f"no good {message.__name__} is found: put one into `further`")


def inputs() -> Iterator[bytes]:
    """Yield good inputs for each target, its number first."""
    for kind, message in DECLARED.items():
        yield bytes([kind]) + example(message)
    for number, data in others():
        yield bytes([number]) + data
    yield from FOUND


def further() -> list[Any]:
    """Return messages that say something; those that are not here have a few numbers and texts, which are found."""
    item = ItemId(bytes(range(32)))
    head = seal(ME, SWARM, Kind.ITEM, 1, int(UNIX * 1000), bytes(CHUNK_BYTES + 1))[:HEAD_BYTES]
    record = make_own_record()
    return [
        Hello(record.encoded, needy=True),
        Peers((record.encoded,)),
        Goodbye("full"),
        Digest((record.summary,)),
        Have((Entry(item, 1000), Entry(item, 1 << 20, parts=b"\x05"))),
        Interest(frozenset([bytes(8)]), is_sated=True),
        Manifest(make_own_manifest().encoded),
        Want((WantedPart(item), WantedPart(item, (0, 7)))),
        ItemOutline(head, bytes(64)),
        DontHave((item,)),
        ItemChunk(item, 3, b"part of a body", bytes(32)),
        Revocations(make_own_revocations().encoded),
        DialledBack("198.41.0.4", 4001, reached=True),
    ]


def others() -> list[tuple[int, bytes]]:
    """Return good inputs for the targets that are no messages."""
    certificate = make_certificate(ME, SWARM, OTHER.public_key, 5, int(UNIX * 1000))
    completions = (one_turn("7", True, 1.0), one_turn("8", False, 0.0))
    manifest = make_own_manifest()
    seed = Address(Endpoint("10.0.0.1", 7700), ME.curve_key)
    return [
        (100, seal(ME, SWARM, Kind.ITEM, 1, int(UNIX * 1000), bytes(8) + b"body")),
        (101, make_own_record().encoded),
        (102, manifest.encoded),
        (103, make_pass(ME, SWARM, OTHER.node_id, int(UNIX * 1000)).encode()),
        (103, make_ticket(certificate, OTHER, SWARM, ME.public_key).encode()),
        (104, str(Invite(manifest.name, manifest.hash, (seed,))).encode()),
        (105, str(seed).encode()),
        (106, encode(Group(TaskKey("builtin/sums", 1, "00"), 1, "3+4=", completions, "llama", 1))),
        (107, bytes([Kind.HAVE]) + Have((Entry(ItemId(bytes(range(32))), 1000),)).encode()),
        (108, make_own_revocations().encoded),
        (
            109,
            encode_report(NodeReport(int(UNIX), "fuzz", "llama", 7, 0.5, None, {"builtin/sums": 0.5}, {ME.node_id: 3})),
        ),
    ]


def make_own_record() -> PeerRecord:
    """Return a record of this node."""
    endpoint = Endpoint("example.org", 7700)
    services = (Service("weights/0123", endpoint),)
    return make_record(ME, SWARM, (endpoint,), 1 << 16, "fuzz", int((UNIX + 60) * 1000), services=services)


def make_own_manifest() -> SwarmManifest:
    """Return a manifest of this node's."""
    task = ManifestTask("builtin/sums", 1, "0123456789abcdef", "{}")
    return make_manifest(ME, "fuzz", int(UNIX * 1000), JoinPolicy.ALLOWLIST, [task], [OTHER.node_id])


def make_own_revocations() -> RevocationList:
    """Return a revocation list after a handover."""
    handover = make_handover(ME, CLUB, 0, OTHER.public_key)
    return make_revocations(OTHER, CLUB, [ME.node_id], 3, (handover,))

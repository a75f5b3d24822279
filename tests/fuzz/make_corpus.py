"""Write the corpus: a good input for every target, from which the fuzzer departs.  python -m tests.fuzz.make_corpus"""

from pathlib import Path

from node.rollouts.group import Group, encode, one_turn
from node.swarm.reports import Report
from node.swarm.reports import encode as encode_report
from node.tasks import TaskKey
from protocol.credentials.grants import make_certificate, make_pass, make_ticket
from protocol.credentials.invite import Invite
from protocol.credentials.manifest import ManifestTask, Policy, make_manifest
from protocol.credentials.records import Address, Endpoint, Service, make_record
from protocol.credentials.revocations import make_handover, make_revocations
from protocol.identity import Identity
from protocol.wire.envelope import CHUNK_BYTES, HEAD_BYTES, ItemId, Kind, seal
from protocol.wire.messages import (
    AskRevocations,
    DialBack,
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
    Ping,
    Revocations,
    Want,
    WantedPart,
)
from tests.fuzz.targets import CLUB, SWARM, TARGETS, UNIX

ME = Identity(bytes(32))
OTHER = Identity(bytes([1]) * 32)


def inputs() -> list[bytes]:
    """Return a good input for each target, in the order of `TARGETS`."""
    endpoint = Endpoint("example.org", 7700)
    services = (Service("weights/0123", endpoint),)
    record = make_record(ME, SWARM, (endpoint,), 1 << 16, "fuzz", int((UNIX + 60) * 1000), services=services)
    item = ItemId(bytes(range(32)))
    task = ManifestTask("builtin/sums", 1, "0123456789abcdef", "{}")
    manifest = make_manifest(ME, "fuzz", int(UNIX * 1000), Policy.ALLOWLIST, [task], [OTHER.node_id])
    certificate = make_certificate(ME, SWARM, OTHER.public_key, 5, int(UNIX * 1000))
    completions = (one_turn("7", True, 1.0), one_turn("8", False, 0.0))
    handover = make_handover(ME, CLUB, 0, OTHER.public_key)
    revocations = make_revocations(OTHER, CLUB, [ME.node_id], 3, (handover,))
    seed = Address(Endpoint("10.0.0.1", 7700), ME.curve_key)
    return [
        seal(ME, SWARM, Kind.ITEM, 1, int(UNIX * 1000), bytes(8) + b"body"),
        record.encoded,
        Hello(record.encoded, needy=True).encode(),
        Peers((record.encoded,)).encode(),
        Ping(7).encode(),
        Goodbye("full").encode(),
        Digest((record.summary,)).encode(),
        Have((Entry(item, 1000), Entry(item, 1 << 20, parts=b"\x05"))).encode(),
        Interest((bytes(8),), announce_only=True).encode(),
        Manifest(manifest.encoded).encode(),
        Want((WantedPart(item), WantedPart(item, (0, 7)))).encode(),
        ItemOutline(
            seal(ME, SWARM, Kind.ITEM, 1, int(UNIX * 1000), bytes(CHUNK_BYTES + 1))[:HEAD_BYTES], bytes(64)
        ).encode(),
        DontHave((item,)).encode(),
        ItemChunk(item, 3, b"part of a body", bytes(32)).encode(),
        manifest.encoded,
        make_pass(ME, SWARM, OTHER.node_id, int(UNIX * 1000)).encode(),
        str(Invite(manifest.name, manifest.hash, (seed,))).encode(),
        str(seed).encode(),
        encode(Group(TaskKey("builtin/sums", 1, "00"), 1, "3+4=", completions, "llama", 1)),
        bytes([Kind.HAVE]) + Have((Entry(item, 1000),)).encode(),
        AskRevocations(7).encode(),
        Revocations(revocations.encoded).encode(),
        revocations.encoded,
        DialBack(4001).encode(),
        DialledBack("198.41.0.4", 4001, reached=True).encode(),
        encode_report(Report(int(UNIX), "fuzz", "llama", 7, 0.5, None, {"builtin/sums": 0.5}, {ME.node_id: 3})),
        # Further ones: another form of the same, which the first does not lead to.
        make_ticket(certificate, OTHER, SWARM, 3, ME.public_key).encode(),
    ]


def main() -> None:
    """Write each input, its target's number first."""
    folder = Path(__file__).parent / "corpus"
    folder.mkdir(exist_ok=True)
    for number, data in enumerate(inputs()):
        target = number if number < len(TARGETS) else 15
        (folder / f"{number:02}").write_bytes(bytes([target]) + data)


if __name__ == "__main__":
    main()

"""A peer in JavaScript, written from docs/protocol.md alone, among real hosts. Its packages are in .venv-interop."""

import hashlib
import json
import os
import shutil
import signal
import string
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from protocol.credentials.grants import Gatekeeper
from protocol.credentials.invite import Invite, make_shared_invite
from protocol.credentials.manifest import JoinPolicy, ManifestTask, SwarmManifest, make_manifest, swarm_id
from protocol.credentials.records import Address
from protocol.host import Host
from protocol.identity import Identity
from protocol.wire.compression import PLAIN
from protocol.wire.envelope import (
    CHUNK_BYTES,
    HEAD_BYTES,
    ItemId,
    Kind,
    chunk_hashes,
    claimed_id,
    control_frame,
    digest_of_hashes,
    item_id,
    seal,
)
from protocol.wire.messages import NO_TOPIC, Entry, Have, ItemChunk, ItemOutline, Ping
from tests.protocol_hosts import ROOT, collect, running
from tests.protocol_raw import raw_peer
from tests.waiting import wait_until

PACKAGES = ROOT / ".venv-interop" / "node_modules"
LARGE = 3_000_000  # bytes: 23 chunks, more than one WANT may name
TOPIC = b"a topic."

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        not (shutil.which("node") and shutil.which("npm")), reason="node and npm are not installed here"
    ),
]


class JavaScriptPeer:
    """A process of tests/interop/peer.mjs, and the events that it printed.

    It dials the first node of an invite, or listens at an endpoint for the swarm whose manifest is in a file.
    """

    def __init__(self, folder: Path, swarm: str, listen: str | None = None, seed: bytes | None = None) -> None:
        assert PACKAGES.is_dir(), "tests/install_interop.sh has to be run first"
        folder.mkdir()
        self._folder = folder
        for file in (ROOT / "tests" / "interop").glob("*.mjs"):
            shutil.copy(file, folder)
        (folder / "node_modules").symlink_to(PACKAGES)
        seed = seed or os.urandom(32)
        self.identity = Identity(seed)
        command = ["node", "peer.mjs", swarm, seed.hex(), *([listen] if listen else [])]
        self._process = subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.events: list[dict[str, Any]] = []
        self._reader = Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self.events.append(json.loads(line))

    def heard(self, event: str, **fields: object) -> dict[str, Any]:
        """Wait for an event with these fields."""
        wanted = {"event": event, **fields}
        return wait_until(
            lambda: next((event for event in list(self.events) if wanted.items() <= event.items()), None),
            30,
            str(wanted),
        )

    def do(self, *words: str) -> None:
        """Give it a line to obey."""
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(words) + "\n")
        self._process.stdin.flush()

    def received(self, frame: bytes) -> dict[str, Any]:
        """Let it receive a frame, and return what it says to that."""
        before = len(self.events)
        self.do("receive", frame.hex())
        return wait_until(lambda: self.events[before:], 20, "what the peer says")[0]

    def publish(self, body: bytes, topic: bytes) -> ItemId:
        """Let it publish an item, and return the id that it names."""
        file = self._folder / sha256(body)
        file.write_bytes(body)
        self.do("publish", file.name, topic.hex())
        return ItemId(bytes.fromhex(self.heard("published", file=file.name)["id"]))

    def stop(self) -> None:
        """End its input, and with it the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=20)
        self._reader.join(20)

    def interrupt(self) -> int:
        """Press Ctrl-C, and return the status that it ends with."""
        self._process.send_signal(signal.SIGINT)
        return self._process.wait(timeout=20)


@contextmanager
def swarm_and_peer(folder: Path) -> Iterator[tuple[Host, Host, Invite, JavaScriptPeer]]:
    """The hosts of a founder and of a member, an invite for one node, and the peer that used it."""
    founder, member = Identity.generate(), Identity.generate()
    now_ms = int(time.time() * 1000)
    tasks = [ManifestTask("builtin/sums", 1, "c0976995997f4201", "{}")]
    manifest = make_manifest(founder, "riddles", now_ms, JoinPolicy.ALLOWLIST, tasks, [member.node_id])
    shared = make_shared_invite(founder, manifest, uses=1, expiry_ms=now_ms + 3_600_000)
    options = {"swarm": manifest.swarm, "manifest": manifest.encoded}
    with (
        running(identity=founder, gate=Gatekeeper(manifest), **options) as (first, address),
        running(address, identity=member, gate=Gatekeeper(manifest), **options) as (second, _),
    ):
        for host in first, second:
            host.subscribe(None, 1000.0)
        wait_until(lambda: second.counters().peers == 1, 20, "the link of the hosts")
        invite = Invite(manifest.name, manifest.hash, (address,), shared)
        peer = JavaScriptPeer(folder / "peer", str(invite))
        try:
            peer.heard("live", node=founder.public_key.hex())
            peer.heard("manifest", name="riddles")
            yield first, second, invite, peer
        finally:
            peer.stop()


@contextmanager
def listening_peer(
    folder: Path, *members: Identity, seed: bytes | None = None
) -> Iterator[tuple[JavaScriptPeer, Address, SwarmManifest, Identity]]:
    """A peer that listens and dials nobody unasked, its address, and the swarm of these members with its founder."""
    founder, seed = Identity.generate(), seed or os.urandom(32)
    allowed = [identity.node_id for identity in (Identity(seed), *members)]
    tasks = [ManifestTask("builtin/sums", 1, "c0976995997f4201", "{}")]
    manifest = make_manifest(founder, "riddles", int(time.time() * 1000), JoinPolicy.ALLOWLIST, tasks, allowed)
    file = folder / "manifest"
    file.write_bytes(manifest.encoded)
    peer = JavaScriptPeer(folder / "peer", str(file), "127.0.0.1:0", seed)
    try:
        yield peer, Address.parse(peer.heard("listening")["address"]), manifest, founder
    finally:
        peer.stop()


def seed_of_id(first: str) -> bytes:
    """Return the seed of a node whose id begins with one of these characters."""
    return next(seed for seed in iter(lambda: os.urandom(32), b"") if Identity(seed).node_id[0] in first)


def refusals(host: Host) -> dict[str, int]:
    """Return what the host refused, and how often."""
    return dict(host.counters().rejected)


def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def test_a_peer_written_from_the_page_alone_exchanges_small_and_large_items_with_a_swarm(tmp_path: Path) -> None:
    with swarm_and_peer(tmp_path) as (first, second, invite, peer):
        for host in first, second:
            for body in os.urandom(300), os.urandom(LARGE), os.urandom(99) + b"words that shrink " * 60_000:
                id_ = host.publish(body, TOPIC)
                peer.heard("item", id=id_.hex(), topic=TOPIC.hex(), bytes=len(body), sha256=sha256(body))
        for host in first, second:
            collect(host, 3)  # of the other

        for body in os.urandom(300), os.urandom(LARGE):
            id_ = peer.publish(body, TOPIC)
            for host in first, second:
                (item,) = collect(host, 1, 30)
                assert (item.id, item.body, item.topic) == (id_, body, TOPIC)
                assert item.sender == peer.identity.node_id
        assert refusals(first) == refusals(second) == {}

        other = JavaScriptPeer(tmp_path / "other", str(invite))
        try:
            other.heard("goodbye", reason="invite_used")
        finally:
            other.stop()


def test_a_peer_that_listens_relays_small_and_large_items_between_hosts_that_know_only_it(tmp_path: Path) -> None:
    member, guest = Identity.generate(), Identity.generate()
    with listening_peer(tmp_path, member) as (peer, address, manifest, founder):
        shared = make_shared_invite(founder, manifest, uses=4, expiry_ms=int(time.time() * 1000) + 3_600_000)
        grant = shared.ticket(manifest.swarm, guest.public_key).encode()
        options = {"listen": None, "swarm": manifest.swarm, "manifest": manifest.encoded}
        with running(address, identity=member, gate=Gatekeeper(manifest), **options) as (first, _):
            first.subscribe(None, 1000.0)
            early = [first.publish(os.urandom(size), TOPIC) for size in (300, LARGE)]
            for id_ in early:
                peer.heard("item", id=id_.hex(), signer=member.public_key.hex())

            with running(address, identity=guest, gate=Gatekeeper(manifest), grant=grant, **options) as (second, _):
                second.subscribe(None, 1000.0)
                assert {item.id for item in collect(second, 2)} == set(early)
                for source, sink in (first, second), (second, first):
                    bodies = [os.urandom(size) for size in (300, LARGE)]
                    for body in bodies:
                        source.publish(body, TOPIC)
                    assert sorted(item.body for item in collect(sink, 2)) == sorted(bodies)
                for host, other in (first, guest), (second, member):
                    (info,) = wait_until(host.peers, 20, "its peers, which it describes now and then")
                    assert info.node_id == peer.identity.node_id
                    assert other.node_id not in {record.node_id for record in host.records()}
                    assert refusals(host) == {}
        assert not [event for event in peer.events if event["event"] in ("refused", "turned away")]
        assert peer.interrupt() == 0


def test_a_peer_that_listens_admits_whom_its_manifest_admits_and_believes_a_key_only_who_proved_it(
    tmp_path: Path,
) -> None:
    member, thief = Identity.generate(), Identity.generate()
    with listening_peer(tmp_path, member) as (peer, address, manifest, founder), ExitStack() as stack:
        shared = make_shared_invite(founder, manifest, uses=1, expiry_ms=int(time.time() * 1000) + 3_600_000)
        options = {"listen": None, "swarm": manifest.swarm, "manifest": manifest.encoded}
        guests = [Identity.generate() for _ in range(2)]
        grants = [shared.ticket(manifest.swarm, guest.public_key).encode() for guest in guests]
        first = stack.enter_context(running(address, identity=guests[0], grant=grants[0], **options))[0]
        wait_until(lambda: first.counters().peers, 20, "the first with the invite")
        for options["identity"], options["grant"], reason in (
            (guests[1], grants[1], "invite_used"),
            (guests[1], grants[0], "not_admitted"),
            (thief, b"", "not_admitted"),
        ):
            with running(address, **options) as (host, _):
                wait_until(lambda host=host: host.refusal, 20, reason)
                assert host.refusal == reason

        ping = control_frame(Kind.PING, Ping(7).encode())
        older = stack.enter_context(raw_peer(address, manifest.swarm, member))
        older.send(ping)
        peer.heard("refused", why="before hello")
        older.send(older.hello())
        peer.heard("live", node=member.public_key.hex())
        long = control_frame(Kind.PONG, bytes(60_000))
        stranger = stack.enter_context(raw_peer(address, manifest.swarm, thief))
        stranger.send(older.hello())
        peer.heard("refused", why="record of another connection")
        stranger.send(stranger.hello(of=member))
        peer.heard("refused", why="hello with the record of another")
        wait_until(lambda: not stranger.try_send(long), 20, "the end of who says too much before its hello")
        peer.heard("lost", why="too much before hello")

        newer = stack.enter_context(raw_peer(address, manifest.swarm, member))
        newer.send(newer.hello(incarnation=2))
        wait_until(lambda: not older.try_send(ping), 20, "the end of the older connection with this key")
        newer.send(ping)
        pong = control_frame(Kind.PONG, Ping(7).encode())
        wait_until(lambda: newer.receive(1) == pong, 20, "the answer on the newer one")


@pytest.mark.parametrize("stays", ["ours", "theirs"])
def test_of_two_links_between_the_peer_and_a_host_both_keep_the_one_that_the_smaller_id_dialled(
    tmp_path: Path, stays: str
) -> None:
    smaller, larger = seed_of_id("234567"), seed_of_id(string.ascii_lowercase)  # as text, and not as bytes
    ours, theirs = (smaller, larger) if stays == "ours" else (larger, smaller)
    member = Identity(theirs)
    with listening_peer(tmp_path, member, seed=ours) as (peer, address, manifest, _):
        options = {"swarm": manifest.swarm, "manifest": manifest.encoded}
        with running(address, identity=member, **options) as (host, where):
            host.subscribe(None, 1000.0)
            peer.heard("live")
            peer.do("dial", str(where))
            peer.heard("two links", stays=stays)
            peer.heard("lost")
            body = os.urandom(LARGE)
            id_ = host.publish(body, TOPIC)
            peer.heard("item", id=id_.hex(), sha256=sha256(body))
            peer.publish(body, TOPIC)
            assert [item.body for item in collect(host, 1)] == [body]
            assert refusals(host) == {}
            assert not [event for event in peer.events if event["event"] == "refused"]


def test_the_host_and_the_peer_refuse_what_is_falsified(tmp_path: Path) -> None:
    with swarm_and_peer(tmp_path) as (host, _, invite, peer):
        good = item_of(peer.identity, invite, b"good")
        places = 0, 40, 120, len(good) - 1  # in the key, the signature, the header, the body
        for count, frame in enumerate([*(flipped(good, place) for place in places), good], 1):
            entry = Entry(claimed_id(frame), len(frame))
            peer.do("send", control_frame(Kind.HAVE, Have((entry,)).encode()).hex())
            # The peer itself says DONT_HAVE, so it was asked.
            wait_until(lambda: refusals(host).get("false_have") == count, 20)  # noqa: B023
            peer.do("send", frame.hex())
        assert [item.body for item in collect(host, 1)] == [b"good"]
        assert refusals(host) == {"forged": 4, "false_have": 5}

        signer = Identity.generate()
        good = item_of(signer, invite, b"good")
        anybodys = bytes([1, *[0] * 31]) * 2 + bytes(32) + good[96:]  # a key of small order: this signature fits all
        for frame in flipped(good, 0), flipped(good, 40), flipped(good, 120), flipped(good, len(good) - 1), anybodys:
            assert peer.received(frame) == {"event": "refused", "why": "forged"}
        assert peer.received(good)["sha256"] == sha256(b"good")

        large = item_of(signer, invite, os.urandom(200_000))
        head, body = large[:HEAD_BYTES], large[HEAD_BYTES:]
        hashes = chunk_hashes(body)
        outline = ItemOutline(head, flipped(hashes, 0))
        assert peer.received(control_frame(Kind.OUTLINE, outline.encode())) == {"event": "refused", "why": "forged"}
        peer.do("receive", control_frame(Kind.OUTLINE, ItemOutline(head, hashes).encode()).hex())
        id_ = item_id(signer.public_key, digest_of_hashes(hashes))
        first, second = (
            ItemChunk(id_, index, body[start:][:CHUNK_BYTES], b"") for index, start in ((0, 0), (1, CHUNK_BYTES))
        )
        false = flipped(control_frame(Kind.CHUNK, first.encode()), -1)
        assert peer.received(false) == {"event": "refused", "why": "false chunk"}
        peer.do("receive", control_frame(Kind.CHUNK, first.encode()).hex())
        assert peer.received(control_frame(Kind.CHUNK, second.encode()))["id"] == id_.hex()


def item_of(signer: Identity, invite: Invite, body: bytes) -> bytes:
    """Return an item as its signer seals it."""
    swarm, now_ms = swarm_id(invite.manifest), int(time.time() * 1000)
    return seal(signer, swarm, Kind.ITEM, 1, now_ms, NO_TOPIC + PLAIN + body)


def flipped(data: bytes, place: int) -> bytes:
    """Return the bytes with one bit changed."""
    changed = bytearray(data)
    changed[place] ^= 1
    return bytes(changed)

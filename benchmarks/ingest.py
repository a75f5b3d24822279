"""What shared groups of 10 kB cost one core: from a frame, or from a socket, to a group to train on; or to the buffer.

- `frames`: a node's protocol core is handed signed frames: allowance, replay check, signature, layout,
  gossip; then the body is decoded, its question rebuilt and each completion scored, as a round does it.
- `buffer`: up to the group buffer on disk, a burst at a time: read, and not verified, as most are never drawn.
- `sockets`: the work of `frames` behind a real host, with CURVE and the transport; peers in a child process publish.

All count the seconds of CPU that this process spent, so that a busy machine does not matter, and all
run on one thread at a time: groups a second of CPU are groups a second on one core.
"""

import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.sharing import feeder, wait_for_peers
from node.config import BufferConfig
from node.rollouts.group import MAX_GROUP_BYTES, Group, encode, one_turn
from node.rollouts.group_buffer import GroupBuffer, ReceivedGroup
from node.rollouts.screening import GroupBounds, check
from node.swarm.sharing import GroupReader, topic_of
from node.tasks import TaskKey, derive_seed
from node.tasks.builtin.families import FAMILIES
from node.tasks.task_set import TaskSet, TrainingQuestion
from protocol.config import Instant, Setup, read_clock
from protocol.core import Core
from protocol.credentials.records import make_record
from protocol.events import Arrived, Deliver, Item, Link, Tick
from protocol.host import Host
from protocol.identity import Identity
from protocol.membership.address_book import Book
from protocol.wire.envelope import Kind, claimed_id, control_frame, seal
from protocol.wire.messages import Entry, Have, Hello

COMPLETIONS = 8
BODY_BYTES = 10_000
BURST = 50  # groups that the peer publishes at a time: below what a link queues
SWARM = b"ingest benchmark"
TIMEOUT_S = 60.0


def run(runs: int, groups: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each of the paths, of `runs` times `groups`; `median_s` is CPU seconds a group."""
    tasks = TaskSet([(family(), 1.0) for family in FAMILIES.values()])
    bodies = [_body(question) for question in tasks.questions(derive_seed("ingest"), groups)]
    for path, measure in (("frames", _frames), ("buffer", _to_buffer), ("sockets", _sockets)):
        seconds = [measure(tasks, bodies) / groups for _ in range(runs)]
        median = statistics.median(seconds)
        yield {
            "bench": "gossip",
            "impl": "gossamer",
            "part": "ingest",
            "path": path,
            "bytes": round(statistics.fmean(len(body) for _, body in bodies)),
            "median_s": median,
            "groups_per_cpu_s": round(1 / median),
            "runs": runs,
        }


def _frames(tasks: TaskSet, bodies: list[tuple[bytes, bytes]]) -> float:
    now = read_clock()
    core, link, frames = _core_and_frames(now, bodies)
    began = time.process_time()
    verified = 0
    for start in range(0, len(frames), BURST):
        for item in _delivered(core, link, frames[start : start + BURST], now):
            verified += check(bytes(item.content), tasks, COMPLETIONS).group is not None
    took = time.process_time() - began
    if verified != len(bodies):
        raise RuntimeError(f"{verified} of {len(bodies)} groups were verified: {dict(core.scores.rejected)}")
    return took


def _to_buffer(tasks: TaskSet, bodies: list[tuple[bytes, bytes]]) -> float:
    now = read_clock()
    core, link, frames = _core_and_frames(now, bodies)
    admission = GroupReader(tasks, GroupBounds(COMPLETIONS, MAX_GROUP_BYTES))
    with tempfile.TemporaryDirectory() as name, GroupBuffer(Path(name, "pool.sqlite"), BufferConfig()) as buffer:
        added, began = 0, time.process_time()
        for start in range(0, len(frames), BURST):
            shared = []
            for item in _delivered(core, link, frames[start : start + BURST], now):
                body = bytes(item.content)
                group, _ = admission.read(body, item.topic)
                if group is not None:
                    shared.append(ReceivedGroup(item.id, item.signer, now.unix, group, body))
            added += buffer.add(shared, now.unix, 1)
        took = time.process_time() - began
    if added != len(bodies):
        raise RuntimeError(f"{added} of {len(bodies)} groups came to the buffer: {dict(core.scores.rejected)}")
    return took


def _delivered(core: Core, link: Link, frames: list[bytes], now: Instant) -> Iterator[Item]:
    """Announce items to a core, which asks for them, and give them; return those that it delivers."""
    entries = tuple(Entry(claimed_id(frame), len(frame)) for frame in frames)
    core.handle(Arrived(link, control_frame(Kind.HAVE, Have(entries).encode())), now)
    core.handle(Tick(), now._replace(steady=core.gossip.due))
    for frame in frames:
        for action in core.handle(Arrived(link, frame), now):
            if isinstance(action, Deliver):
                yield action.item


def _core_and_frames(now: Instant, bodies: list[tuple[bytes, bytes]]) -> tuple[Core, Link, list[bytes]]:
    core, link, signer = _core_with_a_peer(now)
    stamp = int(now.unix * 1000)
    frames = [seal(signer, SWARM, Kind.ITEM, n + 2, stamp, topic + body) for n, (topic, body) in enumerate(bodies)]
    return core, link, frames


def _core_with_a_peer(now: Instant) -> tuple[Core, Link, Identity]:
    setup = Setup(Identity.generate(), SWARM)
    core = Core(setup, Book((), setup.limits), random.Random(0), now)
    peer = Identity.generate()
    record = make_record(peer, SWARM, (), 1, "benchmark", int((now.unix + 3600) * 1000))
    link = Link(peer.curve_key, dialled=False)
    hello = seal(peer, SWARM, Kind.HELLO, 1, int(now.unix * 1000), Hello(record.encoded).encode())
    core.handle(Arrived(link, hello), now)
    return core, link, peer


def _sockets(tasks: TaskSet, bodies: list[tuple[bytes, bytes]]) -> float:
    host = Host(Identity.generate(), SWARM, "tcp://127.0.0.1:0", [])
    address = host.start()
    if address is None:
        raise RuntimeError("a host that listens has an address")
    bursts = [bodies[start : start + BURST] for start in range(0, len(bodies), BURST)]
    try:
        with feeder(address, SWARM, [bursts]) as publish:
            wait_for_peers(host, 1)
            began, deadline = time.process_time(), time.monotonic() + TIMEOUT_S
            verified = published = 0
            while verified < len(bodies):
                if verified == published:
                    publish()
                    published = min(len(bodies), published + BURST)
                verified += sum(check(item.body, tasks, COMPLETIONS).group is not None for item in host.receive(BURST))
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{verified} of {len(bodies)} groups came in {TIMEOUT_S:g} s")
                time.sleep(0.001)
            return time.process_time() - began
    finally:
        host.stop()


def _body(asked: TrainingQuestion) -> tuple[bytes, bytes]:
    """One group of `BODY_BYTES` under its topic: one right answer, the others of the length that a model rambles."""
    task, seed, item = asked
    ramble = os.urandom(BODY_BYTES // (COMPLETIONS - 1) // 2).hex()
    texts = [item.answer, *(f"{ramble[number:]} {number}" for number in range(1, COMPLETIONS))]
    made = tuple(one_turn(text, True, task.verify(item, text) or 0.0) for text in texts)
    key: TaskKey = task.key
    return topic_of(key), encode(Group(key, seed, item.question, made, "benchmark", 0))

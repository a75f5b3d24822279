"""What an item of 1 MB costs a core at either end, from `Host.publish` to `Host.receive`, without sockets.

One core publishes and others pull, each from a queue in place of a link: packing, hashing, signing, the outline, its
chunks, checking and unpacking. `random` bodies cannot be compressed; `text` is source of Python's library.
"""

import os
import random
import statistics
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from protocol.config import Instant, Setup, read_clock
from protocol.core import Core
from protocol.credentials.records import Address, Endpoint
from protocol.events import (
    Accepted,
    Arrived,
    CoreEvent,
    Deliver,
    Dial,
    FillLink,
    Item,
    Link,
    Offer,
    Opened,
    SendFrame,
    Tick,
)
from protocol.identity import Identity
from protocol.limits.limits import Limits
from protocol.membership.address_book import Book
from protocol.wire.compression import pack_content, unpack_content
from protocol.wire.envelope import chunk_hashes
from protocol.wire.messages import NO_TOPIC

BODY_BYTES = 1_000_000
SWARM = b"large benchmark!"
STEP_S = 0.05  # of virtual time
STEPS = 1000


def run(runs: int, items: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each sort of body, of `runs` times `items`; `median_s` is CPU seconds an item, of both ends."""
    sorts = {"random": os.urandom(2 * BODY_BYTES), "text": _library(2 * BODY_BYTES)}
    seconds: dict[str, list[float]] = {sort: [] for sort in sorts}
    for _ in range(runs):
        for sort, source in sorts.items():
            cores, draw = Cores(1), random.Random(0)
            starts = [draw.randrange(len(source) - BODY_BYTES) for _ in range(items)]
            bodies = [source[start : start + BODY_BYTES] for start in starts]
            began = time.process_time()
            for body in bodies:
                if cores.publish(body) != [body]:
                    raise RuntimeError("the item came otherwise")
            seconds[sort].append((time.process_time() - began) / items)
    for sort in sorts:
        yield {
            "bench": "gossip",
            "impl": "gossamer",
            "part": "large",
            "body": sort,
            "bytes": BODY_BYTES,
            "median_s": statistics.median(seconds[sort]),
            "slowest_s": max(seconds[sort]),
            "runs": runs,
        }


class Cores:
    """One core, and `receivers` others that have dialled it."""

    def __init__(self, receivers: int) -> None:
        self._now = read_clock()
        identities = [Identity.generate() for _ in range(1 + receivers)]
        self._keys = [identity.curve_key for identity in identities]
        seed = Address(Endpoint("10.0.0.1", 7700), self._keys[0])
        self._cores = [
            Core(Setup(identity, SWARM), Book((seed,) if number else (), Limits()), random.Random(number), self._now)
            for number, identity in enumerate(identities)
        ]
        self._events: deque[tuple[int, CoreEvent]] = deque()
        self._step()

    def publish(self, body: bytes) -> list[bytes]:
        """Publish a body and return what each receiver has of it."""
        packed = pack_content(body, NO_TOPIC)
        self._events.append((0, Offer(packed, chunk_hashes(packed))))
        received: list[Item] = []
        for _ in range(STEPS):
            received += self._step()
            if len(received) == len(self._cores) - 1:
                break
        return [unpack_content(item.content, BODY_BYTES * 2) for item in received]

    def _step(self) -> list[Item]:
        """Let time pass, and all that is on its way arrive."""
        self._now = Instant(self._now.steady + STEP_S, self._now.unix + STEP_S)
        self._events.extend((number, Tick()) for number in range(len(self._cores)))
        received: list[Item] = []
        while self._events:
            at, event = self._events.popleft()
            for action in self._cores[at].handle(event, self._now):
                match action:
                    case FillLink(link):
                        there = Link(self._keys[at], dialled=not link.dialled)
                        while frame := self._cores[at].make_frame(link, self._now):
                            self._events.append((self._keys.index(link.key), Arrived(there, frame)))
                    case Dial(address):
                        self._events.append((at, Opened(Link(address.key, dialled=True))))
                        self._events.append((0, Accepted(Link(self._keys[at], dialled=False), "10.0.0.2")))
                    case SendFrame(link, frame):
                        there = Link(self._keys[at], dialled=not link.dialled)
                        self._events.append((self._keys.index(link.key), Arrived(there, frame)))
                    case Deliver(item):
                        received.append(item)
        return received


def _library(size: int) -> bytes:
    sources = sorted(Path(os.__file__).parent.glob("*.py"))
    return b"\n".join(source.read_bytes() for source in sources)[:size]

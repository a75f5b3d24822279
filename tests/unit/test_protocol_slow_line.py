"""An honest node whose line is slow: what waits in its queue, its announcements first, is no offence of its own."""

import heapq
import random
from collections import Counter, deque
from itertools import count

from protocol.config import Instant, Setup
from protocol.core import Core
from protocol.credentials.records import make_record
from protocol.driver import Driver
from protocol.events import Accepted, Arrived, Item, Link, Offer, Subscribe, Tick
from protocol.identity import Identity
from protocol.limits.limits import Limits
from protocol.limits.send_queues import SendQueues
from protocol.limits.timing import LAN
from protocol.membership.address_book import Book
from protocol.transport import Make
from protocol.wire.envelope import Kind, chunk_count, kind_of, seal
from protocol.wire.messages import Hello

SWARM = b"a swarm of tests"
STEP_S, DELAY_S = 0.01, 0.02
ROUND = ((0.0, 40, 60_000), (0.1, 1, 3_000_000))


class End:
    """A node, and its transport, whose frames wait for a line of so many bytes a second."""

    def __init__(self, seed: int, line: float) -> None:
        self.identity = Identity(bytes([seed]) * 32)
        self.core = Core(
            Setup(self.identity, SWARM, timing=LAN),
            Book((), Limits(max_known_peers=512)),
            random.Random(seed),
            moment(0.0),
        )
        self.queues = SendQueues(Limits(), 0.0)
        self.now = 0.0
        self.driver = Driver(self.core, self, lambda: moment(self.now), self._take)
        self.line, self.free = line, 0.0
        self.link = Link(b"", dialled=False)  # with the other
        self.got = 0
        self.left: Counter[int] = Counter()  # frames, by kind

    def serve(self, make: Make) -> None:
        self.queues.make = make

    def send(self, link: Link, frame: bytes) -> bool:
        return self.queues.put(link, frame)

    def fill(self, link: Link) -> None:
        self.queues.fill(link)

    def charge(self, link: Link, points: float) -> None:
        """Nobody dials."""

    def _take(self, item: Item) -> None:
        self.got += 1

    def do(self, event: Arrived | Accepted | Offer | Subscribe | Tick, now: float) -> None:
        self.now = now
        self.driver.feed(event)

    def greet(self, other: "End") -> None:
        self.link = Link(other.identity.curve_key, dialled=False)
        self.do(Accepted(self.link, "127.0.0.1"), 0.0)
        expiry = int(moment(3600.0).unix * 1000)
        hello = Hello(make_record(other.identity, SWARM, (), 1, "test", expiry).encoded).encode()
        stamp = int(moment(0.0).unix * 1000)
        self.do(Arrived(self.link, seal(other.identity, SWARM, Kind.HELLO, 1, stamp, hello)), 0.0)

    def leaving(self, now: float) -> list[tuple[float, bytes]]:
        """The frames that leave by now, each with when it is there."""
        sent = []
        while self.free <= now and (turn := self.queues.next(now)) is not None:
            link, frame = turn
            self.queues.sent(link, now)
            self.left[kind_of(frame)] += 1
            self.free = max(now, self.free) + len(frame) / self.line
            sent.append((self.free + DELAY_S, frame))
        return sent


def moment(now: float) -> Instant:
    return Instant(now, 1.7e9 + now)


def talk(line: float, offers: list[tuple[float, int, int]], demand: float, end: float) -> tuple[End, End, Counter[str]]:
    """Let a node publish, behind its line, at each time so many items of so many bytes; return what a peer rejected."""
    slow, quick = End(1, line), End(2, 1e9)
    slow.greet(quick)
    quick.greet(slow)
    quick.do(Subscribe(None, demand), 0.0)
    wire: list[tuple[float, int, End, bytes]] = []
    order, waiting, rng, now = count(), deque(offers), random.Random(0), 0.0
    while now < end:
        now += STEP_S
        if waiting and waiting[0][0] <= now:
            _, items, size = waiting.popleft()
            for _ in range(items):
                slow.do(Offer(bytes(8) + rng.randbytes(size)), now)
        for one, other in ((slow, quick), (quick, slow)):
            for at, frame in one.leaving(now):
                heapq.heappush(wire, (at, next(order), other, frame))
        while wire and wire[0][0] <= now:
            _, _, to, frame = heapq.heappop(wire)
            to.do(Arrived(to.link, frame), now)
        for one in (slow, quick):
            one.now = now
            if one.driver.wait() <= 0:
                one.do(Tick(), now)
    return slow, quick, quick.core.scores.rejected


def test_what_waits_behind_a_slow_line_is_not_announced_before_it_goes_and_no_copy_is_a_replay() -> None:
    slow, quick, rejected = talk(60_000, [(5.0 + 10 * at, 60, 10_000) for at in range(9)], float("inf"), 100.0)
    assert quick.got == slow.core.items_sent == 540
    assert rejected["replayed"] == 0


def test_what_waits_to_be_pushed_when_announcements_are_asked_for_is_kept_back() -> None:
    slow, quick, rejected = talk(128 << 10, [(5.0, 1500, 2500)], 2.0, 45.0)
    assert quick.got >= 100, "what was kept back is announced, and drawn as far as the demand goes"
    assert slow.core.items_sent < 300 and rejected["unasked"] == 0


def test_large_items_come_over_a_line_that_carries_many_small_ones_first() -> None:
    """A minute's items take 41 s of the line, 18 of them before the first chunk of the large one."""
    offers = [(5.0 + 60 * at + later, items, size) for at in range(3) for later, items, size in ROUND]
    slow, quick, rejected = talk(128 << 10, offers, float("inf"), 200.0)
    assert quick.got == slow.core.items_sent == 3 * 41
    assert rejected.keys() <= {"too_many_hellos"}  # this test's own greeting is one


def test_items_that_are_asked_for_whole_over_a_line_that_takes_long_for_them_cost_nothing() -> None:
    """Each burst takes 105 s of the line; what stalls is asked for again, and some of that has just left."""
    slow, quick, rejected = talk(38_000, [(5.0 + 100 * at, 40, 100_000) for at in range(3)], float("inf"), 420.0)
    assert quick.got == 120 and slow.core.items_sent < 1.2 * 120
    assert rejected.keys() <= {"too_many_hellos"}


def test_of_chunks_and_items_that_wait_long_for_a_line_no_copy_leaves() -> None:
    slow, quick, rejected = talk(128 << 10, [(5.0, 100, 60_000), (5.1, 2, 2_000_000)], float("inf"), 120.0)
    assert quick.got == 102
    assert slow.left[Kind.CHUNK] == 2 * chunk_count(2_000_000) and slow.left[Kind.ITEM] <= 102
    assert rejected.keys() <= {"too_many_hellos"}


def test_what_waits_long_for_a_line_costs_nothing_and_leaves_once() -> None:
    slow, quick, rejected = talk(256 << 10, [(5.0 + 50 * at, 100, 60_000) for at in range(2)], float("inf"), 120.0)
    assert quick.got == slow.core.items_sent == 200
    assert rejected.keys() <= {"too_many_hellos"}

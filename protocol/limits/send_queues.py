"""What waits to be sent: queues bounded in bytes, fair queueing among peers (SFQ), and the upload limit. Pure.

libzmq's high-water mark counts messages, and 128 of 1 MiB are 128 MiB for each peer that asks and does not
read. So its sockets are handed little at a time, and everything else waits here.

Rules
 1. Of one link's frames, those that we signed ourselves go first, in their order; then small items; then
    large ones. Nothing large holds up anything small.
 2. The items of a link have `max_link_queue_bytes`, those of all links together `max_queue_bytes`. What does not
    fit is refused, and whoever offered it offers it again later. What we signed ourselves has `CONTROL_BYTES`
    a link of its own, so that a peer that takes our items slowly still hears that we live, and `MAX_CONTROL_BYTES`
    in all. Where these are full, the link that has most of it loses its newest to one that would have less (as SFQ
    drops from the longest queue, McKenney 1990): links that do not read, however many, silence no other. What items a
    lost frame was about is told (`take_lost`), as of one that is refused.
 3. Whose turn it is: start-time fair queueing (Goyal, Vin, Cheng 1996). Each link has a virtual time, which
    rises by the bytes that it is sent; the link with the smallest goes next. One that was idle begins at the
    present virtual time: it is owed nothing for its silence.
 4. Under an upload limit, items wait for tokens. What we signed ourselves does not wait, but is paid for, up to
    `MAX_DEBT_S` ahead: else whoever makes us talk more than the line carries stops our items for long after it has
    gone. An item may leave the bucket in debt by a frame, which is how one larger than its burst gets out.
 5. While nothing waits for anybody, and there is no upload limit, frames pass by the queues: there is no turn to take.
 6. A link whose socket takes no more is tried again after `RETRY_S`, twice that the next time, and so on up to
    `MAX_RETRY_S`: a ROUTER cannot be polled for one of its peers.
"""

import math
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from protocol.config import Limits
from protocol.events import Lane, Link, Unsent

CONTROL_BYTES = 1 << 20  # announcements and records of minutes; a peer that takes none for so long is gone
MAX_CONTROL_BYTES = 16 * CONTROL_BYTES  # of all links: 32 KiB each where all connections that there may be are full
RETRY_S, MAX_RETRY_S = 0.001, 0.064  # on a line of 100 Mbit/s, 800 kB: libzmq is not emptied meanwhile
BURST_S = 0.25  # of the upload limit: what a line's own buffers hold
MAX_DEBT_S = 1.0
MAX_IDLE = 256  # links without frames whose virtual time is remembered


class _Waiting(NamedTuple):
    frame: bytes
    ids: tuple[bytes, ...]  # of the items that it is about, or the place of its chunk


@dataclass(slots=True)
class _Queue:
    virtual: float
    lanes: tuple[deque[_Waiting], ...] = field(default_factory=lambda: tuple(deque() for _ in Lane))
    held: set[bytes] = field(default_factory=set)  # ids of the items, and places of chunks, that wait
    control: int = 0  # bytes
    items: int = 0
    blocked_until: float = -math.inf
    pause: float = RETRY_S

    @property
    def head(self) -> Lane | None:
        return next((lane for lane in Lane if self.lanes[lane]), None)


class SendQueues:
    """See the module's comment. Times are steady seconds."""

    def __init__(self, limits: Limits, now: float) -> None:
        self._limits = limits
        self._rate = limits.upload_bytes_per_second
        self._queues: dict[Link, _Queue] = {}
        self._busy: dict[Link, _Queue] = {}  # those with frames
        self._virtual = 0.0
        self._tokens = self._rate * BURST_S
        self._filled = now
        self.item_bytes = 0  # of all links
        self.control_bytes = 0  # of all links
        self._lost: list[Unsent] = []

    def __len__(self) -> int:
        return sum(len(lane) for queue in self._busy.values() for lane in queue.lanes)

    @property
    def is_open(self) -> bool:
        """Whether nothing waits and nothing has to, so that a frame may go past the queues."""
        return not self._busy and not self._rate

    @property
    def congested(self) -> frozenset[Link]:
        """The links whose items wait."""
        return frozenset(link for link, queue in self._busy.items() if queue.items)

    def holds(self, link: Link, ids: tuple[bytes, ...]) -> bool:
        """Tell whether these items, or chunks, wait for the link: what is on its way need not be put here again."""
        queue = self._busy.get(link)
        return queue is not None and queue.held.issuperset(ids)

    def put(self, link: Link, frame: bytes, lane: Lane, ids: tuple[bytes, ...] = ()) -> bool:
        """Queue a frame about these items; False: there is no room. What went for it `take_lost` tells."""
        queue = self._queues.get(link)
        size = len(frame)
        control, items = (queue.control, queue.items) if queue is not None else (0, 0)
        if lane is Lane.CONTROL:
            if control + size > CONTROL_BYTES or not self._make_room(size, control + size):
                return False
        elif items + size > self._limits.max_link_queue_bytes or self.item_bytes + size > self._limits.max_queue_bytes:
            return False
        if queue is None:
            self._forget_idle()
            queue = self._queues[link] = _Queue(self._virtual)
        if link not in self._busy:
            queue.virtual = max(queue.virtual, self._virtual)
            self._busy[link] = queue
        queue.lanes[lane].append(_Waiting(frame, ids))
        if lane is not Lane.CONTROL:
            queue.held.update(ids)
        self._count(queue, lane, size)
        return True

    def take_lost(self) -> list[Unsent]:
        """Return which items frames were about that had to make room since the last call."""
        lost, self._lost = self._lost, []
        return lost

    def next(self, now: float) -> tuple[Link, bytes] | None:
        """Return the frame to hand over now, and to whom; say with `sent` or `full` what came of it."""
        if not self._busy:
            return None
        self._refill(now)
        best: tuple[bool, float] | None = None
        turn: tuple[Link, bytes] | None = None
        for link, queue in self._busy.items():
            lane = queue.head
            if lane is None or now < queue.blocked_until or not (lane is Lane.CONTROL or self._may_upload):
                continue
            rank = (lane is not Lane.CONTROL, queue.virtual)
            if best is None or rank < best:
                best, turn = rank, (link, queue.lanes[lane][0].frame)
        return turn

    def sent(self, link: Link) -> None:
        """The frame that was next went out."""
        queue = self._busy[link]
        lane = queue.head
        assert lane is not None
        left = queue.lanes[lane].popleft()
        size = len(left.frame)
        if lane is not Lane.CONTROL:
            queue.held.difference_update(left.ids)
        self._count(queue, lane, -size)
        self._virtual = max(self._virtual, queue.virtual)
        queue.virtual += size
        queue.pause = RETRY_S
        least = -math.inf if lane is not Lane.CONTROL else min(self._tokens, -self._rate * MAX_DEBT_S)
        if self._rate:
            self._tokens = max(least, self._tokens - size)
        if queue.head is None:
            del self._busy[link]

    def full(self, link: Link, now: float) -> None:
        """The link's socket takes no more for now."""
        queue = self._busy[link]
        queue.blocked_until = now + queue.pause
        queue.pause = min(MAX_RETRY_S, 2 * queue.pause)

    def drop(self, link: Link) -> None:
        """The link is gone, and what waited for it."""
        queue = self._queues.pop(link, None)
        if queue is not None:
            self.item_bytes -= queue.items
            self.control_bytes -= queue.control
            self._busy.pop(link, None)

    def wait(self, now: float) -> float:
        """Return in how many seconds `next` may have something; infinity while nothing waits."""
        if not self._busy:
            return math.inf
        self._refill(now)
        due = math.inf
        tokens_at = now if self._may_upload else now - self._tokens / self._rate
        for queue in self._busy.values():
            at = queue.blocked_until if queue.head is Lane.CONTROL else max(queue.blocked_until, tokens_at)
            due = min(due, at)
        return max(0.0, due - now)

    @property
    def _may_upload(self) -> bool:
        return not self._rate or self._tokens > 0

    def _refill(self, now: float) -> None:
        if self._rate:
            self._tokens = min(self._rate * BURST_S, self._tokens + max(0.0, now - self._filled) * self._rate)
            self._filled = now

    def _count(self, queue: _Queue, lane: Lane, size: int) -> None:
        if lane is Lane.CONTROL:
            queue.control += size
            self.control_bytes += size
        else:
            queue.items += size
            self.item_bytes += size

    def _make_room(self, size: int, total: int) -> bool:
        """Have room for `size` bytes of control frames, of a link that then has `total`; False: none has more."""
        while self.control_bytes + size > MAX_CONTROL_BYTES:
            link, most = max(self._busy.items(), key=lambda item: item[1].control)
            if most.control <= total:
                return False
            lost = most.lanes[Lane.CONTROL].pop()
            self._count(most, Lane.CONTROL, -len(lost.frame))
            if lost.ids:
                self._lost.append(Unsent(link, lost.ids))
            if most.head is None:
                del self._busy[link]
        return True

    def _forget_idle(self) -> None:
        if len(self._queues) - len(self._busy) >= MAX_IDLE:
            self._queues = dict(self._busy)

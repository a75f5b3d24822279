"""Send queues: bounded in bytes, with fair queueing among peers (SFQ), and the upload limit. Pure.

libzmq's high-water mark counts messages, and 128 of 1 MiB are 128 MiB for each peer that asks and does not
read. So its sockets are handed little at a time, and everything else waits here.

Rules
 1. On one link, messages go first, in their order, and then items.
 2. Items and chunks wait in gossip. `make` asks for the next one of a link when it is the link's turn. So they take no
    memory here, and what is not wanted any more is never made. Messages have `control_bytes` of each link. So a peer
    that takes our items slowly still hears that we live, and peers that read nothing silence no other.
 3. Turns follow start-time fair queueing (Goyal, Vin, Cheng 1996). Each link has a virtual time, which rises by the
    bytes that it is sent; the link with the smallest goes next. One that was idle begins at the present virtual time:
    it is owed nothing for its silence. Once all are idle, all begin anew.
 4. Under an upload limit, items wait for tokens. Messages do not wait, but take tokens, up to a debt of
    `upload_debt_s`. Without that bound, a peer that makes us talk more than the line carries would stop our items for
    long after it has gone. An item may leave the bucket in debt by one frame, so that large items get out.
 5. While nothing waits on any link, and there is no upload limit, frames bypass the queues.
 6. A link whose socket takes no more is tried again after `RETRY_S`, twice that the next time, and so on up to
    `MAX_RETRY_S`: a ROUTER cannot be polled for one of its peers.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count

from protocol.events import Link
from protocol.limits.limits import Limits
from protocol.limits.rate_limits import TokenBucket

FRAME_COST = 128  # bytes of memory that a frame takes beside its own: a peer may make us queue many small ones
RETRY_S, MAX_RETRY_S = 0.001, 0.064  # a line of 100 Mbit/s sends 800 kB in that time, less than libzmq holds of a link


@dataclass(slots=True)
class _Queue:
    link: Link
    virtual: float
    control: deque[bytes] = field(default_factory=deque)
    control_bytes: int = 0
    has_items: bool = False
    item: bytes = b""  # the frame that was made, until the socket takes it
    is_blocked: bool = False
    pause: float = RETRY_S
    place: int = -1  # the number of its place in one of the heaps: a place with another number is an old one


class SendQueues:
    """See the module's comment. Times are steady seconds."""

    def __init__(self, limits: Limits, now: float) -> None:
        self._limits = limits
        self._rate = limits.upload_bytes_per_second
        self._queues: dict[Link, _Queue] = {}
        self._busy: dict[Link, _Queue] = {}  # those for which something waits, each in one of these heaps:
        self._ready: list[tuple[bool, float, int, _Queue]] = []  # in the order of their turns
        self._blocked: list[tuple[float, int, _Queue]] = []  # by the time when they are tried again
        self._places = count()
        self._virtual = 0.0
        self._upload = TokenBucket(self._rate, self._rate * limits.upload_burst_s, now)
        # Return the frame of the link's next item, empty if none waits: see `Gossip.serve`.
        self.make: Callable[[Link], bytes] = lambda link: b""

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits."""
        return not self._busy

    @property
    def is_open(self) -> bool:
        """Whether nothing waits and nothing has to, so that a frame may go past the queues."""
        return not self._busy and not self._rate

    def put(self, link: Link, frame: bytes) -> bool:
        """Queue a message; False if there is no room."""
        queue, size = self._queues.get(link), len(frame) + FRAME_COST
        if size + (queue.control_bytes if queue is not None else 0) > self._limits.control_bytes:
            return False
        queue = self._begin(link)
        queue.control.append(frame)
        queue.control_bytes += size
        if len(queue.control) == 1 and not queue.is_blocked:
            self._place(queue)
        return True

    def fill(self, link: Link) -> None:
        """Let `make` make items for the link whenever it has its turn, until `make` has none."""
        self._begin(link).has_items = True

    def _begin(self, link: Link) -> _Queue:
        queue = self._queues.setdefault(link, _Queue(link, self._virtual))
        if link not in self._busy:
            queue.virtual = max(queue.virtual, self._virtual)
            self._busy[link] = queue
            self._place(queue)
        return queue

    def _place(self, queue: _Queue) -> None:
        """Let a link wait for its turn, at the place that it has by now."""
        queue.is_blocked, queue.place = False, next(self._places)
        heappush(self._ready, (not queue.control, queue.virtual, queue.place, queue))

    def next(self, now: float) -> tuple[Link, bytes] | None:
        """Return the link whose turn it is, and its frame. The caller answers with `sent` or `full`."""
        while self._retry_at() <= now:
            self._place(heappop(self._blocked)[-1])
        while (queue := self._first()) is not None and (queue.control or self._may_upload(now)):
            if queue.control:
                return queue.link, queue.control[0]
            queue.item = queue.item or self.make(queue.link)
            if queue.item:
                return queue.link, queue.item
            queue.has_items = False
            self._rest(queue)
        return None

    def _first(self) -> _Queue | None:
        """Return the one whose turn it is, if no token is missing."""
        while self._ready and self._ready[0][-1].place != self._ready[0][-2]:
            heappop(self._ready)
        return self._ready[0][-1] if self._ready else None

    def _retry_at(self) -> float:
        """Return when the next link is tried again; infinity if none waits for that."""
        while self._blocked and self._blocked[0][-1].place != self._blocked[0][-2]:
            heappop(self._blocked)
        return self._blocked[0][0] if self._blocked else math.inf

    def sent(self, link: Link, now: float) -> None:
        """Note that the frame that `next` returned was taken by the link's socket."""
        queue = self._busy[link]
        if queue.control:
            size = len(queue.control.popleft())
            queue.control_bytes -= size + FRAME_COST
            credit = self._upload.level(now) + self._rate * self._limits.upload_debt_s
            self._upload.spend(min(size, max(0.0, credit)))
        else:
            size, queue.item = len(queue.item), b""
            self._upload.spend(size)
        self._virtual = max(self._virtual, queue.virtual)
        queue.virtual += size
        queue.pause = RETRY_S
        self._rest(queue)

    def full(self, link: Link, now: float) -> None:
        """Note that the link's socket takes no more for now."""
        queue = self._busy[link]
        queue.is_blocked, queue.place = True, next(self._places)
        heappush(self._blocked, (now + queue.pause, queue.place, queue))
        queue.pause = min(MAX_RETRY_S, 2 * queue.pause)

    def drop(self, link: Link) -> None:
        """Drop a link that is gone, and what waited for it."""
        self._busy.pop(link, None)
        if (queue := self._queues.pop(link, None)) is not None:
            queue.place = -1

    def _rest(self, queue: _Queue) -> None:
        """Let a link wait for its next turn, if it still has something to send."""
        if queue.control or queue.has_items:
            self._place(queue)
            return
        del self._busy[queue.link]
        queue.place = -1
        if not self._busy:
            for table in (self._queues, self._ready, self._blocked):
                table.clear()

    def wait(self, now: float) -> float:
        """Return in how many seconds `next` may have something; infinity while nothing waits."""
        if not self._busy:
            return math.inf
        due = self._retry_at()
        if (queue := self._first()) is not None:
            is_free = queue.control or self._may_upload(now)
            due = min(due, now if is_free else now - self._upload.level(now) / self._rate)
        return max(0.0, due - now)

    def _may_upload(self, now: float) -> bool:
        return not self._rate or self._upload.level(now) > 0

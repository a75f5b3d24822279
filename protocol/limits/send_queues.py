"""Send queues: bounded in bytes, with fair queueing among peers (SFQ), and the upload limit. Pure.

libzmq's high-water mark counts messages, and 128 of 1 MiB are 128 MiB for each peer that asks and does not
read. So its sockets are handed little at a time, and everything else waits here.

Rules
 1. Of one link's frames, what we say goes first, in its order; then small items; then
    large ones. Nothing large holds up anything small.
 2. Items and chunks wait by their names, and become frames when it is their turn: so they take no memory, and what is
    not wanted any more is left out. The caller bounds their number. Control messages have `control_bytes` a link of
    its own, so that a peer that takes our items slowly still hears that we live, and one that reads nothing, however
    many do, silences no other.
 3. Whose turn it is: start-time fair queueing (Goyal, Vin, Cheng 1996). Each link has a virtual time, which
    rises by the bytes that it is sent; the link with the smallest goes next. One that was idle begins at the
    present virtual time: it is owed nothing for its silence.
 4. Under an upload limit, items wait for tokens. Our own items do not wait, but are paid for, up to `upload_debt_s`
    ahead. Otherwise a peer that makes us talk more than the line carries would stop our items for long after it has
    gone. An item may leave the bucket in debt by a frame, which is how one larger than its burst gets out.
 5. While nothing waits for anybody, and there is no upload limit, frames pass by the queues: there is no turn to take.
 6. A link whose socket takes no more is tried again after `RETRY_S`, twice that the next time, and so on up to
    `MAX_RETRY_S`: a ROUTER cannot be polled for one of its peers.
"""

import math
from collections import deque
from dataclasses import dataclass, field

from protocol.config import Limits
from protocol.events import Lane, Link

FRAME_COST = 128  # bytes of memory that a frame takes beside its own: a peer that pings and never reads has small ones
RETRY_S, MAX_RETRY_S = 0.001, 0.064  # on a line of 100 Mbit/s, 800 kB: libzmq is not emptied meanwhile
_LANES = tuple(Lane)


@dataclass(slots=True)
class Waiting:
    """A waiting entry: a frame, or the name of what becomes one, of about `size` bytes.

    Our own frames count with `FRAME_COST`.
    """

    frame: bytes
    place: bytes
    size: int


@dataclass(slots=True)
class _Queue:
    virtual: float
    lanes: tuple[deque[Waiting], ...] = field(default_factory=lambda: tuple(deque() for _ in Lane))
    control: int = 0  # bytes
    blocked_until: float = -math.inf
    pause: float = RETRY_S

    @property
    def head(self) -> Lane | None:
        for lane, waiting in zip(_LANES, self.lanes, strict=True):
            if waiting:
                return lane
        return None


class SendQueues:
    """See the module's comment. Times are steady seconds."""

    def __init__(self, limits: Limits, now: float) -> None:
        self._limits = limits
        self._rate = limits.upload_bytes_per_second
        self._queues: dict[Link, _Queue] = {}
        self._busy: dict[Link, _Queue] = {}  # those with frames
        self._virtual = 0.0
        self._tokens = self._rate * self._limits.upload_burst_s
        self._filled = now

    def __len__(self) -> int:
        return sum(len(lane) for queue in self._busy.values() for lane in queue.lanes)

    @property
    def is_open(self) -> bool:
        """Whether nothing waits and nothing has to, so that a frame may go past the queues."""
        return not self._busy and not self._rate

    def put(self, link: Link, frame: bytes) -> bool:
        """Queue what we say; False: there is no room."""
        queue, size = self._queues.get(link), len(frame) + FRAME_COST
        if size + (queue.control if queue is not None else 0) > self._limits.control_bytes:
            return False
        self._append(link, Lane.CONTROL, Waiting(frame, b"", size))
        return True

    def queue(self, link: Link, place: bytes, lane: Lane, size: int, frame: bytes = b"") -> None:
        """Queue what becomes a frame of about `size` bytes when its turn comes, or did already."""
        self._append(link, lane, Waiting(frame, place, size))

    def _append(self, link: Link, lane: Lane, waiting: Waiting) -> None:
        queue = self._queues.get(link)
        if queue is None:
            self._forget_idle()
            queue = self._queues[link] = _Queue(self._virtual)
        if link not in self._busy:
            queue.virtual = max(queue.virtual, self._virtual)
            self._busy[link] = queue
        queue.lanes[lane].append(waiting)
        if lane is Lane.CONTROL:
            queue.control += waiting.size

    def next(self, now: float) -> tuple[Link, Waiting] | None:
        """Return what is to be handed over now, and to whom; say with `sent`, `skip` or `full` what came of it.

        It has a frame, or only a place: then set the frame.
        """
        if not self._busy:
            return None
        self._refill(now)
        best: tuple[bool, float] | None = None
        turn: tuple[Link, Waiting] | None = None
        for link, queue in self._busy.items():
            lane = queue.head
            if lane is None or now < queue.blocked_until or not (lane is Lane.CONTROL or self._may_upload):
                continue
            rank = (lane is not Lane.CONTROL, queue.virtual)
            if best is None or rank < best:
                best, turn = rank, (link, queue.lanes[lane][0])
        return turn

    def sent(self, link: Link) -> None:
        """The frame that was next went out."""
        queue = self._busy[link]
        lane = queue.head
        assert lane is not None
        left = queue.lanes[lane].popleft()
        size = len(left.frame)
        if lane is Lane.CONTROL:
            queue.control -= left.size
        self._virtual = max(self._virtual, queue.virtual)
        queue.virtual += size
        queue.pause = RETRY_S
        least = -math.inf if lane is not Lane.CONTROL else min(self._tokens, -self._rate * self._limits.upload_debt_s)
        if self._rate:
            self._tokens = max(least, self._tokens - size)
        if queue.head is None:
            del self._busy[link]

    def skip(self, link: Link) -> None:
        """The next entry is not wanted any more."""
        queue = self._busy[link]
        lane = queue.head
        assert lane is not None
        queue.lanes[lane].popleft()
        if queue.head is None:
            del self._busy[link]

    def full(self, link: Link, now: float) -> None:
        """The link's socket takes no more for now."""
        queue = self._busy[link]
        queue.blocked_until = now + queue.pause
        queue.pause = min(MAX_RETRY_S, 2 * queue.pause)

    def drop(self, link: Link) -> None:
        """The link is gone, and what waited for it."""
        self._queues.pop(link, None)
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
            burst = self._rate * self._limits.upload_burst_s
            self._tokens = min(burst, self._tokens + max(0.0, now - self._filled) * self._rate)
            self._filled = now

    def _forget_idle(self) -> None:
        if len(self._queues) - len(self._busy) >= self._limits.max_idle_links:
            self._queues = dict(self._busy)

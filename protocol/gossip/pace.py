"""Pace: how many bytes may be under way over our line, in one direction. Pure, no kernel is asked.

What a slow line has not carried waits in kernels and in the modem. There it cannot be cancelled, what follows waits
behind it, and after some seconds connections break. libzmq and the kernel take megabytes for a link at once, so only
peers tell what our line has carried: they acknowledge what we gave, and give what we asked for.

A quick answer shows that the line has room: the window grows by the bytes answered, if half of it was used. An answer
after more than `LATE_S` halves the window. So an uplink that carries a chunk a second has some seven under way, and a
downlink some three. Answers to what we give are slow where several give to one peer, though our line is free.
What was not answered within `LOST_S` does not count as under way any more: who is silent stops nobody else.
"""

from protocol.limits.networks import Scope, scope_of
from protocol.wire.envelope import CHUNK_BYTES

LEAST_BYTES = 2 * CHUNK_BYTES  # while one chunk is answered, another is under way
MOST_BYTES = 64 << 20  # half a second of a line of 1 Gbit/s
UPLINK_QUICK_S = 3.5  # with 1.5, of 16 items that 16 nodes on 1 Mbit/s gave to all, 207 of 240 came in 190 s
DOWNLINK_QUICK_S = 1.5
LATE_S = 12.0  # `LEAST_BYTES` take 8 s of a line of 256 kbit/s; our kernel waits 15 s for an acknowledgement
LOST_S = 20.0


class LineWindow:
    """The window of one line, and the bytes `under_way`; see the module's comment. Times are steady seconds."""

    def __init__(self, window: int, quick_s: float) -> None:
        self.window = window
        self._quick_s = quick_s
        self.under_way = 0
        self._cut_at = float("-inf")

    @property
    def is_full(self) -> bool:
        return self.under_way >= self.window

    def answered(self, size: int, took: float, now: float) -> None:
        """Fit the window to an answer that took so long; its bytes still count as under way."""
        if took <= self._quick_s and 2 * self.under_way >= self.window:
            self.window = min(MOST_BYTES, self.window + size)
        elif took > LATE_S and now > self._cut_at + LATE_S:
            self.window, self._cut_at = max(LEAST_BYTES, self.window // 2), now


class Lines:
    """Our line to the world, and another: to the private networks that we are in."""

    def __init__(self, window: int, quick_s: float) -> None:
        self._far, self._near = LineWindow(window, quick_s), LineWindow(window, quick_s)

    def to(self, voice: str) -> LineWindow:
        """Return the line over which a peer is reached that counts as `voice`."""
        return self._near if scope_of(voice) is Scope.PRIVATE else self._far

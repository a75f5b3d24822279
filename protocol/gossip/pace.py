"""Pace: how many bytes may be under way over our line, in one direction. Pure, no kernel is asked.

What a slow line has not carried waits in kernels and in the modem. There it cannot be cancelled, what follows waits
behind it, and after some seconds connections break. libzmq and the kernel take megabytes for a link at once, so only
peers tell what our line has carried: they acknowledge what we gave, and give what we asked for.

An answer within `QUICK_S` shows that the line has room: the window grows by the bytes answered, if half of it was used.
An answer after more than `LATE_S` halves the window. So a line that carries a chunk a second has some four under way.
What was not answered within `LOST_S` does not count as under way any more: who is silent stops nobody else.
"""

from protocol.limits.networks import Scope, scope_of
from protocol.wire.envelope import CHUNK_BYTES

LEAST_BYTES = 2 * CHUNK_BYTES  # while one chunk is answered, another is under way
MOST_BYTES = 64 << 20  # half a second of a line of 1 Gbit/s
QUICK_S = 3.5  # more than a chunk takes of a line of 1 Mbit/s where several send to one peer
LATE_S = 12.0  # `LEAST_BYTES` take 8 s of a line of 256 kbit/s; our kernel waits 15 s for an acknowledgement
LOST_S = 20.0


class LineWindow:
    """The window of one line, and the bytes `under_way`; see the module's comment. Times are steady seconds."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.under_way = 0
        self._cut_at = float("-inf")

    @property
    def is_full(self) -> bool:
        return self.under_way >= self.window

    def answered(self, size: int, took: float, now: float) -> None:
        """Fit the window to an answer that took so long; its bytes still count as under way."""
        if took <= QUICK_S and 2 * self.under_way >= self.window:
            self.window = min(MOST_BYTES, self.window + size)
        elif took > LATE_S and now > self._cut_at + LATE_S:
            self.window, self._cut_at = max(LEAST_BYTES, self.window // 2), now


class Lines:
    """Our line to the world, and another: to the private networks that we are in."""

    def __init__(self, window: int) -> None:
        self._far, self._near = LineWindow(window), LineWindow(window)

    def to(self, voice: str) -> LineWindow:
        """Return the line over which a peer is reached that counts as `voice`."""
        return self._near if scope_of(voice) is Scope.PRIVATE else self._far

"""Quotas: what the nodes of one network may cost us, in processor time, and the frames that wait for it. Pure.

Keys are free and networks are not. So all nodes that count as one (see `counts_as`) share a quota, and strangers there
have another: else they would use up what its peers need. Every frame is paid for by its size, and so is every byte that
it makes us send. The prices are stated, not measured as we run, so that a simulation is the same on each machine.
`python -m tests.frame_costs` compares them with what frames cost.

Rules
 1. A frame is handled while its payer's quota is above 0, and then paid for.
 2. Otherwise it waits. The links of a payer take turns, so a peer that was blocked for a while loses nothing, and one
    whose neighbour floods us is heard.
 3. `waiting_bytes` may wait for a payer. Beyond them, the newest frame of the link of which most waits is dropped as
    "flood", and costs that link's holder and network points by its price. Else each new key could have as much dropped.
 4. We give peers what they ask for while more than half of their quota is left. So it does not delay their messages.
 5. An item or a chunk that we asked for costs nothing. Another one is dropped at once, and its sender and network lose
    points by its price, as nobody sends such a thing by mistake.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from protocol.events import Link
from protocol.limits.limits import Limits
from protocol.limits.rate_limits import TokenBuckets
from protocol.limits.send_queues import FRAME_COST
from protocol.wire.envelope import CONTROL

# Seconds of processor time, on all threads: see `docs/results/protocol.md`.
FRAME_S = 200e-6
SIGNATURE_S = 100e-6  # more, if the frame is sealed
BYTE_S = 400e-9  # the dearest are those of WANT, CANCEL and of new records; so 250 kB a second come unasked
GIVEN_S = 50e-6  # an item or a chunk that is given: we make it when its link is free
SENT_BYTE_S = 2e-9
RESUME_S = 0.05  # between two looks at what waits


class Payer(NamedTuple):
    """Who pays for a frame: the network or node that its sender counts as, and whether the sender is a live peer."""

    voice: str
    is_peer: bool


def price(frame: bytes) -> float:
    """Return the processor seconds that a frame costs which nobody asked for."""
    each = FRAME_S if frame.startswith(CONTROL) else FRAME_S + SIGNATURE_S
    return each + len(frame) * BYTE_S


@dataclass(slots=True)
class _Waiting:
    """Frames that wait, and the memory that they take."""

    frames: deque[bytes] = field(default_factory=deque)
    size: int = 0

    def add(self, frame: bytes) -> None:
        self.frames.append(frame)
        self.size += len(frame) + FRAME_COST

    def take(self, *, newest: bool = False) -> bytes:
        frame = self.frames.pop() if newest else self.frames.popleft()
        self.size -= len(frame) + FRAME_COST
        return frame


class Quotas:
    """See the module's comment. Times are steady seconds."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._buckets: TokenBuckets[Payer] = TokenBuckets(
            limits.network_cores, limits.network_burst_s, 2 * limits.max_remembered
        )
        self._queues: dict[Payer, dict[Link, _Waiting]] = {}  # the link whose turn it is comes first
        self._resume_at = 0.0

    def may_speak(self, payer: Payer, link: Link, now: float) -> bool:
        """Tell whether a frame of the link is handled now: rules 1 and 2."""
        return link not in self._queues.get(payer, ()) and self._buckets.of(payer, now).level(now) > 0

    def may_take(self, payer: Payer, now: float) -> bool:
        """Tell whether a peer is given what it asked for: rule 4."""
        return self._buckets.of(payer, now).level(now) > self._limits.network_burst_s / 2

    def spend(self, payer: Payer, seconds: float, now: float) -> None:
        """Pay for something that was done."""
        self._buckets.of(payer, now).spend(seconds)

    def put(self, payer: Payer, link: Link, frame: bytes, now: float) -> list[tuple[Link, bytes]]:
        """Let a frame wait; return those that are dropped for it, and whose they are. Rule 3."""
        if not self._queues:
            self._resume_at = now + RESUME_S
        queue = self._queues.setdefault(payer, {})
        queue.setdefault(link, _Waiting()).add(frame)
        dropped = []
        while sum(waiting.size for waiting in queue.values()) > self._limits.waiting_bytes:
            heaviest = max(queue, key=lambda other: queue[other].size)
            dropped.append((heaviest, queue[heaviest].take(newest=True)))
            if not queue[heaviest].frames:
                self._forget(payer, heaviest)
        return dropped

    def next(self, now: float) -> tuple[Link, bytes] | None:
        """Return the next frame that has waited and is handled now, and whose it is; None if there is none."""
        for payer, queue in self._queues.items():
            if self._buckets.of(payer, now).level(now) > 0:
                link = next(iter(queue))
                waiting = queue[link] = queue.pop(link)  # so the others have their turns first
                frame = waiting.take()
                if not waiting.frames:
                    self._forget(payer, link)
                return link, frame
        self._resume_at = now + RESUME_S
        return None

    def drop(self, link: Link) -> None:
        """Drop what waits of a link that ended."""
        for payer in [payer for payer, queue in self._queues.items() if link in queue]:
            self._forget(payer, link)

    def _forget(self, payer: Payer, link: Link) -> None:
        del self._queues[payer][link]
        if not self._queues[payer]:
            del self._queues[payer]

    @property
    def due(self) -> float:
        """When to ask for the `next` frame again; infinity while none waits."""
        return self._resume_at if self._queues else float("inf")

"""What a network in memory does to frames: delays, losses, and partitions."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Conditions:
    """What the network does to frames: one-way delay bounds in seconds, and the share that is lost.

    TCP loses nothing on a live connection. Loss stands for everything that makes a frame
    vanish without the link closing: full queues, stalled processes, overloaded hosts.
    Nodes are spread over `regions` in turn; between two regions a frame takes `far_delay` longer.
    """

    min_delay: float = 0.005
    max_delay: float = 0.05
    loss: float = 0.0
    regions: int = 1
    far_delay: float = 0.0

    @property
    def longest_delay(self) -> float:
        """The most that a frame takes, in seconds."""
        return self.max_delay + (self.far_delay if self.regions > 1 else 0.0)


@dataclass(slots=True)
class Cut:
    """Frames from side i to side j vanish if (i, j) is in `ways`; a key that is not in `sides` is on side 0."""

    sides: Mapping[bytes, int]
    ways: frozenset[tuple[int, int]]

    def stops(self, sender: bytes, receiver: bytes) -> bool:
        """Tell whether what `sender` sends to `receiver` vanishes."""
        return (self.sides.get(sender, 0), self.sides.get(receiver, 0)) in self.ways

"""What a node asks the swarm for: its tasks' topics, and as many groups a second as it can use.

The demand is what the sampler draws, times `OVERSAMPLING`, over the measured seconds a round.
A node that trains on nobody's groups still takes `RELAY_DEMAND`: what it takes it passes on,
and a link that ends at a node which carries nothing is lost to its neighbours.
"""

import hashlib
import math

from node.tasks.base import TaskKey
from protocol.messages import TOPIC_BYTES

# Of what comes, some is without advantage, some drawn before it is read and some too old when its
# turn comes, and a rule that ranks groups wants a choice. Twice this is what seven peers of our own
# kind make, so in a swarm of up to nine such nodes everybody still gets everything.
OVERSAMPLING = 8.0
RELAY_DEMAND = 2.0  # items a second: about 20 kB a second of an ordinary node's line
SEED_DEMAND = 32.0  # of a node that only relays: as much as it remembers for an hour (`gossip.SEEN_ITEMS`)
FIRST_ROUNDS = 3  # measured before anything is declined: the first are slow, and a guess could starve the node
WEIGHT = 0.2  # of the latest round in the average
TELL_RATIO = 2.0  # a change by less is not worth a message to every peer


def topic_of(key: TaskKey) -> bytes:
    """Return the topic (8 bytes) under which groups of the task are shared: of a SHA-256 over its key."""
    text = "\x1f".join((key.name, str(key.version), key.config))
    return hashlib.sha256(text.encode()).digest()[:TOPIC_BYTES]


class Demand:
    """Groups a second that a node with `external` groups a round can use; unbounded until it is measured."""

    def __init__(self, external: int) -> None:
        self._external = external
        self._rounds = 0
        self._began: float | None = None
        self._seconds = 0.0
        self.told = math.inf if external else RELAY_DEMAND

    def next_round(self, now: float) -> bool:
        """Note that a round begins at `now` (s, steady); True if `told` has become another number."""
        if self._began is not None:
            took = now - self._began
            self._seconds = took if self._rounds == 0 else self._seconds + WEIGHT * (took - self._seconds)
            self._rounds += 1
        self._began = now
        if self._rounds < FIRST_ROUNDS or self._external == 0:
            return False
        demand = max(RELAY_DEMAND, OVERSAMPLING * self._external / max(self._seconds, 1e-3))
        if self.told / TELL_RATIO <= demand <= self.told * TELL_RATIO:
            return False
        self.told = demand
        return True

"""How patient a node is with others."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timing:
    """How patient a node is, in seconds.

    A live peer that was heard within `probe_interval` is not probed at all (the constants follow SWIM: Das, Gupta,
    Motivala 2002). One that is silent longer costs a ping; when no answer comes within `probe_timeout`, it is pinged
    again and has as long again; then it is suspected for `suspicion`.

        a dead peer is dropped within   probe_interval + 2 x probe_timeout + suspicion

    A smaller sum finds the dead sooner. A larger one spares the living: a process that loads a
    model holds its interpreter for up to about 20 s. Being dropped costs it a handshake and nothing else.

    Each silent link costs a ping and a pong a `probe_interval`: 12 links at 5 s are 2.4 messages
    a second each way.
    """

    probe_interval: float
    probe_timeout: float  # a round trip, and the other end's busy moments
    suspicion: float  # a peer that talks on and answers nothing pays once in this time, too
    exchange_interval: float  # between two exchanges of records with a random peer
    rotate_interval: float  # between two replacements of one link by a random other: what keeps the overlay random
    announce_interval: float  # an id waits so long to be announced together with others
    pull_patience: float  # a holder that says nothing for so long, and the time that a chunk takes, is silent
    sync_interval: float  # between two announcements of what is newest to a random peer, in case one was lost

    @property
    def death_bound(self) -> float:
        """Seconds in which a dead peer is dropped by a node that is well itself."""
        return self.probe_interval + 2 * self.probe_timeout + self.suspicion


LOCAL = Timing(
    probe_interval=2.0,
    probe_timeout=1.0,
    suspicion=24.0,
    exchange_interval=10.0,
    rotate_interval=120.0,
    announce_interval=0.01,
    pull_patience=2.0,
    sync_interval=10.0,
)
LAN = Timing(
    probe_interval=3.0,
    probe_timeout=1.0,
    suspicion=30.0,
    exchange_interval=20.0,
    rotate_interval=240.0,
    announce_interval=0.05,
    pull_patience=2.0,
    sync_interval=15.0,
)
WAN = Timing(
    probe_interval=5.0,
    probe_timeout=3.0,
    suspicion=45.0,
    exchange_interval=30.0,
    rotate_interval=300.0,
    announce_interval=0.1,
    pull_patience=4.0,
    sync_interval=15.0,
)
# A node takes LOCAL if it listens on loopback only, else WAN (`node.swarm.peering.timing_of`). Simulations take any.
PRESETS = {"local": LOCAL, "lan": LAN, "wan": WAN}

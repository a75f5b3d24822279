"""How patient a node is, for three kinds of network.

The probe and suspicion constants follow SWIM (Das, Gupta, Motivala 2002) and Lifeguard
(Dadgar, Phillips, Currey 2018), on live links only. A live peer that was heard within
`probe_interval` is not probed at all. One that is silent longer costs a ping; when no answer
comes within `probe_timeout`, helpers are asked and have as long again; then it is suspected
for `suspicion_max`, or less with each independent confirmation, down to `suspicion_min`.

    a dead peer is dropped within   probe_interval + 2 x probe_timeout + suspicion_max

A smaller sum finds the dead sooner. A larger one spares the living: a process that loads a
model holds its interpreter for up to about 20 s, and with three confirming neighbours
`suspicion_min` is all the time it gets. Being dropped costs it a handshake and nothing else.

Each silent link costs a ping and a pong a `probe_interval`: 12 links at 5 s are 2.4 messages
a second each way.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timing:
    """All in seconds."""

    probe_interval: float
    probe_timeout: float  # a round trip, and the other end's busy moments
    suspicion_min: float
    suspicion_max: float
    exchange_interval: float  # between two exchanges of records with a random peer
    rotate_interval: float  # between two replacements of one link by a random other: what keeps the overlay random
    announce_interval: float  # ids wait this long for company; it bounds a node's announcements a second
    pull_delay: float  # an announced small item is probably on its way as a push: a one-way delay, and then some
    pull_patience: float  # before a second holder is asked, beside the time that the bytes themselves take
    sync_interval: float  # between two announcements of what is newest to a random peer, in case one was lost

    @property
    def death_bound(self) -> float:
        """Seconds in which a dead peer is dropped by a node that is well itself."""
        return self.probe_interval + 2 * self.probe_timeout + self.suspicion_max


LOCAL = Timing(
    probe_interval=2.0,
    probe_timeout=1.0,
    suspicion_min=8.0,
    suspicion_max=24.0,
    exchange_interval=10.0,
    rotate_interval=120.0,
    announce_interval=0.02,
    pull_delay=0.1,
    pull_patience=2.0,
    sync_interval=10.0,
)
LAN = Timing(
    probe_interval=3.0,
    probe_timeout=1.0,
    suspicion_min=9.0,
    suspicion_max=30.0,
    exchange_interval=20.0,
    rotate_interval=240.0,
    announce_interval=0.05,
    pull_delay=0.2,
    pull_patience=2.0,
    sync_interval=15.0,
)
WAN = Timing(
    probe_interval=5.0,
    probe_timeout=3.0,
    suspicion_min=15.0,
    suspicion_max=45.0,
    exchange_interval=30.0,
    rotate_interval=300.0,
    announce_interval=0.1,
    pull_delay=0.5,
    pull_patience=4.0,
    sync_interval=15.0,
)
PRESETS = {"local": LOCAL, "lan": LAN, "wan": WAN}

"""Failure detector: which live peers still answer. A pure state machine after SWIM, on links that exist.

    WELL     heard within probe_interval
      | silent for probe_interval: ping it                                    any frame from it --> WELL
    PINGED
      | silent for probe_timeout: ping it again, `PINGS` times in all
    SUSPECT  pinged on
      | silent for the suspicion time
    (dead)   dropped by us

While this process does not run, `now` stands still (see `protocol.config.AwakeClock`): nobody is silent in that time.

Left out: SWIM's ping-req, which asks others to probe the subject, and its rumours, which tell them. A node has links to
12 others, so beyond some tens of nodes hardly any of its peers has a link to the subject (docs/results/protocol.md has
the figures). A link's own connection tells more than a stranger can, and a node without a link finds out when it dials.
This would change if links were chosen so that neighbours share neighbours. Left out, too: Lifeguard's local health,
which makes a node more patient while it hears nobody. The suspicion time is already several times as long as the
probes, and a node that is dropped by mistake loses one handshake.
"""

import random
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

from protocol.identity import NodeId
from protocol.limits.timing import Timing
from protocol.wire.messages import Ping

PINGS = 2  # before a suspicion: with one message in ten lost, both go unanswered once in 28 times


class ProbeRound(NamedTuple):
    """The peers to ping, and those that were silent for all of their suspicion time."""

    pings: dict[NodeId, Ping]
    dead: list[NodeId]


class Liveness(Enum):
    """The state of a live peer."""

    WELL = auto()
    PINGED = auto()
    SUSPECT = auto()


@dataclass(slots=True)
class _Subject:
    heard: float
    state: Liveness = Liveness.WELL
    since: float = 0.0  # when it entered the state
    pinged: float = 0.0
    token: int = 0
    pings: int = 0  # since it was last heard
    rtt: float | None = None


class Detector:
    """See the module's comment. Times are steady seconds."""

    def __init__(self, timing: Timing, rng: random.Random) -> None:
        self._timing = timing
        self._rng = rng
        self._subjects: dict[NodeId, _Subject] = {}

    @property
    def suspects(self) -> list[NodeId]:
        return [node for node, subject in self._subjects.items() if subject.state is Liveness.SUSPECT]

    def state(self, node: NodeId) -> Liveness:
        return self._subjects[node].state

    def rtt(self, node: NodeId) -> float | None:
        """Return the seconds that the peer took to answer the last ping, if it was ever pinged."""
        return self._subjects[node].rtt

    def up(self, node: NodeId, now: float) -> None:
        self._subjects[node] = _Subject(now)

    def down(self, node: NodeId) -> None:
        self._subjects.pop(node, None)

    def heard(self, node: NodeId, now: float) -> None:
        subject = self._subjects.get(node)
        if subject is not None:
            subject.heard = now
            subject.state = Liveness.WELL

    def pong(self, node: NodeId, token: int, now: float) -> None:
        subject = self._subjects.get(node)
        if subject is not None and subject.token == token:
            subject.rtt = now - subject.pinged

    def tick(self, now: float) -> ProbeRound:
        result = ProbeRound({}, [])
        fresh = now - self._timing.probe_interval  # most peers, most of the time, were heard since
        for node, subject in self._subjects.items():
            if subject.state is not Liveness.WELL or subject.heard <= fresh:
                self._advance(node, subject, now, result)
        return result

    def _advance(self, node: NodeId, subject: _Subject, now: float, result: ProbeRound) -> None:
        timing = self._timing
        waited = now - subject.since
        match subject.state:
            case Liveness.WELL:
                subject.state, subject.since, subject.pings = Liveness.PINGED, now, 0
                result.pings[node] = self._ping(subject, now)
            case Liveness.PINGED if waited >= PINGS * timing.probe_timeout:
                subject.state, subject.since = Liveness.SUSPECT, now
            case Liveness.PINGED if waited >= subject.pings * timing.probe_timeout:
                result.pings[node] = self._ping(subject, now)
            case Liveness.SUSPECT if waited >= timing.suspicion:
                result.dead.append(node)
            case Liveness.SUSPECT if now - subject.pinged >= timing.probe_interval:
                result.pings[node] = self._ping(subject, now)

    def _ping(self, subject: _Subject, now: float) -> Ping:
        subject.pinged = now
        subject.pings += 1
        subject.token = self._rng.getrandbits(32)
        return Ping(subject.token)

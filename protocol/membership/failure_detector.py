"""Failure detector: which live peers still answer. A pure state machine after SWIM and Lifeguard, on links that exist.

    WELL     heard within probe_interval
      | silent for probe_interval: ping it                                    any frame from it --> WELL
    PINGED
      | silent for probe_timeout: ping it again, `PINGS` times in all
    SUSPECT  the others are told; pinged on
      | silent for the suspicion time
    (dead)   dropped by us

Rules
 1. The suspicion time is Lifeguard's: from suspicion_max down to suspicion_min as peers confirm
    that they do not hear the subject either, logarithmically in their number.
 2. A newer record of the subject, which only it can have signed, clears it. When only others hear it,
    `MAX_VOUCHED` times in a row, the link is at fault: it is cut, and the subject is not called dead.
 3. When nobody else was heard either since the subject was first pinged, the fault is probably ours:
    our health score rises, and with it every probe's time, up to `MAX_HEALTH` + 1 times. It falls
    with each probe that is answered in time, and rises when somebody suspects us.
 4. The time during which we were not run ourselves is nobody's silence: `now` stands still in it
    (see `protocol.config.AwakeClock`).

Left out: SWIM's ping-req, which asks others to probe the subject. A node has a link to 12 of its swarm, so beyond some
tens of nodes hardly anybody who could be asked has one to the subject (docs/results/protocol.md has the figures); and
a link's own connection and heartbeats tell more than a stranger can. What would reopen it: links that are chosen so
that neighbours share neighbours.
"""

import math
import random
from dataclasses import dataclass, field
from enum import Enum, auto

from protocol.config import Timing
from protocol.events import Send
from protocol.identity import NodeId
from protocol.wire.messages import Ping

PINGS = 2  # before a suspicion: with one message in ten lost, both go unanswered once in 28 times
CONFIRMATIONS = 3  # K of Lifeguard: more confirmations than these shorten a suspicion no further
MAX_HEALTH = 4  # S of Lifeguard: a probe may take 5 times its usual time
MAX_VOUCHED = 3


@dataclass(frozen=True, slots=True)
class Suspect:
    """The peer is suspected from now on."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class Dead:
    """The peer was silent for all of its suspicion time."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class Cut:
    """The peer lives, but the link to it does not."""

    node: NodeId


DetectorAction = Send | Suspect | Dead | Cut


class State(Enum):
    """Of a live peer."""

    WELL = auto()
    PINGED = auto()
    SUSPECT = auto()


@dataclass(slots=True)
class _Subject:
    heard: float
    state: State = State.WELL
    since: float = 0.0
    pinged: float = 0.0
    token: int = 0
    pings: int = 0
    vouched: int = 0
    rtt: float | None = None
    confirmers: dict[NodeId, None] = field(default_factory=dict)

    def enter(self, state: State, now: float) -> None:
        self.state, self.since = state, now


class Detector:
    """See the module's comment. Times are steady seconds."""

    def __init__(self, timing: Timing, rng: random.Random) -> None:
        self._timing = timing
        self._rng = rng
        self._subjects: dict[NodeId, _Subject] = {}
        self.health = 0  # 0 is best

    @property
    def suspects(self) -> list[NodeId]:
        """The live peers that are suspected."""
        return [node for node, subject in self._subjects.items() if subject.state is State.SUSPECT]

    def state(self, node: NodeId) -> State:
        """Return the state of a live peer."""
        return self._subjects[node].state

    def rtt(self, node: NodeId) -> float | None:
        """Return the seconds that the peer took to answer the last ping, if it was ever pinged."""
        return self._subjects[node].rtt

    def up(self, node: NodeId, now: float) -> None:
        """A peer is live (again)."""
        self._subjects[node] = _Subject(now)

    def down(self, node: NodeId) -> None:
        """A peer is no longer live."""
        self._subjects.pop(node, None)

    def heard(self, node: NodeId, now: float) -> None:
        """Something came from the peer itself."""
        subject = self._subjects.get(node)
        if subject is None:
            return
        subject.heard = now
        subject.vouched = 0
        if subject.state is not State.WELL:
            if subject.state is State.PINGED and subject.pings == 1:
                self.health = max(0, self.health - 1)
            self._clear(subject)

    def pong(self, node: NodeId, token: int, now: float) -> None:
        """The peer answered a ping."""
        subject = self._subjects.get(node)
        if subject is not None and subject.token == token:
            subject.rtt = now - subject.pinged

    def vouched(self, node: NodeId, now: float) -> list[DetectorAction]:
        """Somebody else showed that the peer is alive."""
        subject = self._subjects.get(node)
        if subject is None or subject.state is State.WELL:
            return []
        subject.heard = now
        subject.vouched += 1
        self._clear(subject)
        return [Cut(node)] if subject.vouched >= MAX_VOUCHED else []

    def confirmed(self, node: NodeId, by: NodeId) -> None:
        """A peer says that it does not hear the subject either; of no weight while we do."""
        subject = self._subjects.get(node)
        if subject is not None and subject.state is not State.WELL and len(subject.confirmers) < CONFIRMATIONS:
            subject.confirmers[by] = None

    def suspected_ourselves(self) -> None:
        """Somebody suspects us: we are slow, or our messages are lost."""
        self.health = min(MAX_HEALTH, self.health + 1)

    def tick(self, now: float) -> list[DetectorAction]:
        """Time has passed."""
        actions: list[DetectorAction] = []
        fresh = now - self._timing.probe_interval  # most peers, most of the time, were heard since
        for node, subject in list(self._subjects.items()):
            if subject.state is not State.WELL or subject.heard <= fresh:
                actions += self._advance(node, subject, now)
        return actions

    def _advance(self, node: NodeId, subject: _Subject, now: float) -> list[DetectorAction]:
        timing = self._timing
        patience = timing.probe_timeout * (1 + self.health)
        waited = now - subject.since
        match subject.state:
            case State.WELL if now - subject.heard >= timing.probe_interval:
                subject.enter(State.PINGED, now)
                subject.pings = 0
                return [self._ping(node, subject, now)]
            case State.PINGED if waited >= PINGS * patience:
                subject.enter(State.SUSPECT, now)
                self._doubt_ourselves(node, now - waited)
                return [Suspect(node)]
            case State.PINGED if waited >= subject.pings * patience:
                return [self._ping(node, subject, now)]
            case State.SUSPECT if waited >= self._suspicion(subject):
                return [Dead(node)]
            case State.SUSPECT if now - subject.pinged >= timing.probe_interval:
                return [self._ping(node, subject, now)]
        return []

    def _suspicion(self, subject: _Subject) -> float:
        least, most = self._timing.suspicion_min, self._timing.suspicion_max
        shorter = math.log(len(subject.confirmers) + 1) / math.log(CONFIRMATIONS + 1)
        return max(least, most - (most - least) * shorter)

    def _ping(self, node: NodeId, subject: _Subject, now: float) -> Send:
        subject.pinged = now
        subject.pings += 1
        subject.token = self._rng.getrandbits(32)
        return Send(node, Ping(subject.token))

    def _doubt_ourselves(self, node: NodeId, since: float) -> None:
        others = [subject for other, subject in self._subjects.items() if other != node]
        if others and all(subject.heard < since for subject in others):
            self.health = min(MAX_HEALTH, self.health + 1)

    def _clear(self, subject: _Subject) -> None:
        subject.state = State.WELL
        subject.confirmers.clear()

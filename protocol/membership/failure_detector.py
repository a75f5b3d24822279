"""Which live peers still answer. A pure state machine after SWIM and Lifeguard, on links that exist.

    WELL     heard within probe_interval
      | silent for probe_interval: ping it                                    any frame from it --> WELL
    PINGED
      | silent for probe_timeout: ask up to HELPERS other peers to probe it
    ASKED
      | nobody reached it within probe_timeout
    SUSPECT  the others are told; pinged on
      | silent for the suspicion time
    (dead)   dropped by us

Rules
 1. The suspicion time is Lifeguard's: from suspicion_max down to suspicion_min as peers confirm
    that they do not hear the subject either, logarithmically in their number.
 2. A helper that finds the subject alive clears it. When only helpers hear it, `MAX_INDIRECT`
    times in a row, the link is at fault: it is cut, and the subject is not called dead.
 3. A helper answers in any case (Lifeguard's nack). When none does, the fault is probably ours:
    our health score rises, and with it every probe's time, up to `MAX_HEALTH` + 1 times. It falls
    with each probe that is answered in time, and rises when somebody suspects us.
 4. The time during which we were not run ourselves is nobody's silence: `now` stands still in it
    (see `protocol.config.AwakeClock`).
"""

import math
import random
from dataclasses import dataclass, field
from enum import Enum, auto

from protocol.config import Timing
from protocol.events import Send
from protocol.identity import NodeId
from protocol.wire.messages import Ping, Probe, Probed, Reach

HELPERS = 3  # k of SWIM: with 3, a message lost in ten lets one probe in 1e4 fail that should not
CONFIRMATIONS = 3  # K of Lifeguard: more confirmations than these shorten a suspicion no further
MAX_HEALTH = 4  # S of Lifeguard: a probe may take 5 times its usual time
MAX_INDIRECT = 3
MAX_ERRANDS = 64
ERRAND_PATIENCE = 0.7  # of probe_timeout: the answer has to be back in time


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
    ASKED = auto()
    SUSPECT = auto()


@dataclass(slots=True)
class _Subject:
    heard: float
    state: State = State.WELL
    since: float = 0.0
    pinged: float = 0.0
    token: int = 0
    helpers: int = 0
    answers: int = 0
    indirect: int = 0
    rtt: float | None = None
    confirmers: dict[NodeId, None] = field(default_factory=dict)

    def enter(self, state: State, now: float) -> None:
        self.state, self.since = state, now


@dataclass(frozen=True, slots=True)
class _Errand:
    asker: NodeId
    token: int
    node: NodeId
    due: float


class Detector:
    """See the module's comment. Times are steady seconds."""

    def __init__(self, timing: Timing, rng: random.Random) -> None:
        self._timing = timing
        self._rng = rng
        self._subjects: dict[NodeId, _Subject] = {}
        self._errands: list[_Errand] = []
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
        self._errands = [errand for errand in self._errands if node not in (errand.asker, errand.node)]

    def heard(self, node: NodeId, now: float) -> list[DetectorAction]:
        """Something came from the peer itself."""
        subject = self._subjects.get(node)
        if subject is None:
            return []
        subject.heard = now
        subject.indirect = 0
        if subject.state is not State.WELL:
            if subject.state is State.PINGED:
                self.health = max(0, self.health - 1)
            self._clear(subject)
        return self._report_back(node) if self._errands else []

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
        subject.indirect += 1
        self._clear(subject)
        return [Cut(node)] if subject.indirect >= MAX_INDIRECT else []

    def probed(self, token: int, reach: Reach, helper: NodeId, now: float) -> list[DetectorAction]:
        """A helper answered."""
        for node, subject in self._subjects.items():
            if subject.token == token and subject.state in (State.ASKED, State.SUSPECT):
                subject.answers += 1
                if reach is Reach.ALIVE:
                    return self.vouched(node, now)
                if reach is Reach.SILENT:
                    self.confirmed(node, helper)
                return []
        return []

    def confirmed(self, node: NodeId, by: NodeId) -> None:
        """A peer says that it does not hear the subject either; of no weight while we do."""
        subject = self._subjects.get(node)
        if subject is not None and subject.state is not State.WELL and len(subject.confirmers) < CONFIRMATIONS:
            subject.confirmers[by] = None

    def suspected_ourselves(self) -> None:
        """Somebody suspects us: we are slow, or our messages are lost."""
        self.health = min(MAX_HEALTH, self.health + 1)

    def errand(self, asker: NodeId, token: int, node: NodeId, now: float) -> list[DetectorAction]:
        """A peer asks whether we can reach `node`."""
        subject = self._subjects.get(node)
        if subject is None:
            return [Send(asker, Probed(token, Reach.UNLINKED))]
        if now - subject.heard < self._timing.probe_timeout:
            return [Send(asker, Probed(token, Reach.ALIVE))]
        if len(self._errands) >= MAX_ERRANDS:
            return []
        due = now + ERRAND_PATIENCE * self._timing.probe_timeout
        self._errands.append(_Errand(asker, token, node, due))
        return [self._ping(node, subject, now)]

    def tick(self, now: float) -> list[DetectorAction]:
        """Time has passed."""
        actions: list[DetectorAction] = []
        fresh = now - self._timing.probe_interval  # most peers, most of the time, were heard since
        for node, subject in list(self._subjects.items()):
            if subject.state is not State.WELL or subject.heard <= fresh:
                actions += self._advance(node, subject, now)
        if self._errands:
            late = [errand for errand in self._errands if errand.due <= now]
            self._errands = [errand for errand in self._errands if errand.due > now]
            actions += [Send(errand.asker, Probed(errand.token, Reach.SILENT)) for errand in late]
        return actions

    def _advance(self, node: NodeId, subject: _Subject, now: float) -> list[DetectorAction]:
        timing = self._timing
        patience = timing.probe_timeout * (1 + self.health)
        waited = now - subject.since
        match subject.state:
            case State.WELL if now - subject.heard >= timing.probe_interval:
                subject.enter(State.PINGED, now)
                return [self._ping(node, subject, now)]
            case State.PINGED if waited >= patience:
                subject.enter(State.ASKED, now)
                return self._ask(node, subject)
            case State.ASKED if waited >= patience:
                if subject.helpers and not subject.answers:
                    self.health = min(MAX_HEALTH, self.health + 1)
                subject.enter(State.SUSPECT, now)
                return [Suspect(node)]
            case State.SUSPECT if waited >= self._suspicion(subject):
                return [Dead(node)]
            case State.SUSPECT if now - subject.pinged >= timing.probe_interval:
                return [self._ping(node, subject, now), *self._ask(node, subject)]
        return []

    def _suspicion(self, subject: _Subject) -> float:
        least, most = self._timing.suspicion_min, self._timing.suspicion_max
        shorter = math.log(len(subject.confirmers) + 1) / math.log(CONFIRMATIONS + 1)
        return max(least, most - (most - least) * shorter)

    def _ping(self, node: NodeId, subject: _Subject, now: float) -> Send:
        subject.pinged = now
        subject.token = self._rng.getrandbits(32)
        return Send(node, Ping(subject.token))

    def _ask(self, node: NodeId, subject: _Subject) -> list[DetectorAction]:
        able = [other for other, one in self._subjects.items() if other != node and one.state is State.WELL]
        helpers = self._rng.sample(able, min(HELPERS, len(able)))
        subject.helpers, subject.answers = len(helpers), 0
        return [Send(helper, Probe(subject.token, node)) for helper in helpers]

    def _clear(self, subject: _Subject) -> None:
        subject.state = State.WELL
        subject.confirmers.clear()

    def _report_back(self, node: NodeId) -> list[DetectorAction]:
        found = [errand for errand in self._errands if errand.node == node]
        self._errands = [errand for errand in self._errands if errand.node != node]
        return [Send(errand.asker, Probed(errand.token, Reach.ALIVE)) for errand in found]

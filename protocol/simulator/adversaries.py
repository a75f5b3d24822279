"""Adversaries: cores that misbehave in one way each, eclipsers that play a script, and keys that cost nothing."""

import hashlib
import random
from dataclasses import dataclass, field

from protocol.config import Instant, Setup
from protocol.core import Core
from protocol.credentials.records import RECORD_LIFE_S, Address, Endpoint, PeerRecord, make_record
from protocol.events import Arrived, Closed, CoreAction, CoreEvent, Dial, FillLink, Link, Opened, SendFrame, Tick
from protocol.identity import KEY_BYTES, SIGNATURE_BYTES, Identity, Verify, node_id
from protocol.limits.networks import netgroup
from protocol.membership.address_book import Book
from protocol.membership.links import distance
from protocol.wire.envelope import ItemId, Kind, control_frame, kind_of, read_control
from protocol.wire.messages import (
    ID_BYTES,
    MAX_RECORDS,
    NO_TOPIC,
    Entry,
    Have,
    Hello,
    Peers,
    Ping,
)

LIE_INTERVAL_S = 1.0
FLOOD_FRAMES = 30  # to each peer at each tick, twice a second: above the allowance of the simulated nodes
TOLD_AT_A_TIME = 2
CALLED_AT_A_TIME = 16  # beside the victims
SYBILS = 512  # invented nodes: twice a book
RENTABLE = 64  # networks among which an attacker chooses each of those that it takes


def _verify(public_key: bytes, signature: bytes, message: bytes) -> bool:
    return signature == _sign(public_key, message)


def _sign(public_key: bytes, message: bytes) -> bytes:
    return hashlib.blake2b(message, digest_size=SIGNATURE_BYTES, key=public_key).digest()


class SimulatedIdentity(Identity):
    """Signs with a hash that is keyed by the *public* key, so anybody could forge it; simulated attackers do not.

    Everything else about it, its sizes included, is as for a real identity.
    """

    verify: Verify = staticmethod(_verify)

    def __init__(self, seed: bytes) -> None:
        self._seed = seed
        self.public_key = hashlib.blake2b(seed, digest_size=KEY_BYTES, person=b"public").digest()
        self.node_id = node_id(self.public_key)
        self.curve_secret = hashlib.blake2b(seed, digest_size=KEY_BYTES, person=b"curve secret").digest()
        self.curve_key = hashlib.blake2b(self.curve_secret, digest_size=KEY_BYTES, person=b"curve").digest()

    def sign(self, message: bytes) -> bytes:
        """Return 64 bytes that `verify` accepts."""
        return _sign(self.public_key, message)


class Dropper(Core):
    """Takes part in everything, but passes on no item and no announcement."""

    def handle(self, event: CoreEvent, now: Instant) -> list[CoreAction]:
        """Act as an honest core, without items and announcements."""
        actions = super().handle(event, now)
        return [action for action in actions if not _passes_on(action)]


def _passes_on(action: CoreAction) -> bool:
    return isinstance(action, FillLink) or (isinstance(action, SendFrame) and kind_of(action.frame) == Kind.HAVE)


class _Speaker(Core):
    """A core that says something of its own to every peer, now and then."""

    interval = LIE_INTERVAL_S

    def __init__(self, setup: Setup, book: Book, rng: random.Random, now: Instant) -> None:
        super().__init__(setup, book, rng, now)
        self._wiles = rng
        self._spoke = now.steady

    def handle(self, event: CoreEvent, now: Instant) -> list[CoreAction]:
        """Act as an honest core, and say its own things, too."""
        actions = super().handle(event, now)
        if isinstance(event, Tick) and now.steady >= self._spoke + self.interval:
            self._spoke = now.steady
            for node in self.membership.peers:
                link = self.membership.link_of(node)
                if link is not None:
                    actions += [SendFrame(link, frame) for frame in self._say(now)]
        return actions

    def _say(self, now: Instant) -> list[bytes]:
        raise NotImplementedError


class FalseAnnouncer(_Speaker):
    """Announces items that do not exist."""

    def _say(self, now: Instant) -> list[bytes]:
        entry = Entry(ItemId(self._wiles.randbytes(ID_BYTES)), 1000, NO_TOPIC)
        return [control_frame(Kind.HAVE, Have((entry,)).encode())]


class Forger(_Speaker):
    """Sends items in the name of a peer, whose key it does not have."""

    def _say(self, now: Instant) -> list[bytes]:
        frame = self._seal(Kind.ITEM, NO_TOPIC + self._wiles.randbytes(100), now)
        victim = self._wiles.choice(self.membership.book.records() or [self.membership.record])
        return [victim.public_key + frame[len(victim.public_key) :]]


class Flooder(_Speaker):
    """Sends far more than its share."""

    interval = 0.0

    def _say(self, now: Instant) -> list[bytes]:
        return [control_frame(Kind.PING, Ping(token).encode()) for token in range(FLOOD_FRAMES)]


@dataclass(eq=False)
class EclipseAttack:
    """The eclipsers' common plan: whom they surround, and the records with which they fill their victims' books.

    They rent networks that are near to those of the victims, `networks` (see `links`). They also call the
    `bystanders`, if there are any, so that these have no place left for the victims.
    """

    networks: tuple[str, ...] = ()
    bystanders: tuple[Address, ...] = ()
    victims: tuple[Address, ...] = ()
    keys: frozenset[bytes] = frozenset()  # of the victims
    records: list[PeerRecord] = field(default_factory=list)

    def rent(self, number: int, now: Instant) -> str:
        """Return a host in the one of `RENTABLE` networks that is nearest to a victim; each victim has its turn."""
        victim = self.networks[number % len(self.networks)]
        hosts = (f"rented{number}-{place}.invalid" for place in range(RENTABLE))
        return min(hosts, key=lambda host: distance(netgroup(host), victim, now.unix))

    def invent(self, setup: Setup, now: Instant) -> None:
        """Make up nodes at addresses where nobody listens."""
        expiry_ms = int((now.unix + RECORD_LIFE_S) * 1000)
        for number in range(SYBILS):
            identity = SimulatedIdentity(b"sybil %27d" % number)
            endpoints = (Endpoint(self.rent(-1 - number, now), 1),)
            record = make_record(identity, setup.swarm, endpoints, int(now.unix * 1000) << 16, "", expiry_ms)
            self.records.append(record)


class Eclipser(Core):
    """Keeps a link to each victim, tells it of accomplices only, and passes on nothing.

    It greets every caller, says that it is needy so that it is let in, answers pings, and ignores all else.
    """

    def __init__(self, attack: EclipseAttack, setup: Setup, book: Book, rng: random.Random, now: Instant) -> None:
        super().__init__(setup, book, rng, now)
        self._attack = attack
        self._wiles = rng
        self._spoke = now.steady
        self._greetings: dict[Link, None] = {}
        if not attack.records:
            attack.invent(setup, now)
        attack.records.append(self.membership.record)

    def wait(self, now: Instant) -> float:
        """Return how many seconds may pass before it speaks next."""
        return max(0.0, self._spoke + LIE_INTERVAL_S - now.steady)

    def handle(self, event: CoreEvent, now: Instant) -> list[CoreAction]:
        """Play the part."""
        match event:
            case Opened(link):
                return [self._hello(link, now)]
            case Closed(link):
                self._greetings.pop(link, None)
            case Arrived(link, frame):
                return self._answer(link, frame, now)
            case Tick():
                return self._press(now)
        return []

    def _hello(self, link: Link, now: Instant) -> SendFrame:
        body = Hello(self.membership.record.encoded, needy=True).encode()
        return SendFrame(link, self._seal(Kind.HELLO, body, now))

    def _answer(self, link: Link, frame: bytes, now: Instant) -> list[CoreAction]:
        if kind_of(frame) == Kind.HELLO:
            self._greetings[link] = None
            return [] if link.dialled else [self._hello(link, now)]
        message = read_control(frame)
        if message is not None and message.kind == Kind.PING:
            return [SendFrame(link, control_frame(Kind.PONG, message.body))]
        return []

    def _press(self, now: Instant) -> list[CoreAction]:
        self._spoke = now.steady
        chosen = self._wiles.sample(self._attack.records, MAX_RECORDS)
        body = Peers(tuple(record.encoded for record in chosen)).encode()
        others = self._attack.bystanders
        called = (*self._attack.victims, *self._wiles.sample(others, min(CALLED_AT_A_TIME, len(others))))
        actions: list[CoreAction] = [*map(Dial, called)]  # dialling twice is dialling once
        links = [link for link in self._greetings if link.key in self._attack.keys]
        # Two of eight victims each second: as many records as a victim takes from one voice.
        chosen_links = self._wiles.sample(links, min(TOLD_AT_A_TIME, len(links)))
        return [*actions, *(SendFrame(link, control_frame(Kind.PEERS, body)) for link in chosen_links)]

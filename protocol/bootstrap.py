"""Bootstrap: asking a swarm's members for its manifest, the first thing that a joiner does.

It is one exchange with each member that is asked, over links of its own. A joiner knows the invite's seeds; members
without room name others. If one refuses, the others are still asked: it may be hostile, or not know yet what they know.

Members, by the key that they have to prove
    WAITING    to be dialled, at once or after a pause that doubles     -- time -->     DIALLED
    DIALLED    the transport opens the link                             -- Opened -->   GREETED, we sent our hello
    GREETED    it has our record, with the grant                        -- HELLO -->    ADMITTED, we asked for it
    ADMITTED   it takes us for a member                                 -- MANIFEST --> done, and the revocation list
               if its hello named one
    REFUSED    it said why, or gave another manifest, or speaks another version of the protocol: asked no more

Rules
 1. If a link closes or stays silent for `PATIENCE_S`, or the member has no room, the member is WAITING again. So it is
    if our key is refused in the handshake. That is noted as a refusal, but nobody signed it and it may not last.
 2. A member may refuse what another grants: each counts the uses of an invite by itself.
 3. Private and loopback endpoints that one member names for another count only if the namer answered from such an
    address. Else it could make a joiner connect into the joiner's own network (see
    `protocol.membership.address_book`).
 4. It is over when the manifest is there or all have refused. A seed that is full or restarts may grant later; the
    caller says how long to wait for it.
 5. A name is a key at an address. It is charged to the seed through which it came, also by way of others. The seeds
    share the places for names evenly: if none is free, the seed with most names gives one to a seed with fewer, that of
    a member that refused or else has come least far. So no hostile member keeps out those whom honest ones name.
 6. Nothing proves that a key is where it is named, so each seed may name one more address for a key. The keys of seeds
    have the addresses that the invite names, and no others. The addresses of a key are tried in turn, and share the
    time and the pauses of one. With each whole turn an address gets twice as long, as lines may be slow.
"""

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum, auto
from typing import NamedTuple

from protocol.config import Instant
from protocol.credentials.invite import Invite
from protocol.credentials.manifest import SwarmManifest, open_manifest
from protocol.credentials.records import RECORD_LIFE_S, RENEWAL_BITS, Address, make_record, open_record
from protocol.credentials.revocations import open_revocations
from protocol.errors import PeerError
from protocol.events import Arrived, Closed, Dial, HangUp, Link, NetworkEvent, Opened, SendFrame, Tick, TurnedAway
from protocol.identity import Identity
from protocol.limits.networks import Scope, scope_of
from protocol.membership.address_book import usable
from protocol.membership.links import HELLO_RETRY_S
from protocol.membership.membership import NO_ROOM
from protocol.notices import GRAYLISTED
from protocol.wire.envelope import CONTROL, Control, Envelope, Kind, control_frame, open_frame, read_control, seal
from protocol.wire.messages import AskManifest, AskRevocations, Body, Goodbye, Hello, Manifest, Peers, Revocations
from protocol.wire.version import MAJOR, goodbye_reason, spoken_version

AGENT = "gossamer/joining"
MAX_NAMES = 16  # of members that are asked: an invite's eight seeds, and as many that those name
MAX_FRAMES = 256  # that a member may send us: its hello, some records, the manifest and what it sends every peer
MAX_PAUSES = 128  # where the count stops: the pause has long been the longest, for all addresses that a key may have
PATIENCE_S = 10.0  # for a link, a hello and an answer, as long as membership has
FIRST_PAUSE_S, LAST_PAUSE_S = 0.5, 8.0
FALSE_MANIFEST = "false_manifest"  # our reason for a member that gives another manifest than the invite's
FALSE_LIST = "false_list"  # and for one whose revocation list is not valid


class AskState(IntEnum):
    """See the module's comment. The later ones have come farther."""

    REFUSED = auto()
    WAITING = auto()
    DIALLED = auto()
    GREETED = auto()
    ADMITTED = auto()


class Name(NamedTuple):
    """Where a member is said to be; `scope` is of the nearest address that its host name may be resolved to."""

    address: Address
    scope: Scope = Scope.LOOPBACK


@dataclass(slots=True)
class AskedMember:
    """A member that is asked; `since` is when its state began, or ends if it is WAITING."""

    names: dict[Name, bytes]  # each with the key of the seed that it is charged to; the first is where we dial
    host: str = ""  # the IP address that answered, "" if it is not known
    state: AskState = AskState.WAITING
    since: float = 0.0
    said: float = 0.0  # when we last said something
    pauses: int = 0
    frames: int = 0
    reason: str = ""  # why it refused, or refused our key
    refused_at: str = ""  # the endpoint at which it refused
    owes_list: bool = False
    manifest: SwarmManifest | None = None  # the invite's, if it gave it
    revocations: bytes = b""  # not yet checked

    @property
    def name(self) -> Name:
        """Where we dial it."""
        return next(iter(self.names))

    @property
    def link(self) -> Link:
        """The link over which it is asked."""
        return Link(self.name.address.key, dialled=True)

    @property
    def seed(self) -> bytes:
        """The key of the seed through which we found it: its own, if it is one."""
        return self.names[self.name]

    @property
    def patience(self) -> float:
        """How long it has now, in seconds: rules 1 and 6."""
        if self.state is not AskState.DIALLED:
            return PATIENCE_S
        addresses = len(self.names)
        return PATIENCE_S * min(1.0, 2.0 ** (self.pauses // addresses) / addresses)

    def may_be_at(self, name: Name, seed: bytes) -> bool:
        """Tell whether `seed` may name it there: rule 6."""
        named_by = self.names.values()
        return name not in self.names and seed not in named_by and name.address.key not in named_by


Action = Dial | HangUp | SendFrame


class Bootstrap:
    """The machine of the module's comment, without I/O: `handle(event, now) -> actions`.

    `grant` is shown to members, b"" for none.
    """

    def __init__(self, identity: Identity, invite: Invite, grant: bytes, rng: random.Random, now: Instant) -> None:
        self._identity = identity
        self._invite = invite
        self._grant = grant
        self._rng = rng
        self._sequence = int(now.unix * 1e6)
        self._incarnation = int(now.unix * 1000) << RENEWAL_BITS
        self._members: dict[bytes, AskedMember] = {}
        for seed in invite.seeds:
            self._members.setdefault(seed.key, AskedMember({})).names[Name(seed)] = seed.key
        self.manifest: SwarmManifest | None = None
        self.revocations = b""  # the swarm's verified revocation list, if that member had one

    @property
    def refusals(self) -> Mapping[str, str]:
        """The reasons of the members that refused us or our key, by endpoint."""
        return {member.refused_at: member.reason for member in self._members.values() if member.reason}

    @property
    def is_over(self) -> bool:
        """Rule 4."""
        return self.manifest is not None or all(member.state is AskState.REFUSED for member in self._members.values())

    def handle(self, event: NetworkEvent | Tick, now: Instant) -> list[Action]:
        """Advance by one event; what a member sends that makes no sense is dropped."""
        match event:
            case Tick():
                return [action for member in self._members.values() for action in self._tick(member, now)]
            case Opened(link, host):
                member = self._member(link)
                if member is None or member.state is not AskState.DIALLED:
                    return [HangUp(link)]
                member.host = host
                return self._greet(member, now)
            case TurnedAway(link):
                if (member := self._member(link)) is not None:
                    self._note(member, GRAYLISTED)
                return []
            case Closed(link):
                member = self._member(link)
                if member is not None and member.state not in (AskState.WAITING, AskState.REFUSED):
                    self._failed(member, now)
                return []
            case Arrived(link, frame):
                member = self._member(link)
                if member is None or member.state not in (AskState.GREETED, AskState.ADMITTED):
                    return []
                return self._arrived(member, frame, now)
        return []

    def _member(self, link: Link) -> AskedMember | None:
        return self._members.get(link.key) if link.dialled else None

    def _tick(self, member: AskedMember, now: Instant) -> list[Action]:
        match member.state:
            case AskState.WAITING if now.steady >= member.since:
                member.state, member.since = AskState.DIALLED, now.steady
                return [Dial(*member.name)]
            case AskState.WAITING | AskState.REFUSED:
                return []
        if now.steady >= member.since + member.patience:
            self._failed(member, now)
            return [HangUp(member.link)]
        if member.state is AskState.GREETED and now.steady >= member.said + HELLO_RETRY_S:
            return self._greet(member, now)
        return []

    def _greet(self, member: AskedMember, now: Instant) -> list[Action]:
        if member.state is not AskState.GREETED:
            member.state, member.since = AskState.GREETED, now.steady
        member.said = now.steady
        record = make_record(
            self._identity,
            self._invite.swarm,
            (),
            self._incarnation,
            AGENT,
            int((now.unix + RECORD_LIFE_S) * 1000),
            self._grant,
        )
        return [self._send(member, Hello(record.encoded, needy=True), now)]

    def _arrived(self, member: AskedMember, frame: bytes, now: Instant) -> list[Action]:
        member.frames += 1
        if member.frames > MAX_FRAMES:
            return self._refused(member, "too_many_frames", now)
        version = None if frame.startswith(CONTROL) else spoken_version(frame)
        if version is not None and version >> 8 != MAJOR:
            goodbye = self._send(member, Goodbye(goodbye_reason()), now)
            return [goodbye, *self._refused(member, goodbye_reason(version), now)]
        try:
            if (said := read_control(frame)) is not None:
                return self._message(member, said, now)
            envelope = open_frame(frame, self._identity.verify)
            is_hello = envelope.kind == Kind.HELLO and envelope.swarm == self._invite.swarm
            return self._message(member, envelope, now) if is_hello else []
        except PeerError:
            return []

    def _message(self, member: AskedMember, envelope: Envelope | Control, now: Instant) -> list[Action]:
        match envelope.kind:
            case Kind.HELLO if member.state is AskState.GREETED:
                hello = Hello.decode(envelope.body)
                member.state, member.since, member.owes_list = AskState.ADMITTED, now.steady, hello.revision > 0
                asks = [self._send(member, AskManifest(), now)]
                if member.owes_list:
                    asks.append(self._send(member, AskRevocations(0), now))
                return list(asks)
            case Kind.GOODBYE:
                reason = Goodbye.decode(envelope.body).reason
                if reason in NO_ROOM and member.state is AskState.GREETED:
                    member.state, member.since = AskState.ADMITTED, now.steady  # without room, it serves the manifest
                    return [self._send(member, AskManifest(), now)]
                if reason in NO_ROOM:
                    self._pause(member, now)
                    return [HangUp(member.link)]
                return self._refused(member, reason, now)
            case Kind.PEERS:
                return self._hear_of(member, Peers.decode(envelope.body), now)
            case Kind.MANIFEST if member.state is AskState.ADMITTED:
                return self._take(member, Manifest.decode(envelope.body).encoded, now)
            case Kind.REVOCATIONS if member.state is AskState.ADMITTED:
                member.revocations = Revocations.decode(envelope.body).encoded
                return self._finish(member, now)
        return []

    def _take(self, member: AskedMember, encoded: bytes, now: Instant) -> list[Action]:
        try:
            manifest = open_manifest(encoded)
        except PeerError:
            return self._refused(member, FALSE_MANIFEST, now)
        if manifest.hash != self._invite.manifest:  # all 32 bytes of it: the swarm's id is only half
            return self._refused(member, FALSE_MANIFEST, now)
        member.manifest = manifest
        return self._finish(member, now)

    def _finish(self, member: AskedMember, now: Instant) -> list[Action]:
        if member.manifest is None or (member.owes_list and not member.revocations):
            return []
        if member.revocations:
            try:
                open_revocations(member.revocations, member.manifest, self._identity.verify)
            except PeerError:
                return self._refused(member, FALSE_LIST, now)
        self.manifest, self.revocations = member.manifest, member.revocations
        return [HangUp(member.link)]

    def _note(self, member: AskedMember, reason: str) -> None:
        member.reason, member.refused_at = reason, str(member.name.address.endpoint)

    def _refused(self, member: AskedMember, reason: str, now: Instant) -> list[Action]:
        self._note(member, reason)
        member.state, member.since = AskState.REFUSED, now.steady
        return [HangUp(member.link)]

    def _failed(self, member: AskedMember, now: Instant) -> None:
        """Turn to the member's next address, as its link closed or stayed silent. Rules 1 and 6."""
        tried = member.name
        member.names[tried] = member.names.pop(tried)
        self._pause(member, now, among=len(member.names))

    def _pause(self, member: AskedMember, now: Instant, among: int = 1) -> None:
        delay = min(LAST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (member.pauses // among)) / among
        member.pauses = min(member.pauses + 1, MAX_PAUSES)
        member.state, member.since = AskState.WAITING, now.steady + delay * self._rng.uniform(0.5, 1.0)

    def _hear_of(self, teller: AskedMember, peers: Peers, now: Instant) -> list[Action]:
        """Take in the names that a member gives. Rules 3, 5 and 6."""
        scope = scope_of(teller.host)
        actions: list[Action] = []
        for encoded in peers.records:
            if not self._has_place(teller.seed):
                break
            try:
                record = open_record(encoded, self._invite.swarm, now.unix, self._identity.verify)
            except PeerError:
                break
            key, addresses = record.curve_key, usable(record, scope)
            if not addresses or key == self._identity.curve_key:
                continue
            name, known = Name(addresses[0], scope), self._members.get(key)
            if known is not None and not known.may_be_at(name, teller.seed):
                continue
            if self._names.total() >= MAX_NAMES:
                actions += self._make_place(now)
            self._members.setdefault(key, AskedMember({})).names[name] = teller.seed
        return actions

    def _has_place(self, seed: bytes) -> bool:
        names = self._names
        return names.total() < MAX_NAMES or names[seed] + 1 < max(names.values())

    def _make_place(self, now: Instant) -> list[HangUp]:
        """Drop a name of the seed with most names: the last of a member that has come least far. Rule 5."""
        (most, _), *_ = self._names.most_common(1)
        named = [
            (member, name)
            for key, member in reversed(self._members.items())
            for name, seed in member.names.items()
            if seed == most != key
        ]
        member, name = min(named, key=lambda pair: pair[0].state)
        link, is_dialled = member.link, member.state is AskState.DIALLED and name == member.name
        del member.names[name]
        if not member.names:
            del self._members[link.key]
            return [HangUp(link)]
        if not is_dialled:
            return []
        member.state, member.since = AskState.WAITING, now.steady
        return [HangUp(link)]

    @property
    def _names(self) -> Counter[bytes]:
        """How many names are charged to each seed. All addresses of one key count once for a seed."""
        return Counter(seed for member in self._members.values() for seed in set(member.names.values()))

    def _send(self, member: AskedMember, body: Body, now: Instant) -> SendFrame:
        if not isinstance(body, Hello | Goodbye):  # which say our version; see `protocol.wire.version`
            return SendFrame(member.link, control_frame(body.kind, body.encode()))
        self._sequence += 1
        stamp = int(now.unix * 1000)
        return SendFrame(
            member.link, seal(self._identity, self._invite.swarm, body.kind, self._sequence, stamp, body.encode())
        )

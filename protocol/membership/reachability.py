"""Reachability: at which endpoints others can dial us, as found by dialling them back (compare libp2p's AutoNAT v2).

Asking
 1. A node asks live peers on other machines, one after the other: at which address do you see me, and can you dial me
    at this endpoint of mine? Each endpoint is tried by itself. A public one is tried by a peer at a public address that
    has one of the same family (IPv4 or IPv6), a private one by a peer in the same /24 or /64: others may have no route.
 2. The newest try of an endpoint counts. One that failed is told to nobody until another succeeds, and up to `ENOUGH`
    others are asked to try it soon. So a false word costs a node its callers for seconds, while with one relay there is
    nobody to ask for a second word. What is known is asked anew after `AGAIN_S`.
 3. A node without a peer, to which somebody said that it is full, and that finds nobody else in `DIAL_TIMEOUT_S`, tells
    no endpoint until a try succeeds. So it is let in as a home node, which others have many places for, and not kept
    out for an endpoint that may lead nowhere. If it did so at once, nodes that can be dialled would come in beyond the
    room for links, and be sent away again.
 4. Beside what it was given, a node tells the public address at which it is seen, if it has no public endpoint of that
    family. On the word of one peer, all others would dial whomever it names. So `DOUBT` networks have to name it, of
    which our router may be one, and somebody has to reach us there. Once we are seen elsewhere it is tried anew.
    Each network counts once. For a public address, all nodes seen at private addresses count as one; for a private
    address, each address counts as one (see `counts_as`). A peer that is gone is one to be asked anew.

Answering
 5. We dial the asker where it asks us to, expect the key that it proved, and hang up once the handshake is done. The
    host may be a third party's. So each asker is served once in `PAUSE_S`, and all together `dial_backs_per_second`. An
    asker that comes too often pays. One that comes after many others gets no answer, and asks another node.
 6. We dial nothing nearer than the asker: who is seen at a public address makes nobody dial a private one. Who is seen
    at a private address may be a stranger behind a gateway. So a private endpoint has to be in the asker's /24 or /64.
"""

import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address, ip_network

from protocol.config import Instant
from protocol.credentials.records import MAX_ENDPOINTS, Address, Endpoint
from protocol.errors import BadAddress, MessageError
from protocol.events import Dial, HangUp, Link, MembershipAction, Send
from protocol.identity import NodeId
from protocol.limits.limits import Limits
from protocol.limits.networks import Scope, read_address, scope_of
from protocol.limits.rate_limits import TokenBucket, TokenBuckets
from protocol.lru import Recent
from protocol.membership.links import DIAL_TIMEOUT_S, Links, LivePeer
from protocol.refusals import Failure
from protocol.wire.messages import DialBack, DialledBack

FIRST_ASK_S = 2.0  # after the start
NEXT_ASK_S = 10.0
AGAIN_S = 600.0  # once it is known: a router's lease may end, a firewall may be opened
ENOUGH = 3  # voices that tell where they see us, or that fail to reach an endpoint, before we rest
DOUBT = 2  # networks that have to name an address before we tell it
PAUSE_S = 30.0  # between two questions of one node to another
NEAR_BITS = {4: 24, 6: 64}  # of a private network that has no router inside, by version of the address
LONG_AGO = float("-inf")


@dataclass(frozen=True, slots=True)
class Standing:
    """Others' word on us: the IP address at which most see us ("": nobody said), and whether we can be dialled.

    `dialable` is None while nobody tried from as far as `seen_at` is; `answers` is how many networks see us there.
    `failures` are the endpoints that lead nowhere.
    """

    seen_at: str = ""
    dialable: bool | None = None
    answers: int = 0
    failures: tuple[Failure, ...] = ()


@dataclass(frozen=True, slots=True)
class _Sight:
    """Where a peer sees us."""

    network: str  # that it counts for; see rule 4
    host: str
    at: float


@dataclass(frozen=True, slots=True)
class _Try:
    """The newest try of an endpoint."""

    reached: bool
    tried_from: str
    at: float
    failed_for: frozenset[str] = frozenset()  # voices, since it was last reached


@dataclass(frozen=True, slots=True)
class _Check:
    asker: NodeId
    question: DialBack
    deadline: float


class Reachability:
    """See the module's comment."""

    def __init__(self, links: Links, limits: Limits, rng: random.Random, now: Instant) -> None:
        self._links = links
        self._limits = limits
        self._rng = rng
        self._given: tuple[Endpoint, ...] = ()
        self._outer: Endpoint | None = None  # where we are seen and were reached: told beside what was given
        self._is_hidden = False  # rule 3
        self._next_ask = now.steady + FIRST_ASK_S
        self._awaited: set[NodeId] = set()  # live peers that did not answer yet
        self._asked: Recent[NodeId, float] = Recent(limits.max_remembered)  # when; kept when a peer answers or goes
        self._sights: Recent[str, _Sight] = Recent(limits.max_dial_back_answers)  # the newest, by voice
        self._tries: Recent[Endpoint, _Try] = Recent(limits.max_dial_back_answers)
        self._router = ""  # the outer address from which our router says that it forwards our port
        self._checks: dict[Link, _Check] = {}
        self._questions: TokenBuckets[NodeId] = TokenBuckets(1 / PAUSE_S, 1, limits.max_remembered)
        self._dial_backs = TokenBucket(limits.dial_backs_per_second, limits.dial_backs_burst, now.steady)

    @property
    def standing(self) -> Standing:
        failures = tuple(
            Failure(endpoint, tried.tried_from)
            for endpoint in self._given
            if (tried := self._tries.get(_normal(endpoint))) is not None and not tried.reached
        )
        networks = self._networks()
        if not networks:
            return Standing(failures=failures)
        seen_at = max(networks, key=lambda host: len(networks[host]))
        own = (Endpoint(seen_at, self._port), *self._given)
        tries = [self._tries.get(_normal(address)) for address in own if scope_of(address.host) is scope_of(seen_at)]
        reached = [tried.reached for tried in tries if tried is not None]
        return Standing(seen_at, any(reached) if reached else None, len(networks[seen_at]), failures)

    @property
    def told(self) -> tuple[Endpoint, ...]:
        """The endpoints to tell. Rules 2 to 4."""
        if self._is_hidden:
            return ()
        addresses = tuple(
            address for address in self._given if (tried := self._tries.get(_normal(address))) is None or tried.reached
        )
        outer = self._outer
        if outer is None or any(scope_of(e.host) is Scope.PUBLIC and e.is_ipv6 == outer.is_ipv6 for e in addresses):
            return addresses
        return (*addresses, outer)[:MAX_ENDPOINTS]

    @property
    def _port(self) -> int:
        return self._given[0].port if self._given else 0

    def _networks(self) -> dict[str, set[str]]:
        """Return which networks see us at each address, by their newest word."""
        sights = self._sights.values()
        fresh = [sight for sight in sights if sight.at > LONG_AGO]
        networks: defaultdict[str, set[str]] = defaultdict(set)
        for sight in fresh or sights:
            networks[sight.host].add(sight.network)
        return networks

    def give(self, endpoints: tuple[Endpoint, ...], now: Instant) -> None:
        """Note where we listen, by what a person or this machine says."""
        if endpoints != self._given:
            if (endpoints[0].port if endpoints else 0) != self._port:
                self._forget_answers()
            self._given, self._is_hidden = endpoints, False
            self._next_ask = min(self._next_ask, now.steady + FIRST_ASK_S)

    def mapped(self, external: str, now: Instant) -> None:
        """Note that our router forwards our port from that address. Earlier answers no longer count."""
        if external != self._router:
            self._router = external
            self._forget_answers()
            self._next_ask = now.steady

    def _forget_answers(self) -> None:
        self._outer = None
        self._sights, self._tries = (Recent(self._limits.max_dial_back_answers) for _ in range(2))

    def hide(self) -> bool:
        """Tell no endpoint until a try succeeds; False if none is told anyway. Rule 3."""
        if not self.told:
            return False
        self._is_hidden = True
        for endpoint in map(_normal, self._targets):
            self._doubt(endpoint)
        return True

    @property
    def _targets(self) -> tuple[Endpoint, ...]:
        """The endpoints that are to be tried."""
        return self._given if self._outer is None else (*self._given, self._outer)

    def _doubt(self, endpoint: Endpoint) -> None:
        """Let an endpoint be tried anew."""
        if (tried := self._tries.get(endpoint)) is not None:
            self._tries.set(endpoint, replace(tried, at=LONG_AGO))

    # Asking

    def tick(self, now: Instant) -> list[MembershipAction]:
        """Ask a peer, if it is time, and give up checks that take too long."""
        late = [link for link, check in self._checks.items() if check.deadline <= now.steady]
        actions = [action for link in late for action in (HangUp(link), *self._tell(link, reached=False))]
        if now.steady >= self._next_ask:
            actions += self._ask(now)
        return actions

    def _ask(self, now: Instant) -> list[MembershipAction]:
        self._next_ask = now.steady + NEXT_ASK_S * self._rng.uniform(0.75, 1.25)
        latest = now.steady - PAUSE_S - DIAL_TIMEOUT_S
        able = [
            node
            for node, peer in self._links.peers.items()
            if can_dial_back(peer.host) and (self._asked.get(node) or LONG_AGO) < latest
        ]
        for host, port, nodes in self._open_questions(able, now):
            # A node that we dialled sees our router's outer address; we prefer to ask it.
            node = self._rng.choice([node for node in nodes if self._links.peers[node].link.dialled] or nodes)
            self._awaited.add(node)
            self._asked.set(node, now.steady)
            return [Send(self._links.peers[node].link, DialBack(port, host))]
        return []

    def _open_questions(self, able: list[NodeId], now: Instant) -> Iterator[tuple[str, int, list[NodeId]]]:
        """Return hosts and ports that are to be tried, and by which of the peers that may be asked."""
        peers = self._links.peers
        for endpoint in self._targets:
            tried = self._tries.get(_normal(endpoint))
            fit = [node for node in able if _can_try(peers[node], endpoint)]
            if tried is not None and now.steady < tried.at + AGAIN_S:
                is_enough = tried.reached or len(tried.failed_for) >= ENOUGH
                fit = [] if is_enough else [node for node in fit if peers[node].place.voice not in tried.failed_for]
            if fit:
                yield endpoint.host, endpoint.port, fit
        sights = [sight for sight in self._sights.values() if now.steady < sight.at + AGAIN_S]
        unheard = [node for node in able if self._sights.get(peers[node].place.voice) not in sights]
        if unheard and len(sights) < ENOUGH:
            yield "", self._port, unheard

    def answered(self, sender: NodeId, answer: DialledBack, now: Instant) -> None:
        """Take a live peer's answer.

        Raises:
            MessageError: we did not ask it.
        """
        if sender not in self._awaited:
            raise MessageError("unasked_answer", "to a dial-back")
        self._awaited.remove(sender)
        address = read_address(answer.seen_at)
        if address is None:
            raise MessageError("malformed", "address")
        tried = Endpoint(answer.host or str(address), answer.port)
        own = (Endpoint(str(address), self._port), *self._given)
        if tried not in own and tried != self._outer:
            return  # we asked for it before we listened elsewhere
        peer, seen_at = self._links.peers[sender], str(address)
        network = peer.place.network if scope_of(seen_at) is Scope.PUBLIC else peer.place.voice
        self._sights.set(peer.place.voice, _Sight(network, seen_at, now.steady))
        before = self._tries.get(_normal(tried))
        failed_for = frozenset() if before is None or before.reached else before.failed_for
        if answer.reached:
            self._is_hidden = False
            failed_for = frozenset()
        elif answer.port:
            failed_for |= {peer.place.voice}
        self._tries.set(_normal(tried), _Try(answer.reached, peer.host, now.steady, failed_for))
        self._see_outer(seen_at)

    def _see_outer(self, seen_at: str) -> None:
        """Tell from now on the address where we are seen and were reached, or doubt the one that we told. Rule 4."""
        if (outer := self._outer) is not None:
            if outer.host != seen_at:
                self._doubt(outer)
            if (tried := self._tries.get(outer)) is not None and not tried.reached:
                self._outer = None
        standing = self.standing
        candidate = Endpoint(standing.seen_at, self._port)
        reached = self._tries.get(candidate)
        is_named = standing.answers + (standing.seen_at == self._router) >= DOUBT
        is_told = is_named and self._port and scope_of(standing.seen_at) is Scope.PUBLIC
        if is_told and reached is not None and reached.reached:
            self._outer = candidate

    # Answering

    def asked(self, sender: NodeId, question: DialBack, now: Instant) -> list[MembershipAction]:
        """Serve a live peer that asks.

        Raises:
            MessageError: it asked just now, or names no host, or one nearer than itself.
        """
        peer = self._links.peers[sender]
        if not self._questions.take(sender, 1, now.steady):
            raise MessageError("too_many_asks", "to be dialled back")
        seen_at = read_address(peer.host)
        if seen_at is None:
            return []
        if question.port == 0:
            return [self._answer(peer, question, reached=False)]
        try:
            endpoint = Endpoint.parse(str(Endpoint(question.host or peer.host, question.port)))
        except BadAddress:
            raise MessageError("malformed", "host") from None
        if scope_of(endpoint.host) < peer.scope:
            raise MessageError("malformed", "a host nearer than the asker")
        target = read_address(endpoint.host)
        if target is not None and scope_of(endpoint.host) is Scope.PRIVATE and not _is_near(target, seen_at):
            return []
        link, dialled_at = Link(peer.link.key, dialled=True), peer.dialled_at
        if dialled_at is not None and (
            dialled_at == endpoint or (not question.host and dialled_at.port == question.port)
        ):
            return [self._answer(peer, question, reached=True)]
        if link == peer.link or self._links.is_parting(link) or not self._dial_backs.take(1, now.steady):
            return []
        self._checks[link] = _Check(sender, question, now.steady + DIAL_TIMEOUT_S)
        return [Dial(Address(endpoint, link.key), peer.scope)]

    def opened(self, link: Link) -> list[MembershipAction] | None:
        """A dialled link is up; None if it is no check of ours."""
        return [HangUp(link), *self._tell(link, reached=True)] if link in self._checks else None

    def closed(self, link: Link) -> list[MembershipAction] | None:
        """A dialled link could not be opened; None if it is no check of ours."""
        return self._tell(link, reached=False) if link in self._checks else None

    def _tell(self, link: Link, *, reached: bool) -> list[MembershipAction]:
        check = self._checks.pop(link)
        return [self._answer(self._links.peers[check.asker], check.question, reached=reached)]

    def _answer(self, peer: LivePeer, question: DialBack, *, reached: bool) -> Send:
        return Send(peer.link, DialledBack(str(read_address(peer.host)), question.port, reached, question.host))

    def gone(self, node: NodeId) -> list[MembershipAction]:
        """Drop what a peer that is no longer live asked, and what it was asked. What it said is to be asked anew."""
        self._awaited.discard(node)
        peer = self._links.peers.get(node)
        if peer is not None and (sight := self._sights.get(peer.place.voice)) is not None:
            self._sights.set(peer.place.voice, replace(sight, at=LONG_AGO))
        void = [link for link, check in self._checks.items() if check.asker == node]
        for link in void:
            del self._checks[link]
        return [HangUp(link) for link in void]


def can_dial_back(host: str) -> bool:
    """Tell whether a node that is seen at `host` can find out whether others can dial us: one on our machine cannot."""
    return bool(host) and scope_of(host) is not Scope.LOOPBACK


def _can_try(peer: LivePeer, endpoint: Endpoint) -> bool:
    """Tell whether what a peer finds out about an endpoint counts: rule 1."""
    address, seen_at = read_address(endpoint.host), read_address(peer.host)
    if seen_at is None or peer.scope is not scope_of(endpoint.host):
        return False
    if peer.scope is Scope.PRIVATE:
        return address is not None and _is_near(address, seen_at)
    hosts = (seen_at, *(read_address(endpoint.host) for endpoint in peer.record.endpoints))
    return address is None or any(host is not None and host.version == address.version for host in hosts)


def _is_near(address: IPv4Address | IPv6Address, other: IPv4Address | IPv6Address) -> bool:
    """Tell whether no router need be between two private addresses."""
    return address in ip_network((other, NEAR_BITS[other.version]), strict=False)


def _normal(endpoint: Endpoint) -> Endpoint:
    """Return an endpoint with its address in the one form in which others write it."""
    address = read_address(endpoint.host)
    return endpoint if address is None else Endpoint(str(address), endpoint.port)

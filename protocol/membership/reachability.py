"""Reachability: how we are seen from outside, and whether we can be dialled there (dial-back, as libp2p's AutoNAT).

Asking
 1. A node asks live peers on other machines, one after the other: at which address do you see me, and can you dial me
    there, at the port where I listen? It asks again now and then.
 2. Each network counts once. For a public address, all nodes seen at private addresses count as one; for a private
    address, each address counts as one (see `counts_as`). The address that most of them name is ours.
 3. Our record changes only when `DOUBT` networks name the same address; our router may be one of them. On the word of
    one peer, all others would dial whomever it names. If one of them could dial us at that address, and it is
    public, we add it to a record that has no public endpoint of its family (IPv4 or IPv6) yet. If none could, we take
    the endpoint at that address back.

Answering
 4. We dial the address from which the asker's link comes, expect the key that it proved, and hang up once the handshake
    is done. So nobody can make us dial a third party.
 5. Each asker is served once in `PAUSE_S`, and all together `dial_backs_per_second`. An asker that comes too often
    pays. One that comes after many others gets no answer, and asks another node.
"""

import random
from collections import defaultdict
from dataclasses import dataclass

from protocol.config import Instant, Limits
from protocol.credentials.records import MAX_ENDPOINTS, Address, Endpoint
from protocol.errors import MessageError
from protocol.events import Dial, HangUp, Link, MembershipAction, Send
from protocol.identity import NodeId
from protocol.limits.networks import Scope, read_address, scope_of
from protocol.limits.rate_limits import TokenBucket, TokenBuckets
from protocol.lru import Recent
from protocol.membership.links import DIAL_TIMEOUT_S, Links
from protocol.wire.messages import DialBack, DialledBack

FIRST_ASK_S = 2.0  # after the start
NEXT_ASK_S = 10.0
AGAIN_S = 600.0  # once it is known: a router's lease may end, a firewall may be opened
ENOUGH = 3  # answers after which we ask only every `AGAIN_S`
DOUBT = 2  # networks that have to name an address before we change our record for it
PAUSE_S = 30.0  # between two questions of one node to another


@dataclass(frozen=True, slots=True)
class Standing:
    """Others' word on us: the IP address at which most see us ("": nobody said), and whether we can be dialled.

    `dialable` is None while nobody tried; `answers` is how many networks see us there.
    """

    seen_at: str = ""
    dialable: bool | None = None
    answers: int = 0


@dataclass(frozen=True, slots=True)
class _Answer:
    network: str  # that the answer counts for; see rule 2
    host: str
    reached: bool


@dataclass(frozen=True, slots=True)
class _Check:
    asker: NodeId
    host: str
    port: int
    deadline: float


class Reachability:
    """See the module's comment."""

    def __init__(self, links: Links, limits: Limits, rng: random.Random, now: Instant) -> None:
        self._links = links
        self._limits = limits
        self._rng = rng
        self._port = 0
        self._next_ask = now.steady + FIRST_ASK_S
        self._awaited: set[NodeId] = set()  # live peers that did not answer yet
        self._asked: Recent[NodeId, float] = Recent(limits.max_remembered)  # when; kept when a peer answers or goes
        self._answers: Recent[str, _Answer] = Recent(limits.max_dial_back_answers)  # the newest, by voice
        self._router = ""  # the outer address from which our router says that it forwards our port
        self._checks: dict[Link, _Check] = {}
        self._questions: TokenBuckets[NodeId] = TokenBuckets(1 / PAUSE_S, 1, limits.max_remembered)
        self._budget = TokenBucket(limits.dial_backs_per_second, limits.dial_backs_burst, now.steady)

    @property
    def standing(self) -> Standing:
        answers = self._answers.values()
        if not answers:
            return Standing()
        networks: defaultdict[str, set[str]] = defaultdict(set)
        for answer in answers:
            networks[answer.host].add(answer.network)
        seen_at = max(networks, key=lambda host: len(networks[host]))
        dialable = any(answer.reached for answer in answers if answer.host == seen_at)
        return Standing(seen_at, dialable, len(networks[seen_at]))

    def reachable(self, told: tuple[Endpoint, ...]) -> tuple[Endpoint, ...]:
        """Return which endpoints to tell, of those that the node listens on or was given. Rule 3."""
        standing = self.standing
        if standing.answers + (standing.seen_at == self._router) < DOUBT:
            return told
        if not standing.dialable:
            return tuple(one for one in told if read_address(one.host) != read_address(standing.seen_at))
        seen = Endpoint(standing.seen_at, self._port)
        is_new = not any(scope_of(one.host) is Scope.PUBLIC and one.is_ipv6 == seen.is_ipv6 for one in told)
        return (*told, seen)[:MAX_ENDPOINTS] if is_new and scope_of(seen.host) is Scope.PUBLIC and self._port else told

    def mapped(self, external: str, now: Instant) -> None:
        """Note that our router forwards our port from that address. Earlier answers no longer count."""
        if external != self._router:
            self._router, self._answers = external, Recent(self._limits.max_dial_back_answers)
            self._next_ask = now.steady

    # Asking

    def tick(self, told: tuple[Endpoint, ...], now: Instant) -> list[MembershipAction]:
        """Ask a peer, if it is time, and give up checks that take too long."""
        port = told[0].port if told else 0
        if port != self._port:
            self._port, self._answers = port, Recent(self._limits.max_dial_back_answers)
        late = [link for link, check in self._checks.items() if check.deadline <= now.steady]
        actions = [action for link in late for action in (HangUp(link), *self._tell(link, reached=False))]
        if now.steady >= self._next_ask:
            actions += self._ask(now)
        return actions

    def _able(self, now: Instant) -> list[NodeId]:
        """Return the peers on other machines that may be asked: the voices that did not answer yet, or else all."""
        peers = self._links.peers
        latest = now.steady - PAUSE_S - DIAL_TIMEOUT_S
        able = [
            node
            for node, peer in peers.items()
            if peer.host and peer.scope is not Scope.LOOPBACK and (self._asked.get(node) or float("-inf")) < latest
        ]
        return [node for node in able if peers[node].place.voice not in self._answers] or able

    def _ask(self, now: Instant) -> list[MembershipAction]:
        self._next_ask = now.steady + NEXT_ASK_S * self._rng.uniform(0.75, 1.25)
        able = self._able(now)
        if not able:
            return []
        # A node that we dialled sees our router's outer address; we prefer to ask it.
        node = self._rng.choice([node for node in able if self._links.peers[node].link.dialled] or able)
        self._awaited.add(node)
        self._asked.set(node, now.steady)
        return [Send(self._links.peers[node].link, DialBack(self._port))]

    def answered(self, sender: NodeId, answer: DialledBack, now: Instant) -> None:
        """Take a live peer's answer.

        Raises:
            MessageError: we did not ask it.
        """
        if sender not in self._awaited:
            raise MessageError("unasked_answer", "to a dial-back")
        self._awaited.remove(sender)
        host = read_address(answer.host)
        if host is None:
            raise MessageError("malformed", "address")
        if answer.port == self._port:
            peer = self._links.peers[sender]
            network = peer.place.network if scope_of(str(host)) is Scope.PUBLIC else peer.place.voice
            self._answers.set(peer.place.voice, _Answer(network, str(host), answer.reached))
        if len(self._answers) >= ENOUGH or all(
            self._links.peers[n].place.voice in self._answers for n in self._able(now)
        ):
            self._next_ask = now.steady + AGAIN_S * self._rng.uniform(0.75, 1.25)

    # Answering

    def asked(self, sender: NodeId, question: DialBack, now: Instant) -> list[MembershipAction]:
        """Serve a live peer that asks.

        Raises:
            MessageError: it asked just now.
        """
        peer = self._links.peers[sender]
        if not self._questions.take(sender, 1, now.steady):
            raise MessageError("too_many_asks", "to be dialled back")
        host = read_address(peer.host)
        if host is None:
            return []
        port = question.port
        if port == 0 or port == peer.port:  # it does not listen; or we dialled it there
            return [Send(peer.link, DialledBack(str(host), port, reached=port != 0))]
        link = Link(peer.link.key, dialled=True)
        if link == peer.link or self._links.is_parting(link) or not self._budget.take(1, now.steady):
            return []
        self._checks[link] = _Check(sender, str(host), port, now.steady + DIAL_TIMEOUT_S)
        return [Dial(Address(Endpoint(str(host), port), link.key))]

    def opened(self, link: Link) -> list[MembershipAction] | None:
        """A dialled link is up; None if it is no check of ours."""
        return [HangUp(link), *self._tell(link, reached=True)] if link in self._checks else None

    def closed(self, link: Link) -> list[MembershipAction] | None:
        """A dialled link could not be opened; None if it is no check of ours."""
        return self._tell(link, reached=False) if link in self._checks else None

    def _tell(self, link: Link, *, reached: bool) -> list[MembershipAction]:
        check = self._checks.pop(link)
        return [Send(self._links.peers[check.asker].link, DialledBack(check.host, check.port, reached))]

    def gone(self, node: NodeId) -> list[MembershipAction]:
        """Drop what a peer that is no longer live asked, and what it was asked."""
        self._awaited.discard(node)
        void = [link for link, check in self._checks.items() if check.asker == node]
        for link in void:
            del self._checks[link]
        return [HangUp(link) for link in void]

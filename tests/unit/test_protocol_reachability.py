"""Dial-back: what a node learns about how it is reached, and what others cannot make it dial."""

import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.config import Instant, Setup
from protocol.credentials.records import RENEWAL_BITS, Address, Endpoint, make_record, open_record
from protocol.errors import PeerError
from protocol.events import Accepted, Closed, Dial, HangUp, Link, Message, Opened, PeerUp, PortMapped, Send, Tick
from protocol.identity import Identity
from protocol.limits.limits import Limits
from protocol.limits.networks import Scope
from protocol.membership.address_book import Book
from protocol.membership.links import DIAL_TIMEOUT_S
from protocol.membership.membership import TICK_S, Membership
from protocol.membership.reachability import AGAIN_S, FIRST_ASK_S, PAUSE_S, Standing
from protocol.refusals import Failure
from protocol.wire.messages import DialBack, DialledBack, Goodbye, Hello, Peers

LIMITS = Limits()
MANY = Limits(max_peers=30, max_known_peers=60)

SWARM = b"a swarm of tests"
UNIX = 1_700_000_000.0
ME, *OTHERS = (Identity(bytes([n]) * 32) for n in range(20))
PORT = 4001
INSIDE = Endpoint("192.168.0.7", PORT)
OUTSIDE = "198.41.0.4"
VICTIM = "8.8.8.8"
APART = [f"93.184.{number}.1" for number in range(16)]  # each in a network of its own


def at(seconds: float) -> Instant:
    return Instant(seconds, UNIX + seconds)


class Node:
    """A membership whose peers dialled it, each from one of `hosts`."""

    def __init__(self, *endpoints: Endpoint, hosts: Sequence[str] = APART[:3]) -> None:
        self.core = Membership(
            Setup(ME, SWARM, endpoints, Limits(max_peers=30)),
            Book((), Limits(max_known_peers=60)),
            random.Random(1),
            at(0),
        )
        self.now = 0.0
        self.log: list = []
        self.hosts = dict(zip(OTHERS, hosts, strict=False))
        for identity in self.hosts:
            self.meet(identity)

    def meet(self, identity: Identity) -> None:
        """Let a node dial this one."""
        self.core.handle(Accepted(Link(identity.curve_key, False), self.hosts[identity]), at(self.now))
        assert PeerUp(identity.node_id) in self.hear(identity, Hello(record_of(identity).encoded))

    def said(self, identity: Identity, message) -> Message:
        return Message(Link(identity.curve_key, False), identity.node_id, message.kind, message.encode())

    def hear(self, identity: Identity, message) -> list:
        return self.core.handle(self.said(identity, message), at(self.now))

    def run(self, seconds: float) -> list:
        """Let time pass, with every peer alive; return what it asked for."""
        end, actions = self.now + seconds, []
        while self.now < end:
            self.now += TICK_S
            for node in self.core.peers:
                self.core.heard(node, at(self.now))
            actions += self.core.handle(Tick(), at(self.now))
        return actions

    def asks(self, seconds: float = 60.0) -> list[Identity]:
        """Let time pass; return whom it asked to dial it back."""
        self.log = self.run(seconds)
        links = [a.to for a in self.log if isinstance(a, Send) and isinstance(a.message, DialBack)]
        by_key = {identity.curve_key: identity for identity in OTHERS}
        return [by_key[link.key] for link in links if isinstance(link, Link)]

    def question(self) -> Identity:
        """Let time pass until it asks somebody; return whom."""
        end = self.now + 60.0
        while not (asked := self.asks(TICK_S)):
            assert self.now < end, "it asks nobody"
        return asked[0]

    def learn(self, *answers: bool, host: str = OUTSIDE) -> list:
        """Answer its next questions; return what it does then."""
        for reached in answers:
            self.hear(self.question(), DialledBack(host, PORT, reached))
        return self.run(TICK_S)


def record_of(identity: Identity):
    return make_record(identity, SWARM, (), 1 << RENEWAL_BITS, "", int((UNIX + 36000) * 1000))


def shown(actions: list) -> set[Link]:
    """To whom a record was shown."""
    return {action.to for action in actions if isinstance(action, Send) and isinstance(action.message, Peers)}


def test_a_node_asks_peers_on_other_machines_once_each_and_then_rests() -> None:
    asked = []
    node = Node(INSIDE)
    assert node.asks(FIRST_ASK_S - TICK_S) == []
    for _ in range(3):
        identity = node.question()
        node.hear(identity, DialledBack(OUTSIDE, PORT, True))
        asked.append(identity)
    assert len(set(asked)) == 3 and node.asks(300.0) == [] and node.asks(600.0) != []
    assert Node(INSIDE, hosts=["127.0.0.1", "127.0.0.2", "127.0.0.3"]).asks() == []


def test_a_peer_that_answered_is_not_asked_again_at_once_because_another_is_silent_or_its_link_was_renewed() -> None:
    node = Node(INSIDE, hosts=APART[:2])
    asked: dict[Identity, list[float]] = {identity: [] for identity in node.hosts}
    while node.now < 2 * PAUSE_S:
        for identity in node.asks(TICK_S):
            asked[identity].append(node.now)
            if identity is OTHERS[0]:
                node.hear(identity, DialledBack(OUTSIDE, PORT, True))
                node.core.handle(Closed(Link(identity.curve_key, False)), at(node.now))
                node.meet(identity)
    assert all(asked.values())
    assert all(later >= earlier + PAUSE_S for times in asked.values() for earlier, later in pairwise(times))


def test_one_that_reached_us_is_enough_and_a_port_that_we_left_is_no_news() -> None:
    node = Node(INSIDE)
    assert node.core.reachability.standing == Standing()
    node.learn(False)
    assert node.core.reachability.standing == Standing(OUTSIDE, False, 1)
    node.learn(True)
    assert node.core.reachability.standing == Standing(OUTSIDE, True, 2)
    identity = node.question()
    node.hear(identity, DialledBack(OUTSIDE, PORT + 1, False))
    assert node.core.reachability.standing.answers == 2


def test_the_address_at_which_most_see_us_is_ours() -> None:
    node = Node(INSIDE)
    node.learn(True, host=VICTIM)
    node.learn(False, False)
    assert node.core.reachability.standing == Standing(OUTSIDE, False, 2)


@given(
    st.sampled_from([["93.185.7.1", "93.185.7.2", "93.185.7.3"], ["172.17.0.1"] * 5, ["10.0.0.1", "192.168.3.1"]]),
    st.lists(st.booleans(), max_size=3),
    st.integers(0, 2**32),
)
def test_an_address_that_one_network_names_is_told_to_nobody(liars: list[str], honest: list[bool], seed: int) -> None:
    hosts = [*liars, *APART[: len(honest)]]
    random.Random(seed).shuffle(hosts)
    node = Node(INSIDE, hosts=hosts)
    answers = dict(zip(APART, honest, strict=False))
    for _ in range(int(60 / TICK_S)):
        for asked in node.asks(TICK_S):
            host = node.hosts[asked]
            node.hear(asked, DialledBack(OUTSIDE if host in answers else VICTIM, PORT, answers.get(host, True)))
        assert set(node.core.record.endpoints) <= {INSIDE, Endpoint(OUTSIDE, PORT)}


def test_all_that_are_seen_at_private_addresses_are_one_network_that_sees_us_at_a_public_one() -> None:
    node = Node(INSIDE, hosts=["172.17.0.1", "172.17.0.1", APART[0]])
    while len(told := node.core.record.endpoints) == 1:
        node.hear(node.question(), DialledBack(OUTSIDE, PORT, True))
        node.run(TICK_S)
    assert told == (INSIDE, Endpoint(OUTSIDE, PORT)) and node.core.reachability.standing.answers == 2


def test_a_node_that_two_networks_see_where_one_could_dial_it_tells_that_address_at_once() -> None:
    node = Node(INSIDE)
    assert shown(node.learn(False)) == set() and node.core.record.endpoints == (INSIDE,)
    actions = node.learn(True)
    assert node.core.record.endpoints == (INSIDE, Endpoint(OUTSIDE, PORT))
    assert shown(actions) == {Link(identity.curve_key, False) for identity in node.hosts}
    before = node.core.record.incarnation
    node.learn(True)
    assert node.core.record.incarnation == before


def test_peers_that_say_where_we_are_get_no_more_links_for_their_network() -> None:
    """Two that named an address of their own network had links of each of its addresses."""
    node = Node(INSIDE)
    node.learn(True, True)
    assert OUTSIDE in {endpoint.host for endpoint in node.core.record.endpoints}
    assert node.core.links.network_of(OUTSIDE) == node.core.links.network_of("198.41.0.5") == "198.41.0.0/24"


def test_a_routers_word_counts_beside_that_of_one_network_and_alone_for_nothing() -> None:
    node = Node(INSIDE)
    node.learn(False)  # before there was a mapping
    node.core.handle(PortMapped(OUTSIDE), at(node.now))
    assert node.core.reachability.standing == Standing() and node.core.record.endpoints == (INSIDE,)
    node.learn(True)
    assert node.core.record.endpoints == (INSIDE, Endpoint(OUTSIDE, PORT))
    node.core.handle(PortMapped(""), at(node.now))
    node.learn(True)
    assert node.core.record.endpoints == (INSIDE,)


@pytest.mark.parametrize(("seen_at", "reached"), [(VICTIM, True), (OUTSIDE, False)])
def test_what_a_router_says_and_no_peer_bears_out_is_told_to_nobody(seen_at: str, reached: bool) -> None:
    node = Node(INSIDE)
    node.core.handle(PortMapped(OUTSIDE), at(0))
    node.learn(reached, host=seen_at)
    assert node.core.record.endpoints == (INSIDE,)


def test_a_node_with_a_public_ipv6_address_tells_the_ipv4_one_that_its_router_forwards_too() -> None:
    outside = Endpoint("2a00:1450::7", PORT)
    node = Node(outside, INSIDE)
    node.learn(False)
    node.learn(True)
    assert node.core.record.endpoints == (outside, INSIDE, Endpoint(OUTSIDE, PORT))


@pytest.mark.parametrize(("host", "own"), [(APART[0], OUTSIDE), ("10.0.0.7", "10.0.0.9")])
def test_an_endpoint_that_one_peer_could_not_dial_is_told_to_nobody_until_another_could(host: str, own: str) -> None:
    """With one relay no second network was there to say so, and nobody but the relay could be heard."""
    told = Endpoint(own, PORT)
    node = Node(told, hosts=[host])
    assert node.core.record.endpoints == (told,)
    node.learn(False, host=own)
    assert node.core.record.endpoints == ()  # so its peers tell it of newcomers
    assert node.core.directory.given == (told,)
    assert node.core.reachability.standing == Standing(own, False, 1, (Failure(told, host),))
    assert node.asks(2 * PAUSE_S) == []  # it would say the same
    second = OTHERS[1]
    node.hosts[second] = host.replace("7", "8").replace("93.184.0", "93.184.9")
    node.meet(second)
    node.learn(True, host=own)
    assert node.core.record.endpoints == (told,) and node.core.reachability.standing.failures == ()


def test_each_endpoint_is_tried_by_itself_by_who_can_tell() -> None:
    """Homes told IPv6 addresses that their routers close, and were asked for at IPv4 ones only."""
    six, near = Endpoint("2003:0::5", PORT), Endpoint("192.168.0.7", 4002)
    four = Endpoint(OUTSIDE, 4003)
    node = Node(six, near, four, hosts=["93.184.1.1", "2a00:1450::1", "192.168.0.9"])
    tries: dict[str, DialBack] = {}
    while len(tries) < 3:
        for asked in node.asks(TICK_S):
            (question,) = (a.message for a in node.log if isinstance(a, Send) and isinstance(a.message, DialBack))
            tries[node.hosts[asked]] = question
            node.hear(asked, DialledBack(OUTSIDE, question.port, False, question.host))
    assert tries == {
        "93.184.1.1": DialBack(4003, OUTSIDE),
        "2a00:1450::1": DialBack(PORT, "2003:0::5"),
        "192.168.0.9": DialBack(4002, "192.168.0.7"),
    }
    node.run(TICK_S)
    assert node.core.record.endpoints == ()
    assert {failure.endpoint for failure in node.core.reachability.standing.failures} == {six, near, four}


def test_an_endpoint_that_failed_once_it_had_been_reached_is_told_again_when_the_next_one_reaches_it() -> None:
    told = Endpoint(OUTSIDE, PORT)
    node = Node(told)
    node.learn(True)
    assert node.core.record.endpoints == (told,)
    node.run(AGAIN_S)
    node.learn(False)
    assert node.core.record.endpoints == ()
    before = node.now
    node.learn(True)
    assert node.core.record.endpoints == (told,) and node.now < before + 2 * PAUSE_S


def test_a_node_that_its_provider_gives_another_address_tells_the_new_one_within_a_minute_and_the_old_one_no_more() -> (
    None
):
    """It told the old one for 20 to 66 minutes."""
    old, new = Endpoint(OUTSIDE, PORT), Endpoint("198.51.8.9", PORT)
    node = Node(INSIDE, hosts=APART[:4])
    node.learn(True, True, True)
    node.run(100.0)
    assert node.core.record.endpoints == (INSIDE, old)
    changed = node.now
    for identity in node.hosts:
        node.core.handle(Closed(Link(identity.curve_key, False)), at(node.now))
        node.meet(identity)
    told = []
    while (new not in told or old in told) and node.now < changed + 60:
        for asked in node.asks(TICK_S):
            (question,) = (a.message for a in node.log if isinstance(a, Send) and isinstance(a.message, DialBack))
            node.hear(asked, DialledBack(new.host, PORT, question.host != old.host, question.host))
        told = [*node.core.record.endpoints]
    assert told == [INSIDE, new]


@pytest.mark.parametrize(
    ("host", "hides"), [(APART[0], True), ("192.168.0.9", True), ("127.0.0.1", False), ("", False)]
)
def test_a_node_without_a_peer_that_a_full_node_sends_away_comes_back_as_a_home_node(host: str, hides: bool) -> None:
    """Members that listened where nobody could reach them were locked out while 256 places for home nodes were free."""
    relay, told = OTHERS[0], Endpoint(OUTSIDE, PORT)
    seed = Address(Endpoint("relay.example", 1), relay.curve_key)
    core = Membership(Setup(ME, SWARM, (told,)), Book((seed,), Limits()), random.Random(1), at(0))
    link = Link(relay.curve_key, True)

    def hello() -> Hello:
        (sent,) = core.handle(Opened(link, host), at(0))
        assert isinstance(sent, Send) and isinstance(sent.message, Hello)
        return sent.message

    assert Dial(seed) in core.handle(Tick(), at(0))
    assert open_record(hello().record, SWARM, UNIX).endpoints == (told,)
    full = Goodbye("full")
    core.handle(Message(link, relay.node_id, full.kind, full.encode()), at(1))
    assert (Dial(seed) in core.handle(Tick(), at(2))) is hides
    if hides:
        again = hello()
        assert open_record(again.record, SWARM, UNIX).endpoints == () and again.needy
        core.handle(Message(link, relay.node_id, full.kind, full.encode()), at(3))
        assert Dial(seed) not in core.handle(Tick(), at(4))  # it is full of home nodes, too: we come back later


def test_a_node_that_hides_endpoints_which_had_been_reached_has_them_tried_again_at_once() -> None:
    told = Endpoint(OUTSIDE, PORT)
    node = Node(told, hosts=APART[:1])
    (peer,) = node.hosts
    node.learn(True)
    node.run(PAUSE_S + DIAL_TIMEOUT_S)
    node.core.handle(Closed(Link(peer.curve_key, False)), at(node.now))
    assert node.core.reachability.hide() and not node.core.reachability.hide()
    node.run(TICK_S)
    assert node.core.record.endpoints == ()
    node.meet(peer)
    node.learn(True)
    assert node.core.record.endpoints == (told,)


@pytest.mark.parametrize("host", ["10.8.0.1", "192.168.1.9", "93.184.1.1", "fd77::9"])
def test_who_may_have_no_route_to_a_private_endpoint_is_not_asked_to_try_it(host: str) -> None:
    node = Node(INSIDE, hosts=[host])
    node.asks(60.0)
    questions = [a.message for a in node.log if isinstance(a, Send) and isinstance(a.message, DialBack)]
    assert questions and all(question.host == "" for question in questions)


def test_an_endpoint_of_our_own_that_is_told_to_nobody_is_not_dialled_for_another_nodes() -> None:
    """Two homes behind routers of one make have one private address: each called itself."""
    node = Node(INSIDE, hosts=["192.168.0.9"])
    other = make_record(OTHERS[5], SWARM, (INSIDE,), 1 << RENEWAL_BITS, "", int((UNIX + 36000) * 1000))
    node.learn(False, host=INSIDE.host)
    assert node.core.record.endpoints == ()
    node.core.book.add(other, "192.168.0.9")
    assert not [action for action in node.run(60.0) if isinstance(action, Dial)]


def test_an_endpoint_that_nobody_tried_is_kept() -> None:
    told = Endpoint("relay.example", PORT)
    node = Node(told)
    node.learn(False, False, False)
    assert node.core.record.endpoints == (told,)


def test_an_answer_to_no_question_is_refused() -> None:
    node = Node(INSIDE)
    with pytest.raises(PeerError, match="unasked_answer"):
        node.hear(OTHERS[0], DialledBack(OUTSIDE, PORT, True))
    identity = node.question()
    with pytest.raises(PeerError, match="malformed"):
        node.hear(identity, DialledBack("no address", PORT, True))


def test_an_asker_is_dialled_where_it_is_seen_under_the_key_that_it_proved_and_told_what_came_of_it() -> None:
    node = Node()
    asker = OTHERS[1]
    link = Link(asker.curve_key, True)
    dial = Dial(Address(Endpoint(node.hosts[asker], 7777), asker.curve_key), Scope.PUBLIC)
    assert node.hear(asker, DialBack(7777)) == [dial]
    yes = Send(Link(asker.curve_key, False), DialledBack(node.hosts[asker], 7777, True))
    assert node.core.handle(Opened(link, node.hosts[asker]), at(1)) == [HangUp(link), yes]
    node.now = PAUSE_S
    assert node.hear(asker, DialBack(7777)) == [dial]
    no = Send(yes.to, DialledBack(node.hosts[asker], 7777, False))
    assert node.core.handle(Closed(link), at(node.now)) == [no]
    node.now = 2 * PAUSE_S
    assert node.hear(asker, DialBack(7777)) == [dial]
    actions = node.run(DIAL_TIMEOUT_S)
    assert HangUp(link) in actions and no in actions


def test_an_asker_is_dialled_at_the_host_that_it_names_unless_that_is_nearer_than_the_asker() -> None:
    node = Node()
    asker, *others = OTHERS[:3]
    for host, who in (("2003::5", asker), ("box.example", others[0])):
        assert node.hear(who, DialBack(7777, host)) == [
            Dial(Address(Endpoint(host, 7777), who.curve_key), Scope.PUBLIC)
        ]
    actions = node.core.handle(Closed(Link(asker.curve_key, True)), at(1))
    assert actions == [Send(Link(asker.curve_key, False), DialledBack(node.hosts[asker], 7777, False, "2003::5"))]
    for host in ("10.0.0.1", "127.0.0.1", "::1", "no host", "a" * 254):
        node.now += PAUSE_S
        with pytest.raises(PeerError, match="malformed"):
            node.hear(others[1], DialBack(7777, host))


@pytest.mark.parametrize(
    ("host", "is_tried"),
    [("", True), ("10.0.0.9", True), ("10.0.1.9", False), ("192.168.0.9", False), ("169.254.169.254", False)],
)
def test_who_is_seen_at_a_private_address_has_no_other_private_network_dialled(host: str, is_tried: bool) -> None:
    node = Node(hosts=["10.0.0.5"])
    asker = OTHERS[0]
    dial = Dial(Address(Endpoint(host or "10.0.0.5", 6379), asker.curve_key), Scope.PRIVATE)
    assert node.hear(asker, DialBack(6379, host)) == ([dial] if is_tried else [])


@pytest.mark.parametrize(
    ("named", "is_reached"), [("", True), (APART[0], True), (VICTIM, False), ("2003::5", False), ("box.example", False)]
)
def test_no_endpoint_is_said_to_be_reached_but_the_one_at_which_we_dialled_the_asker(
    named: str, is_reached: bool
) -> None:
    node, asker, host = Node(hosts=[]), OTHERS[0], APART[0]
    link, where = Link(asker.curve_key, True), Endpoint(host, PORT)
    record = make_record(asker, SWARM, (where,), 1 << RENEWAL_BITS, "", int((UNIX + 36000) * 1000))
    node.core.book.add(record, host)
    assert Dial(Address(where, asker.curve_key), Scope.PUBLIC) in node.run(10 * TICK_S)
    node.core.handle(Opened(link, host), at(node.now))
    greeting = Hello(record.encoded)
    assert PeerUp(asker.node_id) in node.core.handle(
        Message(link, asker.node_id, greeting.kind, greeting.encode()), at(node.now)
    )
    question = DialBack(PORT, named)
    said = node.core.handle(Message(link, asker.node_id, question.kind, question.encode()), at(node.now))
    assert said == ([Send(link, DialledBack(host, PORT, True, named))] if is_reached else [])


def test_who_asks_again_at_once_pays_and_who_is_many_is_not_served() -> None:
    node = Node(hosts=APART)
    dials = [action for asker in OTHERS[:16] for action in node.hear(asker, DialBack(7777)) if isinstance(action, Dial)]
    assert len(dials) == LIMITS.dial_backs_burst
    with pytest.raises(PeerError, match="too_many_asks"):
        node.hear(OTHERS[0], DialBack(7777))


def test_a_question_is_void_when_its_asker_is_gone() -> None:
    node = Node()
    asker = OTHERS[0]
    node.hear(asker, DialBack(7777))
    assert HangUp(Link(asker.curve_key, True)) in node.core.handle(Closed(Link(asker.curve_key, False)), at(1))
    assert node.core.handle(Opened(Link(asker.curve_key, True)), at(2)) == [HangUp(Link(asker.curve_key, True))]
    assert not [a for a in node.run(DIAL_TIMEOUT_S + 1) if isinstance(a, Send) and isinstance(a.message, DialledBack)]


def test_a_node_that_does_not_listen_is_told_only_where_it_is_seen() -> None:
    node = Node()
    (answer,) = node.hear(OTHERS[0], DialBack(0))
    assert answer.message == DialledBack(node.hosts[OTHERS[0]], 0, reached=False)

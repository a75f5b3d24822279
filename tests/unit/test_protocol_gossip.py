"""The gossip machine, driven by hand: who is pushed, told and asked what, and when."""

import hashlib
import random

from hypothesis import given
from hypothesis import strategies as st

from protocol.clock import Instant
from protocol.envelope import ItemId
from protocol.events import PeerDown, PeerUp, Tick
from protocol.gossip import PULL_DELAY_S, PUSH_BYTES, RETRY_S, SYNC_INTERVAL_S, TICK_S, Gossip
from protocol.gossip_events import (
    Announced,
    Deliver,
    Discard,
    Got,
    Item,
    NotSent,
    Publish,
    Pulled,
    SendAnnounce,
    SendItem,
    SendPull,
)
from protocol.identity import Identity, NodeId
from protocol.limits import Limits
from protocol.messages import NO_TOPIC, Entry
from protocol.pulls import MAX_HOLDERS, MAX_PULLS_PER_PEER, MAX_WANTS, PULL_PATIENCE_S, Pulls
from protocol.setup import Setup

UNIX = 1_700_000_000.0
ME, A, B, C = map(NodeId, ("me", "a", "b", "c"))
OWNER = Identity(bytes(32))


def at(seconds: float) -> Instant:
    return Instant(seconds, UNIX + seconds)


def name(number: int) -> ItemId:
    return ItemId(hashlib.sha256(b"%d" % number).digest())


def item(number: int, size: int = 100, signer: NodeId = A, time: float = UNIX) -> Item:
    return Item(name(number), signer, time, NO_TOPIC, bytes(size))


def machine(*peers: NodeId, limits: Limits | None = None) -> Gossip:
    core = Gossip(ME, Setup(OWNER, b"a swarm of tests", limits=limits or Limits()), random.Random(1), at(0))
    for peer in peers:
        core.handle(PeerUp(peer), at(0))
    core.handle(Tick(), at(0))
    return core


def announced(actions) -> dict[NodeId, list[ItemId]]:
    return {a.node: [entry.id for entry in a.items] for a in actions if isinstance(a, SendAnnounce)}


def pulled(actions) -> dict[NodeId, tuple[ItemId, ...]]:
    return {a.node: a.ids for a in actions if isinstance(a, SendPull)}


def test_a_small_item_is_pushed_to_everybody_and_then_not_mentioned() -> None:
    core = machine(A, B)
    small = item(1, PUSH_BYTES, signer=ME)
    assert core.handle(Publish(small), at(1)) == [SendItem(peer, small.id, small.frame) for peer in (A, B)]
    assert announced(core.handle(Tick(), at(2))) == {}


def test_a_large_item_is_announced_without_delay_and_sent_when_asked_for() -> None:
    core = machine(A, B)
    large = item(1, PUSH_BYTES + 1, signer=ME)
    assert core.handle(Publish(large), at(1)) == []
    assert core.wait() == 0.0
    assert announced(core.handle(Tick(), at(1))) == {A: [large.id], B: [large.id]}
    assert core.handle(Pulled(A, (large.id, name(9))), at(1)) == [SendItem(A, large.id, large.frame)]


def test_a_new_item_is_delivered_once_and_announced_to_those_not_known_to_have_it() -> None:
    core = machine(A, B, C)
    core.handle(Announced(B, (Entry(name(1), 100),)), at(1))
    assert core.handle(Got(A, item(1)), at(1)) == [Deliver(item(1))]
    assert core.handle(Got(C, item(1)), at(1)) == []
    assert core.wait() == TICK_S
    assert announced(core.handle(Tick(), at(1 + TICK_S))) == {}
    core.handle(Got(A, item(2)), at(2))
    core.handle(Got(A, item(3)), at(2))
    actions = core.handle(Tick(), at(2 + TICK_S))
    assert announced(actions) == {B: [name(2), name(3)], C: [name(2), name(3)]}
    assert announced(core.handle(Tick(), at(3))) == {}


def test_bytes_that_one_peer_sends_twice_are_a_replay_and_from_two_peers_are_not() -> None:
    core = machine(A, B)
    core.handle(Got(A, item(1)), at(1))
    assert core.duplicate(B, name(1)) is False
    assert core.duplicate(B, name(1)) is True
    assert core.duplicate(A, name(1)) is True


def test_a_missed_push_is_pulled_after_a_delay_from_whoever_announced() -> None:
    core = machine(A, B)
    assert core.handle(Announced(B, (Entry(name(1), 100),)), at(1)) == []
    assert pulled(core.handle(Tick(), at(1 + PULL_DELAY_S - 0.01))) == {}
    assert pulled(core.handle(Tick(), at(1 + PULL_DELAY_S))) == {B: (name(1),)}
    core.handle(Got(B, item(1)), at(2))
    assert pulled(core.handle(Tick(), at(60))) == {}


def test_a_push_that_was_only_late_saves_the_pull() -> None:
    core = machine(A, B)
    core.handle(Announced(B, (Entry(name(1), 100),)), at(1))
    core.handle(Got(A, item(1)), at(1.2))
    assert pulled(core.handle(Tick(), at(1 + PULL_DELAY_S))) == {}


def test_a_large_item_is_asked_for_at_once_and_of_one_holder_only() -> None:
    core = machine(A, B)
    assert core.handle(Announced(A, (Entry(name(1), 100_000),)), at(1)) == [SendPull(A, (name(1),))]
    assert core.handle(Announced(B, (Entry(name(1), 100_000),)), at(1)) == []


def test_another_holder_is_asked_when_the_first_stalls_or_leaves() -> None:
    for leave in (False, True):
        core = machine(A, B)
        core.handle(Announced(A, (Entry(name(1), 100_000),)), at(1))
        core.handle(Announced(B, (Entry(name(1), 100_000),)), at(1))
        if leave:
            core.handle(PeerDown(A), at(2))
            assert pulled(core.handle(Tick(), at(2))) == {B: (name(1),)}
        else:
            assert pulled(core.handle(Tick(), at(1 + PULL_PATIENCE_S))) == {}
            assert pulled(core.handle(Tick(), at(2 + PULL_PATIENCE_S))) == {B: (name(1),)}


def test_a_peer_that_comes_up_is_told_what_is_held_and_fresh() -> None:
    limits = Limits()
    core = machine(A)
    core.handle(Got(A, item(1, time=UNIX - limits.max_item_age_s)), at(1))
    core.handle(Got(A, item(2)), at(1))
    core.handle(Publish(item(3, signer=ME)), at(1))
    core.handle(Tick(), at(2))
    core.handle(PeerUp(B), at(3))
    assert announced(core.handle(Tick(), at(3))) == {B: [name(2), name(3)]}


def test_what_could_not_be_sent_is_announced_later() -> None:
    core = machine(A, B)
    core.handle(Publish(item(1, signer=ME)), at(1))
    core.handle(NotSent(A, (name(1),)), at(1))
    assert announced(core.handle(Tick(), at(1 + TICK_S))) == {}
    assert announced(core.handle(Tick(), at(1 + RETRY_S))) == {A: [name(1)]}


def test_the_newest_items_are_announced_now_and_then_in_case_something_was_lost() -> None:
    core = machine(A)
    core.handle(Publish(item(1, signer=ME)), at(1))
    seen = {}
    for second in range(2, int(2 * SYNC_INTERVAL_S)):
        seen |= announced(core.handle(Tick(), at(second)))
    assert seen == {A: [name(1)]}


def test_our_own_item_that_comes_back_after_a_restart_is_held_but_not_delivered() -> None:
    core = machine(A, B)
    assert core.handle(Got(A, item(1, signer=ME)), at(1)) == []
    assert core.handle(Publish(item(1, signer=ME)), at(2)) == []
    assert core.handle(Pulled(B, (name(1),)), at(2)) != []


def test_a_worthless_item_is_not_passed_on() -> None:
    core = machine(A, B)
    core.handle(Got(A, item(1)), at(1))
    core.handle(Discard(name(1)), at(1))
    assert announced(core.handle(Tick(), at(2))) == {}
    assert core.handle(Pulled(B, (name(1),)), at(2)) == []
    assert core.handle(Got(B, item(1)), at(2)) == []


def test_held_items_are_bounded_in_bytes() -> None:
    core = machine(A, limits=Limits(held_bytes=1000))
    for number in range(50):
        core.handle(Got(A, item(number)), at(1))
    core.handle(PeerUp(B), at(2))
    assert announced(core.handle(Tick(), at(2)))[B] == [name(number) for number in range(40, 50)]


def test_serving_pulls_is_bounded() -> None:
    core = machine(A, B, limits=Limits(bytes_per_second=100.0, bytes_burst=250.0))
    core.handle(Got(A, item(1)), at(1))
    asks = [core.handle(Pulled(B, (name(1),)), at(1)) for _ in range(5)]
    assert [bool(actions) for actions in asks] == [True, True, False, False, False]
    assert core.handle(Pulled(B, (name(1),)), at(2.1)) != []


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("offered"), st.sampled_from("abcdefghijkl"), st.integers(0, 300), st.integers(1, 10**6)),
            st.tuples(st.just("arrived"), st.just(""), st.integers(0, 300), st.just(0)),
            st.tuples(st.just("lost"), st.sampled_from("abcdefghijkl"), st.just(0), st.just(0)),
            st.tuples(st.just("due"), st.just(""), st.integers(0, 20), st.just(0)),
        ),
        max_size=80,
    )
)
def test_pulls_in_flight_never_exceed_their_bounds(history) -> None:
    pulls = Pulls()
    now = 0.0
    asked: dict[ItemId, tuple[str, float]] = {}
    for what, node, number, size in history:
        match what:
            case "offered":
                pulls.offered(NodeId(node), name(number), size, now)
            case "arrived":
                pulls.arrived(name(number))
                asked.pop(name(number), None)
            case "lost":
                pulls.lost(NodeId(node))
                asked = {i: (holder, since) for i, (holder, since) in asked.items() if holder != node}
            case "due":
                now += number
                asked = {i: (holder, since) for i, (holder, since) in asked.items() if since + 60 > now}
                for pull in pulls.due(now):
                    assert not any(asked.get(i, ("", -60.0))[1] + PULL_PATIENCE_S > now for i in pull.ids)
                    asked |= dict.fromkeys(pull.ids, (pull.node, now))
                    assert len(pull.ids) <= MAX_PULLS_PER_PEER
        assert len(pulls) <= MAX_WANTS


def test_wants_and_holders_are_bounded() -> None:
    pulls = Pulls()
    for number in range(MAX_WANTS + 10):
        pulls.offered(A, name(number), 1, 0.0)
    assert len(pulls) == MAX_WANTS
    for number in range(100):
        pulls.offered(NodeId(str(number)), name(1), 1, 0.0)
    asked = set()
    for second in range(0, 1000, 10):
        asked |= {pull.node for pull in pulls.due(float(second)) if name(1) in pull.ids}
    assert len(asked) <= MAX_HOLDERS

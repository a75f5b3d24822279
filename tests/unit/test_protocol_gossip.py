"""The gossip machine, driven by hand: who is pushed, told and asked what, and when."""

import hashlib
import math
import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.config import LAN, Instant, Limits, Setup
from protocol.events import (
    Announced,
    Blame,
    ChunksPulled,
    Deliver,
    Discard,
    Got,
    Interested,
    Item,
    NotSent,
    Outline,
    Outlined,
    PeerDown,
    PeerUp,
    Publish,
    Pulled,
    Send,
    Subscribe,
    Tick,
)
from protocol.gossip.announce_timer import MAX_HOLD
from protocol.gossip.gossip import (
    CATCH_UP_S,
    DRAWS,
    FIRST_IDS,
    PUSH_BYTES,
    SEEN_ITEMS,
    SILENT_S,
    Gossip,
)
from protocol.gossip.item_store import MAX_HELD, Store
from protocol.gossip.peer_state import (
    AGAIN_BYTES,
    AGAIN_S,
    FULL_S,
    KNOWN_ITEMS,
    MAX_BROUGHT,
    MAX_PENDING,
    PUSH_GRACE_BYTES,
    PUSH_GRACE_S,
    RETRY_S,
)
from protocol.gossip.subscriptions import MIN_BURST, hint, same_shard
from protocol.gossip.want_list import MAX_BROKEN, MAX_WANTS, PROMISE_PATIENCE
from protocol.identity import Identity, NodeId, id_of_bytes
from protocol.wire.envelope import CHUNK_BYTES, HEAD_BYTES, ItemId, Kind, chunk_hashes, header_of, seal
from protocol.wire.messages import MAX_DIRECT, MAX_IDS, NO_TOPIC, Announce, Entry, Interest, ItemChunk, Pull, PullChunks

UNIX = 1_700_000_000.0
ME, A, B, C, FAR = (id_of_bytes(letter * 20) for letter in (b"m", b"a", b"b", b"c", b"f"))
TOPIC, OTHER = b"a topic!", b"another!"
OWNER = Identity(bytes(32))


def at(seconds: float) -> Instant:
    return Instant(seconds, UNIX + seconds)


def name(number: int) -> ItemId:
    return ItemId(hashlib.sha256(b"%d" % number).digest())


def item(number: int, size: int = 100, signer: NodeId = A, time: float = UNIX, topic: bytes = NO_TOPIC) -> Item:
    return Item(name(number), signer, time, topic, bytes(size))


def entry(number: int, size: int = 100, signer: NodeId = FAR, topic: bytes = NO_TOPIC) -> Entry:
    return item(number, size, signer, topic=topic).entry


def large_item(size: int = CHUNK_BYTES + 1) -> tuple[Item, Outline]:
    frame = seal(OWNER, b"a swarm of tests", Kind.ITEM, 1, int(UNIX * 1000), body := bytes(size), chunk_hashes(body))
    header, hashes = header_of(frame), chunk_hashes(body)
    return Item(header.item_id, OWNER.node_id, UNIX, NO_TOPIC, frame, hashes), Outline(
        header, frame[:HEAD_BYTES], hashes
    )


def machine(*peers: NodeId, limits: Limits | None = None) -> Gossip:
    core = Gossip(ME, Setup(OWNER, b"a swarm of tests", limits=limits or Limits()), random.Random(1), at(0))
    for peer in peers:
        core.handle(PeerUp(peer), at(0))
    core.handle(Tick(), at(0))
    return core


def due(core: Gossip) -> float:
    """When the next tick is due; the last one was at 0."""
    return core.wait()


def sent(kind: type, actions) -> list[tuple]:
    return [(a.to, a.message) for a in actions if isinstance(a, Send) and isinstance(a.message, kind)]


def announced(actions) -> dict[NodeId, list[ItemId]]:
    return {to: [entry.id for entry in told.items] for to, told in sent(Announce, actions)}


def pulled(actions) -> dict[NodeId, tuple[ItemId, ...]]:
    return {to: pull.ids for to, pull in sent(Pull, actions)}


def test_a_small_item_is_pushed_to_everybody_and_then_not_mentioned() -> None:
    core = machine(A, B)
    small = item(1, PUSH_BYTES, signer=ME)
    assert core.handle(Publish(small), at(1)) == [Send(peer, small) for peer in (A, B)]
    assert announced(core.handle(Tick(), at(2))) == {}


def test_a_large_item_is_announced_without_delay_and_sent_when_asked_for() -> None:
    core = machine(A, B)
    large = item(1, PUSH_BYTES + 1, signer=ME)
    assert core.handle(Publish(large), at(1)) == []
    assert due(core) == 1
    assert announced(core.handle(Tick(), at(1))) == {A: [large.id], B: [large.id]}
    assert core.handle(Pulled(A, (large.id, name(9))), at(1)) == [Send(A, large)]


@pytest.mark.parametrize(("signer", "copies"), [(A, 2), (B, 1)], ids=["its signer, who pushes", "another holder"])
def test_who_signed_what_it_is_asked_for_may_have_pushed_it_before_and_no_other(signer: NodeId, copies: int) -> None:
    core = machine(A)
    core.handle(Announced(A, (entry(1, signer=signer),)), at(1))
    assert pulled(core.handle(Tick(), at(1 + LAN.pull_delay))) in ({A: (name(1),)}, {})  # or before, where none pushes
    assert core.handle(Got(A, item(1, signer=signer)), at(2)) == [Deliver(item(1, signer=signer))]
    assert [core.duplicate(A, name(1), at(2)) for _ in range(2)] == [False] * (copies - 1) + [True] * (3 - copies)


def test_a_new_item_is_delivered_once_and_announced_to_those_not_known_to_have_it() -> None:
    core = machine(A, B, C)
    core.handle(Announced(B, (entry(1, signer=A),)), at(1))
    assert core.handle(Got(A, item(1)), at(1)) == [Deliver(item(1))]
    assert core.handle(Got(C, item(1)), at(1)) == []
    assert due(core) == 1 + LAN.announce_interval
    assert announced(core.handle(Tick(), at(1 + LAN.announce_interval))) == {}
    core.handle(Got(A, item(2)), at(2))
    core.handle(Got(A, item(3)), at(2))
    actions = core.handle(Tick(), at(2 + LAN.announce_interval))
    assert announced(actions) == {B: [name(2), name(3)], C: [name(2), name(3)]}
    assert announced(core.handle(Tick(), at(3))) == {}


def test_an_item_is_remembered_until_whoever_sends_it_again_is_refused_for_its_stamp() -> None:
    limits = Limits(max_item_age_s=300.0)
    stale = limits.max_item_age_s + limits.max_clock_ahead_s
    core = machine(A, limits=limits)
    core.handle(Got(A, item(1)), at(0))
    for now in range(10, int(stale), 10):
        core.handle(Tick(), at(now))
        core.handle(Got(A, item(now, time=UNIX + now)), at(now))
    assert core.signer(name(1)) == A
    core.handle(Tick(), at(stale))
    core.handle(Tick(), at(stale + stale / 8 + 10))
    assert core.signer(name(1)) is None
    assert core.signer(name(int(stale) - 10)) == A


def test_a_burst_is_announced_once_and_an_endless_one_now_and_then() -> None:
    core = machine(A, B)
    interval = LAN.announce_interval
    told = []
    for number in range(200):
        now = 1 + number * interval / 10
        core.handle(Got(A, item(number)), at(now))
        told += [(now, len(ids)) for ids in announced(core.handle(Tick(), at(now))).values()]
    assert len(told) == int(20 / MAX_HOLD) - 1
    assert told[0][0] - 1 == pytest.approx(MAX_HOLD * interval)
    assert sum(count for _, count in told) > 150
    assert due(core) <= now + interval


def test_a_peer_whose_queue_is_full_does_not_hold_up_the_others() -> None:
    core = machine(A, B, C)
    core.handle(NotSent(B, (name(9),)), at(1))
    core.handle(Got(A, item(1)), at(1))
    assert announced(core.handle(Tick(), at(1 + LAN.announce_interval))) == {C: [name(1)]}


def test_bytes_that_one_peer_sends_twice_are_a_replay_and_from_two_peers_are_not() -> None:
    core = machine(A, B)
    core.handle(Got(A, item(1)), at(1))
    assert core.duplicate(B, name(1), at(2)) is False
    assert core.duplicate(B, name(1), at(2)) is True
    assert core.duplicate(A, name(1), at(2)) is True


def test_a_missed_push_is_pulled_after_a_delay_from_whoever_announced() -> None:
    core = machine(A, B)
    assert core.handle(Announced(B, (entry(1, signer=A),)), at(1)) == []
    assert pulled(core.handle(Tick(), at(1 + LAN.pull_delay - 0.01))) == {}
    assert pulled(core.handle(Tick(), at(1 + LAN.pull_delay))) == {B: (name(1),)}
    core.handle(Got(B, item(1)), at(2))
    assert pulled(core.handle(Tick(), at(60))) == {}


def test_a_push_that_was_only_late_saves_the_pull() -> None:
    core = machine(A, B)
    core.handle(Announced(B, (entry(1, signer=A),)), at(1))
    core.handle(Got(A, item(1)), at(1.2))
    assert pulled(core.handle(Tick(), at(1 + LAN.pull_delay))) == {}


def test_a_large_item_is_asked_for_at_once_and_of_one_holder_only() -> None:
    core = machine(A, B)
    assert core.handle(Announced(A, (entry(1, 100_000),)), at(1)) == [Send(A, Pull((name(1),)))]
    assert core.handle(Announced(B, (entry(1, 100_000),)), at(1)) == []


def test_a_small_item_whose_signer_is_no_peer_has_no_push_to_wait_for() -> None:
    core = machine(A, B)
    assert pulled(core.handle(Announced(B, (entry(1, signer=FAR),)), at(1))) == {B: (name(1),)}
    assert pulled(core.handle(Announced(B, (entry(2, signer=B),)), at(1))) == {B: (name(2),)}
    core.handle(PeerDown(A), at(2))
    assert pulled(core.handle(Announced(B, (entry(3, signer=A),)), at(2))) == {B: (name(3),)}


def test_another_holder_is_asked_when_the_first_stalls_or_leaves() -> None:
    for leave in (False, True):
        core = machine(A, B)
        core.handle(Announced(A, (entry(1, 100_000),)), at(1))
        core.handle(Announced(B, (entry(1, 100_000),)), at(1))
        if leave:
            core.handle(PeerDown(A), at(2))
            assert pulled(core.handle(Tick(), at(2))) == {B: (name(1),)}
        else:
            assert pulled(core.handle(Tick(), at(1 + LAN.pull_patience))) == {}
            assert pulled(core.handle(Tick(), at(2 + LAN.pull_patience))) == {B: (name(1),)}


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
    assert announced(core.handle(Tick(), at(1 + LAN.announce_interval))) == {}
    assert announced(core.handle(Tick(), at(1 + RETRY_S))) == {A: [name(1)]}


@pytest.mark.parametrize("congested", [frozenset(), frozenset([A])], ids=["nothing waits", "items wait for the line"])
def test_the_newest_items_are_announced_now_and_then_in_case_something_was_lost(congested: frozenset[NodeId]) -> None:
    core = machine(A)
    core.handle(Publish(item(1, signer=ME)), at(1))
    seen = {}
    for second in range(2, int(2 * LAN.sync_interval)):
        seen |= announced(core.handle(Tick(congested), at(second)))
    assert seen == ({} if congested else {A: [name(1)]})


def test_who_has_more_on_offer_than_it_takes_is_not_reminded_of_the_newest_items() -> None:
    core = machine(A)
    core.handle(Got(A, item(1)), at(1))
    core.handle(PeerUp(B), at(2))
    core.handle(Tick(), at(2))
    core.handle(Interested(B, Interest(None, announce_only=True)), at(3))
    assert announced(core.handle(Tick(), at(2 * LAN.sync_interval))) == {}
    core.handle(Interested(B, Interest(None)), at(3))
    assert announced(core.handle(Tick(), at(4 * LAN.sync_interval))) == {B: [name(1)]}


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
    core.handle(PeerUp(C), at(3))
    assert announced(core.handle(Tick(), at(3))) == {}


def test_an_item_found_bad_is_still_given_to_whoever_was_told_of_it_and_to_nobody_else() -> None:
    core = machine(A, B)
    core.handle(Got(A, item(1)), at(1))
    assert announced(core.handle(Tick(), at(2))) == {B: [name(1)]}
    core.handle(PeerUp(C), at(2))
    core.handle(Discard(name(1)), at(2))
    assert core.handle(Pulled(B, (name(1),)), at(2)) == [Send(B, item(1))]
    assert core.handle(Pulled(C, (name(1),)), at(2)) == []


def test_held_items_are_bounded_in_bytes() -> None:
    core = machine(A, limits=Limits(held_bytes=1000))
    for number in range(50):
        core.handle(Got(A, item(number)), at(1))
    core.handle(PeerUp(B), at(2))
    assert announced(core.handle(Tick(), at(2)))[B] == [name(number) for number in range(40, 50)]


def test_held_items_are_bounded_in_number_and_one_that_comes_again_counts_once() -> None:
    store = Store(1 << 30, 3600.0)
    for number in range(MAX_HELD + 10):
        store.add(item(number, 200), at(1))
    assert len(store) == MAX_HELD < SEEN_ITEMS and store.size == 200 * MAX_HELD
    store.add(item(MAX_HELD, 200), at(2))
    assert len(store) == MAX_HELD and store.size == 200 * MAX_HELD
    assert store.newest(1) == [name(MAX_HELD)]


def test_large_items_beyond_half_of_the_store_push_out_large_ones_only_and_one_may_be_larger() -> None:
    store, chunk = Store(32 * CHUNK_BYTES, 3600.0), CHUNK_BYTES
    for number in range(8):
        store.add(item(number, chunk), at(1))
    for number, size in enumerate((5 * chunk, 9 * chunk, 4 * chunk, 20 * chunk, 20 * chunk, 6 * chunk), start=8):
        store.add(item(number, size), at(2))
        assert store.size == sum(len(one.frame) for one in map(store.get, store.newest(99)) if one) <= 32 * chunk
    assert store.newest(99) == [name(number) for number in (*range(8), 13)]
    for number in range(14, 40):  # small ones have what large ones leave
        store.add(item(number, chunk), at(3))
    assert store.newest(99) == [name(number) for number in range(13, 40)]
    store.add(item(40, chunk), at(3))
    assert store.newest(99) == [name(number) for number in range(14, 41)]


def test_large_items_have_all_of_the_store_while_there_is_room() -> None:
    store = Store(32 * CHUNK_BYTES, 3600.0)
    for number, size in enumerate((20, 5, 5, 2)):
        store.add(item(number, size * CHUNK_BYTES), at(1))
    assert store.newest(99) == [name(number) for number in range(4)]
    store.add(item(4, CHUNK_BYTES), at(2))
    assert store.newest(99) == [name(number) for number in range(1, 5)]


def test_what_a_peer_still_lacks_is_held_longer_than_what_all_have() -> None:
    core = machine(A, B, limits=Limits(held_bytes=1000))
    for number in range(10):
        core.handle(Got(A, item(number)), at(1))
    core.handle(Announced(B, tuple(entry(number) for number in range(3, 10))), at(1))
    for number in range(10, 14):
        core.handle(Got(A, item(number)), at(1))
    held = [number for number in range(14) if core.handle(Pulled(B, (name(number),)), at(2))]
    assert held == [0, 1, 2, 7, 8, 9, 10, 11, 12, 13]


def test_serving_pulls_is_bounded() -> None:
    core = machine(A, B, limits=Limits(bytes_per_second=100.0, bytes_burst=250.0))
    for number in range(5):
        core.handle(Got(A, item(number)), at(1))
    asks = [core.handle(Pulled(B, (name(number),)), at(1)) for number in range(5)]
    assert [bool(actions) for actions in asks] == [True, True, False, False, False]
    assert core.handle(Pulled(B, (name(4),)), at(2.1)) == [Send(B, item(4))]


@pytest.mark.parametrize("size", [10, AGAIN_BYTES], ids=["a small one, for as much as one of 1 KiB", "one of 1 KiB"])
def test_an_item_is_served_to_a_peer_once_and_again_only_out_of_an_allowance_that_outlives_its_link(size: int) -> None:
    core = machine(A, B, limits=Limits(held_bytes=10 * AGAIN_BYTES))
    core.handle(Got(A, item(1, size)), at(1))
    served = [core.handle(Pulled(B, (name(1),)), at(1)) for _ in range(250)]
    assert sum(isinstance(action, Send) for actions in served for action in actions) == 1 + 10
    core.handle(PeerDown(B), at(2))
    core.handle(PeerUp(B), at(2))
    assert core.handle(Pulled(B, (name(1),)), at(2)) == [Blame(B, "asked_again")]
    assert core.handle(Pulled(A, (name(1),)), at(2)) == [Send(A, item(1, size))]
    assert core.handle(Pulled(B, (name(1),)), at(2 + AGAIN_S / 10)) == [Send(B, item(1, size))]


def test_what_one_request_names_again_is_given_once_and_costs_each_time() -> None:
    core = machine(A)
    large, _ = large_item()
    for one in (large, item(1, signer=ME)):
        core.handle(Publish(one), at(1))
    again = Blame(A, "asked_again")
    assert core.handle(Pulled(A, (large.id, name(1), large.id, large.id)), at(2)) == [
        Send(A, large),
        Send(A, item(1, signer=ME)),
        again,
        again,
    ]
    core.handle(Tick(), at(2))
    assert core.handle(ChunksPulled(A, PullChunks(large.id, (1, 1, 0, 1))), at(3)) == [
        Send(A, large.chunk(1)),
        Send(A, large.chunk(0)),
        again,
        again,
    ]


@pytest.mark.parametrize("refusals", [1, 1000], ids=["one refusal", "one in each tenth of a second"])
def test_a_peer_whose_queue_was_full_is_announced_what_it_lacks_once_nothing_waits_for_it_or_a_while_later(
    refusals: int,
) -> None:
    core, waits = machine(A, B), frozenset({B})
    for number in (1, 2):
        core.handle(Got(A, item(number)), at(1))

    def first_told(start: float, congested: frozenset[NodeId]) -> float:
        for tenth in range(1000):
            now = start + tenth / 10
            if tenth < refusals:
                core.handle(NotSent(B, (name(1), name(2))), at(now))
            if B in announced(core.handle(Tick(congested), at(now))):
                return now - start
        return math.inf

    assert first_told(1, waits) == pytest.approx(FULL_S, abs=RETRY_S)
    assert first_told(100, waits) == pytest.approx(FULL_S, abs=RETRY_S)
    core.handle(NotSent(B, (name(1),)), at(200))
    core.handle(Announced(B, (item(1).entry,)), at(200))  # so it need not be told
    core.handle(Tick(waits), at(240))
    assert first_told(300, waits) == pytest.approx(FULL_S, abs=RETRY_S)
    assert first_told(400, frozenset()) == pytest.approx(RETRY_S if refusals == 1 else FULL_S, abs=RETRY_S / 2)


def test_what_did_not_leave_was_not_served() -> None:
    core = machine(A, B, limits=Limits(held_bytes=100))
    core.handle(Got(A, item(1)), at(1))
    for second in range(1, 20):
        assert core.handle(Pulled(B, (name(1),)), at(second)) == [Send(B, item(1))]
        core.handle(NotSent(B, (name(1),)), at(second))


def test_what_is_not_served_for_its_size_is_announced_again_later() -> None:
    core = machine(A, B, limits=Limits(bytes_per_second=100.0, bytes_burst=150.0))
    for number in (1, 2):
        core.handle(Got(A, item(number)), at(1))
    assert announced(core.handle(Tick(), at(2))) == {B: [name(1), name(2)]}
    assert core.handle(Pulled(B, (name(1), name(2))), at(2)) == [Send(B, item(1))]
    assert announced(core.handle(Tick(), at(2 + RETRY_S))) == {B: [name(2)]}
    assert core.handle(Pulled(B, (name(2),)), at(2 + RETRY_S)) == [Send(B, item(2))]


def test_interest_is_told_to_every_peer_now_and_to_come() -> None:
    core = machine(A)
    assert core.handle(PeerUp(B), at(1)) == []  # nothing to tell yet: peers offer everything
    wish = Interest((TOPIC,))
    subscription = Subscribe(frozenset([TOPIC]), math.inf)
    assert core.handle(subscription, at(2)) == [Send(A, wish), Send(B, wish)]
    assert core.handle(subscription, at(3)) == []
    assert core.handle(PeerUp(C), at(4)) == [Send(C, wish)]


def test_only_interested_peers_are_pushed_to_and_told() -> None:
    core = machine(A, B, C)
    core.handle(Interested(B, Interest((TOPIC,))), at(1))
    core.handle(Interested(C, Interest(())), at(1))
    assert [a.to for a in core.handle(Publish(item(1, signer=ME, topic=TOPIC)), at(1))] == [A, B]
    assert [a.to for a in core.handle(Publish(item(2, signer=ME, topic=OTHER)), at(1))] == [A]
    core.handle(Publish(item(3, PUSH_BYTES + 1, signer=ME, topic=OTHER)), at(1))
    core.handle(Got(A, item(4, topic=TOPIC)), at(1))
    assert announced(core.handle(Tick(), at(2))) == {A: [name(3)], B: [name(4)]}


def test_a_peer_that_wants_announcements_only_is_not_pushed_to() -> None:
    core = machine(A)
    core.handle(Interested(A, Interest(None, announce_only=True)), at(1))
    assert core.handle(Publish(item(1, signer=ME)), at(1)) == []
    assert due(core) == 1 + LAN.announce_interval  # with what else comes
    assert announced(core.handle(Tick(), at(1 + LAN.announce_interval))) == {A: [name(1)]}


def test_a_peer_that_draws_from_announcements_is_told_no_more_often_than_it_draws() -> None:
    core = machine(A, B)
    core.handle(Interested(A, Interest(None, announce_only=True)), at(1))
    told: dict[NodeId, list[float]] = {A: [], B: []}
    items: dict[NodeId, list[ItemId]] = {A: [], B: []}
    ticked = 0.0
    for hundredth in range(400):
        now = 1 + hundredth / 100
        if hundredth < 300 and hundredth % 10 == 0:
            core.handle(Got(C, item(hundredth, signer=FAR)), at(now))
        if now >= ticked + core.wait():
            ticked = now
            for node, ids in announced(core.handle(Tick(), at(now))).items():
                told[node].append(now)
                items[node] += ids
    assert items[A] == items[B] and len(items[A]) == 30
    assert len(told[A]) <= 3 * DRAWS / LAN.pull_patience + 1 < 10 < len(told[B])


def test_a_peer_is_told_of_its_shard_and_of_what_we_signed_ourselves() -> None:
    core = machine(A, B)
    core.handle(Interested(B, Interest(None, bits=1)), at(1))
    near, far = (
        next(s for s in map(signer_of, range(99)) if same_shard(hint(s), hint(B), 1, UNIX) is same)
        for same in (True, False)
    )
    core.handle(Got(A, item(1, signer=near)), at(1))
    core.handle(Got(A, item(2, signer=far)), at(1))
    core.handle(Publish(item(3, PUSH_BYTES + 1, signer=ME)), at(1))
    assert announced(core.handle(Tick(), at(2)))[B] == [name(1), name(3)]


def signer_of(number: int) -> NodeId:
    return id_of_bytes(number.to_bytes(20, "little"))


def test_what_we_did_not_ask_for_is_neither_pulled_nor_delivered_nor_held() -> None:
    core = machine(A, B)
    core.handle(Subscribe(frozenset([TOPIC]), math.inf), at(1))
    actions = core.handle(Announced(A, (entry(1, topic=OTHER), entry(2, topic=TOPIC))), at(1))
    assert pulled(actions) == {A: (name(2),)}
    assert core.handle(Got(A, item(3, topic=OTHER)), at(1)) == [Blame(A, "unwanted")]
    assert core.handle(Got(A, item(4, topic=TOPIC)), at(1)) == [Deliver(item(4, topic=TOPIC))]
    assert core.handle(Pulled(B, (name(3),)), at(2)) == []


def test_a_node_pulls_what_it_demands_and_no_more() -> None:
    core = machine(A)
    core.handle(Subscribe(None, 2.0), at(0))
    taken = 0
    for second in range(30):
        entries = tuple(entry(100 * second + number, signer=signer_of(number)) for number in range(50))
        for action in core.handle(Announced(A, entries), at(second)) + core.handle(Tick(), at(second)):
            for _, pull in sent(Pull, [action]):
                taken += len(pull.ids)
                for item_id in pull.ids:
                    core.handle(Got(A, replace(item(0, signer=FAR), id=item_id)), at(second))
    assert taken == MIN_BURST + 2 * 29


def test_of_what_is_offered_every_signer_has_the_same_part_whoever_announces_first_and_most() -> None:
    peers = [signer_of(number) for number in range(7)]
    core = machine(*peers)
    core.handle(Subscribe(None, 8.0), at(0))
    taken: Counter[NodeId] = Counter()
    serial = 0
    for second in range(200):
        actions = []
        for peer in peers:  # always in the same order; the first publishes three times as much
            entries = [entry(serial + number, signer=peer) for number in range(12 if peer == peers[0] else 4)]
            serial += len(entries)
            actions += core.handle(Announced(peer, tuple(entries)), at(second))
        for to, pull in sent(Pull, actions + core.handle(Tick(), at(second + 0.5))):
            for item_id in pull.ids:
                if second >= 20:  # what is on offer is known
                    taken[to] += 1
                core.handle(Got(to, replace(item(0, signer=to), id=item_id)), at(second + 0.5))
    assert taken.total() == pytest.approx(8 * 180, rel=0.05)
    assert all(count == pytest.approx(8 * 180 / 7, rel=0.1) for count in taken.values()), taken


def test_pushes_count_against_the_demand_and_are_declined_above_it() -> None:
    core = machine(A)
    core.handle(Subscribe(None, 2.0), at(0))
    told = []
    for second in range(60):
        for number in range(5):
            core.handle(Got(A, item(10 * second + number)), at(second))
        told += sent(Interest, core.handle(Tick(), at(second)))
    assert told == [(A, Interest(None, announce_only=True))]


@pytest.mark.parametrize("pushes", [0, 1, 20], ids="{} a second".format)
def test_whoever_pushes_does_not_starve_a_node_of_what_it_pulls(pushes: int) -> None:
    core = machine(A, B)
    core.handle(Subscribe(None, 2.0), at(0))
    asked = 0
    for second in range(120):
        for number in range(pushes):
            core.handle(Got(B, item(10**6 + 100 * second + number, signer=B)), at(second))
        entries = tuple(entry(1000 * second + number, signer=signer_of(number)) for number in range(3))
        for action in core.handle(Announced(A, entries), at(second)) + core.handle(Tick(), at(second)):
            for item_id in [item_id for _, pull in sent(Pull, [action]) for item_id in pull.ids]:
                asked += 1
                core.handle(Got(A, replace(item(0, signer=FAR), id=item_id)), at(second))
    assert asked >= 0.95 * 2 * 120


def test_what_is_pushed_beyond_the_demand_is_counted_and_can_be_pulled_later() -> None:
    core = machine(A, B)
    core.handle(Subscribe(None, 1.0), at(0))
    beyond = int(MIN_BURST)
    pushed = [core.handle(Got(A, item(number)), at(0)) for number in range(beyond + 1)]
    assert pushed[0] == [Deliver(item(0))] and pushed[beyond] == [Blame(A, "over_demand")]
    assert pulled(core.handle(Announced(B, (entry(beyond),)), at(60))) == {B: (name(beyond),)}
    assert core.handle(Got(B, item(beyond)), at(60)) == [Deliver(item(beyond))]


def test_a_push_beyond_the_demand_need_not_be_verified_unless_it_was_asked_for_or_is_an_offence() -> None:
    core = machine(A, B)
    assert not core.declines(A, name(1), 100, at(0))  # the demand is met by nothing yet
    core.handle(Announced(A, (entry(1),)), at(0))
    core.handle(Subscribe(None, 0.0), at(1))
    assert not core.declines(A, name(1), 100, at(1))
    assert core.declines(A, name(2), PUSH_GRACE_BYTES, at(1))
    assert core.declines(A, name(2), 1, at(1 + PUSH_GRACE_S / 2))
    assert not core.declines(A, name(2), 1, at(1 + PUSH_GRACE_S))
    assert core.declines(B, name(2), PUSH_GRACE_BYTES, at(1 + 10 * PUSH_GRACE_S))  # what it queued may come so slowly
    assert not core.declines(B, name(2), 1, at(1 + 10 * PUSH_GRACE_S))


def test_what_is_pulled_is_drawn_from_what_all_have_announced_where_there_is_more_than_we_take() -> None:
    core = machine(A, B)
    core.handle(Subscribe(None, 1.0), at(0))
    for second in range(60):
        core.handle(Announced(A, tuple(entry(10 * second + number) for number in range(10))), at(second))
        core.handle(Tick(), at(second))
    core.handle(Tick(), at(90))
    assert core.handle(Announced(A, (entry(1000, signer=A),)), at(100)) == []
    assert core.handle(Announced(B, (entry(1001, signer=B),)), at(100)) == []
    drawn = pulled(core.handle(Tick(), at(100.5)))
    assert name(1000) in drawn[A] and name(1001) in drawn[B]


def test_a_push_long_after_we_asked_for_announcements_only_is_an_offence() -> None:
    core = machine(A)
    core.handle(Subscribe(None, 0.0), at(0))  # nothing: announce only
    core.declines(A, name(1), PUSH_GRACE_BYTES + 1, at(0))
    assert core.handle(Got(A, item(1)), at(PUSH_GRACE_S - 1)) == [Blame(A, "over_demand")]
    assert core.handle(Got(A, item(2)), at(PUSH_GRACE_S)) == [Blame(A, "unasked")]
    core.handle(Subscribe(None, 5.0), at(PUSH_GRACE_S))
    core.handle(Tick(), at(400))  # what is on offer is less than that again
    assert core.handle(Got(A, item(3)), at(500)) == [Deliver(item(3))]


@pytest.mark.parametrize("away", [1.0, 2 * AGAIN_S], ids=["at once", "after long"])
def test_hanging_up_renews_nothing_of_what_may_be_pushed_until_ten_minutes_later(away: float) -> None:
    core = machine(A)
    core.handle(Subscribe(None, 0.0), at(0))
    core.declines(A, name(1), PUSH_GRACE_BYTES + 1, at(0))
    core.handle(PeerDown(A), at(1))
    core.handle(PeerUp(A), at(1 + away))
    blamed = core.handle(Got(A, item(1)), at(1 + away + PUSH_GRACE_S))
    assert blamed == [Blame(A, "unasked" if away == 1.0 else "over_demand")]


def test_an_item_that_was_asked_for_and_comes_late_is_no_push() -> None:
    core = machine(A, B)
    core.handle(Subscribe(None, 1.0), at(0))
    core.handle(Announced(A, (entry(1),)), at(1))
    core.handle(Tick(), at(1 + LAN.pull_patience + 0.1))  # stalled, and asked for again
    core.handle(Subscribe(None, 0.0), at(4))
    assert core.handle(Got(A, item(1)), at(5)) == [Deliver(item(1))]


def test_a_peer_that_repeats_what_live_peers_sign_is_told_so_once_and_again_when_such_a_link_ends() -> None:
    core = machine(A, B, C)
    core.handle(Subscribe(None, 0.0), at(0))  # announcements only: nobody else is left out
    wait = LAN.pull_patience
    core.handle(Announced(B, (entry(2, signer=B), entry(3), entry(4, PUSH_BYTES + 1, signer=C))), at(1))
    assert sent(Interest, core.handle(Tick(), at(wait))) == []
    core.handle(Announced(B, (entry(5, signer=A),)), at(wait))
    wish = Interest(None, announce_only=True)
    assert sent(Interest, core.handle(Tick(), at(wait + 0.1))) == []
    assert sent(Interest, core.handle(Tick(), at(2 * wait))) == [(B, replace(wish, direct=(A, C)))]
    core.handle(Announced(B, (entry(6, signer=C),)), at(2 * wait))
    assert sent(Interest, core.handle(Tick(), at(3 * wait))) == []
    assert sent(Interest, core.handle(PeerDown(A), at(3 * wait))) == [(B, replace(wish, direct=(C,)))]
    assert sent(Interest, core.handle(PeerDown(FAR), at(3 * wait))) == []


def machine_that_heard_of(signer: NodeId, *peers: NodeId) -> Gossip:
    """One that was told of an item of `signer` by all `peers` before it came, and has chosen its sources by 2 s."""
    core = machine(*peers)
    for peer in peers:
        core.handle(Announced(peer, (entry(1, signer=signer),)), at(0.5))
    core.handle(Got(peers[0], item(1, signer=signer)), at(0.6))
    return core


def left_out(core: Gossip, now: float) -> dict[NodeId, bool]:
    """Whom it tells by the tick at `now` what it hears of elsewhere; True: of FAR, too."""
    return {node: FAR in wish.direct for node, wish in sent(Interest, core.handle(Tick(), at(now)))}


def test_of_a_signer_that_is_no_peer_two_of_those_that_told_it_first_are_heard_and_the_others_told_so() -> None:
    core = machine_that_heard_of(FAR, A, B, C)
    told = left_out(core, 2)
    assert sorted(told) == sorted((A, B, C)) and sorted(told.values()) == [False, False, True]
    late = next(node for node, is_out in told.items() if is_out)
    core.handle(Announced(late, (entry(1),)), at(2.1))  # once more, which says nothing new
    assert left_out(core, 4) == {}


@pytest.mark.parametrize("wish", [Interest(None, announce_only=True), Interest(None, bits=1), Interest((TOPIC,))])
def test_a_peer_that_takes_less_than_we_do_is_no_source_and_one_that_does_so_later_no_more(wish: Interest) -> None:
    for less in (A, B, C):
        core = machine_that_heard_of(FAR, A, B, C)
        core.handle(Interested(less, wish), at(1))
        assert left_out(core, 2) == {node: node == less for node in (A, B, C)}
        core.handle(Interested(next(node for node in (A, B, C) if node != less), wish), at(3))
        assert left_out(core, 4) == {less: False}


def test_where_more_is_on_offer_than_is_taken_any_peer_is_heard_of_any_signer() -> None:
    core = machine_that_heard_of(FAR, A, B, C)
    late = next(node for node, is_out in left_out(core, 2).items() if is_out)
    core.handle(Subscribe(None, 0.0), at(3))
    assert left_out(core, 4) == {late: False}
    core.handle(Announced(late, (entry(2, signer=FAR),)), at(5))
    assert left_out(core, 6) == {}


def test_sources_are_chosen_for_no_more_signers_than_an_interest_names_and_at_any_time() -> None:
    core = machine(A, B, C)
    others = [id_of_bytes(bytes([number]) * 20) for number in range(MAX_DIRECT + 5)]
    many = [item(number) for number in range(1000, 1000 + MAX_BROUGHT)]
    for peer in (B, C):
        core.handle(Announced(peer, tuple(one.entry for one in many)), at(0.5))
    for one in many:
        core.handle(Got(A, one), at(0.6))
    left_out(core, 2)
    for number, signer in enumerate(others):
        for peer in (A, B, C):
            core.handle(Announced(peer, (entry(number, signer=signer),)), at(2.5))
        core.handle(Got(A, item(number, signer=signer)), at(2.6))
    (late, wish), *_ = sorted(sent(Interest, core.handle(Tick(), at(4))), key=lambda told: -len(told[1].direct))
    assert len(wish.direct) == MAX_DIRECT - 3 + 2
    assert set(wish.direct) >= {A, B, C} - {late}


def test_signers_that_are_gone_make_room_for_the_sources_of_others_and_no_sooner() -> None:
    core = machine(A, B, C)

    def show(number: int, now: float) -> None:
        signer = id_of_bytes(bytes([number]) * 20)
        for peer in (A, B, C):
            core.handle(Announced(peer, (entry(round(now) * 100 + number, signer=signer),)), at(now))
        core.handle(Got(A, item(round(now) * 100 + number, signer=signer)), at(now))

    def heard_elsewhere(now: float) -> int:
        return sum(FAR in wish.direct for _, wish in sent(Interest, core.handle(Tick(), at(now))))

    for number in range(MAX_DIRECT):
        show(number, 1)
    core.handle(Tick(), at(3))
    show(ord("f"), SILENT_S)
    assert heard_elsewhere(SILENT_S + 1) == 0  # there is no place
    show(0, SILENT_S + 1)  # one of those that have one is not gone
    core.handle(Tick(), at(SILENT_S + 4))
    show(ord("f"), SILENT_S + 5)
    assert heard_elsewhere(SILENT_S + 7) == 1
    assert id_of_bytes(bytes(20)) in core._relied and id_of_bytes(bytes([1]) * 20) not in core._relied


def test_a_source_that_leaves_brings_nothing_or_stays_silent_is_replaced_by_all_peers_again() -> None:
    def chosen() -> tuple[Gossip, NodeId, NodeId]:
        core = machine_that_heard_of(FAR, A, B, C)
        told = left_out(core, 2)
        other = next(node for node, is_out in told.items() if is_out)
        return core, next(node for node in told if node != other), other

    core, source, other = chosen()
    wishes = dict(sent(Interest, core.handle(PeerDown(source), at(2))))
    assert FAR not in wishes[other].direct
    core, source, other = chosen()
    core.handle(Announced(source, (entry(2),)), at(2))
    assert not left_out(core, 2.1 + LAN.pull_patience)[other]
    core, source, other = chosen()
    core.handle(Announced(other, (entry(2),)), at(3))  # as it does now and then, in case something was lost
    core.handle(Got(other, item(2, signer=FAR)), at(3.1))
    assert [*announced(core.handle(Tick(), at(3.2)))]  # which makes the source's silence no word
    core.handle(Announced(source, (entry(2),)), at(3.3))  # nor is it one to repeat ours
    assert not left_out(core, 4)[other]
    core, source, other = chosen()
    core.handle(Announced(other, (entry(2),)), at(3))
    core.handle(Got(other, item(2, signer=FAR)), at(3.1))
    core.handle(Announced(source, (entry(2),)), at(3.2))
    assert left_out(core, 4) == {}


@pytest.mark.parametrize("congested", [frozenset(), frozenset([A, B, C])], ids=["nothing waits", "items wait"])
def test_now_and_then_a_peer_is_asked_for_what_the_sources_withhold_and_told_to_leave_out_what_is_next(
    congested: frozenset[NodeId],
) -> None:
    core = machine_that_heard_of(FAR, A, B, C)
    late = next(node for node, is_out in left_out(core, 2).items() if is_out)
    for now in range(4, int(32 * LAN.sync_interval), 2):
        actions = core.handle(Tick(congested), at(now))
        said = [FAR in wish.direct for node, wish in sent(Interest, actions) if node == late]
        if said:
            break
    assert now >= 0.75 * LAN.sync_interval and said == [False, True]  # two announcements to others are likely before
    core.handle(Announced(late, (entry(1),)), at(now))  # what it left out until then
    assert left_out(core, now + LAN.pull_patience) == {}


def test_now_and_then_a_peer_is_asked_for_what_we_hear_from_its_signers_themselves() -> None:
    """What a live peer pushed may be lost, and nobody else would tell of it."""
    core = machine(A, B)
    core.handle(Announced(B, (entry(1, signer=A),)), at(0))
    assert sent(Interest, core.handle(Tick(), at(2))) == [(B, Interest(None, direct=(A,)))]
    asked = [
        wishes
        for now in range(4, int(8 * LAN.sync_interval), 2)
        if (wishes := [wish for node, wish in sent(Interest, core.handle(Tick(), at(now))) if node == B])
    ]
    assert 1 < len(asked) < 8
    assert all(wishes == [Interest(None), Interest(None, direct=(A,))] for wishes in asked)


def test_what_a_peer_asks_for_by_naming_no_signers_is_what_it_was_not_told_of() -> None:
    core = machine(A, B)
    core.handle(Interested(B, Interest(None, direct=(A,))), at(0))
    for number in (1, 2):
        core.handle(Got(A, item(number, signer=A)), at(0))
    assert announced(core.handle(Tick(), at(1))) == {}
    for wish in (Interest(None), Interest(None, direct=(A,))):
        core.handle(Interested(B, wish), at(2))
    core.handle(Got(A, item(3, signer=A)), at(2))  # what is next
    assert announced(core.handle(Tick(), at(3))) == {B: [item(1).id, item(2).id]}


def test_what_all_who_are_near_hear_of_without_us_is_let_go_of_first() -> None:
    core = machine(A, B, limits=replace(Limits(), held_bytes=2 * len(item(1).frame)))
    core.handle(Interested(B, Interest(None, direct=(A,))), at(0))
    for one in (item(1, signer=FAR), item(2, signer=A), item(3, signer=FAR)):
        core.handle(Got(A, one), at(0))
    assert announced(core.handle(Tick(), at(1))) == {B: [item(1).id, item(3).id]}


def test_once_a_signer_is_a_peer_its_sources_need_not_announce_its_items_either() -> None:
    core = machine_that_heard_of(FAR, A, B, C)
    told = left_out(core, 2)
    source, late = (next(node for node, is_out in told.items() if is_out is wanted) for wanted in (False, True))
    core.handle(PeerUp(FAR), at(3))
    core.handle(Announced(source, (entry(2),)), at(3))
    assert left_out(core, 4) == {source: True}
    assert FAR in dict(sent(Interest, core.handle(PeerDown(source), at(5))))[late].direct
    assert not any(FAR in wish.direct for _, wish in sent(Interest, core.handle(PeerDown(FAR), at(5))))


def test_a_signer_that_does_not_bring_what_it_announced_is_heard_of_through_others() -> None:
    core = machine(A, B)
    core.handle(Announced(B, (entry(1, signer=A),)), at(0))
    assert sent(Interest, core.handle(Tick(), at(2))) == [(B, Interest(None, direct=(A,)))]
    core.handle(Announced(A, (entry(2, signer=A),)), at(2))
    late = 2.1 + LAN.pull_patience
    assert sent(Interest, core.handle(Tick(), at(late))) == [(B, Interest(None))]
    core.handle(Announced(B, (entry(2, signer=A),)), at(late))
    assert sent(Interest, core.handle(Tick(), at(late + LAN.pull_patience))) == []
    core.handle(Got(A, item(2)), at(late + 3))
    core.handle(Announced(B, (entry(3, signer=A),)), at(late + 3))
    assert sent(Interest, core.handle(Tick(), at(late + 3 + LAN.pull_patience))) == [(B, Interest(None, direct=(A,)))]


def test_a_small_item_is_not_announced_to_who_hears_of_it_from_its_signer_and_is_when_that_ends() -> None:
    core = machine(A, B, C)
    core.handle(Interested(B, Interest(None, direct=(A,))), at(0))
    core.handle(Got(A, item(1)), at(1))
    core.handle(Got(C, item(2, signer=FAR)), at(1))
    core.handle(Announced(A, (entry(3, PUSH_BYTES + 1, signer=A),)), at(1))
    core.handle(Got(A, item(3, PUSH_BYTES + 1)), at(1))
    assert announced(core.handle(Tick(), at(2)))[B] == [name(2), name(3)]
    core.handle(Interested(B, Interest(None)), at(3))
    assert announced(core.handle(Tick(), at(4))) == {B: [name(1)]}


def test_nobody_waits_for_a_node_that_draws_what_it_pulls_but_who_fetches_what_is_large() -> None:
    core = machine(A, B)
    assert not core.may_rest(at(1))
    core.handle(Subscribe(None, 0.0), at(1))
    assert core.may_rest(at(1))
    large = item(1, CHUNK_BYTES + 1000, signer=ME)
    core.handle(Publish(large), at(1))
    core.handle(Tick(), at(1))
    assert core.may_rest(at(1))
    core.handle(ChunksPulled(B, PullChunks(large.id, (0,))), at(1))
    assert not core.may_rest(at(1))
    assert core.may_rest(at(1 + LAN.pull_patience))


def test_chunks_are_given_of_what_has_an_outline_only() -> None:
    core = machine(A)
    small, large = item(1, CHUNK_BYTES, signer=ME), item(2, CHUNK_BYTES + 1000, signer=ME)
    for one in (small, large):
        core.handle(Publish(one), at(1))
        core.handle(Tick(), at(2))
    given = [core.handle(ChunksPulled(A, PullChunks(one.id, (0,))), at(3)) for one in (small, large)]
    assert [[to for to, _ in sent(ItemChunk, actions)] for actions in given] == [[], [A]]


def test_an_item_that_is_stale_soon_is_delivered_and_not_announced() -> None:
    core = machine(A, B)
    old = 0.9 * Limits().max_item_age_s
    for number, age in ((1, 0.0), (2, old)):
        assert core.handle(Got(A, item(number, time=UNIX - age)), at(1)) != []
    assert announced(core.handle(Tick(), at(2))) == {B: [name(1)]}
    core.handle(PeerUp(C), at(3))
    assert announced(core.handle(Tick(), at(3)))[C] == [name(1)]


def test_without_a_bound_on_the_demand_nothing_that_is_wanted_is_given_up() -> None:
    for demand, still in ((math.inf, True), (0.001, False)):
        core = machine(A)
        core.handle(Subscribe(None, demand), at(0))
        core.handle(Announced(A, tuple(entry(number) for number in range(200))), at(0))
        for second in range(100):
            core.handle(Tick(), at(second))
        assert bool(len(core._pulls)) is still


def test_a_pull_that_failed_does_not_use_up_the_demand() -> None:
    core = machine(A)
    core.handle(Subscribe(None, 0.01), at(0))
    burst = int(MIN_BURST)
    core.handle(Announced(A, tuple(entry(number) for number in range(burst))), at(0))
    assert pulled(core.handle(Announced(A, (entry(burst),)), at(1))) == {}
    assert len(pulled(core.handle(Tick(), at(3)))[A]) == burst // 2  # the holder's window, halved


def test_who_announces_and_never_delivers_is_blamed() -> None:
    core = machine(A)
    blames = []
    for second in range(int(PROMISE_PATIENCE * LAN.pull_patience) + 2):
        entries = tuple(entry(100 * second + number) for number in range(MAX_BROKEN))
        core.handle(Announced(A, entries), at(second))
        blames += [a for a in core.handle(Tick(), at(second)) if isinstance(a, Blame)]
    assert blames == [Blame(A, "broken_promise")] * len(blames) and blames


def test_a_newcomer_is_told_the_newest_at_once_and_the_rest_in_batches_but_for_what_it_has() -> None:
    core = machine(A)
    for number in range(1500):
        core.handle(Got(A, item(number)), at(1))
    core.handle(PeerUp(B), at(2))
    first = announced(core.handle(Tick(), at(2)))[B]
    assert first == [name(number) for number in range(1500 - FIRST_IDS, 1500)]
    core.handle(Announced(B, tuple(entry(number, signer=A) for number in range(500))), at(2))
    batches = [announced(core.handle(Tick(), at(2 + tenth / 10))).get(B) for tenth in range(1, 100)]
    batches = [batch for batch in batches if batch]
    assert [len(batch) for batch in batches] == [MAX_IDS, 1000 - FIRST_IDS - MAX_IDS]
    assert sorted(sum(batches, first)) == sorted(name(number) for number in range(500, 1500))
    assert core.wait() > CATCH_UP_S / 4


def test_a_newcomer_that_is_told_while_its_queue_is_full_is_told_later() -> None:
    core = machine()
    core.handle(Publish(item(1, signer=ME)), at(0))
    core.handle(PeerUp(B), at(1))
    assert announced(core.handle(Tick(), at(1))) == {B: [name(1)]}
    core.handle(NotSent(B, (name(1),)), at(1))
    assert announced(core.handle(Tick(), at(1 + RETRY_S))) == {B: [name(1)]}


PEERS = st.sampled_from([A, B, C])
NUMBERS = st.integers(0, 40)
ENTRIES = st.lists(st.builds(entry, NUMBERS, st.sampled_from([100, 100_000]), st.sampled_from([A, B, FAR])), max_size=8)
EVENTS = st.one_of(
    st.builds(PeerUp, PEERS),
    st.builds(PeerDown, PEERS),
    st.builds(Publish, st.builds(item, NUMBERS, st.sampled_from([100, 100_000]), st.just(ME))),
    st.builds(Got, PEERS, st.builds(item, NUMBERS, st.sampled_from([100, 100_000]), st.sampled_from([A, B, FAR]))),
    st.builds(Announced, PEERS, ENTRIES.map(tuple)),
    st.builds(Pulled, PEERS, st.lists(NUMBERS.map(name), max_size=4).map(tuple)),
    st.builds(NotSent, PEERS, st.lists(NUMBERS.map(name), max_size=4).map(tuple)),
    st.builds(Discard, NUMBERS.map(name)),
    st.builds(Interested, PEERS, st.builds(Interest, st.none() | st.just((TOPIC,)), st.integers(0, 16), st.booleans())),
    st.builds(Subscribe, st.none() | st.just(frozenset([TOPIC])), st.sampled_from([0.0, 0.5, 5.0, math.inf])),
    st.just(Tick()),
)


@given(st.lists(st.tuples(EVENTS, st.floats(0, 3)), max_size=60))
def test_no_history_delivers_twice_talks_to_strangers_or_grows_beyond_bounds(history) -> None:
    core = machine(limits=Limits(held_bytes=300_000))
    up: set[NodeId] = set()
    delivered: set[ItemId] = set()
    now = 0.0
    for event, pause in history:
        now += pause
        match event:
            case PeerUp(node):
                up.add(node)
            case PeerDown(node):
                up.discard(node)
        for action in core.handle(event, at(now)):
            if isinstance(action, Deliver):
                assert action.item.id not in delivered
                delivered.add(action.item.id)
            elif not isinstance(action, Blame):
                assert action.to in up
        assert core.wait() >= 0
        assert core._store.size <= 300_000
        assert len(core._pulls) <= MAX_WANTS
        for peer in core._peers.values():
            assert len(peer.pending) <= MAX_PENDING and len(peer.backlog) <= MAX_PENDING
            assert len(peer.known) <= KNOWN_ITEMS


def test_who_was_asked_twice_for_a_large_item_may_answer_twice() -> None:
    large, outline = large_item()
    core = machine(A)
    core.handle(Announced(A, (large.entry,)), at(1))
    asks = [ask for now in range(2, 8) for ask in sent(Pull, core.handle(Tick(), at(now)))]
    assert len(asks) >= 1  # beside the one at once
    said = [core.handle(Outlined(A, outline), at(8)) for _ in range(len(asks) + 2)]
    assert [*sent(PullChunks, said[0])] and said[1:-1] == [[]] * len(asks)
    assert said[-1] == [Blame(A, "unasked")]


def test_who_answers_a_pull_after_another_did_is_not_blamed_for_it() -> None:
    """Who was asked first announces again, so another is asked, and answers at once."""
    large, outline = large_item()
    core = machine(A, B)
    assert pulled(core.handle(Announced(A, (large.entry,)), at(1))) == {A: (large.id,)}
    core.handle(Announced(B, (large.entry,)), at(1))
    assert pulled(core.handle(Announced(A, (large.entry,)), at(1 + 0.6 * LAN.pull_patience))) == {B: (large.id,)}
    assert sent(PullChunks, core.handle(Outlined(A, outline), at(3)))
    assert core.handle(Outlined(B, outline), at(3)) == []
    assert core.handle(Outlined(B, outline), at(3)) == [Blame(B, "unasked")]


def test_a_copy_is_a_replay_unless_it_was_asked_for_whoever_brought_the_item_first() -> None:
    core = machine(A, B)
    core.handle(Announced(A, (entry(1),)), at(1))
    core.handle(Announced(B, (entry(1),)), at(1))
    assert pulled(core.handle(Announced(A, (entry(1),)), at(1 + 0.6 * LAN.pull_patience))) == {B: (name(1),)}
    assert core.handle(Got(A, item(1, signer=FAR)), at(3)) == [Deliver(item(1, signer=FAR))]
    assert [core.duplicate(B, name(1), at(2)) for _ in range(2)] == [False, True]

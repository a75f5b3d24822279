"""The gossip machine, driven by hand: who is told, asked and given what, and when."""

import hashlib
import math
import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.config import Instant, Setup
from protocol.events import (
    Blame,
    Deliver,
    Item,
    Outline,
    Send,
    Serve,
    Subscribe,
)
from protocol.gossip.exchange import CATCH_UP_S, DRAWS, HAND_OVER_S, MOST_PACES, Gossip
from protocol.gossip.pace import LEAST_BYTES, LOST_S
from protocol.gossip.store import Store
from protocol.gossip.subscriptions import BESIDE, BESIDE_BURST, MIN_BURST
from protocol.identity import Identity, NodeId, id_of_bytes
from protocol.limits.limits import Limits
from protocol.limits.timing import LAN
from protocol.wire.envelope import CHUNK_BYTES, HEAD_BYTES, ItemId, Kind, chunk_count, chunk_hashes, header_of, seal
from protocol.wire.messages import (
    MAX_IDS,
    NO_TOPIC,
    Ack,
    Busy,
    Cancel,
    DontHave,
    Entry,
    Have,
    Interest,
    ItemChunk,
    ItemOutline,
    Want,
    WantedPart,
)

LIMITS = Limits()

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
        core.up(peer, at(0))
    core.tick(at(0))
    return core


def soon(core: Gossip, now: float = 0.0) -> list:
    """Return what a node does at its next tick, which is due within an announce interval."""
    assert core.due <= now + LAN.announce_interval
    return core.tick(at(core.due))


def said(kind: type, actions) -> list[tuple]:
    return [(a.to, a.message) for a in actions if isinstance(a, Send) and type(a.message) is kind]


def announced(actions) -> dict[NodeId, list[ItemId]]:
    return {to: [entry.id for entry in told.items] for to, told in said(Have, actions)}


def asked(actions) -> dict[NodeId, list[ItemId]]:
    return {to: [part.id for part in want.parts] for to, want in said(Want, actions)}


def queued(actions) -> list[NodeId]:
    return [a.to for a in actions if isinstance(a, Serve)]


def all_given(core: Gossip, node: NodeId, now: float) -> list:
    """Return all that a line carries that is free now."""
    return list(iter(lambda: core.serve(node, at(now)), None))


def have(node: NodeId, *entries: Entry) -> tuple:
    return node, Have(entries)


def want(node: NodeId, *ids: ItemId, chunks: tuple[int, ...] = ()) -> tuple:
    return node, Want(tuple(WantedPart(one, chunks) for one in ids))


def delivered(actions) -> list[ItemId]:
    return [a.item.id for a in actions if isinstance(a, Deliver)]


def blamed(actions) -> list[str]:
    return [a.reason for a in actions if isinstance(a, Blame)]


# Acknowledging, and leaving


def acked(node: NodeId, *ids: ItemId, chunks: tuple[int, ...] = ()) -> tuple:
    return node, Ack(tuple(WantedPart(one, chunks) for one in ids))


def test_small_items_that_came_are_acknowledged_together_at_the_next_tick_and_those_that_came_twice_too() -> None:
    core = machine(A, B)
    core.heard(*have(A, entry(1), entry(2)), at(0))
    soon(core)
    assert said(Ack, core.got(A, item(1, signer=FAR), at(0.5))) == []
    core.got(A, item(2, signer=FAR), at(0.5))
    core.came(B, name(2), at(0.5))
    assert said(Ack, soon(core, 0.5)) == [
        (A, Ack((WantedPart(name(1)), WantedPart(name(2))))),
        (B, Ack((WantedPart(name(2)),))),
    ]
    assert said(Ack, core.tick(at(1))) == []


def test_an_outline_and_a_chunk_that_came_are_acknowledged_at_once_and_a_false_chunk_is_not() -> None:
    large, outline = large_item()
    core = machine(A)
    core.heard(*have(A, large.entry), at(0))
    soon(core)
    assert said(Ack, core.outlined(A, outline, at(0))) == [(A, Ack((WantedPart(large.id),)))]
    assert said(Ack, core.chunk_arrived(A, large.chunk(1), at(0))) == [(A, Ack((WantedPart(large.id, (1,)),)))]
    false = ItemChunk(large.id, 0, b"false", hashlib.sha256(b"false").digest())
    assert said(Ack, core.chunk_arrived(A, false, at(0))) == []


def left_over(core: Gossip, now: float = 1.0) -> tuple[int, bool]:
    state = core.hand_over(at(now))
    return state.untaken, state.has_takers


def give(core: Gossip, node: NodeId, *ids: ItemId, chunks: tuple[int, ...] = ()) -> None:
    core.heard(*want(node, *ids, chunks=chunks), at(0.5))
    all_given(core, node, 0.5)


def test_an_item_is_handed_over_once_a_peer_acknowledged_what_it_asked_for_or_announced_all_of_it() -> None:
    core = machine(A, B)
    for number in (1, 2, 3):
        core.publish(item(number, signer=ME), at(0))
    core.got(A, item(4, signer=FAR), at(0))
    assert left_over(core) == (3, True)
    core.heard(*acked(A, name(1)), at(1))  # which it was not given
    assert left_over(core) == (3, True)
    give(core, A, name(1))
    assert left_over(core) == (3, True)
    core.heard(*acked(A, name(1)), at(1))
    core.heard(*have(B, entry(2)), at(1))
    assert left_over(core) == (1, True)
    core.down(A, at(1))
    assert left_over(core) == (1, True)
    core.down(B, at(1))
    assert left_over(core) == (1, False)  # nobody is here to take the third


def test_a_large_item_is_handed_over_once_peers_have_all_its_chunks_together() -> None:
    large, _ = large_item(2 * CHUNK_BYTES + 1)
    core = machine(A, B)
    core.publish(replace(large, signer=ME), at(0))
    give(core, A, large.id)
    core.heard(*acked(A, large.id), at(1))
    assert left_over(core) == (1, True)  # that was its outline
    for node, chunks in ((A, (0, 2)), (B, (1, 2))):
        assert left_over(core) == (1, True)
        give(core, node, large.id, chunks=chunks)
        core.heard(*acked(node, large.id, chunks=chunks), at(1))
    assert left_over(core) == (0, False)


@pytest.mark.parametrize(
    ("interest", "has_takers"),
    [
        (Interest(None), True),
        (Interest(frozenset([TOPIC])), True),
        (Interest(frozenset([OTHER])), False),
        (Interest(None, is_sated=True), False),
    ],
)
def test_who_leaves_waits_for_peers_that_will_ask_and_not_for_those_that_have_enough(
    interest: Interest, has_takers: bool
) -> None:
    core = machine(A)
    core.heard(A, interest, at(0))
    core.publish(item(1, signer=ME, topic=TOPIC), at(0))
    assert left_over(core) == (1, interest.covers(TOPIC))  # it is told yet, if it wants to be
    for _ in range(3):
        core.tick(at(core.due))
    assert left_over(core) == (1, has_takers)
    core.heard(*want(A, name(1)), at(2))
    assert left_over(core) == (1, interest.covers(TOPIC))


def test_an_item_that_nobody_took_within_a_round_is_not_waited_for_any_more() -> None:
    core = machine(A)
    core.publish(item(1, signer=ME), at(0))
    assert left_over(core, HAND_OVER_S) == (1, True) and left_over(core, HAND_OVER_S + 1) == (0, False)


# Publishing, and passing on


@pytest.mark.parametrize("size", [100, 65_000])
def test_an_item_is_announced_and_given_when_asked_for(size: int) -> None:
    core = machine(A)
    core.publish(item(1, size, ME), at(0))
    assert core.serve(A, at(0)) is None
    assert announced(soon(core)) == {A: [name(1)]}
    assert queued(core.heard(*want(A, name(1)), at(1))) == [A]
    assert core.serve(A, at(1)) == item(1, size, ME)


def test_a_new_item_is_delivered_once_and_announced_to_those_not_known_to_have_it() -> None:
    core = machine(A, B, C)
    core.heard(*have(B, entry(1)), at(0))
    actions = core.got(A, item(1, signer=FAR), at(0))
    assert delivered(actions) == [name(1)]
    assert delivered(core.got(B, item(1, signer=FAR), at(0))) == []
    assert announced(soon(core)) == {C: [name(1)]}
    assert announced(core.tick(at(1))) == {}


def test_an_item_is_remembered_until_whoever_sends_it_again_is_refused_for_its_stamp() -> None:
    core = machine(A)
    core.got(A, item(1), at(0))
    for number in range(2, LIMITS.max_seen // 4):
        core.got(A, item(number), at(1))
    assert core.signer(name(1)) == A
    core.tick(at(3600.0 + 600.0 + 1))
    core.tick(at(3 * (3600.0 + 600.0)))
    assert core.signer(name(1)) is None


def test_a_burst_is_announced_once_and_an_endless_one_now_and_then() -> None:
    core, interval = machine(A, B), LAN.announce_interval
    told = []
    for number in range(60):
        now = number * 0.3 * interval
        core.got(A, item(number), at(now))
        if now >= core.due:
            told.append(announced(core.tick(at(now))).get(B, []))
    assert [len(ids) for ids in told if ids] == [15] * 4


def test_an_item_that_is_stale_soon_is_delivered_and_not_announced() -> None:
    core = machine(A, B)
    assert delivered(core.got(A, item(1, time=UNIX - 3000), at(0))) == [name(1)]
    assert announced(soon(core)) == {}


def test_our_own_item_that_comes_back_after_a_restart_is_held_but_not_delivered() -> None:
    core = machine(A)
    assert delivered(core.got(A, item(1, signer=ME), at(0))) == []
    assert queued(core.heard(*want(A, name(1)), at(1))) == [A]


def test_a_worthless_item_is_not_passed_on_and_still_given_to_whoever_was_told_of_it() -> None:
    core = machine(A, B, C)
    core.got(A, item(1), at(0))
    soon(core)
    core.discard(name(1))
    core.withdraw_signed(lambda signer: signer == C)  # who is revoked later changes nothing for it
    core.up(FAR, at(1))
    assert FAR not in announced(core.tick(at(1 + CATCH_UP_S)))
    assert queued(core.heard(*want(B, name(1)), at(2))) == [B]


def test_a_peer_owes_an_item_once_for_each_time_that_it_was_asked() -> None:
    core = machine(A, B)
    core.heard(*have(A, entry(1)), at(0))
    assert not core.owes(A, name(1))
    assert asked(soon(core)) == {A: [name(1)]}
    assert core.owes(A, name(1)) and not core.owes(B, name(1))
    core.got(A, item(1, signer=FAR), at(1))
    assert not core.owes(A, name(1))


def test_who_announces_an_item_that_it_waits_for_is_not_given_it() -> None:
    core = machine(A, B)
    core.publish(item(1, signer=ME), at(0))
    for peer in (A, B):
        core.heard(*want(peer, name(1)), at(0))
    core.heard(*have(B, entry(1, signer=ME)), at(0))
    assert all_given(core, A, 0) == [item(1, signer=ME)] and all_given(core, B, 0) == []


# Asking


def test_items_are_asked_for_at_the_next_tick_of_one_holder() -> None:
    core = machine(A, B)
    core.heard(*have(B, entry(1, 65_000, A), entry(2, signer=FAR)), at(0))
    assert set(asked(soon(core))[B]) == {name(1), name(2)}
    core.heard(*have(A, entry(2, signer=FAR)), at(0))
    assert asked(soon(core)) == {}


def test_a_holder_that_says_no_is_passed_over_and_pays_for_what_it_announced() -> None:
    core = machine(A, B)
    core.heard(*have(A, entry(1)), at(0))
    assert asked(soon(core)) == {A: [name(1)]}
    core.heard(*have(B, entry(1)), at(0))
    assert blamed(core.heard(A, DontHave((name(1),)), at(1))) == ["false_have"]
    assert asked(soon(core, 1)) == {B: [name(1)]}


def test_who_announces_never_delivers_and_talks_on_is_blamed() -> None:
    core = machine(A)
    core.heard(*have(A, entry(1)), at(0))
    soon(core)
    core.heard(*have(A, entry(2)), at(LAN.pull_patience + 1))
    found = []
    for second in range(2, 12):
        found += blamed(core.tick(at(second)))
    assert "unanswered" in found


def test_who_is_paused_after_it_announced_more_is_not_blamed() -> None:
    """Nodes that were paused every five minutes were refused by all others: each pause cost points."""
    core = machine(A)
    core.heard(*have(A, entry(1)), at(0))
    soon(core)
    core.heard(*have(A, entry(2)), at(1))
    for second in range(2, 12):
        assert blamed(core.tick(at(second))) == []


# Giving


def test_what_is_not_here_is_said_at_once() -> None:
    core = machine(A)
    core.got(A, item(1), at(0))
    actions = core.heard(*want(A, name(1), name(2)), at(0))
    assert queued(actions) == [A] and said(DontHave, actions) == [(A, DontHave((name(2),)))]


def test_what_waits_for_a_line_is_said_to_be_busy_now_and_then_until_it_leaves() -> None:
    core = machine(A)
    core.publish(item(1, 65_000, ME), at(0))
    core.heard(*want(A, name(1)), at(0))
    told = [said(Busy, core.tick(at(second / 4))) for second in range(40)]
    assert sum(map(len, told)) == pytest.approx(10 / (LAN.pull_patience / 2), abs=1)
    assert core.due <= 10 + LAN.pull_patience / 2
    core.serve(A, at(10))
    assert said(Busy, core.tick(at(20))) == []


def test_what_is_asked_for_again_while_it_waits_waits_once_and_what_is_cancelled_does_not() -> None:
    core = machine(A)
    core.publish(item(1, 65_000, ME), at(0))
    assert len(queued(core.heard(*want(A, name(1)), at(0)))) == 1
    assert core.heard(*want(A, name(1), name(1)), at(0)) == []
    core.heard(A, Cancel((WantedPart(name(1)),)), at(0))
    assert core.serve(A, at(0)) is None
    assert len(queued(core.heard(*want(A, name(1)), at(0)))) == 1


def test_no_chunk_holds_up_an_item_or_an_outline() -> None:
    large, outline = large_item()
    core = machine(A)
    core.publish(large, at(0))
    core.got(A, item(1), at(0))
    core.heard(*want(A, large.id, chunks=(1,)), at(0))
    core.heard(*want(A, large.id, name(1)), at(0))
    assert all_given(core, A, 0) == [ItemOutline(outline.head, outline.hashes), item(1), large.chunk(1)]


def test_what_one_peer_may_wait_for_is_bounded_and_beyond_that_we_are_busy() -> None:
    core = machine(A)
    for number in range(LIMITS.max_served + 1):
        core.got(A, item(number, 10), at(0))
    ids = [name(number) for number in range(LIMITS.max_served + 1)]
    actions = [
        action
        for start in range(0, len(ids), MAX_IDS)
        for action in core.heard(*want(A, *ids[start : start + MAX_IDS]), at(0))
    ]
    assert said(Busy, actions) == [(A, Busy((ids[-1],)))] and len(all_given(core, A, 0)) == LIMITS.max_served


def test_a_sated_peer_is_told_in_batches() -> None:
    core = machine(A)
    core.heard(A, Interest(None, is_sated=True), at(0))
    core.publish(item(1, signer=ME), at(0))
    core.publish(item(2, signer=ME), at(0))
    assert core.due == LAN.pull_patience / DRAWS
    assert announced(core.tick(at(core.due))) == {A: [name(2), name(1)]}


# Large items


def test_a_large_item_is_given_as_its_outline_and_its_chunks() -> None:
    large, outline = large_item()
    core = machine(A)
    core.publish(large, at(0))
    core.heard(*want(A, large.id), at(0))
    assert core.serve(A, at(0)) == ItemOutline(outline.head, outline.hashes)
    core.heard(*want(A, large.id, chunks=(1, 0, 7)), at(0))
    assert {core.serve(A, at(0)) for part in (0, 1)} == {large.chunk(0), large.chunk(1)}
    assert said(DontHave, core.heard(*want(A, large.id, chunks=(7,)), at(0))) == [(A, DontHave((large.id,)))]


def test_whatever_else_a_peer_announces_meanwhile_a_large_item_is_given_to_its_end() -> None:
    """Chunks were refused whose item was not among the last 4,096 that the peer was known to have."""
    large, _ = large_item(4 * CHUNK_BYTES)
    core = machine(A)
    core.publish(large, at(0))
    core.tick(at(0))
    for batch in range(9):
        core.heard(*have(A, *(entry(512 * batch + number) for number in range(512))), at(1))
    assert len(queued(core.heard(*want(A, large.id, chunks=(3,)), at(2)))) == 1


def test_a_chunk_that_came_is_announced_and_given_before_the_item_is_whole() -> None:
    large, outline = large_item(3 * CHUNK_BYTES)
    core = machine(A, B)
    core.heard(*have(A, large.entry), at(0))
    soon(core)
    (got,) = said(Want, core.outlined(A, outline, at(0)))
    first = got[1].parts[0].chunks[0]
    core.chunk_arrived(A, large.chunk(first), at(0))
    ((to, told),) = said(Have, core.tick(at(MOST_PACES * LAN.announce_interval)))
    assert (to, told.items[0].parts) == (B, bytes([1 << first])), "A is known to have all of it"
    core.heard(*want(B, large.id, chunks=(first,)), at(1))
    assert core.serve(B, at(1)) == large.chunk(first)
    for index in {0, 1, 2} - {first}:
        core.tick(at(1))
        actions = core.chunk_arrived(A, large.chunk(index), at(1))
    assert delivered(actions) == [large.id]
    assert announced(core.tick(at(2))) == {B: [large.id]}


def test_a_peer_with_a_part_that_brought_the_last_chunk_is_told_that_all_of_the_item_is_here() -> None:
    """It was taken for one that has all, so two nodes that had got different chunks of a third never both had all."""
    large, outline = large_item(2 * CHUNK_BYTES)
    core = machine(A, B)
    core.heard(*have(A, large.entry), at(0))
    soon(core)
    core.outlined(A, outline, at(0))
    core.chunk_arrived(A, large.chunk(0), at(0))
    core.down(A, at(0))
    ((_, got),) = said(Want, core.heard(*have(B, large.entry._replace(parts=b"\x02")), at(0)))
    assert got.parts[0].chunks == (1,)
    assert delivered(core.chunk_arrived(B, large.chunk(1), at(0))) == [large.id]
    ((to, told),) = said(Have, core.tick(at(1)))
    assert (to, told.items[0].parts) == (B, b"")


def test_a_peer_that_comes_up_is_told_of_the_chunks_that_are_here() -> None:
    """Two nodes that had got different chunks of a third never had all of them if they met after it had left."""
    large, outline = large_item(2 * CHUNK_BYTES)
    core = machine(A)
    core.heard(*have(A, large.entry), at(0))
    soon(core)
    core.outlined(A, outline, at(0))
    core.chunk_arrived(A, large.chunk(0), at(0))
    core.down(A, at(0))
    core.tick(at(5))
    core.up(B, at(6))
    ((to, told),) = said(Have, core.tick(at(6 + CATCH_UP_S)))
    assert (to, told.items[0].id, told.items[0].parts) == (B, large.id, b"\x01")


def test_of_what_a_peer_waits_for_the_chunk_that_fewest_others_were_given_leaves_first() -> None:
    large, _ = large_item(4 * CHUNK_BYTES)
    core = machine(A, B, C)
    core.publish(large, at(0))
    left = []
    for node in (A, B, C):
        core.heard(*want(node, large.id, chunks=(0, 1, 2, 3)), at(0))
    for _ in range(4):
        for node in (A, B, C):
            chunk = core.serve(node, at(0))
            assert isinstance(chunk, ItemChunk)
            left.append(chunk.index)
            core.heard(*acked(node, large.id, chunks=(chunk.index,)), at(0))
    assert sorted(left[:4]) == [0, 1, 2, 3] and sorted(left) == sorted([0, 1, 2, 3] * 3)


def waiting_peers(*peers: NodeId) -> tuple[Gossip, Item]:
    """Return a node with peers that wait for all 16 chunks of an item each."""
    large, _ = large_item(16 * CHUNK_BYTES)
    core = machine(*peers)
    core.publish(large, at(0))
    for node in peers:
        core.heard(*want(node, large.id, chunks=tuple(range(16))), at(0))
    return core, large


def given_now(core: Gossip, now: float, *peers: NodeId) -> list[tuple[NodeId, int]]:
    """Return the chunks that leave now, as many as there is room for, one for each of these peers in turn."""
    given, nodes = [], list(peers)
    while nodes:
        node = nodes.pop(0)
        if (chunk := core.serve(node, at(now))) is not None:
            assert isinstance(chunk, ItemChunk)
            given.append((node, chunk.index))
            nodes.append(node)
    return given


def test_no_more_leaves_than_our_line_is_known_to_carry_and_peers_take_turns() -> None:
    """A line of 256 kbit/s was given 14 MB to bring 1 MB to 16 peers, and connections broke."""
    core, large = waiting_peers(A, B, C)
    under_way = given_now(core, 0, A, B, C)
    assert [node for node, _ in under_way] == [A, B] and len(under_way) * CHUNK_BYTES == LEAST_BYTES
    turns = []
    for second in range(8, 80, 8):
        node, chunk = under_way.pop(0)
        able = queued(core.heard(*acked(node, large.id, chunks=(chunk,)), at(second)))
        under_way += (more := given_now(core, second, *able))
        turns += [to for to, _ in more]
    assert turns == [C, A, B] * 3


def test_while_what_leaves_is_acknowledged_quickly_more_and_more_leaves() -> None:
    core, large = waiting_peers(A, B, C)
    under_way, most = given_now(core, 0, A, B, C), []
    for tenth in range(20):
        most.append(len(under_way))
        node, chunk = under_way.pop(0)
        able = queued(core.heard(*acked(node, large.id, chunks=(chunk,)), at(tenth / 10)))
        under_way += given_now(core, tenth / 10, *able)
    assert most == [2 + acks for acks in range(20)]


def test_a_peer_that_acknowledges_nothing_is_given_one_thing_in_a_while_and_stops_nobody_for_longer() -> None:
    core, large = waiting_peers(A, B)
    assert [node for node, _ in given_now(core, 0, A)] == [A, A]
    core.tick(at(LOST_S))
    assert {node for node, _ in given_now(core, LOST_S - 1, A, B)} == {B}
    core.heard(*acked(B, large.id, chunks=tuple(range(16))), at(LOST_S))
    for _ in range(3):
        assert sum(node == A for node, _ in given_now(core, LOST_S, A)) <= 1
    core.heard(*acked(A, large.id, chunks=tuple(range(16))), at(LOST_S + 1))
    assert len(given_now(core, LOST_S + 1, A)) > 1


def test_a_peer_that_goes_takes_what_is_under_way_to_it_along() -> None:
    core, _ = waiting_peers(A, B)
    given_now(core, 0, A)
    assert given_now(core, 0, B) == []
    core.down(A, at(1))
    assert len(given_now(core, 1, B)) == 2


def test_chunks_and_outlines_that_nobody_asked_for_pay_and_late_ones_do_not() -> None:
    large, outline = large_item(2 * CHUNK_BYTES)
    core = machine(A, B)
    assert blamed(core.outlined(A, outline, at(0))) == ["unasked"]
    assert blamed(core.chunk_arrived(A, large.chunk(0), at(0))) == ["unasked"]
    core.heard(*have(A, large.entry), at(0))
    soon(core)
    core.outlined(A, outline, at(0))
    core.tick(at(60))
    assert blamed(core.chunk_arrived(A, large.chunk(0), at(60))) == []


def test_a_large_item_of_a_topic_that_we_do_not_want_is_nobodys_fault_who_gave_it() -> None:
    large, outline = large_item(2 * CHUNK_BYTES)
    core = machine(A)
    core.subscribe(Subscribe(frozenset([TOPIC]), math.inf), at(0))
    core.heard(*have(A, large.entry._replace(topic=TOPIC)), at(0))
    soon(core)
    core.outlined(A, outline, at(0))
    found = [action for index in (0, 1) for action in core.chunk_arrived(A, replace(large.chunk(index)), at(0))]
    assert delivered(found) == [large.id] or blamed(found) == []


def test_a_large_item_of_another_topic_than_was_announced_is_not_fetched_again() -> None:
    body = OTHER + bytes(CHUNK_BYTES)
    frame, hashes = seal(OWNER, b"a swarm of tests", Kind.ITEM, 1, int(UNIX * 1000), body), chunk_hashes(body)
    outline = Outline(header_of(frame), frame[:HEAD_BYTES], hashes)
    large, core = Item(outline.id, OWNER.node_id, UNIX, OTHER, frame, hashes), machine(A)
    core.subscribe(Subscribe(frozenset([TOPIC]), math.inf), at(0))
    offer = have(A, large.entry._replace(topic=TOPIC))
    core.heard(*offer, at(0))
    assert asked(soon(core)) == {A: [large.id]}
    core.outlined(A, outline, at(0))
    actions = [action for index in (0, 1) for action in core.chunk_arrived(A, large.chunk(index), at(0))]
    assert actions == [Send(A, Ack((WantedPart(large.id, (index,)),))) for index in (0, 1)]
    core.heard(*offer, at(1))
    assert core.wanted == 0


# The store


def store(held_bytes: int) -> Store:
    return Store(ME, Limits(held_bytes=held_bytes))


def ids(held: Store) -> list[ItemId]:
    return held.newest(1 << 20)


def test_held_items_are_bounded_in_bytes_and_number_and_one_that_comes_again_counts_once() -> None:
    held = store(1000)
    for number in range(20):
        held.add(item(number), at(0))
    assert held.held_bytes == 1000 and name(9) not in ids(held) and name(10) in ids(held)
    held.add(item(19), at(1))
    assert held.held_bytes == 1000 and len(ids(held)) == 10
    tiny = store(1 << 30)
    for number in range(LIMITS.max_held + 5):
        tiny.add(item(number, 1), at(0))
    assert len(ids(tiny)) == LIMITS.max_held


def test_what_we_signed_stays_while_other_items_come() -> None:
    held = store(1000)
    held.add(item(0, signer=ME), at(0))
    for number in range(1, 40):
        held.add(item(number), at(0))
    assert name(0) in ids(held) and name(1) not in ids(held) and held.held_bytes == 1000
    for number in range(100, 120):
        held.add(item(number, signer=ME), at(0))
    assert held.held_bytes == 1000 and name(0) not in ids(held)


def test_the_node_is_brought_what_came_before_it_had_room_unless_the_store_let_it_go() -> None:
    limits = Limits(held_bytes=9000)
    core = Gossip(ME, Setup(OWNER, b"a swarm of tests", limits=limits), random.Random(1), at(0))
    for number in (1, 2):
        core.publish(item(number, 5000), at(0))
    assert core.bring(name(2)) == [Deliver(item(2, 5000), again=True)]
    assert core.size(name(1)) == 0 and core.bring(name(1)) == []


def test_what_a_peer_waits_for_and_the_store_let_go_is_told_to_be_here_no_more() -> None:
    limits = Limits(held_bytes=9000)
    core = Gossip(ME, Setup(OWNER, b"a swarm of tests", limits=limits), random.Random(1), at(0))
    core.up(A, at(0))
    core.heard(A, Interest(None, is_sated=True), at(0))
    core.publish(item(1, 8000, ME), at(0))
    assert queued(core.heard(*want(A, name(1)), at(1))) == [A]
    core.publish(item(2, 8000, ME), at(1))
    assert all_given(core, A, 1) == [DontHave((name(1),))]


# Peers that come, and what was lost


def test_a_peer_that_wants_more_topics_is_told_what_is_held_of_those_and_of_no_others() -> None:
    """It got nothing of them that was older than a minute."""
    one, two, three = (b"topic-%d!" % number for number in range(3))
    core = machine(A, B)
    for peer in (A, B):
        core.heard(peer, Interest(frozenset([one])), at(0))
    for number, topic in enumerate((one, two, three)):
        core.publish(item(number, 100_000, ME, topic=topic), at(0))
    assert announced(core.tick(at(1))) == {A: [name(0)], B: [name(0)]}
    core.heard(A, Interest(frozenset([one, two])), at(200))
    core.heard(B, Interest(frozenset()), at(200))
    assert announced(core.tick(at(200 + CATCH_UP_S))) == {A: [name(1)]}
    assert announced(core.tick(at(300))) in ({}, {A: []})


@pytest.mark.parametrize("how", ["it says again what it wants", "a message to it found no room"])
def test_a_peer_that_missed_what_it_was_told_is_told_again_what_it_lacks(how: str) -> None:
    core = machine(A)
    core.heard(A, Interest(None), at(0))
    for number in range(3):
        core.publish(item(number, 100_000, ME), at(0))
    assert set(announced(core.tick(at(1)))[A]) == {name(0), name(1), name(2)}
    core.heard(*have(A, entry(1, 100_000)), at(1))
    if how == "it says again what it wants":
        core.heard(A, Interest(None), at(200))
    else:
        core.unheard(A, at(200))
    assert set(announced(core.tick(at(200 + CATCH_UP_S)))[A]) == {name(0), name(2)}


def test_a_node_without_room_for_what_is_announced_asks_for_it_once_it_has_room() -> None:
    core = machine(A, limits=Limits(max_offers=8))
    core.heard(*have(A, *(entry(number) for number in range(9))), at(0))
    assert said(Interest, soon(core)) == []
    for number in range(4):
        assert said(Interest, core.tick(at(1))) == []
        core.got(A, item(number, signer=FAR), at(1))
    assert said(Interest, core.tick(at(2))) == [(A, Interest(None))]
    assert said(Interest, core.tick(at(3))) == []


def test_a_peer_that_comes_up_is_told_what_is_held_and_fresh() -> None:
    core = machine(A)
    core.got(A, item(1), at(0))
    core.got(A, item(2, time=UNIX - 3000), at(0))
    core.up(B, at(1))
    assert announced(core.tick(at(1 + CATCH_UP_S))) == {B: [name(1)]}


def test_a_newcomer_is_told_the_newest_first_in_batches_but_for_what_it_has() -> None:
    core = machine(A)
    for number in range(1600):
        core.got(A, item(number), at(0))
    core.up(B, at(1))
    first = announced(core.tick(at(1 + CATCH_UP_S)))[B]
    assert set(first) == {name(number) for number in range(1600 - MAX_IDS, 1600)}
    core.heard(*have(B, *(entry(number) for number in range(400))), at(4))
    core.got(A, item(1600), at(4))
    batches = [announced(core.tick(at(3 + CATCH_UP_S * turn))).get(B, []) for turn in range(1, 6)]
    rest = [item for batch in batches for item in batch]
    assert name(1600) in batches[0] and sorted(rest) == sorted(
        name(number) for number in (*range(400, 1600 - MAX_IDS), 1600)
    )
    assert max(map(len, batches)) <= MAX_IDS


def test_news_waits_for_more_news_also_while_a_newcomer_catches_up() -> None:
    core, interval = machine(A), LAN.announce_interval
    for number in range(MAX_IDS + 10):
        core.got(A, item(number), at(0))
    core.up(B, at(1))
    core.tick(at(1 + CATCH_UP_S))
    now = 2 + CATCH_UP_S
    core.got(A, item(10_000), at(now))
    assert B not in announced(core.tick(at(now)))
    assert name(10_000) in announced(core.tick(at(now + interval)))[B]


def test_what_is_news_does_not_hasten_what_a_newcomer_missed() -> None:
    core = machine(A)
    for number in range(3 * MAX_IDS):
        core.got(A, item(number), at(0))
    core.up(B, at(1))
    told = 0
    for tenth in range(30, 50):
        core.got(A, item(10_000 + tenth), at(tenth / 10))
        told += len(announced(core.tick(at(tenth / 10))).get(B, []))
    assert told <= 2 * MAX_IDS


@pytest.mark.parametrize("eager", [True, False])
def test_the_newest_items_are_announced_now_and_then_in_case_something_was_lost(eager: bool) -> None:
    core = machine(A)
    core.heard(A, Interest(None, is_sated=not eager), at(0))
    core.publish(item(1, signer=ME), at(0))
    core.serve(A, at(0))
    core.tick(at(1))
    told = [announced(core.tick(at(second))) for second in range(2, 40)]
    assert any(told) == eager


# Interest and demand


def test_interest_is_told_to_every_peer_now_and_to_come() -> None:
    core = machine(A)
    wish = Interest(frozenset([TOPIC]))
    assert said(Interest, core.subscribe(Subscribe(frozenset([TOPIC]), math.inf), at(0))) == [(A, wish)]
    assert said(Interest, core.up(B, at(1))) == [(B, wish)]


def test_only_interested_peers_are_told() -> None:
    core = machine(A, B)
    core.heard(A, Interest(frozenset([TOPIC])), at(0))
    core.heard(B, Interest(frozenset([OTHER])), at(0))
    core.publish(item(1, signer=ME, topic=TOPIC), at(0))
    core.publish(item(2, 65_000, signer=ME, topic=OTHER), at(0))
    assert announced(soon(core)) == {A: [name(1)], B: [name(2)]}


def test_a_peer_that_draws_from_announcements_is_told_no_more_often_than_it_draws() -> None:
    core = machine(A, B)
    core.heard(B, Interest(None, is_sated=True), at(0))
    told, now = 0, 0.0
    for number in range(100):
        now += 0.1
        core.got(A, item(number), at(now))
        told += B in announced(core.tick(at(now + LAN.announce_interval)))
    assert told <= 10 / (LAN.pull_patience / DRAWS) + 2


def test_what_we_did_not_ask_for_is_neither_asked_for_nor_delivered_nor_held() -> None:
    core = machine(A)
    core.subscribe(Subscribe(frozenset([TOPIC]), math.inf), at(0))
    assert asked(core.heard(*have(A, entry(1, topic=OTHER)), at(0))) == {}
    actions = core.got(A, item(1, topic=OTHER), at(0))
    assert delivered(actions) == [] and blamed(actions) == ["unwanted"] and core.held_bytes == 0


def test_a_node_asks_for_what_it_demands_and_no_more_and_what_failed_does_not_count() -> None:
    core = machine(A)
    core.subscribe(Subscribe(None, 2.0), at(0))
    total, now = 0, 0.0
    for number in range(600):
        core.heard(*have(A, entry(number)), at(now))
        now += 0.05
        for ids in asked(core.tick(at(now))).values():
            total += len(ids)
            for one in ids:
                core.got(A, Item(one, FAR, UNIX, NO_TOPIC, bytes(100)), at(now))
    assert total == pytest.approx(MIN_BURST + 2.0 * now, abs=3)
    core = machine(A)
    core.subscribe(Subscribe(None, 2.0), at(0))
    for number in range(100):
        core.heard(*have(A, entry(number)), at(0))
        assert asked(soon(core)) == {A: [name(number)]}
        core.heard(A, DontHave((name(number),)), at(0))


def test_small_items_of_a_topic_beside_the_others_do_not_wait_for_their_lot_and_have_a_bound() -> None:
    core = machine(A)
    core.subscribe(Subscribe(None, 2.0, frozenset([TOPIC])), at(0))
    came, topics, now = Counter[bytes](), dict[ItemId, bytes](), 0.0
    for number in range(0, 6000, 10):
        offered = [entry(number + more, topic=OTHER) for more in range(9)]
        offered.append(entry(number + 9, 100 if number % 20 else 9000, topic=TOPIC))
        topics |= {item.id: item.topic if item.size < 9000 else b"large" for item in offered}
        actions = core.heard(*have(A, *offered), at(now))
        now += 0.5
        actions += core.tick(at(now))
        while ids := [part.id for _, message in said(Want, actions) for part in message.parts]:
            came.update(topics[one] for one in ids)
            actions = [
                more for one in ids for more in core.got(A, Item(one, FAR, UNIX, topics[one], bytes(100)), at(now))
            ]
    by_lot = (2.0 * now + MIN_BURST) / len(topics)  # the part of everything that comes by it
    assert came[OTHER] == pytest.approx(5400 * by_lot, rel=0.2)
    assert came[b"large"] < 300 * 2 * by_lot
    assert came[TOPIC] == pytest.approx(300 * by_lot + 2.0 * BESIDE * now + BESIDE_BURST, rel=0.25)
    assert sum(came.values()) <= (1 + BESIDE) * 2.0 * now + MIN_BURST + BESIDE_BURST


def test_what_one_liar_announces_and_nobody_has_makes_no_node_sated() -> None:
    """What is on offer was measured from ids that nobody had verified."""
    core = machine(A, B)
    core.subscribe(Subscribe(None, 1.0), at(0))
    for second in range(120):
        core.heard(*have(A, *(entry(1000 * second + number) for number in range(64))), at(second))
        for ids in asked(core.tick(at(second))).values():
            core.heard(A, DontHave(tuple(ids)), at(second))
    assert not core._appetite.interest.is_sated
    assert delivered(core.got(B, item(1, signer=B), at(120))) == [name(1)]


def test_nobody_waits_for_a_node_that_draws_what_it_asks_for_but_who_fetches_what_is_large() -> None:
    large, _ = large_item()
    core = machine(A)
    core.publish(large, at(0))
    assert not core.may_rest(at(0))
    core.subscribe(Subscribe(None, 0.0), at(0))
    assert core.may_rest(at(1))
    core.heard(*want(A, large.id, chunks=(0,)), at(1))
    assert not core.may_rest(at(1)) and core.may_rest(at(1 + LAN.pull_patience))


# Any history


PEERS = st.sampled_from([A, B, C])
NUMBERS = st.integers(0, 40)
IDS = st.lists(NUMBERS.map(name), max_size=4).map(tuple)
ENTRIES = st.lists(
    st.builds(
        lambda number, size, signer, parts: entry(number, size, signer)._replace(parts=parts),
        NUMBERS,
        st.sampled_from([100, 100_000, 1_000_000]),
        st.sampled_from([A, B, FAR]),
        st.sampled_from([b"", b"\x01", b"\xff\x00"]),
    ),
    max_size=8,
)
PARTS = st.lists(st.builds(WantedPart, NUMBERS.map(name), st.sampled_from([(), (0,), (1, 7)])), max_size=4).map(tuple)
LARGE, OUTLINE = large_item(3 * CHUNK_BYTES)


def calls(method: str, *arguments: st.SearchStrategy) -> st.SearchStrategy:
    """Return calls of a method of `Gossip`, without the time."""
    return st.tuples(st.just(method), st.tuples(*arguments))


CALLS = st.one_of(
    calls("up", PEERS),
    calls("down", PEERS),
    calls("publish", st.builds(item, NUMBERS, st.sampled_from([100, 100_000]), st.just(ME))),
    calls("got", PEERS, st.builds(item, NUMBERS, st.sampled_from([100, 100_000]), st.sampled_from([A, B, FAR]))),
    calls("heard", PEERS, ENTRIES.map(lambda entries: Have(tuple(entries)))),
    calls("heard", PEERS, st.just(Have((LARGE.entry,)))),
    calls("heard", PEERS, st.builds(Want, PARTS) | st.builds(Cancel, PARTS) | st.builds(Ack, PARTS)),
    calls("heard", PEERS, st.builds(Busy, IDS) | st.builds(DontHave, IDS)),
    calls("heard", PEERS, st.builds(Busy, st.just((LARGE.id,))) | st.builds(DontHave, st.just((LARGE.id,)))),
    calls("heard", PEERS, st.builds(Interest, st.none() | st.just(frozenset([TOPIC])), st.booleans())),
    calls("outlined", PEERS, st.just(OUTLINE)),
    calls("chunk_arrived", PEERS, st.integers(0, 3).map(LARGE.chunk)),
    calls("discard", NUMBERS.map(name)),
    calls(
        "subscribe",
        st.builds(Subscribe, st.none() | st.just(frozenset([TOPIC])), st.sampled_from([0.0, 0.5, 5.0, math.inf])),
    ),
    calls("tick"),
)


@given(st.lists(st.tuples(CALLS, st.floats(0, 3), st.booleans()), max_size=80))
def test_no_history_delivers_twice_talks_to_strangers_or_grows_beyond_bounds(history) -> None:
    core = machine(limits=Limits(held_bytes=600_000))
    up: set[NodeId] = set()
    seen: set[ItemId] = set()
    waiting: list[Serve] = []
    now = 0.0
    for (method, arguments), pause, sends in history:
        now += pause
        match method, arguments:
            case "up", (node,):
                up.add(node)
            case "down", (node,):
                up.discard(node)
        times = () if method == "discard" else (at(now),)
        for action in getattr(core, method)(*arguments, *times) or ():
            if isinstance(action, Deliver):
                assert action.item.id not in seen
                seen.add(action.item.id)
            elif not isinstance(action, Blame):
                assert action.to in up
            if isinstance(action, Serve):
                waiting.append(action)
        if sends and waiting:
            left = waiting.pop(0)
            core.serve(left.to, at(now))
        assert core.due > 0
        assert core.held_bytes <= 600_000
        assert core.wanted <= LIMITS.max_wants
        wants, in_flight = core._wants, dict.fromkeys(up, 0)
        for item_id, wanted in wants._wants.items():
            assert set(wanted.holders) <= up
            for part, asked in wanted.asked.items():
                in_flight[asked.node] += wanted.cost(part)
            if (partial := wants.partial(item_id)) is not None:
                chunks = {part for part in (*wanted.asked, *partial.chunks) if part >= 0}
                assert partial.missing == (1 << chunk_count(partial.size)) - 1 - sum(1 << chunk for chunk in chunks)
        assert in_flight == {node: holder.in_flight for node, holder in wants._holders.items()}
        asked = [asked.size for wanted in wants._wants.values() for asked in wanted.asked.values()]
        assert wants._downlinks.to("").under_way == sum(asked) <= sum(in_flight.values())
        given = [given.size for peer in core._peers.values() for given in peer.given.values()]
        assert core._uplinks.to("").under_way == sum(given)
        for wanted in wants._wants.values():
            for node in wanted.holders:
                assert wanted.holders[node] is core._ledger.find(node, wanted.entry.id)
        assert sum(room.size for room in wants._rooms.values()) == 2 * sum(p.size for p in wants._partials.values())
        for peer in core._peers.values():
            assert len(peer.pending) <= LIMITS.max_pending and peer.waiting <= LIMITS.max_served
        assert all(len(rows) <= LIMITS.max_peer_rows for rows in core._ledger._rows.values())

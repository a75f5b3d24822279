"""What is asked for, of whom, in which order, and who is asked instead when it does not come."""

import hashlib
import random
from collections import Counter
from collections.abc import ItemsView
from itertools import chain

import pytest

from protocol.events import Item, Link, Outline, Send
from protocol.gossip.chunks import Partial
from protocol.gossip.ledger import ALL, THEIRS, ItemLedger, LedgerRow, Statement, Theirs
from protocol.gossip.pace import LOST_S
from protocol.gossip.wants import (
    DOWNLINK_BYTES,
    LONG_S,
    LULL_S,
    NETWORK_PART,
    PROMPT_S,
    SLOW_BYTES_PER_SECOND,
    STALL_S,
    UNASKED_S,
    Took,
    Wants,
)
from protocol.identity import Identity, NodeId
from protocol.limits.limits import Limits
from protocol.limits.timing import LAN
from protocol.wire.envelope import CHUNK_BYTES, HEAD_BYTES, ItemId, Kind, chunk_count, chunk_hashes, header_of, seal
from protocol.wire.messages import NO_TOPIC, Body, Cancel, Entry, ItemChunk, Want, WantedPart
from tests.steps import steps

LIMITS = Limits()

A, B, C, D = (NodeId(letter) for letter in "abcd")
EVERYTHING = float("inf")
LIFE_S = 3600.0
ALICE = Identity(bytes(32))


def name(number: int) -> ItemId:
    return ItemId(hashlib.sha256(b"%d" % number).digest())


def entry(number: int, size: int = 100, signer: int = 0) -> Entry:
    return Entry(name(number), size, NO_TOPIC, signer.to_bytes(4, "big"))


def large(chunks: int, seed: int = 0) -> tuple[Item, Outline]:
    body = bytes(8) + random.Random(seed).randbytes(chunks * CHUNK_BYTES - 8)
    hashes = chunk_hashes(body)
    frame = seal(ALICE, b"a swarm of tests", Kind.ITEM, 1, 1000, body, hashes)
    header = header_of(frame)
    return Item(header.item_id, ALICE.node_id, 1.0, NO_TOPIC, frame, hashes), Outline(
        header, frame[:HEAD_BYTES], hashes
    )


def said(sends: list[Send]) -> list[tuple[Link | NodeId, Body]]:
    return [(send.to, send.message) for send in sends]


class Machine(Wants):
    """The machine, with its own ledger, and a way to look at what it asks for."""

    def __init__(self, *peers: NodeId, seed: int = 1, capacity: int = 1 << 24) -> None:
        self.ledger = ItemLedger(lambda item: item in self, LIMITS)
        super().__init__(self.ledger, LAN, Limits(held_bytes=capacity), random.Random(seed))
        self.patience = self._patience
        for peer in peers:
            self.ledger.up(peer)
            self.up(peer)

    def ask(self, now: float, allowance: float = EVERYTHING, beside: float = 0.0) -> dict[NodeId, list[ItemId]]:
        """Return what is asked for, but chunks."""
        found: dict[NodeId, list[ItemId]] = {}
        for node, want in said(self.draw(now, allowance, beside)):
            if not isinstance(want, Cancel):
                found.setdefault(node, []).extend(part.id for part in want.parts)
        return found

    def chunks(self, now: float, *nodes: NodeId) -> dict[NodeId, list[int]]:
        """Return which chunks the nodes, or all, are asked for."""
        asks = [ask for node in nodes for ask in self.fill(node, now)] if nodes else self.fill_all(now)
        return {node: [chunk for part in want.parts for chunk in part.chunks] for node, want in said(asks)}

    def begin(self, item: Item, outline: Outline, *holders: NodeId, now: float = 0.0) -> None:
        for node in holders:
            self.have(node, item.entry, now)
        (asked,) = self.ask(now)
        assert self.outlined(asked, outline, now) is Took.TAKEN


def machine(*peers: NodeId, seed: int = 1, capacity: int = 1 << 24) -> Machine:
    return Machine(*(peers or (A, B)), seed=seed, capacity=capacity)


# The ledger


def test_every_state_can_be_reached_and_what_is_in_no_table_changes_nothing() -> None:
    assert {*THEIRS.values()} == {*Theirs}
    row = LedgerRow()
    row.note(Statement.LACK)
    assert row == LedgerRow()


def test_rows_are_bounded_and_those_of_what_is_wanted_stay() -> None:
    ledger = ItemLedger(lambda item: item == name(0), LIMITS)
    ledger.up(A)
    for number in range(LIMITS.max_peer_rows + 10):
        ledger.row(A, name(number)).note(Statement.HAVE)
    assert ledger.find(A, name(0)) is not None and ledger.find(A, name(1)) is None
    assert (
        sum(ledger.find(A, name(number)) is not None for number in range(LIMITS.max_peer_rows + 10))
        == LIMITS.max_peer_rows
    )
    for number in range(2000):
        ledger.up(NodeId(f"peer {number}"))
    assert ledger.room < LIMITS.max_peer_rows


# The lot


def test_no_more_than_the_allowance_is_asked_for() -> None:
    wants = machine()
    for number in range(100):
        wants.have(A, entry(number), 0.0)
    (asked,) = wants.ask(0.0, 10).values()
    assert len(asked) == 10
    assert wants.ask(1.0, 10.9) == {}
    assert wants.arrived(asked[0], A, 1.0) and sum(map(len, wants.ask(1.0, 10).values())) == 1
    assert wants.lack(A, asked[1:]) == 9 and sum(map(len, wants.ask(1.0, 10).values())) == 9
    assert len(wants) == 90


def test_a_holder_that_is_always_busy_does_not_take_the_allowance_for_good() -> None:
    """One peer that made up 32 items and said that it was busy kept a node from asking anybody for anything."""
    wants = machine()
    for number in range(200):
        wants.have(A, entry(number), 0.0)
    assert {node: len(asked) for node, asked in wants.ask(0.0, 10).items()} == {A: 10}
    for number in range(200, 400):
        wants.have(B, entry(number), 0.0)
    wants.busy(A, (), wants.patience / 2)
    assert wants.ask(wants.patience / 2, 10) == {}
    assert {node: len(asked) for node, asked in wants.ask(wants.patience, 10).items()} == {A: 5, B: 5}


def test_signers_take_turns_whatever_they_publish() -> None:
    counts: Counter[bool] = Counter()
    for seed in range(20):
        wants = machine(seed=seed)
        for number in range(500):
            wants.have(A, entry(number, signer=1), 0.0)
        for number in range(500, 510):
            wants.have(A, entry(number, signer=number), 0.0)
        rare = {name(number) for number in range(500, 510)}
        counts.update(item in rare for item in wants.ask(0.0, 11)[A])
    assert counts == {True: 200, False: 20}


@pytest.mark.parametrize("interval", [0.0, LAN.announce_interval])
def test_holders_take_turns_whatever_keys_they_bring(interval: float) -> None:
    """Of eleven links one brings a new key with each of its items, the others what seven signers made."""
    counts: Counter[bool] = Counter()
    flooder, *honest = (NodeId(f"peer {number}") for number in range(11))
    for seed in range(20):
        wants = machine(flooder, *honest, seed=seed)
        wants.ask(0.0)
        for number in range(1000):
            wants.have(flooder, entry(number, signer=number), interval)
        for number in range(1000, 1100):
            for node in random.Random(number).sample(honest, 4):
                wants.have(node, entry(number, signer=10_000 + number % 7), interval)
        counts.update(node == flooder for node, ids in wants.ask(interval, 22).items() for _ in ids)
    assert sum(counts.values()) == 440 and 40 <= counts[True] <= 48  # what two others both drew is asked for once


def test_a_network_has_one_lot_however_many_links_it_has_and_each_of_them_has_its_turn() -> None:
    wants = machine(B)
    crowd = [NodeId(f"peer {number}") for number in range(60)]
    for node in crowd:
        wants.ledger.up(node)
        wants.up(node, "200.0.0.0/24")
    for number in range(6000):
        wants.have(crowd[number % 60], entry(number, signer=number), 0.0)
    for number in range(6000, 6100):
        wants.have(B, entry(number, signer=number), 0.0)
    asked = wants.ask(0.0, 120)
    assert len(asked[B]) == 60 and {len(asked[node]) for node in crowd} == {1}


def test_what_a_second_holder_says_of_the_signer_changes_nothing() -> None:
    wants = machine()
    for number in range(40):
        wants.have(A, entry(number, signer=1), 0.0)
        wants.have(B, entry(number, signer=2), 0.0)
    for now in range(1, 41):
        for node, ids in wants.ask(now, 1).items():
            for item in ids:
                assert wants.arrived(item, node, now)
    assert len(wants) == 0 and wants.ask(42.0) == {}
    assert {holder.offers for holder in wants._holders.values()} == {0}


def test_two_nodes_that_cannot_take_everything_take_different_things() -> None:
    chosen = []
    for seed in (1, 2):
        wants = machine(seed=seed)
        for number in range(200):
            wants.have(A, entry(number), 0.0)
        chosen.append(set(wants.ask(0.0, 20)[A]))
    assert len(chosen[0] & chosen[1]) < 10


# A want lives


def test_a_want_lives_until_its_item_is_stale_whoever_fails() -> None:
    wants, asked, now = machine(), Counter[NodeId](), 0.0
    wants.have(A, entry(1), 0.0)
    wants.have(B, entry(1), 0.0)
    while now < LIFE_S:
        asked.update(wants.ask(now).keys())
        now += 1.0
        wants.check(now, bounded=True)
        assert (len(wants) == 1) == (now < LIFE_S)
    assert min(asked[A], asked[B]) > 5


def test_where_the_demand_has_a_bound_what_was_never_asked_for_is_forgotten_after_a_while() -> None:
    wants = machine()
    wants.have(A, entry(1), 0.0)
    wants.check(UNASKED_S, bounded=False)
    assert len(wants) == 1
    wants.check(UNASKED_S, bounded=True)
    assert len(wants) == 0


def test_wants_and_what_one_holder_offers_are_bounded_and_what_was_asked_for_stays() -> None:
    wants = machine(*(NodeId(f"peer {number}") for number in range(8)))
    wants.have(NodeId("peer 0"), entry(0), 0.0)
    assert wants.ask(0.0) == {NodeId("peer 0"): [name(0)]}
    for number in range(1, LIMITS.max_wants + 3000):
        wants.have(NodeId(f"peer {number % 8}"), entry(number), 0.0)
    assert len(wants) <= LIMITS.max_wants and name(0) in wants
    alone = machine()
    for number in range(LIMITS.max_offers + 100):
        alone.have(A, entry(number), 0.0)
    assert len(alone) == LIMITS.max_offers
    for number in range(2 * LIMITS.max_holders):
        node = NodeId(f"holder {number}")
        alone.ledger.up(node)
        alone.up(node)
        alone.have(node, entry(LIMITS.max_offers), 0.0)
    assert len(alone._wants[name(LIMITS.max_offers)].holders) == LIMITS.max_holders


def test_an_announcement_takes_no_more_steps_when_the_table_is_full_of_what_was_asked_for() -> None:
    """Six keys kept a core busy: to evict a want, the node walked over all that was asked for."""
    wants = machine(*(peers := [NodeId(f"peer {number}") for number in range(8)]))

    def announce(first: int, count: int) -> None:
        for number in range(first, first + count):
            wants.have(peers[number % len(peers)], entry(number), 0.0)

    into_empty = steps(lambda: announce(0, 100))
    announce(100, LIMITS.max_wants - 100)
    while asked := wants.ask(0.0):
        for node, items in asked.items():
            wants.busy(node, items, 0.0)
    assert len(wants) == LIMITS.max_wants
    assert steps(lambda: announce(LIMITS.max_wants, 100)) < 5 * into_empty


# Who is asked


def test_an_item_is_asked_of_one_holder_at_a_time_and_of_another_when_that_says_no_leaves_or_is_silent() -> None:
    wants = machine(A, B, C, D)
    for node in (A, B, C, D):
        wants.have(node, entry(1), 0.0)
    ((first, _),) = wants.ask(0.0).items()
    assert wants.ask(0.1) == {}
    assert wants.lack(first, [name(1)]) == 1
    ((second, _),) = wants.ask(0.3).items()
    wants.lost(second)
    ((third, _),) = wants.ask(0.4).items()
    assert wants.check(0.4 + wants.patience, bounded=False) == []
    ((fourth, _),) = wants.ask(10.0).items()
    assert {first, second, third, fourth} == {A, B, C, D}
    assert wants.arrived(name(1), fourth, 10.1) and len(wants) == 0


def test_who_says_that_it_does_not_have_what_it_announced_is_told_apart_from_who_was_not_asked() -> None:
    wants = machine()
    wants.have(A, entry(1), 0.0)
    assert wants.lack(A, [name(1), name(2)]) == 0  # nobody asked it yet, and it takes it back
    wants.have(A, entry(1), 0.0)
    wants.ask(0.0)
    assert wants.lack(A, [name(1)]) == 1 and len(wants) == 0


def test_a_holder_that_was_silent_is_asked_last_and_pays_if_it_went_on_announcing() -> None:
    wants = machine()
    wants.have(A, entry(1), 0.0)
    wants.ask(0.0)
    wants.have(A, entry(2), LAN.pull_patience + 0.1)
    assert wants.check(wants.patience, bounded=False) == [A]
    wants.have(A, entry(3), 10.0)
    wants.have(B, entry(3), 10.0)
    wants.have(B, entry(1), 10.0)
    assert name(1) in wants.ask(10.0)[B]


def test_a_process_that_is_blocked_and_says_nothing_does_not_pay() -> None:
    wants = machine()
    for number in range(20):
        wants.have(A, entry(number), 0.0)
    wants.ask(0.0)
    assert wants.check(30.0, bounded=False) == []


def test_a_holder_that_could_not_be_told_what_is_asked_of_it_is_asked_later_and_not_blamed() -> None:
    wants = machine()
    wants.have(A, entry(1), 0.0)
    assert wants.ask(0.0) == {A: [name(1)]}
    wants.unheard(A, 0.0)
    wants.have(A, entry(2), 1.0)  # it speaks all the time
    wants.have(B, entry(1), 1.0)
    assert name(1) in wants.ask(1.0)[B]
    assert wants.lack(B, [name(1)]) == 1
    assert name(1) in wants.ask(wants.patience)[A]
    wants.unheard(A, wants.patience)
    assert wants.check(1.9 * wants.patience, bounded=False) == []
    assert wants.arrived(name(1), A, 2 * wants.patience)  # it had heard of it after all


@pytest.mark.parametrize("publishers", [1, 3])
def test_while_all_comes_late_a_holder_is_silent_once_all_that_was_asked_for_could_have_come(publishers: int) -> None:
    """A slow node got half of it twice, and one with a slow publisher waited two minutes for a paused holder."""
    others = [NodeId(f"publisher {number}") for number in range(publishers)]
    wants = machine(A, B, *others)
    wants.have(A, entry(1), 0.0)
    wants.ask(0.0)
    wants.have(B, entry(1), 0.5)
    for number in range(2, 200):
        wants.have(others[number % publishers], entry(number, 64 << 10), 0.5)
    asked: list[tuple[NodeId, ItemId]] = []
    for half in range(1, int(2 * LONG_S)):
        wants.check(half / 2, bounded=False)
        asks = wants.ask(half / 2)
        if B in asks:
            break
        asked += [(node, item_id) for node in asks for item_id in asks[node]]
        if half > 4:
            assert wants.arrived(*reversed(asked.pop(0)), half / 2)
    waits_s = min(publishers * LIMITS.window_bytes, DOWNLINK_BYTES) / SLOW_BYTES_PER_SECOND
    assert half / 2 == pytest.approx(wants.patience + waits_s, abs=2.0)


def test_who_talks_on_and_answers_nothing_for_a_while_pays_once_in_that_time() -> None:
    """A node that came back was refused by all others while it loaded its model: it paid for each of five silences."""
    wants, blamed = machine(), []
    for second in range(int(2 * LAN.suspicion) + 4):
        wants.have(A, entry(second), second)
        wants.ask(second)
        blamed += [second] * len(wants.check(second, bounded=False))
    assert len(blamed) == 2 and blamed[1] - blamed[0] >= LAN.suspicion


def test_who_says_that_it_is_busy_is_waited_for_and_not_blamed() -> None:
    wants = machine()
    wants.have(A, entry(1), 0.0)
    wants.ask(0.0)
    for second in range(1, 60):
        wants.busy(A, [], float(second))
        assert wants.check(float(second), bounded=False) == [] and wants.ask(float(second)) == {}
    assert wants.arrived(name(1), A, 60.0)


def test_who_is_busy_with_what_it_was_not_asked_for_is_as_silent_as_before() -> None:
    """A peer that named an id of nobody's every few seconds kept all that it was asked for until that was stale."""
    wants = machine()
    wants.have(A, entry(1), 0.0)
    wants.ask(0.0)
    wants.have(B, entry(1), 0.5)
    for tenth in range(1, int(10 * wants.patience) + 1):
        wants.busy(A, [name(2)], tenth / 10)
        wants.check(tenth / 10, bounded=False)
    assert wants.ask(wants.patience) == {B: [name(1)]}


def test_what_a_busy_holder_was_asked_for_is_asked_of_one_that_has_nothing_to_do_and_cancelled() -> None:
    wants = machine()
    wants.have(A, entry(1), 0.0)
    wants.ask(0.0)
    wants.have(B, entry(1), 0.5)
    wants.busy(A, [], 1.0)
    asks = said(wants.draw(1.0, EVERYTHING))
    assert [(node, type(want)) for node, want in asks] == [(A, Cancel), (B, Want)]
    assert wants.arrived(name(1), A, 1.1), "it had left"
    assert [(node, type(want)) for node, want in said(wants.draw(1.1, EVERYTHING))] == [(B, Cancel)]
    assert wants.arrived(name(1), B, 1.2), "as well"
    assert not wants.arrived(name(1), B, 1.3)


def test_while_our_line_is_full_a_busy_holder_is_waited_for() -> None:
    """Sixteen nodes on lines of 1 Mbit/s got a third of their chunks twice, as each asked here and there."""
    wants = machine(A, B, C)
    wants.have(A, entry(1), 0.0)
    wants.have(C, entry(2), 0.0)
    wants.ask(0.0)
    wants.have(B, entry(1), 0.5)
    late = 2 * PROMPT_S
    assert wants.arrived(name(2), C, late)
    wants.busy(A, [], late + LULL_S / 2)
    assert wants.ask(late + LULL_S / 2) == {}
    wants.busy(A, [], late + LULL_S)
    assert wants.ask(late + LULL_S) == {B: [name(1)]}


def test_a_busy_holder_is_waited_for_no_more_once_something_comes_quickly() -> None:
    """Four slow publishers among eight fast nodes held up their items for 18 s, as fast peers brought other things."""
    wants = machine(A, B, C)
    for number, holder in ((1, A), (2, C)):
        wants.have(holder, entry(number), 0.0)
    wants.ask(0.0)
    wants.have(B, entry(1), 0.5)
    assert wants.arrived(name(2), C, 1.5 * PROMPT_S)
    wants.have(C, entry(3), 1.6)
    assert wants.ask(1.6) == {C: [name(3)]} and wants.arrived(name(3), C, 1.7)
    wants.busy(A, [], 1.8)
    assert wants.ask(1.8) == {B: [name(1)]}


def test_a_holder_that_is_busy_for_long_is_waited_for_no_more_whatever_else_comes() -> None:
    wants = machine(A, B, C)
    wants.have(A, entry(1), 0.0)
    wants.ask(0.0)
    wants.have(B, entry(1), 0.5)
    for second in range(2, int(LONG_S) + 1, 2):
        wants.have(C, entry(second), second - 1.5)
        wants.ask(second - 1.5)
        assert wants.arrived(name(second), C, second)
        wants.busy(A, [], second)
        assert wants.ask(second).get(B) == (None if second < LONG_S else [name(1)])


def test_what_is_cancelled_and_asked_of_the_same_holder_again_is_cancelled_first() -> None:
    item, outline = large(2)
    wants = machine(A, B)
    wants.begin(item, outline, A)
    first, second = wants.chunks(0.0)[A]
    wants.have(B, item.entry, 0.5)
    wants.busy(A, [], 1.0)
    assert wants.chunk_arrived(A, item.chunk(first), 1.1) is Took.TAKEN
    (_, cancel), (_, want) = said(wants.fill(A, 1.1))
    assert isinstance(cancel, Cancel) and not isinstance(want, Cancel)
    assert want == Want((WantedPart(item.id, (second,)),))


def test_who_refuses_for_now_is_asked_again_later() -> None:
    wants = machine()
    wants.have(A, entry(1), 0.0)
    wants.ask(0.0)
    wants.busy(A, [name(1)], 1.0)
    assert wants.check(1.0, bounded=False) == [] and wants.ask(1.1) == {}
    assert wants.ask(1.0 + wants.patience) == {A: [name(1)]}


@pytest.mark.parametrize("answer", ["busy", "silent"])
def test_one_attackers_keys_do_not_take_all_places_of_an_items_holders_and_give_nothing(answer: str) -> None:
    """32 keys of one address announced each item first and said BUSY: 52 of 60 items never came."""
    keys = [NodeId(f"key {number}") for number in range(LIMITS.max_holders)]
    wants = machine(*keys, A)
    for node in keys:
        wants.have(node, entry(1), 0.0)
    (first,) = wants.ask(0.0)
    now = wants.patience
    if answer == "busy":
        wants.busy(first, [name(1)], now)
    wants.check(now, bounded=False)
    wants.have(A, entry(1), now)
    asked: list[NodeId] = []
    while A not in asked and now < 60 * wants.patience:
        wants.have(first, entry(1), now)  # it does not get its place back by saying so again
        for node in wants.ask(now):
            asked.append(node)
            if answer == "busy":
                wants.busy(node, [name(1)], now)
        now += 0.1 if answer == "busy" else wants.patience
        wants.check(now, bounded=False)
    assert A in asked and len(set(asked)) == len(asked)


def test_who_answers_others_and_not_one_is_asked_for_that_no_more_after_a_while() -> None:
    wants = machine()
    wants.have(A, entry(0), 0.0)
    wants.ask(0.0)
    now, number, blamed = 0.0, 1, []
    while now < wants.patience:
        now += 0.5
        wants.have(A, entry(number), now)
        for item in wants.ask(now).get(A, []):
            wants.arrived(item, A, now)
        number += 1
        blamed += wants.check(now, bounded=False)
    assert blamed == [A]
    wants.have(B, entry(0), now)
    assert wants.ask(now) == {B: [name(0)]}


@pytest.mark.parametrize("wait", [LAN.announce_interval, 0.4])
def test_a_holder_is_asked_for_a_window_of_bytes_at_a_time_however_long_they_take(wait: float) -> None:
    wants, now = machine(), 0.0
    for number in range(400):
        wants.have(A, entry(number, 60_000), now)
    asked = wants.ask(now)[A]
    for _ in range(60):
        now += wait
        wants.arrived(asked.pop(0), A, now)
        wants.check(now, bounded=False)
        asked += wants.ask(now).get(A, [])
        assert LIMITS.window_bytes - 60_000 < 60_000 * len(asked) <= LIMITS.window_bytes


def test_an_answer_that_comes_late_was_asked_for_as_often_as_it_was_and_no_more() -> None:
    wants = machine()
    wants.have(A, entry(1), 0.0)
    wants.have(B, entry(1), 0.0)
    ((first, _),) = wants.ask(0.0).items()
    wants.check(wants.patience, bounded=False)
    ((second, _),) = wants.ask(5.0).items()
    assert first != second and wants.owes(first, name(1))
    assert wants.arrived(name(1), second, 5.1)
    assert wants.arrived(name(1), first, 5.2) and not wants.arrived(name(1), first, 5.3)


# Large items


def test_chunks_come_from_all_who_have_them_and_make_the_item() -> None:
    item, outline = large(9)
    wants = machine(A, B, C)
    wants.begin(item, outline, A, B, C)
    came = []
    while asked := wants.chunks(0.0):
        for node, indices in asked.items():
            for index in indices:
                assert wants.finish(item.id) is None
                assert wants.chunk_arrived(node, item.chunk(index), 1.0) is Took.TAKEN
                came.append(index)
    assert sorted(came) == list(range(9))
    assert wants.finish(item.id) == item and len(wants) == 0 and not wants.partials


def test_who_has_a_part_gives_it_and_the_rarest_chunk_goes_first() -> None:
    item, outline = large(5)
    wants = machine(A, B)
    wants.begin(item, outline, A)
    wants.have(B, item.entry._replace(parts=b"\x1d"), 0.0)
    assert wants.chunks(0.0, A)[A][0] == 1
    assert set(wants.chunks(0.0, B)[B]) < {0, 2, 3, 4}


def test_chunks_that_fill_our_line_hold_up_no_small_item_of_another_holder() -> None:
    wants = machine(A, B, C)
    for number, node in ((30, A), (31, B)):
        item, outline = large(number)
        wants.begin(item, outline, node)
    assert sum(map(len, wants.chunks(0.0).values())) == DOWNLINK_BYTES // CHUNK_BYTES
    wants.have(C, entry(1), 0.1)
    assert wants.ask(0.1) == {C: [name(1)]}


def test_holders_that_are_busy_for_long_with_all_that_our_line_brings_do_not_stop_another() -> None:
    """Their keys are free, and what they announce is nobody else's."""
    busy = [NodeId(f"busy {number}") for number in range(4)]
    wants = machine(A, *busy)
    for number in range(400):
        wants.have(busy[number % 4], entry(number, 64 << 10), 0.0)
    wants.ask(0.0)
    item, outline = large(4)
    wants.have(A, item.entry, 1.0)
    second = 1.0
    while not wants.ask(second).get(A):
        for node in busy:
            wants.busy(node, [], second)
        wants.check(second, bounded=False)
        second += 1.0
    assert LOST_S - 1 <= second <= LOST_S + 1
    assert wants.outlined(A, outline, second) is Took.TAKEN and wants.chunks(second, A)


def test_a_chunk_that_a_silent_holder_was_asked_for_is_asked_of_another_and_what_came_stays() -> None:
    item, outline = large(2)
    wants = machine(A, B)
    wants.begin(item, outline, A)
    first, _ = wants.chunks(0.0)[A]
    assert wants.chunk_arrived(A, item.chunk(first), 0.1) is Took.TAKEN
    wants.have(B, item.entry, 0.2)
    wants.check(0.2 + wants.patience, bounded=False)
    assert wants.chunks(10.0) == {B: [1 - first]}
    assert wants.chunk_arrived(A, item.chunk(1 - first), 10.1) is Took.TAKEN, "late, and good"
    assert wants.chunk_arrived(B, item.chunk(1 - first), 10.2) is Took.LATE
    assert wants.chunk_arrived(B, item.chunk(1 - first), 10.3) is Took.UNASKED
    assert wants.finish(item.id) == item


def test_who_sends_a_chunk_that_is_not_what_its_hash_says_is_no_holder_any_more() -> None:
    item, outline = large(2)
    wants = machine(A, B)
    wants.begin(item, outline, A)
    index, _ = wants.chunks(0.0)[A]
    false = ItemChunk(item.id, index, bytes(CHUNK_BYTES), chunk_hashes(bytes(CHUNK_BYTES)))
    wants.have(B, item.entry, 0.1)
    assert wants.chunk_arrived(A, false, 0.1) is Took.FALSE
    assert {node: sorted(asked) for node, asked in wants.chunks(0.2).items()} == {B: [0, 1]}
    wants.have(A, entry(1), 0.3)
    assert wants.ask(0.3) == {A: [name(1)]}


def test_a_false_chunk_that_comes_late_of_who_said_that_it_has_none_is_found_false() -> None:
    item, outline = large(2)
    wants = machine(A, B)
    wants.begin(item, outline, A)
    index, *_ = wants.chunks(0.0)[A]
    wants.check(wants.patience, bounded=False)
    wants.have(B, item.entry, wants.patience)
    wants.lack(A, [item.id])
    false = ItemChunk(item.id, index, b"false", hashlib.sha256(b"false").digest())
    assert wants.chunk_arrived(A, false, wants.patience) is Took.FALSE


def test_an_outline_that_comes_late_is_taken_whatever_size_another_holder_says() -> None:
    item, outline = large(2)
    wants = machine(A, B)
    wants.have(A, item.entry, 0.0)
    assert wants.ask(0.0) == {A: [item.id]}
    now = wants.patience
    wants.check(now, bounded=False)
    wants.lack(A, [item.id])
    wants.have(B, item.entry._replace(size=100), now)
    assert wants.outlined(A, outline, now) is Took.TAKEN
    assert wants.ask(now + 1.0) == {} and sorted(wants.chunks(now + 1.0)[B]) == [0, 1]


def test_a_chunk_of_another_size_than_the_signer_states_ends_the_want() -> None:
    item, outline = large(2)
    size = len(item.frame) - HEAD_BYTES - 1
    header = header_of(outline.head[:-36] + size.to_bytes(4, "big") + outline.head[-32:])
    wants = machine(A)
    wants.begin(item, Outline(header, outline.head, outline.hashes), A)
    wants.chunks(0.0)
    assert wants.chunk_arrived(A, item.chunk(1), 0.1) is Took.MISSIZED
    assert len(wants) == 0 and not wants.partials


def test_a_holder_that_leaves_takes_nothing_with_it_that_came() -> None:
    item, outline = large(3)
    wants = machine(A, B)
    wants.begin(item, outline, A)
    first, *_ = wants.chunks(0.0)[A]
    wants.chunk_arrived(A, item.chunk(first), 0.1)
    wants.lost(A)
    assert item.id in wants
    wants.have(B, item.entry, 1.0)
    assert sorted(chain(*wants.chunks(1.0).values())) == sorted({0, 1, 2} - {first})


def test_what_is_begun_has_a_bounded_room_and_what_stalls_gives_way() -> None:
    one, of_one = large(4, seed=1)
    two, of_two = large(4, seed=2)
    wants = machine(A, B, capacity=6 * CHUNK_BYTES)
    wants.begin(one, of_one, A)
    wants.have(B, two.entry, 1.0)
    assert wants.ask(1.0) == {}  # an outline would be of no use
    assert wants.ask(STALL_S - 1.0) == {} and len(wants.partials) == 1
    assert wants.ask(STALL_S + 1.0)[B] == [two.id]
    assert wants.outlined(B, of_two, STALL_S + 1.0) is Took.TAKEN
    assert len(wants.partials) == 1 and one.id in wants and two.id in wants
    for index in range(4):
        wants.chunks(STALL_S + 2.0)
        wants.chunk_arrived(B, two.chunk(index), STALL_S + 2.0)
    assert wants.finish(two.id) == two and not wants.partials


def test_one_network_fills_a_quarter_of_the_room_for_large_items_whatever_keys_it_brings() -> None:
    wants, most = machine(A, capacity=1 << 30), LIMITS.max_partials // NETWORK_PART
    attackers = [NodeId(f"attacker {number}") for number in range(most + 20)]
    made = [large(2, seed=number) for number in range(len(attackers) + 1)]
    for node, (item, outline) in zip(attackers, made, strict=False):
        wants.ledger.up(node)
        wants.up(node, "198.41.0.0/24")
        wants.have(node, item.entry, 0.0)
        if node in wants.ask(0.0):
            assert wants.outlined(node, outline, 0.0) is Took.TAKEN
    assert len(wants.partials) == most
    honest, outline = made[-1]
    wants.begin(honest, outline, A, now=1.0)
    late = STALL_S + 0.5
    assert wants.ask(late) and honest.id in wants.partials and len(wants.partials) == most, "it gives way to its own"


def test_what_gave_way_is_asked_of_nobody_any_more_and_fetched_again_as_if_nothing_had_come() -> None:
    (one, of_one), (two, _) = large(3, seed=1), large(4, seed=2)
    wants = machine(A, B, capacity=6 * CHUNK_BYTES)
    wants.begin(one, of_one, A)
    asked, now = wants.chunks(0.0)[A], STALL_S
    wants.have(B, two.entry, 0.0)
    assert wants.ask(0.0) == {}
    for second in range(int(now) + 1):
        wants.busy(A, (), second)
        assert wants.check(second, bounded=False) == []
    cancel, *asks = said(wants.draw(now, EVERYTHING))
    assert cancel == (A, Cancel((WantedPart(one.id, tuple(asked)),)))
    assert dict(asks) == {A: Want((WantedPart(one.id),)), B: Want((WantedPart(two.id),))}
    assert wants.outlined(A, of_one, now) is Took.TAKEN
    wants.lost(A)
    assert one.id not in wants and not wants.partials


def test_what_stalls_is_looked_for_once_and_not_for_each_item_that_lacks_room() -> None:
    """A draw took 11 ms and not 2 where 256 items were begun and others offered."""

    class Counted(dict[ItemId, Partial]):
        looks = 0

        def items(self) -> ItemsView[ItemId, Partial]:
            self.looks += 1
            return super().items()

    one, of_one = large(4)
    wants = machine(A, B, capacity=6 * CHUNK_BYTES)
    wants.begin(one, of_one, A)
    for number in range(20):
        wants.have(B, entry(number, 4 * CHUNK_BYTES), 0.0)
    wants._partials = begun = Counted(wants._partials)
    assert wants.ask(1.0) == {} and wants.ask(STALL_S - 1.0) == {} and begun.looks == 1


def test_what_gave_way_and_nobody_has_is_wanted_no_more() -> None:
    """It stayed for an hour, in the place of a fresh item; a peer could fill the table with items that it let go."""
    (one, of_one), (two, _) = large(4, seed=1), large(4, seed=2)
    wants = machine(A, B, capacity=6 * CHUNK_BYTES)
    wants.begin(one, of_one, A)
    wants.chunk_arrived(A, one.chunk(wants.chunks(0.0)[A][0]), 0.0)
    wants.lack(A, [one.id])
    wants.have(B, two.entry, 0.0)
    assert wants.ask(0.0) == {} and one.id in wants
    assert wants.ask(STALL_S) == {B: [two.id]} and one.id not in wants


def test_what_stalls_gives_way_to_nothing_where_nothing_else_lacks_room() -> None:
    """Twelve items of 2 MB took four times as long on a line of 1 Mbit/s, which is busy with one for over 10 s."""
    item, outline = large(4)
    wants = machine(A, B, capacity=5 * CHUNK_BYTES)
    wants.begin(item, outline, A)
    wants.have(B, entry(1), 0.0)
    assert wants.ask(10 * STALL_S) == {B: [name(1)]}
    wants.check(10 * STALL_S, bounded=False)
    assert len(wants.partials) == 1


def test_partial_items_are_bounded_in_number() -> None:
    item, outline = large(2)
    wants = machine(A, capacity=1 << 40)
    wants.have(A, item.entry, 0.0)
    assert wants.ask(0.0) == {A: [item.id]}
    for number in range(LIMITS.max_partials):
        wants._partials[name(number)] = Partial.begin(outline, 0.0, B)
        wants._count(B, 1, outline.header.size)
    assert wants.outlined(A, outline, 0.0) is Took.NO_ROOM


def test_an_item_has_as_many_chunks_as_its_size_says() -> None:
    item, outline = large(4)
    assert chunk_count(len(item.frame) - HEAD_BYTES) == 4
    assert item.chunk(4).data == b""
    assert outline.fill(item.chunk(index).data for index in range(4)) == item


def test_a_row_says_who_has_all_of_an_item() -> None:
    ledger = ItemLedger(lambda item: False, LIMITS)
    ledger.up(A)
    assert ledger.is_news(A, name(1)) and ledger.lacks(A, name(1))
    row = ledger.row(A, name(1))
    assert not row.has_all
    row.note(Statement.HAVE)
    assert row.has_all and not ledger.is_news(A, name(1)) and not ledger.lacks(A, name(1))
    row.parts = 5
    assert not row.has_all and ledger.is_news(A, name(1)) and row.parts != ALL
    row.told = True
    assert not ledger.is_news(A, name(1)) and ledger.lacks(A, name(1))


def test_what_is_fetched_in_chunks_is_not_asked_for_again_as_one_beside_the_others() -> None:
    item, outline = large(3)
    wants = machine(A, B)
    wants.have(B, item.entry._replace(size=100), 0.0, is_beside=True)  # a hostile peer calls it small
    assert wants.ask(0.0, 0.0, EVERYTHING) == {B: [item.id]}
    assert wants.outlined(B, outline, 0.0) is Took.TAKEN
    wants.have(A, item.entry, 0.0)
    assert wants.ask(0.1, EVERYTHING, EVERYTHING) == {}


def test_a_flood_of_one_holder_does_not_push_out_what_another_has_beside() -> None:
    wants = machine(A, B)
    for number in range(1000):
        node = A if number == 0 else B
        wants.have(node, entry(number, signer=number), 0.0, is_beside=True)
    asked = wants.ask(0.1, 0.0, 2)
    assert asked[A] == [name(0)] and len(asked[B]) == 1
    wants.lost(B)
    assert wants.ask(1.0, 0.0, EVERYTHING) == {} and len(wants) == 1

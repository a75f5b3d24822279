"""Which items are pulled, of whom, in which order, and who is blamed when they do not come."""

import hashlib
import random
from collections import Counter, deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.config import LAN
from protocol.gossip.want_list import (
    FIRST_WINDOW,
    MAX_ASKS,
    MAX_BROKEN,
    MAX_HOLDERS,
    MAX_LOOKS,
    MAX_OFFERS,
    MAX_PULL_BYTES_PER_PEER,
    MAX_QUEUE_S,
    MAX_WANTS,
    MAX_WINDOW,
    PROMISE_LIFE_S,
    PROMISE_PATIENCE,
    PULL_BYTES_PER_SECOND,
    WANT_LIFE_S,
    Pulls,
)
from protocol.identity import NodeId
from protocol.wire.envelope import CHUNK_BYTES, HEAD_BYTES, MAX_ITEM_BYTES, ItemId
from protocol.wire.messages import NO_TOPIC, Entry

A, B = NodeId("a"), NodeId("b")
PATIENCE = LAN.pull_patience
EVERYTHING = float("inf")
SLOW_CHUNK_S = (HEAD_BYTES + CHUNK_BYTES) / PULL_BYTES_PER_SECOND + 1e-6


def name(number: int) -> ItemId:
    return ItemId(hashlib.sha256(b"%d" % number).digest())


def entry(number: int, size: int = 100, signer: int = 0) -> Entry:
    return Entry(name(number), size, NO_TOPIC, signer.to_bytes(4, "big"))


def machine() -> Pulls:
    return Pulls(LAN, random.Random(1))


def due(pulls: Pulls, now: float, allowance: float = EVERYTHING) -> dict[NodeId, list[ItemId]]:
    return {node: list(pull.ids) for node, pull in pulls.due(now, allowance)}


def asked(pulls: Pulls, now: float, allowance: float = EVERYTHING) -> int:
    return sum(map(len, due(pulls, now, allowance).values()))


def test_no_more_than_the_allowance_is_asked_for() -> None:
    pulls = machine()
    for number in range(20):
        pulls.offered(A, entry(number), 0.0)
    assert asked(pulls, 0.0, 0.9) == 0
    assert asked(pulls, LAN.announce_interval, 3.5) == 3
    assert asked(pulls, 2 * LAN.announce_interval) == 17


def test_all_that_waits_is_looked_at_once_in_an_interval_and_between_only_what_is_new(monkeypatch) -> None:
    pulls = machine()
    looks: list[ItemId] = []
    choose = pulls._choose
    monkeypatch.setattr(pulls, "_choose", lambda want: looks.append(want.entry.id) or choose(want))
    for number in range(300):
        pulls.offered(A, entry(number, MAX_ITEM_BYTES, signer=number), 0.0)
    assert asked(pulls, 0.0) == FIRST_WINDOW - 1 == MAX_PULL_BYTES_PER_PEER // (HEAD_BYTES + CHUNK_BYTES)
    looks.clear()
    for number in range(300, 310):  # A has room for one more, but for none so large, and announcements are free
        pulls.offered(A, entry(number, MAX_ITEM_BYTES, signer=number), 0.0)
        assert asked(pulls, 0.0) == 0
    assert looks == [name(number) for number in range(300, 310)]
    pulls.offered(B, entry(7), 0.0)
    pulls.offered(B, entry(310), 0.0)
    assert set(due(pulls, 0.0)[B]) >= {name(310)}
    looks.clear()
    due(pulls, LAN.announce_interval)
    assert len(looks) == MAX_LOOKS


def test_signers_take_turns_whatever_they_publish() -> None:
    counts: Counter[bool] = Counter()
    for seed in range(20):
        pulls = Pulls(LAN, random.Random(seed))
        for number in range(500):
            pulls.offered(A, entry(number, signer=1), 0.0)
        for number in range(500, 510):
            pulls.offered(A, entry(number, signer=number), 0.0)
        rare = {name(number) for number in range(500, 510)}
        counts.update(item in rare for item in due(pulls, 0.0, 11)[A])
    assert counts == {True: 200, False: 20}


@pytest.mark.parametrize("interval", [0.0, LAN.announce_interval])
def test_holders_take_turns_whatever_keys_they_bring(interval: float) -> None:
    """Of eleven links one brings a new key with each of its items, the others what seven signers made."""
    counts: Counter[bool] = Counter()
    flooder, *honest = (NodeId(f"peer {number}") for number in range(11))
    for seed in range(20):
        pulls = Pulls(LAN, random.Random(seed))
        due(pulls, 0.0)
        for number in range(1000):
            pulls.offered(flooder, entry(number, signer=number), interval)
        for number in range(1000, 1100):
            for node in random.Random(number).sample(honest, 4):
                pulls.offered(node, entry(number, signer=10_000 + number % 7), interval)
        asked = due(pulls, interval, 22)
        counts.update(node == flooder for node, ids in asked.items() for _ in ids)
    assert sum(counts.values()) == 440 and 40 <= counts[True] <= 48  # what two others both drew is asked for once


def test_what_a_second_holder_says_of_the_signer_changes_nothing() -> None:
    pulls = machine()
    for number in range(40):
        pulls.offered(A, entry(number, signer=1), 0.0)
        pulls.offered(B, entry(number, signer=2), 0.0)
    for now in range(1, 41):
        for node, ids in due(pulls, now, 1).items():
            assert all(pulls.arrived(item, node, now) for item in ids)
    assert len(pulls) == 0 and due(pulls, 42.0) == {}


def test_two_nodes_that_cannot_take_everything_take_different_things() -> None:
    chosen = []
    for seed in (1, 2):
        pulls = Pulls(LAN, random.Random(seed))
        for number in range(200):
            pulls.offered(A, entry(number), 0.0)
        chosen.append(set(due(pulls, 0.0, 20)[A]))
    assert len(chosen[0] & chosen[1]) < 10


def test_the_rest_is_forgotten_after_a_while() -> None:
    pulls = machine()
    pulls.offered(A, entry(1), 0.0)
    assert pulls.check(WANT_LIFE_S - 0.1) == (0, [])
    assert len(pulls) == 1
    assert pulls.check(WANT_LIFE_S) == (0, [])
    assert len(pulls) == 0


def test_what_is_asked_for_is_wanted_until_it_comes_or_stalls_whatever_its_age_and_however_full_the_list() -> None:
    pulls = machine()
    for number in range(2):
        pulls.offered(A, entry(number), 0.0)
    asked_at = WANT_LIFE_S - 0.1
    assert asked(pulls, asked_at) == 2
    pulls.check(WANT_LIFE_S + 0.1)
    for number in range(2, 2 + MAX_WANTS):
        pulls.offered(NodeId(str(number % 8)), entry(number), WANT_LIFE_S + 0.1)
    assert len(pulls) == MAX_WANTS
    assert pulls.arrived(name(0), A, WANT_LIFE_S + 0.2)  # an answer, and no push
    pulls.check(asked_at + PATIENCE)
    assert pulls.arrived(name(1), A, asked_at + PATIENCE + 1.0)  # a late one
    assert name(1) not in {item_id for ids in due(pulls, asked_at + PATIENCE).values() for item_id in ids}


def test_a_holder_that_announces_more_than_it_may_is_still_expected_to_answer_what_it_was_asked() -> None:
    pulls = machine()
    pulls.offered(A, entry(0), 0.0)
    assert asked(pulls, 0.0) == 1
    for number in range(1, 2 * MAX_OFFERS):
        pulls.offered(A, entry(number), 0.1)
    assert len(pulls) == MAX_OFFERS
    assert pulls.arrived(name(0), A, 0.2)


def test_who_was_asked_twice_may_answer_twice_and_no_more() -> None:
    pulls = machine()
    pulls.offered(A, entry(0), 0.0)
    pulls.offered(A, entry(1), 0.0)
    assert asked(pulls, 0.0) == 2
    assert [pulls.arrived(name(1), A, 1.0) for _ in range(2)] == [True, False]  # asked once
    pulls.check(1.1 + PATIENCE)
    assert due(pulls, 1.1 + PATIENCE) == {A: [name(0)]}  # of the same holder, for there is no other
    assert pulls.arrived(name(0), A, 1.2 + PATIENCE)  # the late answer to the first time
    assert [pulls.arrived(name(0), node, 1.2 + PATIENCE) for node in (A, A, B)] == [True, False, False]


def test_who_was_asked_once_may_answer_though_another_did_before() -> None:
    pulls = machine()
    pulls.offered(A, entry(0), 0.0)
    assert asked(pulls, 0.0) == 1
    pulls.offered(B, entry(0), 0.1)
    pulls.check(0.1 + PATIENCE)
    assert due(pulls, 0.1 + PATIENCE) == {B: [name(0)]}
    assert [pulls.arrived(name(0), node, 0.2 + PATIENCE) for node in (A, A, B, B)] == [True, False, True, False]


def test_who_brings_what_it_announced_before_it_is_asked_has_brought_it() -> None:
    pulls = machine()
    pulls.offered(A, entry(0), 0.0, delay=1.0)
    assert [pulls.arrived(name(0), A, 0.5) for _ in range(2)] == [False, False]


@pytest.mark.parametrize("since", ["the want expired", "the list was full", "it owes it no more"])
def test_a_late_answer_was_asked_for_whatever_became_of_the_want(since: str) -> None:
    pulls = machine()
    pulls.offered(A, entry(0), 0.0)
    assert asked(pulls, 0.0) == 1
    now = PROMISE_PATIENCE * PATIENCE
    for _ in range(2):  # it stalls, and then it owes it no more
        pulls.check(now)
    if since == "the want expired":
        pulls.check(WANT_LIFE_S)
    if since == "the list was full":
        for number in range(1, MAX_WANTS + 1):
            pulls.offered(NodeId(str(number % 8)), entry(number), now)
    assert not pulls.owes(A) and bool(pulls.holders(name(0))) is (since == "it owes it no more")
    assert pulls.is_asked(name(0), A) and not pulls.is_asked(name(0), B)
    assert [pulls.arrived(name(0), node, WANT_LIFE_S) for node in (A, A, B)] == [True, False, False]


def test_a_window_grows_with_what_is_delivered_and_halves_when_the_holder_stalls() -> None:
    pulls = machine()
    for number in range(1000):
        pulls.offered(A, entry(number), 0.0)
    first = due(pulls, 0.0)[A]
    assert len(first) == FIRST_WINDOW
    for item in first:
        assert pulls.arrived(item, A, 0.1) is True
    assert asked(pulls, 0.1) == MAX_WINDOW
    assert pulls.check(0.1 + PATIENCE + 0.01) == (MAX_WINDOW, [])
    assert asked(pulls, 0.1 + PATIENCE + 0.01) == MAX_WINDOW // 2


def test_a_holder_that_goes_on_delivering_does_not_stall() -> None:
    pulls = machine()
    for number in range(10):
        pulls.offered(A, entry(number), 0.0)
        pulls.offered(B, entry(number), 0.0)
    first = due(pulls, 0.0)
    for second, item in enumerate(first[A]):
        pulls.arrived(item, A, second + 1.0)
        failed, _ = pulls.check(second + 1.0)
        assert failed == (len(first[B]) if second + 1 == 3 else 0)


def test_who_announces_an_item_first_does_not_keep_it_by_claiming_that_it_is_large() -> None:
    pulls = machine()
    pulls.offered(A, entry(0, size=MAX_ITEM_BYTES), 0.0)
    assert due(pulls, 0.0) == {A: [name(0)]}
    pulls.offered(B, entry(0), 0.0)
    assert pulls.check(PATIENCE)[0] == 0
    assert pulls.check(PATIENCE + SLOW_CHUNK_S)[0] == 1
    assert due(pulls, PATIENCE + SLOW_CHUNK_S) == {B: [name(0)]}


@pytest.mark.parametrize("size", [100, MAX_ITEM_BYTES])
def test_an_item_that_stalls_while_others_flow_is_asked_of_another_in_the_end(size: int) -> None:
    pulls = machine()
    pulls.offered(A, entry(0, size), 0.0)
    assert due(pulls, 0.0) == {A: [name(0)]}
    pulls.offered(B, entry(0), 0.0)
    for tenth in range(1, 150):
        pulls.offered(A, entry(tenth), tenth / 10)
        due(pulls, tenth / 10)
        pulls.arrived(name(tenth), A, tenth / 10)
        if pulls.check(tenth / 10)[0]:
            break
    patience = PATIENCE + (SLOW_CHUNK_S if size > 100 else 0.0)
    assert PROMISE_PATIENCE * PATIENCE <= tenth / 10 < PROMISE_PATIENCE * patience + 0.2
    assert due(pulls, tenth / 10) == {B: [name(0)]}


def test_one_that_owes_us_something_is_asked_last() -> None:
    pulls = machine()
    pulls.offered(A, entry(1), 0.0)
    due(pulls, 0.0)
    assert pulls.check(PATIENCE + 0.1)[0] == 1
    pulls.offered(B, entry(3, 10_000), 3.0)
    assert due(pulls, 3.0)[B] == [name(3)]  # busier than the other, which was asked for its first item again
    pulls.offered(A, entry(2), 3.0)
    pulls.offered(B, entry(2), 3.0)
    assert due(pulls, 3.0) == {B: [name(2)]}


def liar(*, talks: bool, delivers: int = 0) -> list[float]:
    """Offer items that never come, but for `delivers` in each 10; return when the holder is blamed."""
    pulls = machine()
    blamed = []
    for tenth in range(600):
        now = tenth / 10
        if talks or tenth == 0:
            for number in range(10):
                pulls.offered(A, entry(10 * tenth + number), now)
        for item in [i for ids in due(pulls, now).values() for i in ids]:
            if item[0] % 10 < delivers:
                pulls.arrived(item, A, now)
        blamed += [now for _ in pulls.check(now)[1]]
    return blamed


def test_a_holder_that_announces_and_never_delivers_is_blamed() -> None:
    blamed = liar(talks=True)
    assert PROMISE_PATIENCE * PATIENCE <= blamed[0] < PROMISE_PATIENCE * PATIENCE + 1
    assert 3 <= len(blamed) <= 6  # in a minute: at most once in each time that a promise has


def test_a_holder_that_fell_silent_is_not_blamed() -> None:
    assert liar(talks=False) == []


def test_who_gives_what_it_is_asked_for_in_turn_and_slowly_is_not_blamed_for_what_waits() -> None:
    """Its announcements go before its items, one in four seconds, and before copies of those that stalled."""
    pulls, queue, stalled = machine(), deque[ItemId](), 0
    for number in range(60):
        pulls.offered(A, entry(number), 0.0)
    for second in range(240):
        pulls.offered(A, entry(60 + second), second)
        queue.extend(item for ids in due(pulls, second).values() for item in ids)
        if second % 4 == 3:
            assert pulls.arrived(queue.popleft(), A, second)
        failed, blamed = pulls.check(second)
        stalled += failed
        assert blamed == []
    assert stalled > 60


def test_who_gives_one_item_now_and_then_does_not_owe_the_others_for_ever() -> None:
    pulls, given, blamed = machine(), 0.0, []
    for half in range(1000):
        now = half / 2
        for number in range(10):
            pulls.offered(A, entry(10 * half + number), now)
        for item in [item for ids in due(pulls, now).values() for item in ids]:
            if now >= given + PROMISE_PATIENCE * PATIENCE - 1:
                given = now
                pulls.arrived(item, A, now)
        blamed += [now for _ in pulls.check(now)[1]]
    assert MAX_QUEUE_S <= blamed[0] < MAX_QUEUE_S + 60


def test_a_holder_that_keeps_most_promises_is_not_blamed() -> None:
    assert liar(talks=True, delivers=8) == []


def test_one_slow_reply_is_not_blamed_and_a_late_one_is_a_kept_promise() -> None:
    pulls = machine()
    for number in range(MAX_BROKEN):
        pulls.offered(A, entry(number), 0.0)
    items = due(pulls, 0.0)[A]
    pulls.check(PATIENCE + 0.1)
    pulls.offered(A, entry(1000), 4.0)
    for item in items:
        pulls.arrived(item, A, 5.0)
    assert pulls.check(PROMISE_PATIENCE * PATIENCE + 1)[1] == []


@pytest.mark.parametrize("again", [False, True])
def test_an_announcement_is_a_promise_for_a_while(again: bool) -> None:
    """What is asked for later may have made room since: that is no offence, and an answer to it was asked for."""
    pulls = machine()
    for number in range(2 * MAX_BROKEN):
        pulls.offered(A, entry(number), 0.0)
    late = PROMISE_LIFE_S + 0.1
    for number in range(2 * MAX_BROKEN) if again else ():
        pulls.offered(A, entry(number), late)
    items = due(pulls, late)[A]
    stalled = late + PATIENCE + 0.1
    assert pulls.check(stalled) == (2 * MAX_BROKEN, [])
    pulls.offered(A, entry(1000), stalled)
    assert pulls.arrived(items[0], A, stalled)
    assert pulls.check(stalled + PROMISE_PATIENCE * PATIENCE) == (0, [A] if again else [])
    assert not pulls.owes(A)


def test_what_is_announced_again_was_not_sent_and_is_asked_for_again_a_few_times() -> None:
    pulls = machine()
    pulls.offered(A, entry(1), 0.0)
    assert asked(pulls, 0.0) == 1
    pulls.offered(A, entry(1), 0.5)
    assert asked(pulls, 0.5) == 0  # it crossed our question
    for ask in range(1, MAX_ASKS):
        pulls.offered(A, entry(1), ask * PATIENCE)
        assert asked(pulls, ask * PATIENCE) == 1
    assert pulls.check(MAX_ASKS * PATIENCE - 0.1) == (MAX_ASKS - 1, [])
    assert pulls.offered(A, entry(1), MAX_ASKS * PATIENCE) is False
    assert len(pulls) == 0


def test_a_liar_gains_nothing_by_announcing_the_same_again() -> None:
    pulls = machine()
    blamed, wasted, now = [], 0, 0.0
    while now < 120:
        for number in range(64):
            pulls.offered(A, entry(number), now)
        wasted += asked(pulls, now)
        blamed += [now for _ in pulls.check(now)[1]]
        now += 0.6 * PATIENCE
    assert PROMISE_PATIENCE * PATIENCE <= blamed[0] < PROMISE_PATIENCE * PATIENCE + 2
    assert len(blamed) >= 9  # in two minutes
    assert wasted < 4 * 120 / PATIENCE  # its window is next to nothing


def test_hanging_up_pays_no_debt() -> None:
    pulls = machine()
    for number in range(2 * MAX_BROKEN):
        pulls.offered(A, entry(number), 0.0)
    assert asked(pulls, 0.0) == 2 * MAX_BROKEN
    pulls.check(PATIENCE + 0.1)
    assert pulls.lost(A) == 0
    assert pulls.check(100.0) == (0, [])  # while it is away it says nothing
    pulls.offered(A, entry(1000), 101.0)
    assert pulls.check(101.0)[1] == [A]
    pulls.lost(A)
    pulls.offered(A, entry(2000), 300.0)
    assert pulls.check(300.0)[1] == []  # once for one incident


def test_one_holder_cannot_fill_the_table() -> None:
    pulls = machine()
    for number in range(3 * MAX_WANTS):
        pulls.offered(A, entry(number), 0.0)
    assert len(pulls) == MAX_OFFERS
    pulls.offered(B, entry(10**6), 0.0)
    assert len(pulls) == MAX_OFFERS + 1


def test_wants_and_holders_are_bounded() -> None:
    pulls = machine()
    for number in range(MAX_WANTS + 10):
        pulls.offered(NodeId(str(number % 10)), entry(number), 0.0)
    assert len(pulls) == MAX_WANTS
    for number in range(100):
        pulls.offered(NodeId(str(number)), entry(-1, signer=1), 0.0)
    holders = set()
    for tenth in range(0, 590, 10):
        holders |= {node for node, ids in due(pulls, tenth / 10).items() if name(-1) in ids}
        pulls.check(tenth / 10)
    assert 1 < len(holders) <= MAX_HOLDERS


NODES = [NodeId(letter) for letter in "abcdefghijkl"]
histories = st.lists(
    st.one_of(
        st.tuples(st.just("offered"), st.sampled_from(NODES), st.integers(0, 300), st.integers(1, 10**6)),
        st.tuples(st.just("arrived"), st.sampled_from(NODES), st.integers(0, 300), st.just(0)),
        st.tuples(st.just("lost"), st.sampled_from(NODES), st.just(0), st.just(0)),
        st.tuples(st.just("check"), st.just(""), st.integers(0, 20), st.just(0)),
        st.tuples(st.just("due"), st.just(""), st.integers(0, 3), st.integers(0, 200)),
    ),
    max_size=80,
)


@given(histories)
def test_pulls_in_flight_never_exceed_their_bounds_and_no_item_is_asked_of_two(history) -> None:
    pulls = machine()
    now = 0.0
    flying: dict[ItemId, tuple[NodeId, float, int]] = {}
    sizes: dict[ItemId, int] = {}
    asks: Counter[tuple[ItemId, NodeId]] = Counter()
    answers: Counter[tuple[ItemId, NodeId]] = Counter()  # that may come yet, at the most
    for what, node, number, amount in history:
        match what:
            case "offered":
                size = sizes.setdefault(name(number), amount)
                if pulls.offered(node, entry(number, size, amount % 7), now, 0.2 if amount % 2 else 0.0):
                    asks = Counter({key: count for key, count in asks.items() if key[0] != name(number)})
                if flying.get(name(number), ("", 0.0))[0] == node and now >= flying[name(number)][1] + PATIENCE / 2:
                    del flying[name(number)]
            case "arrived":
                is_answer = pulls.arrived(name(number), node, now)
                assert is_answer >= (name(number) in flying)
                assert is_answer <= (name(number) in flying or answers[name(number), node] > 0)
                answers[name(number), node] -= answers[name(number), node] > 0
                flying.pop(name(number), None)
            case "lost":
                gone = [item for item, (holder, *_) in flying.items() if holder == node]
                assert pulls.lost(node) == len(gone)
                for item in gone:
                    del flying[item]
            case "check":
                now += number
                failed, _ = pulls.check(now)
                assert failed <= len(flying)
                for item in list(flying):  # whatever is still flying is young
                    if item not in pulls._asked:
                        del flying[item]
            case "due":
                now += number / 10
                for node, pull in pulls.due(now, amount):
                    for item in pull.ids:
                        assert item not in flying
                        flying[item] = (node, now, sizes[item])
                        asks[item, node] += 1
                        answers[item, node] += 1
        for node, holder in pulls._holders.items():
            listed = [item for items in holder.waiting.values() for item in items]
            assert sorted(listed) == sorted(
                item for item in holder.offers if item not in pulls._asked and item not in pulls._delayed
            )
            assert all(node in pulls._wants[item].holders for item in listed) and all(holder.waiting.values())
        for node in {holder for holder, *_ in flying.values()}:
            loads = [size for holder, _, size in flying.values() if holder == node]
            assert len(loads) <= MAX_WINDOW
            assert len(loads) == 1 or sum(loads) <= MAX_PULL_BYTES_PER_PEER
    assert len(pulls) <= MAX_WANTS
    assert max(asks.values(), default=0) <= 2 * MAX_ASKS  # an announcement that is repeated earns one more

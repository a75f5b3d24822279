"""Large items: chunks prove themselves, a lost holder costs nothing that came, nothing hostile grows."""

import random
import tracemalloc
from collections import Counter, deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import MessageError
from protocol.events import Item, Outline
from protocol.gossip.downloads import (
    LIFE_S,
    MAX_DOWNLOADS,
    MAX_SOURCES,
    MAX_STRIKES,
    SHARE,
    WINDOW,
    Downloads,
    Took,
)
from protocol.gossip.want_list import PROMISE_PATIENCE
from protocol.identity import Identity, NodeId
from protocol.wire.compression import PLAIN, WORTH_BYTES, ZSTD, pack_content, unpack_content
from protocol.wire.envelope import (
    CHUNK_BYTES,
    HEAD_BYTES,
    ItemId,
    Kind,
    chunk_count,
    chunk_hashes,
    digest_of_hashes,
    header_of,
    seal,
)
from protocol.wire.messages import ItemChunk, PullChunks

ALICE = Identity(bytes(32))
A, B, C, D = (NodeId(letter) for letter in "abcd")
PATIENCE = 2.0


def large(size: int, seed: int = 0, signer: Identity = ALICE) -> Item:
    body = bytes(8) + random.Random(seed).randbytes(size - 8)
    hashes = chunk_hashes(body)
    frame = seal(signer, b"a swarm of tests", Kind.ITEM, 1, 1000, body, hashes)
    return Item(header_of(frame).item_id, signer.node_id, 1.0, bytes(8), frame, hashes)


def outline_of(item: Item) -> Outline:
    return Outline(header_of(item.frame), item.frame[:HEAD_BYTES], item.hashes)


def chunk_of(item: ItemId, index: int, data: bytes) -> ItemChunk:
    return ItemChunk(item, index, data, chunk_hashes(data))


def ask(downloads: Downloads, owed: dict[NodeId, deque[tuple[bytes, int]]], now: float) -> bool:
    """Let each holder owe what it is asked for now; False: nobody is asked for anything."""
    asks = downloads.due(now)
    for node, pull in asks:
        owed[node].extend((pull.id, index) for index in pull.indices)
    return bool(asks)


def indices(asks: list[tuple[NodeId, PullChunks]], node: NodeId) -> list[int]:
    return [index for to, pull in asks if to == node for index in pull.indices]


@given(st.data())
def test_whoever_comes_goes_stalls_or_lies_the_item_comes_out_as_it_was_signed(data: st.DataObject) -> None:
    item = large(data.draw(st.integers(1, 12)) * CHUNK_BYTES + data.draw(st.integers(1, CHUNK_BYTES)))
    downloads, now = Downloads(1 << 30, PATIENCE), 0.0
    assert downloads.begin(outline_of(item), [A], now)
    flying: list[tuple[NodeId, int]] = []
    for _ in range(data.draw(st.integers(0, 40))):
        flying += [(node, index) for node, pull in downloads.due(now) for index in pull.indices]
        assert all(sum(to == node for to, _ in flying) <= WINDOW * (MAX_STRIKES + 2) for node in (A, B, C))
        node = data.draw(st.sampled_from([A, B, C]))
        match data.draw(st.sampled_from(["offer", "lose", "stall", "lie", "deliver"])):
            case "offer":
                downloads.offered(node, item.id)
                flying = [one for one in flying if one[0] != node]  # it says that it could not send them
            case "lose":
                downloads.lost(node)
                flying = [one for one in flying if one[0] != node]
            case "stall":
                now += PATIENCE
                downloads.check(now)
            case what if flying:
                to, index = flying.pop(0)
                chunk = item.chunk(index) if what == "deliver" else chunk_of(item.id, index, bytes(CHUNK_BYTES))
                downloads.arrived(to, chunk, now)
        if downloads.finish(item.id) is not None:
            return
    if item.id not in downloads:
        return  # given up: nobody delivered for LIFE_S
    downloads.offered(NodeId("honest"), item.id)
    for _ in range(200):
        for node, pull in downloads.due(now):
            for index in pull.indices if node == "honest" else ():
                assert downloads.arrived(node, item.chunk(index), now) is Took.TAKEN
        for node in (A, B, C):
            downloads.lost(node)
        if (done := downloads.finish(item.id)) is not None:
            assert done == item and len(downloads) == 0
            return
    raise AssertionError("it never came")


def test_chunks_are_asked_of_all_holders_few_at_a_time_and_what_one_owed_of_the_other() -> None:
    item = large(20 * CHUNK_BYTES)
    downloads = Downloads(1 << 30, PATIENCE)
    assert downloads.begin(outline_of(item), [A, B], 0.0)
    asks = downloads.due(0.0)
    assert len(indices(asks, A)) == len(indices(asks, B)) == WINDOW
    assert not set(indices(asks, A)) & set(indices(asks, B)) and downloads.due(0.0) == []
    for index in indices(asks, B):
        downloads.arrived(B, item.chunk(index), 1.0)
    downloads.lost(A)
    assert indices(downloads.due(1.0), B) == indices(asks, A)


def test_a_false_chunk_ends_its_senders_part_and_nothing_else() -> None:
    item = large(3 * CHUNK_BYTES)
    downloads = Downloads(1 << 30, PATIENCE)
    downloads.begin(outline_of(item), [A, B], 0.0)
    asks = downloads.due(0.0)
    lie = chunk_of(item.id, indices(asks, A)[0], bytes(CHUNK_BYTES))
    assert downloads.arrived(A, lie, 0.0) is Took.FALSE
    downloads.offered(A, item.id)
    again = downloads.due(0.0)
    assert not indices(again, A)
    assert sorted(indices(asks, B) + indices(again, B)) == [0, 1, 2]
    assert downloads.arrived(B, chunk_of(item.id, 99, b"x"), 0.0) is Took.UNASKED


@pytest.mark.parametrize("sizes", [(1, 2), (CHUNK_BYTES, 1)], ids=["the last is larger", "one inside is smaller"])
def test_a_chunk_of_another_size_than_its_signer_states_is_not_its_senders_fault(sizes: tuple[int, int]) -> None:
    """An id does not depend on the size, so whoever signs may state two of them."""
    item = large(CHUNK_BYTES + 1)
    stated, came = sizes
    chunks = [bytes(CHUNK_BYTES), bytes(came)] if stated == 1 else [bytes(came), bytes(CHUNK_BYTES)]
    hashes = b"".join(map(chunk_hashes, chunks))
    header = replace(header_of(item.frame), size=CHUNK_BYTES + stated, digest=digest_of_hashes(hashes))
    outline = Outline(header, item.frame[:HEAD_BYTES], hashes)
    downloads = Downloads(1 << 30, PATIENCE)
    assert downloads.begin(outline, [A], 0.0) and indices(downloads.due(0.0), A) == [0, 1]
    took = [downloads.arrived(A, chunk_of(outline.id, index, data), 0.0) for index, data in enumerate(chunks)]
    assert Took.MISSIZED in took and Took.FALSE not in took
    assert len(downloads) == 0 and downloads.begin(outline_of(item), [A], 0.0)


def counts_hold(downloads: Downloads) -> None:
    """Assert that what is counted of links and their signers is what there is, within the bounds."""
    held = downloads._downloads.values()
    begun = [one for one in held if one.in_progress]
    size = {id(one): one.outline.header.size for one in held}
    assert downloads._size == sum(size[id(one)] for one in begun) <= downloads._capacity
    assert downloads._of_link == Counter(one.link for one in held)
    assert downloads._of_signer == Counter((one.link, one.outline.header.public_key) for one in held)
    sums: Counter = Counter()
    for one in begun:
        sums[one.link] += size[id(one)]
    assert downloads._size_of_link == sums
    assert all(one.link in one.sources or not one.sources for one in held)
    for one in held:
        asked = {index for source in one.sources.values() for index in source.asked}
        assert asked | one.missing.keys() | one.chunks.keys() == set(range(chunk_count(size[id(one)])))
        assert one.missing.keys().isdisjoint(asked | one.chunks.keys())
        assert one.in_progress or not any(source.asked or source.late for source in one.sources.values())


def nobody_has_longer_than_is_left(downloads: Downloads, now: float) -> None:
    """Assert that of what an item may be late in all, each holder has what its chunks were not late yet, or none."""
    for one in downloads._downloads.values():
        for source in one.sources.values():
            patience = PATIENCE + len(source.asked)  # a chunk a second
            left = PROMISE_PATIENCE * patience - one.spared
            assert not source.asked or now < source.since + max(patience, left)


MANY = [large(size * CHUNK_BYTES, seed, Identity(bytes([seed]) * 32)) for seed in (1, 2, 3) for size in (2, 3, 5)]


@given(st.data())
def test_whatever_comes_in_whatever_order_the_counts_hold_and_the_bounds(data: st.DataObject) -> None:
    downloads, now = Downloads(9 * CHUNK_BYTES, PATIENCE), 0.0
    flying: list[tuple[NodeId, Item, int]] = []
    items = {item.id: item for item in MANY}
    for _ in range(data.draw(st.integers(0, 60))):
        item, node = data.draw(st.sampled_from(MANY)), data.draw(st.sampled_from([A, B, C]))
        match data.draw(
            st.sampled_from(["begin", "offer", "lose", "wait", "hear", "revoke", "ask", "deliver", "deliver", "lie"])
        ):
            case "begin":
                downloads.begin(outline_of(item), data.draw(st.lists(st.sampled_from([A, B, C]), unique=True)), now)
            case "offer" if item.id in downloads:
                downloads.offered(node, item.id)
            case "lose":
                downloads.lost(node)
            case "wait":
                now += data.draw(st.sampled_from([0.5, 3.0, LIFE_S]))
                downloads.check(now)
                nobody_has_longer_than_is_left(downloads, now)
            case "hear":
                downloads.heard(node, now)
            case "revoke":
                downloads.forget_signed(lambda signer, one=item.signer: signer == one)
            case "ask":
                flying += [(to, items[pull.id], index) for to, pull in downloads.due(now) for index in pull.indices]
            case what if flying:
                to, fetched, index = flying.pop(0)
                chunk = fetched.chunk(index) if what == "deliver" else chunk_of(fetched.id, index, b"false")
                downloads.arrived(to, chunk, now)
                downloads.finish(fetched.id)
        counts_hold(downloads)
        assert all(one.sources for one in downloads._downloads.values() if not one.in_progress)


@given(st.data())
def test_whatever_the_other_holders_do_who_gives_at_once_gets_its_item_through(data: st.DataObject) -> None:
    item = large(data.draw(st.integers(2, 8)) * CHUNK_BYTES)
    junk = [large(10 * CHUNK_BYTES, seed, Identity(bytes([seed]) * 32)) for seed in (1, 2, 3)]
    items = {one.id: one for one in (item, *junk)}
    downloads, now = Downloads(40 * CHUNK_BYTES, PATIENCE), 0.0
    assert downloads.begin(outline_of(item), data.draw(st.permutations([A, B, C])), now)
    assert all(downloads.begin(outline_of(one), data.draw(st.permutations([B, C])), now) for one in junk)
    owed: dict[NodeId, deque[tuple[bytes, int]]] = {node: deque() for node in (A, B, C)}

    def is_whole() -> bool:
        while ask(downloads, owed, now):
            while owed[A]:
                item_id, index = owed[A].popleft()
                assert downloads.arrived(A, items[item_id].chunk(index), now) is Took.TAKEN
        return downloads.finish(item.id) is not None

    for _ in range(data.draw(st.integers(0, 80))):
        if is_whole():
            return
        node, one = data.draw(st.sampled_from([B, C])), data.draw(st.sampled_from([item, item, *junk]))
        match data.draw(st.sampled_from(["wait", "wait", "announce", "lose", "hear", "deliver", "lie"])):
            case "wait":
                now += data.draw(st.sampled_from([0.5, 1.0, 3.0]))
                downloads.check(now)
            case "announce" if one.id in downloads:
                downloads.offered(node, one.id)
            case "lose":
                downloads.lost(node)
                owed[node].clear()
            case "hear":
                downloads.heard(node, now)
            case what if owed[node]:
                item_id, index = owed[node].popleft()
                chunk = items[item_id].chunk(index) if what == "deliver" else chunk_of(items[item_id].id, index, b"")
                downloads.arrived(node, chunk, now)
        assert item.id in downloads
    for _ in range(MAX_STRIKES * 2 * int(PATIENCE + WINDOW)):  # the others fall silent
        if is_whole():
            return
        now += 0.5
        downloads.check(now)
    assert is_whole()


def test_downloads_take_no_more_than_their_room_and_a_stuck_one_makes_way() -> None:
    first, second = large(4 * CHUNK_BYTES, 1), large(4 * CHUNK_BYTES, 2)
    downloads = Downloads(5 * CHUNK_BYTES, PATIENCE)
    assert not downloads.begin(outline_of(large(6 * CHUNK_BYTES)), [B], 0.0)
    assert downloads.begin(outline_of(first), [A], 0.0) and downloads.begin(outline_of(second), [B], 0.0)
    assert len(indices(downloads.due(0.0), A)) == WINDOW and indices(downloads.due(0.0), B) == []
    slow = PATIENCE + WINDOW  # a chunk a second
    assert downloads.check(slow - 0.1) == 0 and downloads.check(slow) == 1
    assert first.id not in downloads and len(indices(downloads.due(slow), B)) == WINDOW
    assert downloads.check(slow + LIFE_S - 0.1) == 0
    assert downloads.check(slow + LIFE_S) == 1 and len(downloads) == 0


def test_outlines_that_wait_are_few_and_no_signer_has_all_their_places() -> None:
    downloads = Downloads(3 * CHUNK_BYTES, PATIENCE)
    for signer in [Identity(bytes([number]) * 32) for number in range(SHARE + 1)]:
        before = len(downloads)
        for seed in range(MAX_DOWNLOADS // SHARE + 3):
            downloads.begin(outline_of(large(CHUNK_BYTES + 9, seed, signer)), [A], 0.0)
        assert len(downloads) - before in (MAX_DOWNLOADS // SHARE, 0)
    assert len(downloads) == MAX_DOWNLOADS


def test_who_gives_a_signers_items_slowly_holds_neither_the_room_nor_the_places_for_those_that_others_give() -> None:
    slow = [large(2 * CHUNK_BYTES, seed) for seed in range(MAX_DOWNLOADS // SHARE)]
    quick = large(4 * CHUNK_BYTES, 99)
    downloads = Downloads(16 * CHUNK_BYTES, PATIENCE)
    assert all(downloads.begin(outline_of(item), [A], 0.0) for item in slow)
    assert downloads.begin(outline_of(quick), [B], 0.0)
    asks = downloads.due(0.0)
    assert {pull.id for node, pull in asks if node == A} == {slow[0].id, slow[1].id}  # a quarter of the room
    assert len(indices(asks, B)) == WINDOW
    for index in (0, 1):
        downloads.arrived(A, slow[0].chunk(index), 1.0)
    assert downloads.finish(slow[0].id) == slow[0]
    assert {pull.id for node, pull in downloads.due(1.0) if node == A} == {slow[2].id}


def when_whole(downloads: Downloads, held: Mapping[NodeId, list[Item]], quick: NodeId, end: float) -> dict[Item, float]:
    """Return when each item was fetched: from `quick` all at once, from others a chunk as late as they may give one."""
    items = {item.id: item for held_by_one in held.values() for item in held_by_one}
    owed: dict[NodeId, deque[tuple[bytes, int]]] = {node: deque() for node in held}
    found: dict[Item, float] = {}
    now = 0.0
    while now < end:
        while ask(downloads, owed, now):
            while owed[quick]:
                item_id, index = owed[quick].popleft()
                assert downloads.arrived(quick, items[item_id].chunk(index), now) is Took.TAKEN
                if (item := downloads.finish(item_id)) is not None:
                    found[item] = now
        now += PATIENCE + WINDOW - 0.1
        for node in owed.keys() - {quick}:
            if owed[node]:
                item_id, index = owed[node].popleft()
                downloads.arrived(node, items[item_id].chunk(index), now)
                downloads.finish(item_id)
        downloads.check(now)
    return found


def test_a_link_that_brings_many_keys_and_gives_slowly_holds_neither_the_room_nor_the_places() -> None:
    keys = [Identity(number.to_bytes(32)) for number in range(1, MAX_DOWNLOADS + 9)]
    held = {A: [large(2 * CHUNK_BYTES, 1, key) for key in keys], B: [large(2 * CHUNK_BYTES, seed) for seed in range(9)]}
    downloads = Downloads(8 * CHUNK_BYTES, PATIENCE)
    assert sum(downloads.begin(outline_of(item), [A], 0.0) for item in held[A]) == MAX_DOWNLOADS
    assert all(downloads.begin(outline_of(item), [B], 0.0) for item in held[B])
    assert len(downloads) == MAX_DOWNLOADS
    assert downloads.check(0.0) == len(held[B])  # those that made room: what was to be spent on them is not
    assert when_whole(downloads, held, B, 1.0) == dict.fromkeys(held[B], 0.0)


def test_an_item_is_charged_to_that_holder_of_it_who_brings_least() -> None:
    held = {A: [large(2 * CHUNK_BYTES, seed) for seed in range(9)]}
    downloads = Downloads(8 * CHUNK_BYTES, PATIENCE)
    assert all(downloads.begin(outline_of(item), [A], 0.0) for item in held[A])
    theirs = large(2 * CHUNK_BYTES, 9, Identity(bytes([1]) * 32))
    assert downloads.begin(outline_of(theirs), [A], 0.0)  # A was the first to say that it holds it
    assert theirs.id not in {pull.id for _, pull in downloads.due(0.0)}
    downloads.offered(B, theirs.id)
    assert theirs.id in {pull.id for _, pull in downloads.due(0.0)}


@pytest.mark.parametrize("first", [A, B], ids=["and another was the first to say so", "and was the first"])
def test_the_only_item_of_a_link_keeps_its_place_whoever_else_holds_it(first: NodeId) -> None:
    items = [large(2 * CHUNK_BYTES, 1, Identity(number.to_bytes(32))) for number in range(1, MAX_DOWNLOADS + 1)]
    downloads = Downloads(2 * CHUNK_BYTES, PATIENCE)
    assert all(downloads.begin(outline_of(item), [A], 0.0) for item in items[2:])
    downloads.due(0.0)
    assert downloads.begin(outline_of(items[0]), [first], 0.0)
    downloads.offered(A if first == B else B, items[0].id)
    assert downloads.begin(outline_of(items[1]), [C], 0.0)
    one_more = large(2 * CHUNK_BYTES, 2)
    assert downloads.begin(outline_of(one_more), [C], 0.0)  # in the place of A's newest
    counts_hold(downloads)
    assert [item.id in downloads for item in (items[0], items[-1])] == [True, False]


@pytest.mark.parametrize("announce_all", [False, True], ids=["each its own", "all of them all"])
def test_links_that_give_the_largest_items_slowly_take_turns_with_others(announce_all: bool) -> None:
    keys = [Identity(number.to_bytes(32)) for number in range(1, 22)]
    slow = (A, C, NodeId("d"))
    held = {node: [large(4 * CHUNK_BYTES, 1, key) for key in keys[at::3]] for at, node in enumerate(slow)}
    held[B] = [large(4 * CHUNK_BYTES, seed) for seed in range(4)]
    downloads = Downloads(8 * CHUNK_BYTES, PATIENCE)
    for node, items in held.items():
        assert all(downloads.begin(outline_of(item), [node], 0.0) for item in items)
    for item in [item for node in slow for item in held[node] if announce_all]:
        for node in slow:
            downloads.offered(node, item.id)
    found = when_whole(downloads, held, B, 200.0)
    turn = 4 * (PATIENCE + WINDOW)
    assert [found[item] <= turn * (2 + at) for at, item in enumerate(held[B])] == [True] * 4


def test_links_that_come_and_go_do_not_make_room_for_the_one_that_stays() -> None:
    items = [large(2 * CHUNK_BYTES, 1, Identity(number.to_bytes(32))) for number in range(1, 5)]
    downloads = Downloads(8 * CHUNK_BYTES, PATIENCE)
    for number, item in enumerate(items):
        node = NodeId(f"for a while {number}")
        assert downloads.begin(outline_of(item), [A, node], 0.0)
        downloads.due(0.0)
        downloads.lost(node)
    honest = large(2 * CHUNK_BYTES)
    assert downloads.begin(outline_of(honest), [B], 0.0)
    assert indices(downloads.due(0.0), B) == []
    assert downloads.check(0.1) == 0  # what A holds alone now waits again
    assert indices(downloads.due(0.1), B) == [0, 1]
    assert len(downloads) == 5


def test_of_what_waits_again_nothing_is_taken_that_comes_late() -> None:
    first, second = (large(2 * CHUNK_BYTES, 1, Identity(bytes([number]) * 32)) for number in (1, 2))
    downloads, slow = Downloads(4 * CHUNK_BYTES, PATIENCE), PATIENCE + 2
    for item, node in ((first, B), (second, C)):
        assert downloads.begin(outline_of(item), [A, node], 0.0)
        downloads.due(0.0)
        downloads.lost(node)
    downloads.due(0.0)
    assert downloads.check(slow) == 0  # A was silent
    assert downloads.begin(outline_of(large(2 * CHUNK_BYTES, 3)), [D], slow)
    downloads.check(slow)
    counts_hold(downloads)
    waits = next(item for item in (first, second) if not downloads._downloads[item.id].in_progress)
    late = [downloads.arrived(A, chunk_of(waits.id, 0, b"false"), slow) for _ in range(3)]
    assert late == [Took.LATE, Took.LATE, Took.UNASKED]  # it was asked for two
    counts_hold(downloads)


def test_chunks_that_come_after_their_item_did_were_asked_for() -> None:
    item = large(2 * CHUNK_BYTES)
    downloads, slow = Downloads(1 << 30, PATIENCE), PATIENCE + WINDOW
    assert downloads.begin(outline_of(item), [A], 0.0)
    asked = indices(downloads.due(0.0), A)
    downloads.offered(B, item.id)
    downloads.check(slow)
    assert indices(downloads.due(slow), B) == asked
    assert [downloads.arrived(A, item.chunk(index), slow) for index in asked] == [Took.TAKEN] * 2
    assert downloads.finish(item.id) is not None
    late = [downloads.arrived(B, item.chunk(index), slow + 1) for index in (*asked, 0)]
    assert late == [Took.LATE, Took.LATE, Took.UNASKED]
    assert downloads.arrived(A, item.chunk(0), slow + 1) is Took.UNASKED


def test_chunks_of_a_holder_that_was_silent_too_often_were_asked_for() -> None:
    item, now = large(CHUNK_BYTES + 1), 0.0
    downloads = Downloads(1 << 30, PATIENCE)
    assert downloads.begin(outline_of(item), [A], now)
    for _ in range(MAX_STRIKES):
        downloads.due(now)
        now += PATIENCE + WINDOW
        downloads.check(now)
    assert downloads.due(now) == []  # it holds the item no more
    late = [downloads.arrived(A, item.chunk(index), now) for index in (0, 1) * (MAX_STRIKES + 1)]
    assert late == [Took.LATE] * 2 * MAX_STRIKES + [Took.UNASKED] * 2


def test_a_chunk_that_a_holder_was_asked_for_twice_may_come_twice() -> None:
    item = large(2 * CHUNK_BYTES)
    downloads, slow = Downloads(1 << 30, PATIENCE), PATIENCE + WINDOW
    assert downloads.begin(outline_of(item), [A], 0.0)
    downloads.due(0.0)
    downloads.offered(A, item.id)  # it could not send one of them
    downloads.due(0.0)
    downloads.check(slow)  # and is slow
    downloads.due(slow)
    came = [downloads.arrived(A, item.chunk(index), slow) for index in (0, 1) * 4]
    assert downloads.finish(item.id) is not None
    assert came == [Took.TAKEN] * 6 + [Took.UNASKED] * 2


def test_what_was_asked_for_of_an_item_that_was_given_up_twice_may_come_yet() -> None:
    item = large(2 * CHUNK_BYTES)
    downloads = Downloads(1 << 30, PATIENCE)
    for _ in range(2):
        assert downloads.begin(outline_of(item), [A], 0.0)
        downloads.due(0.0)
        downloads.forget_signed(lambda signer: True)
    came = [downloads.arrived(A, item.chunk(index), 1.0) for index in (0, 1, 0, 1, 0)]
    assert came == [Took.LATE] * 4 + [Took.UNASKED]


def test_no_time_passes_for_an_item_whose_holder_could_not_send_it_while_that_gives_another() -> None:
    """What was begun first is asked for first, and takes all that its holder may be asked for at a time."""
    items = {one.id: one for one in (large(100 * CHUNK_BYTES, 1), large(2 * CHUNK_BYTES, 2))}
    downloads, now = Downloads(1 << 30, PATIENCE), 0.0
    owed: dict[NodeId, deque[tuple[bytes, int]]] = {A: deque(), B: deque()}
    for node, one in zip((B, A), items.values(), strict=True):
        assert downloads.begin(outline_of(one), [node], now)
        ask(downloads, owed, now)
    for one in reversed(items):  # A's queue was full
        downloads.offered(A, ItemId(one))
    owed[A].clear()
    came = []
    ask(downloads, owed, now)
    while len(downloads):
        now += 1.0
        item_id, index = owed[A].popleft()
        assert downloads.arrived(A, items[ItemId(item_id)].chunk(index), now) is Took.TAKEN
        came += [one for one in items if downloads.finish(one) is not None]
        ask(downloads, owed, now)
        assert downloads.check(now) == 0
    assert came == [*items] and now > LIFE_S


def test_what_is_taken_up_by_one_link_after_those_that_brought_it_are_gone_is_that_links() -> None:
    items = [large(2 * CHUNK_BYTES, 1, Identity(number.to_bytes(32))) for number in range(1, 5)]
    downloads = Downloads(8 * CHUNK_BYTES, PATIENCE)
    for number, item in enumerate(items):
        node = NodeId(f"for a while {number}")
        assert downloads.begin(outline_of(item), [node], 0.0)
        downloads.due(0.0)
        downloads.lost(node)
        downloads.offered(A, item.id)
    assert downloads.begin(outline_of(large(2 * CHUNK_BYTES)), [B], 0.0)
    assert downloads.check(0.1) == 0  # what A has beyond its share waits again
    assert indices(downloads.due(0.1), B) == [0, 1]


def test_what_a_link_holds_alone_since_others_left_goes_on_while_nobody_else_waits() -> None:
    items = [large(2 * CHUNK_BYTES, 1, Identity(number.to_bytes(32))) for number in range(1, 6)]
    downloads = Downloads(8 * CHUNK_BYTES, PATIENCE)
    for item, node in zip(items, "bcdef", strict=True):
        assert downloads.begin(outline_of(item), [A, NodeId(node)], 0.0)
    asks = downloads.due(0.0)
    assert {pull.id for _, pull in asks} == {item.id for item in items[:4]}
    for node in "bcdef":
        downloads.lost(NodeId(node))
    assert downloads.check(0.1) == 0
    assert {pull.id for _, pull in [*asks, *downloads.due(0.1)]} == {item.id for item in items[:4]}


def test_a_download_whose_holders_are_all_gone_keeps_no_place_and_takes_no_turn() -> None:
    downloads = Downloads(8 * CHUNK_BYTES, PATIENCE)
    begun, waiting = large(8 * CHUNK_BYTES, 1), [large(2 * CHUNK_BYTES, seed) for seed in range(2, 9)]
    assert downloads.begin(outline_of(begun), [A], 0.0)
    assert len(indices(downloads.due(0.0), A)) == WINDOW
    downloads.lost(A)
    assert downloads.check(0.1) == 0 and begun.id in downloads  # it may come back
    for number, item in enumerate(waiting):
        node = NodeId(f"for a while {number}")
        assert downloads.begin(outline_of(item), [node], 0.1)
        downloads.lost(node)
    assert len(downloads) == 1 and downloads.check(0.2) == len(waiting)
    assert downloads.begin(outline_of(waiting[0]), [B], 0.3)
    assert indices(downloads.due(0.3), B) == []
    assert downloads.check(0.4) == 1 and begun.id not in downloads
    assert indices(downloads.due(0.4), B) == [0, 1]


@pytest.mark.parametrize("gives", [True, False], ids=["a slow line", "a link that gives nothing"])
def test_who_gives_nothing_holds_no_room_with_what_nobody_was_asked_for_yet(gives: bool) -> None:
    first, second, other = (large(size * CHUNK_BYTES, size) for size in (5, 3, 25))
    downloads = Downloads(32 * CHUNK_BYTES, PATIENCE)
    assert downloads.begin(outline_of(first), [A], 0.0) and downloads.begin(outline_of(second), [A], 0.0)
    assert {pull.id for _, pull in downloads.due(0.0)} == {first.id}  # the window is full
    assert downloads.begin(outline_of(other), [B], 0.0)
    slow = PATIENCE + WINDOW
    if gives:
        assert downloads.arrived(A, first.chunk(0), slow - 0.1) is Took.TAKEN
    assert downloads.check(slow) == (0 if gives else 2)
    assert bool(indices(downloads.due(slow), B)) is not gives


def test_on_a_slow_line_whatever_waits_for_its_turn_at_the_only_holder_is_not_given_up() -> None:
    items = {
        item.id: item for item in (large(8 * CHUNK_BYTES, 1, Identity(number.to_bytes(32))) for number in range(1, 13))
    }
    downloads, now, owed = Downloads(256 * CHUNK_BYTES, PATIENCE), 0.0, deque()
    assert all(downloads.begin(outline_of(item), [A], now) for item in items.values())
    found = set()
    while len(found) < len(items):
        assert downloads.check(now) == 0
        owed.extend((pull.id, index) for _, pull in downloads.due(now) for index in pull.indices)
        item_id, index = owed.popleft()
        now += 0.5  # 2 Mbit/s
        assert downloads.arrived(A, items[item_id].chunk(index), now) is Took.TAKEN
        found |= {item_id} if downloads.finish(item_id) is not None else set()


def test_a_holder_that_gives_nothing_ends_nothing_that_another_gives_in_its_turn() -> None:
    first, second, other = (large(size * CHUNK_BYTES, size, Identity(bytes([size]) * 32)) for size in (70, 6, 50))
    downloads, now = Downloads(100 * CHUNK_BYTES, PATIENCE), 0.0
    assert all(downloads.begin(outline_of(item), [A], now) for item in (first, second))
    assert len(indices(downloads.due(now), A)) == WINDOW  # of the first
    assert downloads.begin(outline_of(other), [C], now)  # and waits
    for index in range(int(LIFE_S) + 5):
        downloads.offered(B, second.id)
        assert len(indices(downloads.due(now), B)) == WINDOW
        now += 1.0
        assert downloads.arrived(A, first.chunk(index), now) is Took.TAKEN
        assert downloads.check(now) == 0


@pytest.mark.parametrize("gives", [True, False], ids=["one gives others", "they give nothing"])
def test_an_item_is_given_up_for_others_once_all_its_holders_failed_and_give_nothing_else(gives: bool) -> None:
    first, item, other = (large(size * CHUNK_BYTES, size, Identity(bytes([size]) * 32)) for size in (2, 6, 40))
    downloads = Downloads(41 * CHUNK_BYTES, PATIENCE)
    assert downloads.begin(outline_of(first), [A], 0.0) and downloads.begin(outline_of(item), [A, B], 0.0)
    assert downloads.begin(outline_of(other), [C], 0.0)
    downloads.due(0.0)
    if gives:
        assert downloads.arrived(A, first.chunk(0), 1.0) is Took.TAKEN
    for node in (A, B):  # could not send what they were asked for
        downloads.offered(node, item.id)
    downloads.due(1.0)
    downloads.check(PATIENCE + WINDOW)
    assert (item.id in downloads) is gives


@pytest.mark.parametrize("given", [12, 0], ids=["and gave all else at once", "and was not asked yet"])
def test_what_one_holder_withholds_is_asked_of_another_before_the_item_is_given_up(given: int) -> None:
    item, other = large((4 + given) * CHUNK_BYTES, 1), large(40 * CHUNK_BYTES, 2)
    downloads = Downloads(41 * CHUNK_BYTES, PATIENCE)
    assert downloads.begin(outline_of(item), [B], 0.0) and downloads.begin(outline_of(other), [C], 0.0)
    withheld = indices(downloads.due(0.0), B)
    downloads.offered(A, item.id)
    while asks := indices(downloads.due(0.0), A):
        assert [downloads.arrived(A, item.chunk(index), 0.0) for index in asks] == [Took.TAKEN] * len(asks)
    slow = PATIENCE + WINDOW
    assert downloads.check(slow) == 0 and len(withheld) == WINDOW
    assert indices(downloads.due(slow), A) == withheld
    assert downloads.check(2 * slow) == 1  # nobody is left who did not fail


@pytest.mark.parametrize("late", [4, 3], ids=["all of them", "but for one"])
def test_what_comes_late_is_taken_though_another_was_asked_for_it(late: int) -> None:
    item = large(4 * CHUNK_BYTES)
    downloads, slow = Downloads(1 << 30, PATIENCE), PATIENCE + WINDOW
    assert downloads.begin(outline_of(item), [A], 0.0)
    asked = indices(downloads.due(0.0), A)
    downloads.offered(B, item.id)
    assert downloads.check(slow) == 0 and indices(downloads.due(slow), B) == asked
    given = asked[:late]
    assert [downloads.arrived(A, item.chunk(index), slow + 1.0) for index in given] == [Took.TAKEN] * late
    assert downloads.arrived(A, item.chunk(0), slow + 1.0) is Took.UNASKED
    if late < 4:
        assert downloads.finish(item.id) is None
        assert [downloads.arrived(B, item.chunk(index), slow + 2.0) for index in asked] == [Took.TAKEN] * 4
    assert downloads.finish(item.id) == item


def test_who_gives_again_what_came_late_of_another_gives_nothing() -> None:
    item, other = large(4 * CHUNK_BYTES, 1), large(8 * CHUNK_BYTES, 2)
    downloads, slow = Downloads(8 * CHUNK_BYTES, PATIENCE), PATIENCE + WINDOW
    assert downloads.begin(outline_of(item), [A], 0.0) and downloads.begin(outline_of(other), [C], 0.0)
    downloads.due(0.0)
    downloads.offered(B, item.id)
    downloads.check(slow)
    assert indices(downloads.due(slow), B) == [0, 1, 2, 3]
    assert downloads.arrived(A, item.chunk(0), slow + 1.0) is Took.TAKEN
    assert downloads.arrived(B, item.chunk(0), 2 * slow - 1.0) is Took.TAKEN
    assert downloads.check(2 * slow) == 0  # B is relieved, and A has given something
    downloads.due(2 * slow)
    assert downloads.check(3 * slow) == 1 and indices(downloads.due(3 * slow), C)


def test_who_announces_again_and_again_what_it_is_asked_for_is_asked_last() -> None:
    item = large(2 * CHUNK_BYTES)
    downloads = Downloads(1 << 30, PATIENCE)
    assert downloads.begin(outline_of(item), [B, A], 0.0)
    assert (indices(asks := downloads.due(0.0), B), indices(asks, A)) == ([0], [1])
    assert downloads.arrived(A, item.chunk(1), 0.0) is Took.TAKEN
    downloads.offered(B, item.id)
    assert downloads.due(1.0) == [(A, PullChunks(item.id, (0,)))]
    downloads.lost(A)
    for now in range(2, 20):  # and, its queue may be full, for good only once it was silent
        assert downloads.due(now) == [(B, PullChunks(item.id, (0,)))]
        downloads.offered(B, item.id)
    assert downloads.due(20.0) and downloads.check(20.0 + PATIENCE + 1.0) == 0
    assert downloads.due(24.0) == [(B, PullChunks(item.id, (0,)))]


@pytest.mark.parametrize("another", [False, True], ids=["the only holder", "another one is free"])
def test_chunks_wait_behind_other_items_of_their_holder_for_a_while_and_only_where_nobody_else_is_free(
    another: bool,
) -> None:
    item, now = large(4 * CHUNK_BYTES), 0.0
    downloads = Downloads(1 << 30, PATIENCE)
    assert downloads.begin(outline_of(item), [B], now)
    asked = indices(downloads.due(now), B)
    if another:
        downloads.offered(A, item.id)
    while not (asks := downloads.due(now)):
        now += 1.0
        downloads.heard(B, now)
        assert downloads.check(now) == 0
    slow = PATIENCE + WINDOW
    assert now == (slow if another else PROMISE_PATIENCE * slow)
    assert indices(asks, A if another else B) == asked


@pytest.mark.parametrize("announces", [False, True])
@pytest.mark.parametrize("gap", [9, 14, 29])
def test_small_items_that_come_before_each_chunk_hold_the_room_no_longer_than_before_one(
    gap: int, announces: bool
) -> None:
    item, other = large(64 * CHUNK_BYTES, 1), large(8 * CHUNK_BYTES, 2)
    downloads, now, owed = Downloads(64 * CHUNK_BYTES, PATIENCE), 0, deque[int]()
    assert downloads.begin(outline_of(item), [A], now) and downloads.begin(outline_of(other), [B], now)
    while not indices(asks := downloads.due(now), B):
        owed.extend(indices(asks, A))
        now += 1
        downloads.heard(A, now)
        if now % gap == 1:
            downloads.arrived(A, item.chunk(owed.popleft()), now)
        if announces:
            downloads.offered(A, item.id)
            owed.clear()
        downloads.check(now)
    slow = PATIENCE + WINDOW
    late = gap - slow  # each time, until what it may be in all is spent
    assert now <= (PROMISE_PATIENCE - 1) * slow / late * gap + MAX_STRIKES * slow + gap


@pytest.mark.parametrize("full", [25, 31])
def test_what_a_full_queue_holds_back_is_given_up_for_others_when_small_items_came_of_it_for_long(full: int) -> None:
    item, other = large(4 * CHUNK_BYTES, 1), large(8 * CHUNK_BYTES, 2)
    downloads = Downloads(8 * CHUNK_BYTES, PATIENCE)
    assert downloads.begin(outline_of(item), [A], 0.0) and downloads.begin(outline_of(other), [B], 0.0)
    for now in range(full):
        asks = indices(downloads.due(now), A)
        assert (len(asks) == WINDOW) is (now <= PROMISE_PATIENCE * (PATIENCE + WINDOW))
        downloads.heard(A, now)
        downloads.check(now)
        if item.id in downloads:
            downloads.offered(A, item.id)  # it could not send them
    assert (item.id in downloads) is (full < PROMISE_PATIENCE * (PATIENCE + WINDOW))
    assert bool(indices(downloads.due(full), B)) is (item.id not in downloads)


class Holder(str):
    """A node id that counts how often it is looked up."""

    looked_up = 0

    def __hash__(self) -> int:
        Holder.looked_up += 1
        return super().__hash__()


def test_to_look_what_to_ask_for_costs_as_much_as_there_are_holders_and_not_their_square() -> None:
    downloads, count = Downloads(1 << 30, PATIENCE), MAX_DOWNLOADS // SHARE
    holders = [NodeId(Holder(number)) for number in range(MAX_SOURCES)]
    assert all(downloads.begin(outline_of(large(CHUNK_BYTES + 1, seed)), holders, 0.0) for seed in range(count))
    downloads.due(0.0)
    Holder.looked_up = 0
    assert downloads.due(0.0) == []
    assert Holder.looked_up < 10 * count * MAX_SOURCES


def test_what_is_announced_again_was_not_sent_and_is_asked_for_again() -> None:
    item = large(2 * CHUNK_BYTES)
    downloads = Downloads(1 << 30, PATIENCE)
    downloads.begin(outline_of(item), [A], 0.0)
    assert indices(downloads.due(0.0), A) == [0, 1]
    assert downloads.due(0.5) == []
    downloads.offered(A, item.id)
    assert indices(downloads.due(0.5), A) == [0, 1]


@given(st.binary(max_size=20_000) | st.text(max_size=20_000).map(str.encode))
def test_contents_come_back(body: bytes) -> None:
    assert unpack_content(pack_content(body), len(body)) == body
    assert unpack_content(pack_content(body * 9), 9 * len(body)) == body * 9


def test_text_is_compressed_and_noise_and_small_bodies_are_not() -> None:
    text = b"the quick brown fox jumps over the lazy dog " * 500
    assert len(pack_content(text)) < len(text) / 3
    noise = random.Random(1).randbytes(50_000)
    assert pack_content(noise) == PLAIN + noise
    assert pack_content(text[: WORTH_BYTES - 1]) == PLAIN + text[: WORTH_BYTES - 1]


def bomb(size: int) -> bytes:
    return ZSTD + zstandard.ZstdCompressor().compress(bytes(size))


def test_no_content_unpacks_to_more_than_is_allowed() -> None:
    huge = bomb(256 << 20)
    assert len(huge) < 32 << 10
    tracemalloc.start()
    for content, reason in (
        (huge, "oversized"),
        (PLAIN + bytes(1001), "oversized"),
        (bomb(1001), "oversized"),
        (ZSTD + zstandard.ZstdCompressor(write_content_size=False).compress(bytes(500)), "malformed"),
        (bomb(500)[:-1], "malformed"),
        (bomb(500) + b"x", "malformed"),
        (bomb(300) + bomb(300)[1:], "malformed"),
        (b"", "malformed"),
        (b"\x02rest", "malformed"),
    ):
        with pytest.raises(MessageError) as caught:
            unpack_content(content, 1000)
        assert caught.value.reason == reason, content[:20]
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@given(st.binary(max_size=200), st.sampled_from([PLAIN, ZSTD, ZSTD + b"\x28\xb5\x2f\xfd", b""]))
def test_arbitrary_contents_raise_nothing_but_the_typed_error(data: bytes, start: bytes) -> None:
    with suppress(MessageError):
        assert len(unpack_content(start + data, 1000)) <= 1000


def test_a_frame_that_claims_less_than_it_holds_is_malformed() -> None:
    honest = zstandard.ZstdCompressor().compress(bytes(range(256)) * 2)
    at = honest.index((512 - 256).to_bytes(2, "little"), 4)  # two bytes of size, less 256 (RFC 8878, 3.1.1.1.4)
    lying = honest[:at] + (0).to_bytes(2, "little") + honest[at + 2 :]
    assert zstandard.get_frame_parameters(lying).content_size == 256
    with pytest.raises(MessageError):
        unpack_content(ZSTD + lying, 1000)


def test_an_item_has_as_many_chunks_as_its_size_says() -> None:
    item = large(3 * CHUNK_BYTES + 1)
    assert item.is_large and chunk_count(len(item.frame) - HEAD_BYTES) == 4
    assert len(item.chunk(3).data) == 1 and item.chunk(4).data == b""
    assert outline_of(item).fill(item.chunk(index).data for index in range(4)) == item

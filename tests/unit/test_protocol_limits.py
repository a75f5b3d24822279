import ast
import itertools
import math
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import protocol
from protocol.config import Instant
from protocol.events import Link
from protocol.host import Mailbox
from protocol.identity import Identity
from protocol.limits.limits import Limits
from protocol.limits.peer_scores import PENALTIES, REJECT_PENALTY, PeerScores, ScoreBoard
from protocol.limits.quotas import Payer, Quotas, price
from protocol.limits.rate_limits import TokenBucket, TokenBuckets
from protocol.limits.send_queues import FRAME_COST
from protocol.lru import Expiring, Recent
from protocol.transport.inbound import _FAILURES
from protocol.wire.envelope import Kind, control_frame
from tests.locks import watched
from tests.waiting import wait_until

LIMITS = Limits()


def scores(capacity: int = 4096) -> ScoreBoard:
    return ScoreBoard(Limits(max_remembered=capacity))


def held(board: ScoreBoard, now: float) -> bool:
    return board.is_refused("node", now)


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 50)), max_size=50))
def test_a_bucket_never_gives_more_than_its_burst_and_rate(takes: list[tuple[float, float]]) -> None:
    bucket = TokenBucket(rate=5.0, burst=20.0, now=0.0)
    now = given_out = 0.0
    for pause, amount in takes:
        now += pause
        if bucket.take(amount, now):
            given_out += amount
        assert given_out <= 20.0 + 5.0 * now + 1e-6


def test_a_clock_that_steps_back_gives_nothing_away() -> None:
    bucket = TokenBucket(rate=5.0, burst=20.0, now=100.0)
    assert bucket.take(20.0, 100.0)
    assert not bucket.take(1.0, 50.0)


def speak(quotas: Quotas, payer: Payer, link: Link, frame: bytes, now: float) -> bool:
    """Bring a frame; return whether it was handled at once."""
    if quotas.may_speak(payer, link, now):
        quotas.spend(payer, price(frame), now)
        return True
    quotas.put(payer, link, frame, now)
    return False


NETWORK, LINKS = Payer("198.41.0.0/24", is_peer=True), [Link(bytes([n]) * 32, dialled=False) for n in range(3)]
SMALL, LARGE = control_frame(Kind.PING, b"1"), control_frame(Kind.CANCEL, bytes(20_000))


def test_an_honest_swarms_traffic_over_one_link_never_waits() -> None:
    quotas = Quotas(Limits())
    have, want = control_frame(Kind.HAVE, bytes(66)), control_frame(Kind.WANT, bytes(50))
    for second in range(600):
        for _ in range(8 * 16):  # the items of 8 nodes x 16 groups a second, relayed: two short messages for each
            assert speak(quotas, NETWORK, LINKS[0], have, second)
            assert speak(quotas, NETWORK, LINKS[0], want, second)


def test_frames_beyond_a_quota_wait_in_their_order_and_links_take_turns() -> None:
    quotas = Quotas(Limits(network_cores=0.01, network_burst_s=0.01))
    frames = {link: [control_frame(Kind.HAVE, bytes([n, m]) * 5_000) for m in range(4)] for n, link in enumerate(LINKS)}
    handled = [(link, frame) for link in LINKS for frame in frames[link] if speak(quotas, NETWORK, link, frame, 0)]
    assert len(handled) < 4 and quotas.next(0) is None
    stranger = Payer(NETWORK.voice, is_peer=False)
    assert speak(quotas, stranger, Link(bytes(32), True), SMALL, 0), "strangers have a quota of their own"
    now = 0.0
    while quotas.due < math.inf:
        now = max(now + 0.01, quotas.due)
        while (turn := quotas.next(now)) is not None:
            quotas.spend(NETWORK, price(turn[1]), now)
            handled.append(turn)
    assert {link: [frame for owner, frame in handled if owner == link] for link in LINKS} == frames
    waited = [LINKS.index(link) for link, _ in handled[-6:]]
    assert all(before != after for before, after in itertools.pairwise(waited)), "no link has two turns in a row"
    owed = sum(price(frame) for _, frame in handled[:-1]) - 0.01
    assert now == pytest.approx(owed / 0.01, abs=0.1)


def test_no_more_than_its_bound_waits_for_a_payer_and_the_heaviest_link_loses() -> None:
    quotas = Quotas(Limits(network_cores=1e-9, network_burst_s=1e-9, waiting_bytes=100_000))
    quotas.spend(NETWORK, 1.0, 0)
    busy, quiet, other = LINKS
    size = len(SMALL) + FRAME_COST
    dropped = [link for _ in range(2000) for link, _ in quotas.put(NETWORK, busy, SMALL, 0)]
    assert dropped == [busy] * (2000 - 100_000 // size)
    for link in (quiet, other) * 200:
        assert {loser for loser, _ in quotas.put(NETWORK, link, SMALL, 0)} <= {busy}
    quotas.spend(NETWORK, -2.0, 0)
    held = 0
    while quotas.next(0) is not None:
        held += size
    assert 100_000 - size < held <= 100_000
    assert quotas.put(NETWORK, quiet, bytes(200_000), 0) and quotas.due == math.inf, "one frame that is too large"


def test_where_too_much_waits_the_newest_frame_is_dropped_and_the_oldest_handled_first() -> None:
    quotas = Quotas(Limits(network_cores=1e-9, network_burst_s=1e-9, waiting_bytes=10_000))
    quotas.spend(NETWORK, 1.0, 0)
    frames = [bytes([number]) * 1_000 for number in range(12)]
    dropped = [frame for each in frames for _, frame in quotas.put(NETWORK, LINKS[0], each, 0)]
    quotas.spend(NETWORK, -2.0, 0)
    handled = [found[1] for found in iter(lambda: quotas.next(0), None)]
    assert handled + dropped == frames and dropped


def test_what_waits_of_a_link_goes_with_it() -> None:
    quotas = Quotas(Limits(network_cores=1.0, network_burst_s=1e-9))
    quotas.spend(NETWORK, 1.0, 0)
    for link in LINKS[:2]:
        assert not speak(quotas, NETWORK, link, SMALL, 0)
    quotas.drop(LINKS[0])
    assert quotas.next(10) == (LINKS[1], SMALL) and quotas.due == math.inf


def test_what_is_asked_for_waits_before_messages_do() -> None:
    quotas = Quotas(Limits(network_cores=0.1, network_burst_s=1.0))
    quotas.spend(NETWORK, 0.6, 0)
    assert not quotas.may_take(NETWORK, 0) and quotas.may_speak(NETWORK, LINKS[0], 0)
    assert quotas.may_take(NETWORK, 2)


def test_each_subject_has_a_bucket_and_who_goes_on_is_remembered_among_any_number_of_others() -> None:
    buckets: TokenBuckets[str] = TokenBuckets(1.0, 2.0, capacity=8)
    assert [buckets.take("a", 1, 0.0) for _ in range(3)] == [True, True, False]
    assert buckets.take("b", 2, 0.0) and buckets.take("a", 1, 1.0)
    for other in range(100):
        buckets.take(str(other), 1, 1.0)
        if other % 4 == 0:
            assert not buckets.take("a", 1, 1.0)
    assert buckets.take("b", 2, 1.0), "it was silent for longest"


def test_the_score_board_remembers_the_last_offenders() -> None:
    board = scores(capacity=10)
    for number in range(100):
        board.penalise(f"key {number}", 1.0, 0.0)
        board.penalise("who goes on", 1.0, 0.0)
    assert board.is_refused("who goes on", 0.0)
    assert sum(board.score(f"key {number}", 0.0) < 0 for number in range(100)) == 9


def test_keys_of_strangers_however_many_make_no_refused_node_forgotten() -> None:
    admission, now = PeerScores(Limits(max_remembered=4)), Instant(0.0, 0.0)
    node, keys = Identity(bytes(32)).node_id, [bytes([number] * 32).hex() for number in range(5)]
    for subject in (node, *keys):
        admission.offence("lie", subject, now, 30.0)
    assert admission.is_refused(node, now)
    assert [admission.is_refused(key, now) for key in keys] == [False, True, True, True, True]


def test_the_default_patience_for_lies_is_as_documented() -> None:
    def refused_after(count: int, pause: float) -> bool:
        board = scores()
        now = 0.0
        for _ in range(count):
            now += pause
            board.penalise("liar", REJECT_PENALTY, now)
        return board.is_refused("liar", now)

    assert refused_after(21, 0.0) and not refused_after(20, 0.0)
    assert refused_after(1000, 60 / 1.5) and not refused_after(1000, 60 / 1.3)


def test_a_score_decays_by_half_and_an_offender_is_heard_again() -> None:
    board = scores()
    board.penalise("node", 40.0, 0.0)
    assert board.is_refused("node", 0.0)
    assert board.score("node", 600.0) == -20.0
    assert board.is_refused("node", LIMITS.first_refusal_s - 1) and not board.is_refused("node", LIMITS.first_refusal_s)
    assert board.score("somebody else", 0.0) == 0.0


def test_each_refusal_is_twice_as_long_as_the_last_up_to_a_day() -> None:
    board = scores()
    now = 0.0
    for number in range(15):
        board.penalise("node", 40.0, now)
        board.penalise("node", 40.0, now)  # what comes while it is refused makes it no longer
        delay = min(LIMITS.last_refusal_s, LIMITS.first_refusal_s * 2**number)
        assert held(board, now + delay - 1) and not held(board, now + delay)
        now += delay


@pytest.mark.parametrize(("days", "doublings"), [(0.99, 4), (1.01, 3), (3.5, 1), (30, 0)])
def test_a_day_without_a_refusal_takes_one_doubling_back(days: float, doublings: int) -> None:
    board, now = scores(), 0.0
    for number in range(4):
        board.penalise("node", 40.0, now)
        now += LIMITS.first_refusal_s * 2**number
    now += days * LIMITS.last_refusal_s
    board.penalise("node", 40.0, now)
    delay = LIMITS.first_refusal_s * 2**doublings
    assert held(board, now + delay - 1) and not held(board, now + delay)


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans())), st.integers(1, 5))
def test_recent_keeps_the_newest(history: list[tuple[int, bool]], capacity: int) -> None:
    recent: Recent[int, int] = Recent(capacity)
    order: list[int] = []
    for step, (key, add) in enumerate(history):
        order = [known for known in order if known != key]
        if add:
            recent.set(key, step)
            order = [*order, key][-capacity:]
        else:
            recent.pop(key)
    assert len(recent) == len(order) and all(key in recent for key in order)


EXACT = st.integers(0, 96).map(lambda number: number / 32)  # seconds whose sums are not rounded


@given(st.lists(st.tuples(st.integers(0, 30), EXACT), max_size=100), st.integers(1, 20))
def test_expiring_keeps_the_newest_for_their_life_and_no_more_than_an_eighth_longer(
    history: list[tuple[int, float]], capacity: int
) -> None:
    recent: Expiring[int, float] = Expiring(capacity, 8.0)
    last: dict[int, float] = {}
    now = 0.0
    for key, pause in history:
        now += pause
        recent.expire(now)
        recent.set(key, now)
        last.pop(key, None)
        last[key] = now
        newest = dict(list(last.items())[-capacity:])
        assert len(recent) <= capacity
        assert all(key in recent for key, since in newest.items() if now < since + 8.0)
    for _ in range(18):
        now += 0.5
        recent.expire(now)
    assert len(recent) == 0


@given(st.lists(st.binary(max_size=8), max_size=40), st.integers(1, 10), st.integers(1, 40))
def test_a_mailbox_keeps_the_newest_within_both_bounds(items: list[bytes], max_items: int, max_bytes: int) -> None:
    box: Mailbox[bytes] = Mailbox(max_items, max_bytes, len)
    for item in items:
        is_empty = len(box) == 0
        assert box.put(item) == is_empty
    kept = list(items)
    while len(kept) > max_items or sum(map(len, kept)) > max_bytes:
        kept.pop(0)
    assert box.dropped == len(items) - len(kept)
    assert box.take(len(items)) == kept
    assert len(box) == 0


def test_a_mailbox_counts_its_bytes_under_its_lock_alone() -> None:
    counted: list[bool] = []

    def size(_: int) -> int:
        counted.append(lock.is_mine)
        return 1

    with watched() as lock:
        box: Mailbox[int] = Mailbox(3, 3, size)
    for number in range(5):  # the last two push two out
        box.put(number)
    assert (box.take(1), box.take(5, timeout=60), box.dropped) == ([2], [3, 4], 2)
    assert box.wait_to_put(5, timeout=60)
    box.drop_oldest()
    assert len(counted) == 5 + 2 + 3 + 2 and all(counted)


def test_who_waits_at_a_mailbox_is_woken_by_what_comes() -> None:
    there: Mailbox[int] = Mailbox(10, 10, lambda _: 1)
    back: Mailbox[int] = Mailbox(10, 10, lambda _: 1)

    def answer() -> None:
        for _ in range(1000):
            back.put(*there.take(1, timeout=60))

    thread = threading.Thread(target=answer)
    thread.start()
    for number in range(1000):
        there.put(number)
        assert back.take(10, timeout=60) == [number]
    thread.join()


@pytest.mark.parametrize(("max_items", "max_bytes", "kept"), [(10, 10, 5), (3, 10, 3), (10, 3, 3)])
def test_who_waits_for_several_is_woken_once_they_are_there_or_no_more_fit(
    max_items: int, max_bytes: int, kept: int
) -> None:
    box: Mailbox[int] = Mailbox(max_items, max_bytes, lambda _: 1)
    taken: list[list[int]] = []
    thread = threading.Thread(target=lambda: taken.append(box.take(10, timeout=60, least=5)))
    thread.start()
    wait_until(lambda: box._filled._waiters, 20, "somebody to wait")
    for number in range(min(5, kept + 1)):
        assert thread.is_alive()
        box.put(number)
    thread.join(60)
    assert [len(one) for one in taken] == [kept]


def test_nobody_waits_at_a_mailbox_for_longer_than_they_may() -> None:
    box: Mailbox[int] = Mailbox(10, 10, lambda _: 1)
    began = time.monotonic()
    assert box.take(1) == box.take(1, timeout=0.05) == []
    assert time.monotonic() >= began + 0.05


@pytest.mark.parametrize(("max_items", "max_bytes"), [(2, 10), (10, 2)])
def test_who_waits_for_room_in_a_mailbox_gets_it_when_something_is_taken_or_is_told_that_there_is_none(
    max_items: int, max_bytes: int
) -> None:
    box: Mailbox[int] = Mailbox(max_items, max_bytes, lambda _: 1)
    assert box.wait_to_put(0, 0.0) and box.wait_to_put(1, 0.0)
    assert not box.wait_to_put(2, 0.0) and not box.wait_to_put(2, 0.05)
    thread = threading.Thread(target=lambda: [box.wait_to_put(number, 60) for number in range(2, 100)])
    thread.start()
    taken: list[int] = []
    while len(taken) < 100:
        taken += box.take(10, timeout=60)
        assert len(box) <= 2
    thread.join(60)
    assert taken == [*range(100)] and box.dropped == 0


def test_a_mailbox_loses_nothing_between_threads() -> None:
    box: Mailbox[int] = Mailbox(100_000, 100_000, lambda _: 1)

    def fill(start: int) -> None:
        for number in range(start, start + 5000):
            box.put(number)

    threads = [threading.Thread(target=fill, args=(start,)) for start in (0, 5000)]
    for thread in threads:
        thread.start()
    taken: list[int] = []
    while any(thread.is_alive() for thread in threads):
        taken += box.take(100)
    taken += box.take(100_000)
    assert sorted(taken) == list(range(10_000))


SOURCES = [path for path in Path(protocol.__file__).parent.rglob("*.py") if "simulator" not in path.parts]
# What takes the reason as its first argument, and as its second.
FIRST = {"MessageError", "EnvelopeError", "RecordError", "RefusedEarly", "offence", "_offence", "_priced"}
SECOND = {"Blame", "_cut"}
RETURNED_BY = {"_fault", "_item_refusal"}


def reasons() -> set[str]:
    """Return every reason that a peer's doing is counted by, wherever it is written."""
    found = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                place = 0 if name in FIRST else 1 if name in SECOND else len(node.args)
                found |= {one.value for one in node.args[place : place + 1] if isinstance(one, ast.Constant)}
            if isinstance(node, ast.FunctionDef) and node.name in RETURNED_BY:
                returned = [part for one in ast.walk(node) if isinstance(one, ast.Return) for part in ast.walk(one)]
                found |= {part.value for part in returned if isinstance(part, ast.Constant)}
    return (found | {*_FAILURES.values(), "framing", "inbox_full", "outbox_full"}) - {""}


# Refusals that cost nobody score, and why.
FREE = {
    "backlog": "the heaviest is cut, and somebody has to be",
    "graylisted": "it is refused already, and pays no longer for more of it",
    "handshake_flood": "no key was proven, and a network has a rate of handshakes",
    "handshake_malformed": "no key was proven, and a network has a rate of handshakes",
    "handshake_unfinished": "no key was proven, and a network has a rate of handshakes",
    "inbox_full": "our own node does not take what came",
    "internal": "a defect of ours",
    "no_room": "its large item waits until others are there",
    "other_version": "it is told so once, and is no offender",
    "outbox_full": "our own node sends too much",
    "queue_full": "it reads too slowly, and hears less",
    "revoked": "it is refused for as long as the list says so",
    "superseded": "its own newer connection takes its place",
    "too_many_connections": "the oldest that was never answered makes room",
}


def test_every_reason_has_a_price_or_says_why_it_has_none() -> None:
    assert not PENALTIES.keys() & FREE.keys()
    assert reasons() == (PENALTIES | FREE).keys()


def test_whoever_is_refused_is_refused_for_what_it_paid_most_for() -> None:
    admission = PeerScores(Limits())
    for _ in range(10):
        assert admission.offence("no_hello", "key", Instant(0.0, 0.0)) == (PENALTIES["no_hello"], None)
    told = [admission.offence("forged", "key", Instant(0.0, 0.0)).refused_for for _ in range(8)]
    assert told == [None, None, None, None, "forged", None, None, None]


def test_what_was_paid_long_ago_is_not_what_somebody_is_refused_for() -> None:
    admission, day = PeerScores(Limits()), 24 * 3600.0
    for number in range(2000):
        admission.offence("flood", "key", Instant(600.0 * number, 0.0))
    told = [admission.offence("forged", "key", Instant(15 * day, 0.0)).refused_for for _ in range(6)]
    assert [one for one in told if one] == ["forged"]

"""The rules by which connections are cut, as numbers: no sockets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.events import Link
from protocol.limits.connections import (
    MAX_WIRE_FRAME_BYTES,
    POINT_HANDSHAKES,
    ConnectionCut,
    Connections,
    Review,
    wire_bytes,
)
from protocol.limits.limits import MIB, Limits

LIMITS = Limits()

HERE = "127.0.0.1"
STEP = 0.25


def inbound(key: int) -> Link:
    return Link(bytes([key]) * 32, dialled=False)


class Table(Connections):
    """A table with a clock; `look` measures, reads every socket until it is empty, and judges."""

    def __init__(self, **limits) -> None:
        super().__init__(Limits(**limits))
        self.now = 0.0

    def come(self, number: int, prefix: str = HERE) -> list[ConnectionCut]:
        return self.accepted(number, prefix, self.now)

    def admit(self, number: int, link: Link, prefix: str = HERE) -> None:
        assert self.come(number, prefix) == []
        assert self.took(number, link, [100]) == (True, [])
        self.answered(link)

    def look(self, received: dict[int, int] | None = None, *, unread: int = 0, drained: bool = True) -> Review:
        self.now += STEP
        self.begin()
        for number, size in (received or {}).items():
            self.measure(number, size, unread)
        if drained:
            self.drained(None)
        return self.review(self.now)


def test_a_message_that_never_ends_is_cut_and_its_sender_named() -> None:
    table = Table()
    table.admit(1, inbound(1))
    legal = wire_bytes(100) + MAX_WIRE_FRAME_BYTES + LIMITS.slack_bytes
    assert table.look({1: legal}).cuts == []
    assert table.look({1: legal + 1}).cuts == [ConnectionCut(1, "endless_message", inbound(1))]
    assert table.took(1, inbound(1), [5]) == (False, [])
    assert table.look().cuts == []


def test_bytes_in_the_kernel_or_in_a_socket_that_was_not_emptied_prove_nothing() -> None:
    table = Table()
    table.admit(1, inbound(1))
    assert table.look({1: 9 * MIB}, unread=9 * MIB - MAX_WIRE_FRAME_BYTES).cuts == []
    assert table.look({1: 9 * MIB}, drained=False).cuts == []
    assert [cut.reason for cut in table.look({1: 9 * MIB}).cuts] == ["endless_message"]


@given(st.lists(st.lists(st.integers(0, MAX_WIRE_FRAME_BYTES), min_size=1, max_size=3), max_size=60))
def test_whole_messages_are_never_held_against_anybody(messages: list[list[int]]) -> None:
    table = Table()
    table.admit(1, inbound(1))
    received = wire_bytes(100)
    for parts in messages:
        received += sum(map(wire_bytes, parts)) + 80  # and a heartbeat each way
        table.took(1, inbound(1), parts)
        assert table.look({1: received}).cuts == []


def test_heartbeats_of_a_busy_month_are_forgiven() -> None:
    table = Table()
    table.admit(1, inbound(1))
    received = wire_bytes(100)
    for _ in range(100):
        received += LIMITS.slack_bytes // 2 + wire_bytes(10)
        table.took(1, inbound(1), [10])
        assert table.look({1: received}).cuts == []


def test_a_stranger_gets_ten_seconds_and_few_bytes() -> None:
    table = Table()
    table.come(1)
    table.come(2)
    table.admit(3, inbound(3))
    assert table.look({2: LIMITS.unanswered_bytes + 1, 3: LIMITS.unanswered_bytes + 1}).cuts == [
        ConnectionCut(2, "no_hello", None)
    ]
    cuts = [cut for _ in range(int(LIMITS.hello_s / STEP) + 1) for cut in table.look().cuts]
    assert cuts == [ConnectionCut(1, "no_hello", None)]


def test_time_in_which_we_were_blocked_is_not_held_against_a_stranger() -> None:
    table = Table()
    table.look()
    table.come(1)
    table.now += 20
    assert table.look().cuts == []


def test_the_oldest_stranger_makes_room_and_no_peer_does() -> None:
    table = Table(max_prefix_connections=3, max_connections=5)
    table.admit(1, inbound(1))
    table.come(2)
    table.come(3)
    assert table.come(4) == [ConnectionCut(2, "too_many_connections", None)]
    table.answered(inbound(1))
    for number in (5, 6):
        assert table.come(number, "10.0.0.0/24") == []
    assert table.come(7, "10.0.1.0/24") == [ConnectionCut(3, "too_many_connections", None)]
    for number in (4, 5, 6, 7):
        assert table.took(number, inbound(number), [1]) == (True, [])
        table.answered(inbound(number))
    assert table.come(8, "10.0.2.0/24") == [ConnectionCut(8, "too_many_connections", None)]
    table.gone(4)
    table.look()
    assert table.come(9) == []


def test_handshakes_are_rationed_by_prefix() -> None:
    table = Table(prefix_handshakes_burst=2.0, prefix_handshakes_per_second=1.0)
    assert [len(table.come(number)) for number in range(4)] == [0, 0, 1, 1]
    assert table.come(9, "10.0.0.0/24") == []
    table.now += 1
    assert table.come(10) == []
    assert table.come(11) == [ConnectionCut(11, "handshake_flood", None)]


def test_incomplete_messages_of_one_prefix_have_one_bound_whatever_keys_it_brings() -> None:
    """120 keys each began a message of parts of 34 bytes: 168 MB, and four times that in memory."""
    table = Table()
    for number in range(1, 121):
        table.admit(number, inbound(number))
    table.admit(200, inbound(200), "10.0.0.0/24")
    legal = MAX_WIRE_FRAME_BYTES // 2
    cuts = table.look(dict.fromkeys((*range(1, 121), 200), legal)).cuts
    assert {cut.reason for cut in cuts} == {"backlog"} and 200 not in {cut.number for cut in cuts}
    assert (120 - len(cuts)) * legal <= LIMITS.prefix_backlog_bytes < (121 - len(cuts)) * legal
    assert table.look().cuts == []
    assert LIMITS.prefix_backlog_bytes * 4 <= 32 * MIB


def test_the_heaviest_pays_when_all_together_hold_too_much() -> None:
    table = Table(max_backlog_bytes=10 * MIB)
    for number in range(4):
        table.admit(number, inbound(number))
    assert table.look({number: 2 * MIB + number for number in range(4)}, drained=False).cuts == []
    review = table.look({0: 2 * MIB, 1: 2 * MIB, 2: 30 * MIB, 3: 2 * MIB}, drained=False)
    assert review.cuts == [ConnectionCut(2, "backlog", inbound(2))]


def test_a_newer_connection_of_a_key_replaces_the_older() -> None:
    table = Table()
    table.admit(1, inbound(7))
    table.come(2)
    assert table.took(2, inbound(7), [1]) == (True, [ConnectionCut(1, "superseded", inbound(7))])
    assert table.took(1, inbound(7), [1]) == (False, [])
    table.gone(1)
    assert [table.look().closed for _ in range(3)] == [[], [], []]
    table.gone(2)
    assert [table.look().closed for _ in range(3)] == [[inbound(7)], [], []]
    assert len(table) == 0


def test_a_link_is_closed_once_its_last_frames_were_read() -> None:
    table = Table()
    table.admit(1, inbound(1))
    table.gone(1)
    assert table.look(drained=False).closed == []
    assert table.took(1, inbound(1), [1]) == (True, [])
    assert table.look().closed == [inbound(1)]
    assert len(table) == 0


def test_who_we_hang_up_on_is_cut_and_not_reported() -> None:
    table = Table()
    table.admit(1, inbound(1))
    assert table.hung_up(inbound(1)) == [ConnectionCut(1, "", inbound(1))]
    assert table.hung_up(inbound(1)) == []
    table.gone(1)
    review = table.look()
    assert (review.closed, review.ended) == ([], [inbound(1)])


def test_the_end_of_a_link_is_that_of_its_newest_connection_and_of_no_other_that_brought_its_last_words() -> None:
    table = Table()
    table.admit(1, inbound(7))
    table.come(2)
    table.took(2, inbound(7), [1])
    assert table.carries(2, inbound(7)) and not table.carries(1, inbound(7)) and not table.carries(-1, inbound(7))
    table.gone(1)
    assert [table.look().ended for _ in range(2)] == [[], []]
    table.admit(3, inbound(8))
    assert table.took(2, inbound(8), [1]) == (True, []) and not table.carries(2, inbound(8))
    table.gone(2)
    assert [table.look().ended for _ in range(3)] == [[inbound(7)], [], []]


def test_late_frames_of_another_connection_are_delivered_and_not_counted() -> None:
    table = Table()
    table.admit(1, inbound(2))
    table.admit(3, inbound(1))
    assert table.took(1, inbound(1), [10 * MIB]) == (True, [])
    assert table.took(9, inbound(1), [10 * MIB]) == (True, [])
    assert [cut.link for cut in table.look({1: 4 * MIB}).cuts] == [inbound(2)]


def test_what_a_stranger_said_that_was_gone_before_it_was_read_is_not_delivered() -> None:
    table = Table()
    table.come(1)
    table.gone(1)
    assert table.took(1, inbound(1), [100]) == (False, [])  # nobody knows its network any more
    assert table.took(-1, Link(b"d" * 32, dialled=True), [100]) == (True, [])  # we know whom we dialled
    table.come(2)
    assert table.took(2, inbound(1), [100]) == (True, [])


def test_a_link_moves_while_bytes_come_or_those_leave_that_wait_for_its_line() -> None:
    table = Table()
    table.admit(1, inbound(1))

    def moves(received: int, acknowledged: int, unsent: int) -> bool:
        table.begin()
        table.measure(1, received, 0, acknowledged, unsent)
        return table.review(0.0).moving == [inbound(1)]

    assert moves(900, 500, 0)
    assert not moves(900, 600, 0), "a ping to a process that is stopped is acknowledged by its kernel"
    assert moves(900, 700, 5_000) and not moves(900, 700, 5_000)
    assert moves(901, 700, 5_000)


@pytest.mark.parametrize("drained", [True, False])
def test_a_dialled_link_is_measured_too(drained: bool) -> None:
    link = Link(b"d" * 32, dialled=True)
    table = Table()
    table.connected(1, link, HERE)
    table.begin()
    table.measure(1, 4 * MIB, 0)
    if drained:
        table.drained(link)
    assert table.review(0.0).cuts == ([ConnectionCut(1, "endless_message", link)] if drained else [])


@given(
    st.lists(
        st.tuples(st.sampled_from(["accept", "gone", "took", "answer", "hang", "look"]), st.integers(0, 9)), max_size=80
    )
)
def test_the_table_stays_bounded_and_consistent(steps: list[tuple[str, int]]) -> None:
    table, newest, ended = Table(max_prefix_connections=3, max_connections=4), -1, set()
    for step, choice in steps:
        number = newest - choice
        match step:
            case "accept":
                newest += 1
                table.come(newest, f"10.0.{choice % 2}.0/24")
            case "gone" if number >= 0 and number not in ended:
                ended.add(number)
                table.gone(number)
            case "took":
                table.took(number, inbound(choice % 4), [10])
            case "answer":
                table.answered(inbound(choice % 4))
            case "hang":
                table.hung_up(inbound(choice % 4))
            case "look":
                table.look()
        assert len(list(table.numbers())) <= 4
    for number in set(range(newest + 1)) - ended:
        table.gone(number)
    table.look()
    assert len(table) == 0


@pytest.mark.parametrize("dialled", [True, False])
def test_a_prefix_whose_peers_broke_the_rules_begins_no_handshakes_for_a_while_and_its_live_links_stay(
    dialled: bool,
) -> None:
    table = Table(prefix_handshakes_burst=102.0, prefix_handshakes_per_second=10.0)
    link = Link(b"k" * 32, dialled=True) if dialled else inbound(1)
    if dialled:
        table.connected(1, link, HERE)
    else:
        table.admit(1, link)
    table.admit(2, inbound(2), "10.0.0.0/24")
    table.charge(link, 100 / POINT_HANDSHAKES, table.now)
    assert table.come(3) == []
    table.charge(link, 40 / POINT_HANDSHAKES, table.now)
    assert [cut.reason for cut in table.come(4)] == ["handshake_flood"]
    assert table.come(5, "10.0.0.0/24") == []
    assert table.look().cuts == [] and table.took(1, link, [100]) == (True, [])
    table.now = 3.5
    assert [cut.reason for cut in table.come(6)] == ["handshake_flood"]
    table.now = 4.2
    assert table.come(7) == []

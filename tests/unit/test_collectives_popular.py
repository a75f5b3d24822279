"""The choice of the state that holds: a pure function of all shares."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collectives.errors import CollectiveError, Mismatch, NotEnoughPeers
from collectives.shared_state.selection import MAX_INLINE_TABLE, Share, ShareError, choose, decode_all
from collectives.types import SyncStrategy

POPULAR, RECEIVE, SEND = SyncStrategy.ENFORCE_POPULAR, SyncStrategy.RECEIVE_ONLY, SyncStrategy.SEND_ONLY


def share(content: str, revision: int = 0, synced: int | None = None, strategy: SyncStrategy = POPULAR) -> Share:
    return Share(strategy, revision, synced, b"l" * 32, content.encode() * 32, 0, b"")


def chosen(*shares: Share) -> tuple[int, str, str]:
    choice = choose(dict(zip("abcdefgh", shares, strict=False)))
    return choice.revision, choice.content[:1].decode(), "".join(choice.holders)


CASES = {
    "alone": ([share("x", 3)], (3, "x", "a")),
    "all the same": ([share("x"), share("x"), share("x")], (0, "x", "abc")),
    "one drifted": ([share("x"), share("z"), share("x")], (0, "x", "ac")),
    "a tie goes to the greatest hash": ([share("x"), share("z")], (0, "z", "b")),
    "newest first": ([share("x", 4), share("z", 5), share("x", 4)], (5, "z", "b")),
    "newcomers with equal zeros": ([share("x", 9, 8), share("0"), share("0"), share("0")], (9, "x", "a")),
    "a founder that never synchronised": ([share("x", 9), share("0"), share("0")], (9, "x", "a")),
    "a newcomer from a longer run": ([share("x", 9, 9), share("z", 1000)], (9, "x", "a")),
    "halves that meet: three against two that went further": (
        [share("x", 100, 99)] * 3 + [share("z", 120, 119)] * 2,
        (100, "x", "abc"),
    ),
    "most of those with a history missed a step": ([share("z", 10, 9)] + [share("x", 9, 9)] * 3, (10, "z", "a")),
    "receivers offer nothing": ([share("x", 1, 1, RECEIVE), share("z", 0, 0)], (0, "z", "b")),
    "a receiver that has it may give it": ([share("x", 0, 0, RECEIVE), share("x")], (0, "x", "ab")),
    "a sender is not replaced": ([share("x", 1, 1, SEND), share("z", 2, 1), share("z", 2, 1)], (1, "x", "a")),
    "nobody but one ahead of all is left": (
        [share("z", 9), share("0", 0, 0, RECEIVE), share("0", 0, 0, RECEIVE)],
        (9, "z", "a"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_state_that_holds(case):
    shares, expected = CASES[case]
    assert chosen(*shares) == expected


def test_the_order_in_which_shares_came_decides_nothing():
    shares = {"a": share("x", 3, 2), "b": share("z", 3, 2), "c": share("y", 2, 2), "d": share("x", 9)}
    choices = {choose(dict(order)) for order in itertools.permutations(shares.items())}
    assert len(choices) == 1


def test_a_revision_that_jumps_names_the_member():
    with pytest.raises(Mismatch, match="member b gave revision = 7") as caught:
        chosen(share("x", 5, 5), share("z", 7, 5))
    assert (caught.value.member, caught.value.field) == ("b", "revision")


def test_impossible_combinations():
    with pytest.raises(NotEnoughPeers, match="only receive"):
        chosen(share("x", strategy=RECEIVE), share("x", strategy=RECEIVE))
    with pytest.raises(Mismatch, match="member c gave SEND_ONLY content"):
        chosen(share("x", strategy=SEND), share("y"), share("z", strategy=SEND))
    assert chosen(share("x", strategy=SEND), share("y"), share("x", strategy=SEND)) == (0, "x", "ac")


@given(
    st.builds(
        Share,
        st.sampled_from(SyncStrategy),
        st.integers(0, 2**64 - 1),
        st.none() | st.integers(0, 2**64 - 2),
        st.binary(min_size=32, max_size=32),
        st.binary(min_size=32, max_size=32),
        st.just(0),
        st.just(b""),
    )
)
def test_a_share_survives_the_wire(one):
    data = one.encode()
    assert Share.decode(data) == one
    assert len(data) <= MAX_INLINE_TABLE + 100


@given(st.binary(max_size=200))
def test_garbage_is_no_share(data):
    with pytest.raises(ShareError):
        Share.decode(data)


def test_a_member_that_sends_garbage_is_named():
    with pytest.raises(CollectiveError, match="member b sent no share"):
        decode_all({"a": share("x").encode(), "b": b"\xc1"})

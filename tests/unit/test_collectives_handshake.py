"""The handshake of the collectives' connections and their record layer: the changed, replayed or reflected fails."""

import itertools
import os
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collectives.mesh.handshake import (
    HELLO_BYTES,
    PROOF_BYTES,
    Handshake,
    HandshakeError,
    Opener,
    Party,
    Purpose,
    Sealer,
    SealError,
    group_hash,
)
from protocol.identity import Identity

ALICE, BOB, EVE = Identity.generate(), Identity.generate(), Identity.generate()
GROUP = group_hash("group")


def party(identity, group=GROUP, encrypt=True, session=b"8 bytes."):
    return Party(identity, group, session, encrypt)


def pair(encrypt=True, **options):
    """Return an initiator and a responder that fit each other."""
    return (
        Handshake(party(ALICE, encrypt=encrypt, session=b"alice..."), initiator=True, **options),
        Handshake(party(BOB, encrypt=encrypt, session=b"bob....."), initiator=False),
    )


def reason_of(call, *arguments):
    with pytest.raises(HandshakeError) as error:
        call(*arguments)
    return error.value.reason


@pytest.mark.parametrize("encrypt", [True, False])
def test_both_ends_learn_who_the_other_is_and_can_speak(encrypt):
    alice, bob = pair(encrypt, purpose=Purpose.DATA, stream=3, expected=BOB.node_id)
    proof = alice.feed(bob.feed(alice.start()))
    assert bob.feed(proof) == b""
    assert (alice.peer.member, bob.peer.member) == (BOB.node_id, ALICE.node_id)
    assert (alice.peer.session, bob.peer.session) == (b"bob.....", b"alice...")
    assert (bob.peer.purpose, bob.peer.stream) == (Purpose.DATA, 3)
    for sender, receiver in ((alice, bob), (bob, alice)):
        for message in (b"first", b"", b"first"):
            record = sender.peer.sealer.seal(message)
            assert (record == message) is (not encrypt)
            assert receiver.peer.opener.open(record) == message


@given(cuts=st.lists(st.integers(0, HELLO_BYTES + PROOF_BYTES), max_size=6), tail=st.binary(max_size=40))
@settings(max_examples=30, deadline=None)
def test_bytes_may_come_in_any_pieces_and_what_follows_the_handshake_is_kept(cuts, tail):
    alice, bob = pair()
    answer = bob.feed(alice.start())
    edges = [0, *sorted(cuts), len(answer)]
    proof = b"".join(alice.feed(answer[one:other]) for one, other in itertools.pairwise(edges))
    data, given_back = proof + tail, b""
    for i in range(len(data)):
        if bob.peer is None:
            given_back += bob.feed(data[i : i + 1])
    assert given_back == b"" and bob.peer.member == ALICE.node_id and bob.peer.leftover == b""
    again = pair()
    proof = again[0].feed(again[1].feed(again[0].start()))
    again[1].feed(proof + tail)
    assert again[1].peer.leftover == tail


@given(at=st.integers(0, HELLO_BYTES - 1), bit=st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_a_changed_bit_of_the_first_message_fails(at, bit):
    alice, bob = pair()
    hello = bytearray(alice.start())
    hello[at] ^= 1 << bit
    with pytest.raises(HandshakeError):
        bob.feed(alice.feed(bob.feed(bytes(hello))))
    assert bob.peer is None


@given(at=st.integers(0, HELLO_BYTES + PROOF_BYTES - 1), bit=st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_a_changed_bit_of_the_answer_fails(at, bit):
    alice, bob = pair()
    answer = bytearray(bob.feed(alice.start()))
    answer[at] ^= 1 << bit
    with pytest.raises(HandshakeError):
        alice.feed(bytes(answer))
    assert alice.peer is None


@given(at=st.integers(0, PROOF_BYTES - 1), bit=st.integers(0, 7))
@settings(max_examples=40, deadline=None)
def test_a_changed_bit_of_the_last_message_fails(at, bit):
    alice, bob = pair()
    proof = bytearray(alice.feed(bob.feed(alice.start())))
    proof[at] ^= 1 << bit
    assert reason_of(bob.feed, bytes(proof)) == "proof"
    assert bob.peer is None


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (party(BOB, group=group_hash("another")), "group"),
        (party(BOB, encrypt=False), "encryption"),
        (party(ALICE), "self"),
    ],
)
def test_who_does_not_fit_is_refused_by_name(other, reason):
    alice = Handshake(party(ALICE), initiator=True)
    assert reason_of(Handshake(other, initiator=False).feed, alice.start()) == reason


def test_another_than_expected_is_refused():
    alice, bob = pair(expected=EVE.node_id)
    assert reason_of(alice.feed, bob.feed(alice.start())) == "other_id"


@given(st.binary(min_size=1, max_size=300))
@settings(max_examples=100, deadline=None)
def test_noise_is_refused_or_waited_on(noise):
    bob = pair()[1]
    with suppress(HandshakeError):
        assert bob.feed(noise) == b""
    assert bob.peer is None


def test_a_replayed_handshake_proves_nothing():
    alice, bob = pair()
    hello = alice.start()
    proof = alice.feed(bob.feed(hello))
    again = pair()[1]
    again.feed(hello)  # the same first message: another answer, so another secret
    assert reason_of(again.feed, proof) == "proof"


def test_a_reflected_message_proves_nothing():
    alice = pair()[0]
    assert reason_of(alice.feed, alice.start()) == "self"
    # The responder's own proof, sent back to it in place of the initiator's.
    alice, bob = pair()
    answer = bob.feed(alice.start())
    assert reason_of(bob.feed, answer[HELLO_BYTES:]) == "proof"


def test_a_key_without_its_holder_proves_nothing():
    """Eve says that she is Alice: her signature is not Alice's."""

    class Impostor(Identity):
        pass

    impostor = Impostor.generate()
    impostor.public_key = ALICE.public_key
    eve, bob = Handshake(party(impostor), initiator=True), pair()[1]
    assert reason_of(bob.feed, eve.feed(bob.feed(eve.start()))) == "signature"


def test_a_weak_ephemeral_key_is_refused():
    alice, bob = pair()
    hello = bytearray(alice.start())
    hello[-40:-8] = bytes(32)  # a point of small order
    assert reason_of(bob.feed, bytes(hello)) == "ephemeral"


@given(st.binary(min_size=1, max_size=100), st.data())
@settings(max_examples=50, deadline=None)
def test_a_record_that_was_changed_does_not_open(plain, data):
    key = os.urandom(32)
    record = bytearray(Sealer(key).seal(plain))
    record[data.draw(st.integers(0, len(record) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(SealError):
        Opener(key).open(bytes(record))


def test_records_open_in_their_order_only():
    key = os.urandom(32)
    sealer = Sealer(key)
    first, second = sealer.seal(b"first"), sealer.seal(b"second")
    for order in ([second], [first, first]):
        opener = Opener(key)
        with pytest.raises(SealError):
            for record in order:
                opener.open(record)
    opener = Opener(key)
    into = bytearray(5)
    opener.open_into(memoryview(first), memoryview(into))
    assert (into, opener.open(second)) == (b"first", b"second")

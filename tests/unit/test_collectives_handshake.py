"""The handshake of the collectives' connections and their record layer: the changed, replayed or reflected fails."""

import itertools
import os
import socket
import sys
from contextlib import suppress
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collectives.mesh.addresses import is_vouched
from collectives.mesh.connection import Channel, ChannelError
from collectives.mesh.handshake import (
    HELLO_BYTES,
    PROOF_BYTES,
    Handshake,
    HandshakeError,
    Party,
    Purpose,
    anybody,
    group_id,
    group_key,
)
from collectives.mesh.limits import HandshakeRates
from collectives.mesh.sealing import KEY_BYTES, TAG_BYTES, Opener, Sealer, SealError
from collectives.types import Protection
from protocol.identity import Identity

ALICE, BOB, EVE = Identity.generate(), Identity.generate(), Identity.generate()
GROUP = group_key("group")


def party(identity, group=GROUP, protection=Protection.ENCRYPTED, session=b"8 bytes.", may_join=anybody):
    return Party(identity, group, session, protection, may_join)


def pair(protection=Protection.ENCRYPTED, **options):
    """Return an initiator and a responder that fit each other."""
    return (
        Handshake(party(ALICE, protection=protection, session=b"alice..."), initiator=True, **options),
        Handshake(party(BOB, protection=protection, session=b"bob....."), initiator=False),
    )


def reason_of(call, *arguments):
    with pytest.raises(HandshakeError) as error:
        call(*arguments)
    return error.value.reason


def shake(alice, bob):
    """Let both finish; return the four messages."""
    messages = [alice.start()]
    for end in (bob, alice, bob, alice):
        messages.append(end.feed(messages[-1]))
    assert messages.pop() == b""
    return messages


@pytest.mark.parametrize("protection", Protection)
def test_both_ends_learn_who_the_other_is_and_can_speak(protection):
    alice, bob = pair(protection, purpose=Purpose.DATA, stream=3, expected=BOB.node_id)
    assert [len(message) for message in shake(alice, bob)] == [HELLO_BYTES, HELLO_BYTES, PROOF_BYTES, PROOF_BYTES]
    assert (alice.peer.member, bob.peer.member) == (BOB.node_id, ALICE.node_id)
    assert (alice.peer.session, bob.peer.session) == (b"bob.....", b"alice...")
    assert (bob.peer.purpose, bob.peer.stream) == (Purpose.DATA, 3)
    for sender, receiver in ((alice, bob), (bob, alice)):
        for message in (b"first", b"", b"first"):
            record = sender.peer.sealer.seal(message)
            assert record.startswith(message) is (protection is not Protection.ENCRYPTED or not message)
            assert receiver.peer.opener.open(record) == message


@pytest.mark.parametrize(
    ("protection", "alice_vouched", "bob_vouched", "bare"),
    [
        (Protection.AUTHENTICATED, True, True, True),
        (Protection.AUTHENTICATED, True, False, False),
        (Protection.AUTHENTICATED, False, True, False),
        (Protection.AUTHENTICATED, False, False, False),
        (Protection.ENCRYPTED, True, True, True),
        (Protection.ENCRYPTED, True, False, False),
        (Protection.ENCRYPTED, False, False, False),
        (Protection.UNAUTHENTICATED, False, False, True),
        (Protection.UNAUTHENTICATED, True, True, True),
    ],
)
def test_a_payload_goes_without_a_tag_where_both_ends_kernels_vouch_or_both_want_it_so(
    protection, alice_vouched, bob_vouched, bare
):
    alice = Handshake(party(ALICE, protection=protection, session=b"alice..."), initiator=True, vouched=alice_vouched)
    bob = Handshake(party(BOB, protection=protection, session=b"bob....."), initiator=False, vouched=bob_vouched)
    shake(alice, bob)
    assert alice.peer.bare is bob.peer.bare is bare


@pytest.mark.parametrize("flags", [1, 2, 4, 5, 0x80])
@pytest.mark.parametrize("protection", Protection)
def test_nobody_on_the_way_changes_how_much_is_protected(protection, flags):
    alice, bob = pair(protection)
    hello = bytearray(alice.start())
    hello[5] ^= flags  # says that the kernel vouches, or what nobody has heard of
    with pytest.raises(HandshakeError):
        bob.feed(alice.feed(bob.feed(bytes(hello))))


@pytest.mark.slow
def test_the_kernel_vouches_for_this_users_unix_sockets_alone():
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as tcp:
        assert [is_vouched(end) for end in ends] == [sys.platform == "linux"] * 2
        assert not is_vouched(tcp)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as alone:
        assert not is_vouched(alone)
    for end in ends:
        end.close()


@given(cuts=st.lists(st.integers(0, HELLO_BYTES + PROOF_BYTES), max_size=6), tail=st.binary(max_size=40))
@settings(max_examples=30, deadline=None)
def test_bytes_may_come_in_any_pieces_and_what_follows_the_handshake_is_kept(cuts, tail):
    alice, bob = pair()
    hello, proof = alice.start(), None
    answer = bob.feed(hello)
    proof = alice.feed(answer)
    last = bob.feed(proof[:50]) + bob.feed(proof[50:] + tail)
    assert bob.peer.member == ALICE.node_id and bob.peer.leftover == tail
    edges = [0, *sorted(cuts), len(last)]
    given_back = b"".join(alice.feed(last[one:other]) for one, other in itertools.pairwise(edges))
    assert given_back == b"" and alice.peer.member == BOB.node_id and alice.peer.leftover == b""


@given(which=st.integers(0, 3), at=st.integers(0, HELLO_BYTES + PROOF_BYTES), bit=st.integers(0, 7))
@settings(max_examples=150, deadline=None)
def test_a_changed_bit_of_any_message_ends_it_at_the_end_that_it_came_to_or_at_both(which, at, bit):
    alice, bob = pair()
    message = alice.start()
    with pytest.raises(HandshakeError):
        for number, end in enumerate((bob, alice, bob, alice)):
            if number == which:
                message = bytearray(message)
                message[at % len(message)] ^= 1 << bit
            message = end.feed(bytes(message))
    assert (alice if which % 2 else bob).peer is None
    assert alice.peer is None


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (party(BOB, group=group_key("another")), "group_or_secret"),
        (party(BOB, group=group_key("group", b"a secret")), "group_or_secret"),
        (party(BOB, protection=Protection.AUTHENTICATED), "protection"),
        (party(BOB, protection=Protection.UNAUTHENTICATED), "protection"),
        (party(BOB, may_join=lambda member: member != ALICE.node_id), "may_not_join"),
        (party(ALICE), "self"),
    ],
)
def test_who_does_not_fit_is_refused_by_name_before_anything_is_proven_to_it(other, reason):
    alice, bob = Handshake(party(ALICE), initiator=True), Handshake(other, initiator=False)
    sent = []

    def meet():
        message = alice.start()
        for end in (bob, alice, bob):
            message = end.feed(message)
            sent.append((end, message))

    assert reason_of(meet) == reason
    assert sum(len(message) for end, message in sent if end is bob) <= HELLO_BYTES
    assert alice.peer is bob.peer is None


def test_the_one_that_dials_is_as_choosy():
    alice = Handshake(party(ALICE, may_join=lambda member: member != BOB.node_id), initiator=True)
    bob = pair()[1]
    assert reason_of(alice.feed, bob.feed(alice.feed(bob.feed(alice.start())))) == "may_not_join"


def test_a_key_without_its_holder_proves_nothing_and_nobody_is_asked_about_it():
    """Eve says that she is Alice: her signature is not Alice's."""

    class Impostor(Identity):
        pass

    impostor, asked = Impostor.generate(), []
    impostor.public_key = ALICE.public_key
    choosy = party(BOB, may_join=lambda member: asked.append(member) or True)
    eve, bob = Handshake(party(impostor), initiator=True), Handshake(choosy, initiator=False)
    assert reason_of(bob.feed, eve.feed(bob.feed(eve.start()))) == "signature"
    assert asked == []
    shake(pair()[0], Handshake(choosy, initiator=False))
    assert asked == [ALICE.node_id]


def test_a_secret_and_a_name_are_told_apart_however_they_are_cut():
    keys = [
        group_key("run"),
        group_key("run", b""),
        group_key("ru", b"n"),
        group_key("run", b"n"),
        group_key("runn"),
        group_key("run", b"n\0"),
    ]
    assert len(set(keys)) == len(keys)
    assert len({*keys, *map(group_id, keys)}) == 2 * len(keys)


def test_nothing_that_is_sent_depends_on_the_group_or_the_member_in_a_way_that_others_can_test():
    """All that goes over the wire is fresh keys, and what is sealed under a secret that takes both of them."""
    for name in ("group", "another"):
        alice = Handshake(party(ALICE, group=group_key(name)), initiator=True)
        bob = Handshake(party(BOB, group=group_key(name)), initiator=False)
        said = shake(alice, bob)
        assert said[0][:8] == said[1][:8] == b"GSMC\x05\x01\x01\x00"  # the rest of a hello is the fresh key
        for known in (ALICE, BOB):
            assert known.public_key not in b"".join(said)
        assert b"8 bytes." not in b"".join(said) and group_key(name) not in b"".join(said)
        assert len({*said, *shake(*pair())}) == 8


def test_another_than_expected_is_refused():
    alice, bob = pair(expected=EVE.node_id)
    assert reason_of(alice.feed, bob.feed(alice.feed(bob.feed(alice.start())))) == "other_id"


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
    assert reason_of(again.feed, proof) == "group_or_secret"


def test_a_reflected_message_proves_nothing():
    alice = pair()[0]
    proof = alice.feed(alice.start())  # its own hello: then it proves itself to itself
    assert reason_of(alice.feed, proof) == "group_or_secret"
    # The initiator's own proof, sent back to it in place of the responder's.
    alice, bob = pair()
    assert reason_of(alice.feed, alice.feed(bob.feed(alice.start()))) == "group_or_secret"


def test_a_weak_ephemeral_key_is_refused():
    alice, bob = pair()
    hello = alice.start()[:-32] + bytes(32)  # a point of small order
    assert reason_of(bob.feed, hello) == "ephemeral"


def ends(encrypts):
    key = os.urandom(KEY_BYTES)
    return Sealer(key, encrypts=encrypts), Opener(key, encrypts=encrypts)


@given(encrypts=st.booleans(), plain=st.binary(min_size=1, max_size=100), data=st.data())
@settings(max_examples=80, deadline=None)
def test_a_record_that_was_changed_does_not_open(encrypts, plain, data):
    sealer, opener = ends(encrypts)
    record = bytearray(sealer.seal(plain))
    assert len(record) == len(plain) + TAG_BYTES
    record[data.draw(st.integers(0, len(record) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(SealError):
        opener.open(bytes(record))


@given(encrypts=st.booleans(), record=st.binary(max_size=40))
@settings(max_examples=60, deadline=None)
def test_a_record_that_somebody_made_up_does_not_open(encrypts, record):
    with pytest.raises(SealError):
        ends(encrypts)[1].open(record)


@pytest.mark.parametrize("encrypts", [True, False])
def test_records_open_in_their_order_only(encrypts):
    key = os.urandom(KEY_BYTES)
    sealer = Sealer(key, encrypts=encrypts)
    first, second = sealer.seal(b"first"), sealer.seal(b"second")
    for order in ([second], [first, first]):
        opener = Opener(key, encrypts=encrypts)
        with pytest.raises(SealError):
            for record in order:
                opener.open(record)


def test_a_record_is_sealed_and_opened_where_it_belongs():
    sealer, opener = ends(encrypts=True)
    record, into = bytearray(5 + TAG_BYTES), bytearray(5)
    sealer.seal_into(memoryview(b"first"), memoryview(record))
    opener.open_into(memoryview(record), memoryview(into))
    assert (into, opener.open(sealer.seal(b"second"))) == (b"first", b"second")
    sealer, opener = ends(encrypts=False)
    opener.check(b"first", sealer.tag(b"first"))
    assert opener.open(sealer.seal(b"second")) == b"second"
    with pytest.raises(SealError):
        opener.check(b"third", sealer.tag(b"thirst"))


@pytest.mark.parametrize("reset", [False, True])
def test_what_was_said_right_before_the_other_end_hung_up_is_read(reset):
    ours, theirs = socket.socketpair()
    alice, bob = (Channel(end, handshake) for end, handshake in zip((ours, theirs), pair(), strict=True))
    for end in (ours, theirs):
        end.setblocking(False)
    while alice.peer is None or bob.peer is None:
        for end in (alice, bob):
            end.write()
            end.read()
    if reset:  # it hung up over what it had not read
        bob.send(b"unheard")
    for word in (b"last", b"words"):
        alice.send(word)
    alice.close()
    assert bob.read() == [b"last", b"words"]
    with pytest.raises(ChannelError):
        bob.read()
    bob.close()


def test_many_networks_that_each_keep_below_their_limit_do_not_keep_a_new_one_out():
    rates = HandshakeRates(0.0)
    rng = Random(1)
    crowd = [(rng.uniform(0.0, 120.0), f"10.0.{prefix}.0/24") for prefix in range(64) for _ in range(15 * 120)]
    newcomers = [(60.0 + number / 2, f"198.51.{number}.0/24") for number in range(100)]
    let_in = {prefix for now, prefix in sorted([*crowd, *newcomers]) if rates.take(prefix, now)}
    assert let_in >= {prefix for _, prefix in newcomers}

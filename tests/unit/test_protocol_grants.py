"""Who may be in a swarm with an allowlist: passes and invites, and every way to stretch them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.config import Instant
from protocol.credentials.grants import (
    MAX_USES,
    Gatekeeper,
    Pass,
    Ticket,
    make_certificate,
    make_pass,
    open_grant,
)
from protocol.credentials.invite import SharedInvite, make_shared_invite
from protocol.credentials.manifest import JoinPolicy, ManifestTask, SwarmManifest, make_manifest
from protocol.credentials.records import MAX_GRANT_BYTES, PeerRecord, make_record
from protocol.errors import GrantError
from protocol.identity import Identity

FOUNDER, LISTED, GUEST, STRANGER = (Identity(bytes([n]) * 32) for n in range(4))
NOW = Instant(1000.0, 1_700_000_000.0)
HOUR_MS = 3_600_000
LATER_MS = int(NOW.unix * 1000) + HOUR_MS
TASKS = [ManifestTask("t", 1, "ab", "{}")]
CLUB = make_manifest(FOUNDER, "club", 1, JoinPolicy.ALLOWLIST, TASKS, [LISTED.node_id])
OTHER = make_manifest(FOUNDER, "other", 1, JoinPolicy.ALLOWLIST, TASKS)


def record(identity: Identity, grant: bytes = b"", manifest: SwarmManifest = CLUB) -> PeerRecord:
    return make_record(identity, manifest.swarm, (), 1, "", LATER_MS, grant)


def answer(identity: Identity, grant: bytes = b"", now: Instant = NOW) -> str:
    return Gatekeeper(CLUB).admits(record(identity, grant), now)


def shared(uses: int = 3, manifest: SwarmManifest = CLUB, founder: Identity = FOUNDER) -> SharedInvite:
    return make_shared_invite(founder, manifest, uses, LATER_MS)


def ticket(invite: SharedInvite, holder: Identity) -> bytes:
    return invite.ticket(CLUB.swarm, holder.public_key).encode()


def test_an_open_swarm_admits_everybody_and_a_closed_one_its_list_and_founder() -> None:
    in_the_open = make_manifest(FOUNDER, "open", 1, JoinPolicy.OPEN, TASKS)
    assert Gatekeeper(in_the_open).admits(record(STRANGER, manifest=in_the_open), NOW) == ""
    assert [answer(node) for node in (FOUNDER, LISTED, STRANGER)] == ["", "", "not_admitted"]


def test_a_pass_admits_its_node_until_it_expires_and_nobody_else() -> None:
    grant = make_pass(FOUNDER, CLUB.swarm, GUEST.node_id, LATER_MS).encode()
    assert answer(GUEST, grant) == ""
    assert answer(STRANGER, grant) == "not_admitted"
    later = Instant(NOW.steady + 3600, NOW.unix + 3600)
    assert answer(GUEST, grant, later) == "invite_expired"


def test_expiry_is_checked_again_for_a_grant_that_was_found_good() -> None:
    keeper = Gatekeeper(CLUB)
    later = Instant(NOW.steady + 3600, NOW.unix + 3600)
    for grant in (make_pass(FOUNDER, CLUB.swarm, GUEST.node_id, LATER_MS).encode(), ticket(shared(), GUEST)):
        assert [keeper.admits(record(GUEST, grant), now) for now in (NOW, later)] == ["", "invite_expired"]


@pytest.mark.parametrize(
    "grant",
    [
        make_pass(STRANGER, CLUB.swarm, GUEST.node_id, LATER_MS).encode(),
        make_pass(FOUNDER, OTHER.swarm, GUEST.node_id, LATER_MS).encode(),
        Pass(LATER_MS + 1, make_pass(FOUNDER, CLUB.swarm, GUEST.node_id, LATER_MS).signature).encode(),
        ticket(shared(founder=STRANGER), GUEST),
        ticket(shared(manifest=OTHER), GUEST),
        shared().ticket(OTHER.swarm, GUEST.public_key).encode(),
        b"",
        b"\x92\x01\x90",
    ],
    ids=[
        "by another",
        "for another swarm",
        "longer",
        "invite by another",
        "invite for another",
        "ticket for another",
        "none",
        "empty",
    ],
)
def test_what_the_founder_did_not_sign_for_this_swarm_admits_nobody(grant: bytes) -> None:
    assert answer(GUEST, grant) == "not_admitted"


def test_a_grant_that_was_found_good_for_one_key_is_not_good_for_another() -> None:
    keeper = Gatekeeper(CLUB)
    for grant in (make_pass(FOUNDER, CLUB.swarm, GUEST.node_id, LATER_MS).encode(), ticket(shared(), GUEST)):
        assert [keeper.admits(record(node, grant), NOW) for node in (GUEST, STRANGER)] == ["", "not_admitted"]


def test_an_invite_admits_as_many_nodes_as_it_has_uses_the_first_that_are_seen() -> None:
    invite, keeper = shared(uses=2), Gatekeeper(CLUB)
    nodes = [Identity(bytes([n]) * 32) for n in (10, 11, 12)]
    asked = [record(node, ticket(invite, node)) for node in nodes]
    assert [keeper.admits(one, NOW) for one in asked * 2] == ["", "", "invite_used"] * 2
    assert keeper.admits(record(nodes[2], ticket(shared(), nodes[2])), NOW) == "", "another invite has uses of its own"


def test_holders_are_bounded_and_a_new_one_waits_for_invites_to_expire(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protocol.credentials.grants.MAX_HOLDERS", 2)
    keeper, late = Gatekeeper(CLUB), Instant(0.0, NOW.unix + 1800)
    short = make_shared_invite(FOUNDER, CLUB, 1, LATER_MS - HOUR_MS // 2)
    assert [keeper.admits(record(GUEST, ticket(invite, GUEST)), NOW) for invite in (short, shared())] == ["", ""]
    asked = record(STRANGER, ticket(shared(), STRANGER))
    assert keeper.admits(asked, Instant(0.0, late.unix - 1)) == "too_many_uses"
    assert keeper.admits(asked, late) == ""


def test_a_clock_that_is_ahead_for_once_makes_no_used_invite_good_again() -> None:
    keeper, invite = Gatekeeper(CLUB), shared(uses=1)
    late = Instant(NOW.steady + 1, NOW.unix + 3600)
    asked = [record(node, ticket(invite, node)) for node in (GUEST, STRANGER)]
    assert [keeper.admits(asked[0], now) for now in (NOW, late)] == ["", "invite_expired"]
    assert [keeper.admits(one, NOW) for one in asked] == ["", "invite_used"]


def test_a_ticket_is_of_no_use_under_another_key_or_with_more_uses() -> None:
    invite = shared(uses=2)
    assert answer(STRANGER, ticket(invite, GUEST)) == "not_admitted"
    genuine = invite.certificate
    more = make_certificate(STRANGER, CLUB.swarm, genuine.key, 100, LATER_MS)
    stretched = SharedInvite(invite.secret, type(genuine)(genuine.key, 100, genuine.expiry_ms, genuine.signature))
    for forged in (stretched, SharedInvite(invite.secret, more)):
        assert answer(GUEST, ticket(forged, GUEST)) == "not_admitted"


def test_an_invite_has_a_bounded_number_of_uses() -> None:
    for uses in (0, MAX_USES + 1):
        with pytest.raises(GrantError):
            make_certificate(FOUNDER, CLUB.swarm, GUEST.public_key, uses, LATER_MS)


def test_every_grant_fits_a_record() -> None:
    largest = Ticket(make_certificate(FOUNDER, CLUB.swarm, bytes(32), MAX_USES, 2**64 - 1), bytes(64))
    assert len(largest.encode()) < MAX_GRANT_BYTES
    assert open_grant(largest.encode()) == largest


@given(st.binary(max_size=MAX_GRANT_BYTES + 10))
def test_noise_admits_nobody(noise: bytes) -> None:
    with pytest.raises(GrantError):
        open_grant(noise)
    assert Gatekeeper(CLUB)._open(record(GUEST, noise)) is None


def test_true_is_no_kind_of_a_grant() -> None:
    grant = make_pass(FOUNDER, CLUB.swarm, GUEST.node_id, LATER_MS).encode()
    assert answer(GUEST, grant) == ""
    assert answer(GUEST, grant.replace(b"\x92\x01", b"\x92\xc3", 1)) == "not_admitted"


@given(st.data())
def test_an_altered_grant_admits_nobody(data: st.DataObject) -> None:
    grants = [make_pass(FOUNDER, CLUB.swarm, GUEST.node_id, LATER_MS).encode(), ticket(SHARED, GUEST)]
    grant = bytearray(data.draw(st.sampled_from(grants)))
    grant[data.draw(st.integers(0, len(grant) - 1))] ^= data.draw(st.integers(1, 255))
    assert answer(GUEST, bytes(grant)) == "not_admitted"


SHARED = shared()

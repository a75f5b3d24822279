"""Who may be in a swarm with an allowlist: passes and invites, and every way to stretch them."""

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.config import NOT_KEPT, Instant
from protocol.credentials.grants import (
    MAX_USES,
    Gatekeeper,
    Pass,
    Ticket,
    Use,
    make_certificate,
    make_pass,
    open_grant,
)
from protocol.credentials.invite import SharedInvite, make_shared_invite
from protocol.credentials.manifest import JoinPolicy, ManifestTask, SwarmManifest, make_manifest
from protocol.credentials.records import MAX_GRANT_BYTES, PeerRecord, make_record
from protocol.credentials.use_log import ENTRY_BYTES, UseLog
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


def ticket(invite: SharedInvite, number: int, holder: Identity) -> bytes:
    return invite.ticket(CLUB.swarm, number, holder.public_key).encode()


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
    for grant in (make_pass(FOUNDER, CLUB.swarm, GUEST.node_id, LATER_MS).encode(), ticket(shared(), 0, GUEST)):
        assert [keeper.admits(record(GUEST, grant), now) for now in (NOW, later)] == ["", "invite_expired"]


@pytest.mark.parametrize(
    "grant",
    [
        make_pass(STRANGER, CLUB.swarm, GUEST.node_id, LATER_MS).encode(),
        make_pass(FOUNDER, OTHER.swarm, GUEST.node_id, LATER_MS).encode(),
        Pass(LATER_MS + 1, make_pass(FOUNDER, CLUB.swarm, GUEST.node_id, LATER_MS).signature).encode(),
        ticket(shared(founder=STRANGER), 0, GUEST),
        ticket(shared(manifest=OTHER), 0, GUEST),
        shared().ticket(OTHER.swarm, 0, GUEST.public_key).encode(),
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
    for grant in (make_pass(FOUNDER, CLUB.swarm, GUEST.node_id, LATER_MS).encode(), ticket(shared(), 0, GUEST)):
        assert [keeper.admits(record(node, grant), NOW) for node in (GUEST, STRANGER)] == ["", "not_admitted"]


def test_an_invite_admits_one_node_a_number_the_first_that_is_seen() -> None:
    invite, keeper = shared(uses=2), Gatekeeper(CLUB)
    nodes = [Identity(bytes([n]) * 32) for n in (10, 11, 12)]
    assert keeper.admits(record(nodes[0], ticket(invite, 0, nodes[0])), NOW) == ""
    assert keeper.admits(record(nodes[1], ticket(invite, 0, nodes[1])), NOW) == "invite_used"
    assert keeper.admits(record(nodes[1], ticket(invite, 1, nodes[1])), NOW) == ""
    assert {keeper.admits(record(nodes[2], ticket(invite, n, nodes[2])), NOW) for n in (0, 1)} == {"invite_used"}
    assert keeper.admits(record(nodes[0], ticket(invite, 0, nodes[0])), NOW) == ""


def use_by(identity: Identity, number: int = 0, key: bytes = bytes(32), expiry_ms: int = LATER_MS) -> Use:
    return Use(key, number, identity.node_id, expiry_ms)


def test_a_use_admits_nobody_before_it_is_on_disk_and_is_handed_out_once() -> None:
    invite, keeper = shared(uses=1), Gatekeeper(CLUB, keeps=True)
    first, second = Identity(bytes([10]) * 32), Identity(bytes([11]) * 32)
    asked = [record(node, ticket(invite, 0, node)) for node in (first, second)]
    assert [keeper.admits(asked[0], NOW), keeper.admits(asked[0], NOW)] == [NOT_KEPT, NOT_KEPT]
    (use,) = keeper.take_fresh()
    assert keeper.take_fresh() == () and use.holder == first.node_id
    assert keeper.admits(asked[1], NOW) == "invite_used"
    keeper.lost([use])
    assert keeper.admits(asked[1], NOW) == NOT_KEPT  # nobody had it after all
    keeper.kept(keeper.take_fresh())
    assert [keeper.admits(one, NOW) for one in asked] == ["invite_used", ""]


def test_a_restart_forgets_no_use(tmp_path: Path) -> None:
    invite = shared(uses=1)
    first, second = Identity(bytes([10]) * 32), Identity(bytes([11]) * 32)
    log = UseLog(tmp_path / "uses.bin")
    keeper = Gatekeeper(CLUB, log.load(0), keeps=True)
    keeper.admits(record(first, ticket(invite, 0, first)), NOW)
    log.append(keeper.take_fresh(), 0)
    again = Gatekeeper(CLUB, UseLog(tmp_path / "uses.bin").load(0), keeps=True)
    assert again.admits(record(second, ticket(invite, 0, second)), NOW) == "invite_used"
    assert again.admits(record(first, ticket(invite, 0, first)), NOW) == ""


def test_uses_are_bounded_and_a_new_one_waits_for_others_to_expire(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protocol.credentials.grants.MAX_NUMBERS", 2)
    keeper = Gatekeeper(CLUB, [use_by(GUEST, 0), use_by(GUEST, 1, expiry_ms=LATER_MS // 2)])
    late = Instant(0.0, LATER_MS / 2000 - 1)
    invite = shared()
    asked = record(STRANGER, ticket(invite, 0, STRANGER))
    assert keeper.admits(asked, late) == "too_many_uses"
    assert keeper.admits(asked, Instant(0.0, LATER_MS / 2000)) == ""


uses = st.lists(
    st.builds(
        Use,
        st.binary(min_size=31, max_size=31).map(lambda key: key + b"\1"),  # another than that of `use_by`
        st.integers(0, MAX_USES - 1),
        st.sampled_from([GUEST.node_id, STRANGER.node_id]),
        st.integers(1, 2**64 - 1),
    ),
    max_size=6,
    unique_by=lambda use: (use.key, use.number),
)


@given(uses, st.data())
def test_a_log_that_was_cut_short_or_damaged_holds_the_uses_before_the_damage(
    tmp_path_factory: pytest.TempPathFactory, kept: list[Use], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("uses") / "uses.bin"
    log = UseLog(path)
    for use in kept:
        log.append([use], 0)
    assert list(UseLog(path).load(0)) == kept
    whole = path.read_bytes() if kept else b""
    at = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:at] + data.draw(st.binary(max_size=3)))
    before = kept[: at // ENTRY_BYTES]
    again = UseLog(path)
    assert list(again.load(0)) == before
    again.append([use_by(FOUNDER)], 0)  # and goes on behind them
    assert list(UseLog(path).load(0)) == [*before, use_by(FOUNDER)]


def test_a_clock_that_is_ahead_for_once_makes_no_used_invite_good_again(tmp_path: Path) -> None:
    log = UseLog(tmp_path / "uses.bin")
    log.append([use_by(GUEST, 0)], 0)
    started_late = UseLog(tmp_path / "uses.bin")
    assert started_late.load(LATER_MS + 1)
    started_late.append([use_by(GUEST, 1)], LATER_MS + 1)
    assert [use.number for use in UseLog(tmp_path / "uses.bin").load(0)] == [0, 1]


@pytest.mark.parametrize(("late", "holder"), [(99, GUEST), (600, STRANGER)])
def test_of_two_uses_of_one_number_the_first_counts_that_has_not_expired(
    tmp_path: Path, late: int, holder: Identity
) -> None:
    path = tmp_path / "uses.bin"
    UseLog(path).append(
        [use_by(GUEST, 0, expiry_ms=100), use_by(STRANGER, 0, expiry_ms=1000), use_by(FOUNDER, 0)], now_ms=0
    )
    assert [use.holder for use in UseLog(path).load(late)] == [holder.node_id]


def test_a_log_lets_go_of_what_expired_and_never_outgrows_its_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protocol.credentials.use_log.MAX_BYTES", 10 * ENTRY_BYTES)
    monkeypatch.setattr("protocol.credentials.use_log.MAX_NUMBERS", 1)
    log = UseLog(tmp_path / "uses.bin")
    for number in range(100):
        log.append([use_by(GUEST, number, expiry_ms=number + 1)], now_ms=number)
        assert (tmp_path / "uses.bin").stat().st_size <= 10 * ENTRY_BYTES
    assert [use.number for use in UseLog(tmp_path / "uses.bin").load(99)] == [99]
    assert (tmp_path / "uses.bin").stat().st_size == ENTRY_BYTES
    assert (tmp_path / "uses.bin").stat().st_mode & 0o777 == 0o600


def test_a_use_that_could_not_be_written_is_not_found_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = UseLog(tmp_path / "uses.bin")
    log.append([use_by(GUEST, 0)], 0)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            log.append([use_by(GUEST, 1)], 0)
    log.append([use_by(STRANGER, 2)], 0)
    assert [use.number for use in UseLog(tmp_path / "uses.bin").load(0)] == [0, 2]


def test_a_ticket_is_of_no_use_under_another_key_beyond_its_uses_or_with_more_of_them() -> None:
    invite = shared(uses=2)
    assert answer(STRANGER, ticket(invite, 0, GUEST)) == "not_admitted"
    assert answer(GUEST, ticket(invite, 2, GUEST)) == "not_admitted"
    genuine = invite.certificate
    more = make_certificate(STRANGER, CLUB.swarm, genuine.key, 100, LATER_MS)
    stretched = SharedInvite(invite.secret, type(genuine)(genuine.key, 100, genuine.expiry_ms, genuine.signature))
    for forged in (stretched, SharedInvite(invite.secret, more)):
        assert answer(GUEST, ticket(forged, 50, GUEST)) == "not_admitted"


def test_an_invite_has_a_bounded_number_of_uses() -> None:
    for uses in (0, MAX_USES + 1):
        with pytest.raises(GrantError):
            make_certificate(FOUNDER, CLUB.swarm, GUEST.public_key, uses, LATER_MS)
    assert sorted(shared(MAX_USES).numbers(random.Random(1))) == list(range(MAX_USES))


def test_every_grant_fits_a_record() -> None:
    largest = Ticket(make_certificate(FOUNDER, CLUB.swarm, bytes(32), MAX_USES, 2**64 - 1), MAX_USES - 1, bytes(64))
    assert len(largest.encode()) < MAX_GRANT_BYTES
    assert open_grant(largest.encode()) == largest


@given(st.binary(max_size=MAX_GRANT_BYTES + 10))
def test_noise_admits_nobody(noise: bytes) -> None:
    with pytest.raises(GrantError):
        open_grant(noise)
    assert Gatekeeper(CLUB)._open(record(GUEST, noise)) is None


@given(st.data())
def test_an_altered_grant_admits_nobody(data: st.DataObject) -> None:
    grants = [make_pass(FOUNDER, CLUB.swarm, GUEST.node_id, LATER_MS).encode(), ticket(SHARED, 1, GUEST)]
    grant = bytearray(data.draw(st.sampled_from(grants)))
    grant[data.draw(st.integers(0, len(grant) - 1))] ^= data.draw(st.integers(1, 255))
    assert answer(GUEST, bytes(grant)) == "not_admitted"


SHARED = shared()

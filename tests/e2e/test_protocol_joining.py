"""What a machine is told that asks for a swarm's manifest, over real sockets."""

import time
from pathlib import Path

import pytest

from protocol import joiner
from protocol.config import Instant, read_clock
from protocol.credentials.grants import Gatekeeper
from protocol.credentials.invite import Invite, make_shared_invite
from protocol.credentials.manifest import JoinPolicy, ManifestTask, make_manifest
from protocol.credentials.records import Endpoint, make_record
from protocol.errors import JoinError
from protocol.host import Host
from protocol.identity import Identity
from protocol.limits.timing import LOCAL
from protocol.refusals import CLOCK_AHEAD, CLOCK_BEHIND
from protocol.storage import save_peers
from tests.protocol_hosts import running


@pytest.mark.parametrize(("days", "reason"), [(-2, CLOCK_BEHIND), (8, CLOCK_AHEAD)])
def test_who_joins_with_a_clock_that_is_off_by_days_is_told_so_at_once(
    days: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was told after the whole time limit that no seed answered, and to see that the invite was whole."""
    owner, task = Identity.generate(), ManifestTask("builtin/sums", 1, "c0976995997f4201", '{"difficulty":2}')
    manifest = make_manifest(owner, "riddles", int(time.time() * 1000), JoinPolicy.OPEN, [task])
    member = Host(
        owner,
        manifest.swarm,
        "tcp://127.0.0.1:0",
        (),
        timing=LOCAL,
        manifest=manifest.encoded,
        gate=Gatekeeper(manifest),
    )
    address = member.start()
    assert address is not None
    monkeypatch.setattr(joiner, "read_clock", lambda: Instant(read_clock().steady, time.time() + 86400 * days))
    try:
        with pytest.raises(JoinError) as refused:
            joiner.fetch_manifest(Identity.generate(), Invite("riddles", manifest.hash, (address,)), b"", timeout=60.0)
        assert refused.value.reason == reason
        assert member.counters().rejected == {reason: 1}
    finally:
        member.stop()


def test_who_can_be_dialled_and_has_used_an_invite_is_counted_again_when_a_member_restarts(tmp_path: Path) -> None:
    owner, first, second = (Identity.generate() for _ in range(3))
    now_ms, task = int(time.time() * 1000), ManifestTask("builtin/sums", 1, "c0976995997f4201", '{"difficulty":2}')
    manifest = make_manifest(owner, "riddles", now_ms, JoinPolicy.ALLOWLIST, [task])
    once = make_shared_invite(owner, manifest, 1, now_ms + 3_600_000)
    tickets = {node: once.ticket(manifest.swarm, node.public_key).encode() for node in (first, second)}
    ends_ms = now_ms + 3_600_000
    record = make_record(first, manifest.swarm, (Endpoint("127.0.0.1", 1),), 1, "", ends_ms, tickets[first])
    save_peers(tmp_path / "peers.json", [record.encoded])
    options = {"swarm": manifest.swarm, "manifest": manifest.encoded, "gate": Gatekeeper(manifest)}
    with running(identity=owner, peers_file=tmp_path / "peers.json", **options) as (_, address):
        invite = Invite("riddles", manifest.hash, (address,))
        with pytest.raises(JoinError) as refused:
            joiner.fetch_manifest(second, invite, tickets[second], timeout=60.0)
        assert refused.value.reason == "invite_used"
        assert joiner.fetch_manifest(first, invite, tickets[first], timeout=60.0).manifest == manifest

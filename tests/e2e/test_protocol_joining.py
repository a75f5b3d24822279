"""What a machine is told that asks for a swarm's manifest with a wrong clock, over real sockets."""

import time

import pytest

from protocol import joiner
from protocol.config import Instant, read_clock
from protocol.credentials.grants import Gatekeeper
from protocol.credentials.invite import Invite
from protocol.credentials.manifest import JoinPolicy, ManifestTask, make_manifest
from protocol.errors import JoinError
from protocol.host import Host
from protocol.identity import Identity
from protocol.limits.timing import LOCAL
from protocol.refusals import CLOCK_AHEAD, CLOCK_BEHIND


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

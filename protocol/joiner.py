"""The joiner: drives `bootstrap` on real sockets and a real clock, on its caller's thread."""

import random
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

import structlog

from protocol.bootstrap import FALSE_MANIFEST, Bootstrap
from protocol.config import AwakeClock, Instant, read_clock
from protocol.credentials.invite import Invite
from protocol.credentials.manifest import SwarmManifest
from protocol.errors import JoinError
from protocol.events import Dial, HangUp, NetworkEvent, SendFrame, Tick
from protocol.identity import Identity
from protocol.limits.limits import Limits
from protocol.transport import Transport
from protocol.transport.zeromq import ZmqTransport
from protocol.wire.version import VERSION, said, version_in

POLL_S = 0.1

log = structlog.get_logger()


class FetchedManifest(NamedTuple):
    """The swarm's manifest and the revocation list, empty if there is none."""

    manifest: SwarmManifest
    revocations: bytes


def fetch_manifest(identity: Identity, invite: Invite, grant: bytes, timeout: float) -> FetchedManifest:
    """Ask the invite's seeds, and whom they name, for the manifest that the invite names.

    Waits up to `timeout` seconds. All sockets are closed when it returns.

    Raises:
        JoinError: no member answered, or those that did refuse this node; `reason` and `refusals` say why.
    """
    bootstrap = Bootstrap(identity, invite, grant, random.Random(), read_clock())
    transport = ZmqTransport(identity, None, Limits())
    try:
        drive(bootstrap, transport, read_clock, timeout)
    finally:
        transport.close()
    if bootstrap.manifest is not None:
        return FetchedManifest(bootstrap.manifest, bootstrap.revocations)
    raise _why_not(bootstrap, invite, timeout)


def drive(bootstrap: Bootstrap, transport: Transport, clock: Callable[[], Instant], timeout: float) -> None:
    """Let `bootstrap` talk over `transport` until it is over, at most for `timeout` seconds in which this process ran.

    A member that refuses is logged while others are still asked.
    """
    awake = AwakeClock(clock)
    deadline = awake().steady + timeout
    said: Mapping[str, str] = {}
    events: list[NetworkEvent | Tick] = [Tick()]
    while True:
        for event in events:
            for action in bootstrap.handle(event, awake()):
                match action:
                    case Dial(address, scope):
                        transport.dial(address, scope)
                    case HangUp(link):
                        transport.hang_up(link)
                    case SendFrame(link, frame):
                        transport.send(link, frame)
        if bootstrap.is_over or awake().steady >= deadline:
            return
        before, said = said, bootstrap.refusals
        for member, reason in said.items() - before.items():
            log.info("refused by a member, others are asked", member=member, reason=reason)
        events = [*transport.poll(POLL_S), Tick()]


def _why_not(bootstrap: Bootstrap, invite: Invite, timeout: float) -> JoinError:
    refusals = bootstrap.refusals
    if not refusals:
        seeds = ", ".join(str(seed.endpoint) for seed in invite.seeds)
        return JoinError(
            f"no seed of the invite answered within {timeout:g} s ({seeds}): "
            "see that the invite is whole, or ask for a newer one"
        )
    reason = Counter(refusals.values()).most_common(1)[0][0]
    if theirs := version_in(reason):
        return JoinError(
            f"swarm {invite.name!r} speaks protocol {theirs}, and this node {said(VERSION)}: "
            "install the version of gossamer that the swarm's nodes run",
            reason,
            refusals,
        )
    if reason == FALSE_MANIFEST:
        return JoinError(
            f"the manifest of swarm {invite.name!r} is not the one that the invite names: do not join it",
            reason,
            refusals,
        )
    return JoinError(f"swarm {invite.name!r} does not admit this node: {reason}", reason, refusals)

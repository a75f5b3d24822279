"""The joiner: a node that has no manifest yet asks members for it, on its caller's thread.

It is an ordinary core that listens nowhere, wants no items, and admits everybody: only members know whom the swarm
admits. Members without room give the manifest, too, and name others. If one refuses, the others are still asked: it may
be hostile, or not know yet what they know. It is over when the manifest is there, or all seeds have refused. A key that
is refused in the handshake is no refusal: nobody signed it, and it may not last.
"""

import random
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import NamedTuple

import structlog

from protocol.config import Gate, Instant, Setup, read_clock
from protocol.core import Core
from protocol.credentials.grants import Gatekeeper
from protocol.credentials.invite import Invite
from protocol.credentials.manifest import SwarmManifest, open_manifest
from protocol.driver import Driver
from protocol.errors import JoinError, RevocationError
from protocol.events import Subscribe
from protocol.identity import Identity
from protocol.limits.limits import Limits
from protocol.limits.timing import WAN
from protocol.membership.address_book import Book
from protocol.refusals import GRAYLISTED, Case
from protocol.transport import Transport
from protocol.transport.zeromq import ZmqTransport
from protocol.wire.version import VERSION, said, version_in

AGENT = "gossamer/joining"
FALSE_MANIFEST = "false_manifest"  # the offence of who gives another than the invite's
LEAST_WAIT_S, MOST_WAIT_S = 0.01, 0.1
MAX_LISTS = 16  # revocation lists that wait for the manifest: those of an invite's eight seeds, and as many

log = structlog.get_logger()


class FetchedManifest(NamedTuple):
    """The swarm's manifest and the revocation list, empty if there is none."""

    manifest: SwarmManifest
    revocations: bytes


class _Newcomer(Gate):
    """The gate of a node without a manifest: revocation lists wait until there is one to check them by."""

    def __init__(self) -> None:
        self.lists: deque[bytes] = deque(maxlen=MAX_LISTS)

    def obey(self, encoded: bytes) -> bool:
        self.lists.append(encoded)
        return False


def fetch_manifest(identity: Identity, invite: Invite, grant: bytes, timeout: float) -> FetchedManifest:
    """Ask the invite's seeds, and whom they name, for the manifest that the invite names.

    Waits up to `timeout` seconds. All sockets are closed when it returns.

    Raises:
        JoinError: no member answered, or those that did refuse this node; `reason` and `refusals` say why.
    """
    transport = ZmqTransport(identity, None, Limits())
    try:
        return fetch_over(transport, read_clock, identity, invite, grant, timeout)
    finally:
        transport.close()


def fetch_over(  # a transport and a clock, and the caller's words
    transport: Transport,
    clock: Callable[[], Instant],
    identity: Identity,
    invite: Invite,
    grant: bytes,
    timeout: float,
) -> FetchedManifest:
    """Do so over `transport`, for `timeout` seconds of `clock` in which this process ran. Raises as `fetch_manifest`.

    A member that refuses is logged while others are still asked.
    """
    gate, limits = _Newcomer(), Limits()
    setup = Setup(identity, invite.swarm, (), limits, WAN, AGENT, grant, manifest=b"", gate=gate)
    core = Core(setup, Book(invite.seeds, limits), random.Random(), clock())
    driver = Driver(core, transport, clock, lambda _: None)
    driver.feed(Subscribe(frozenset(), 0.0))
    deadline = driver.at.steady + timeout
    refusals: dict[str, str] = {}
    while not core.manifest:
        if driver.at.steady >= deadline or _have_all_refused(invite, refusals):
            raise _why_not(invite, refusals, is_false=core.scores.rejected[FALSE_MANIFEST] > 0, timeout=timeout)
        driver.step(min(MOST_WAIT_S, max(LEAST_WAIT_S, driver.wait())))
        for note in core.membership.refusals.take():
            if note.case in (Case.BY_THEM, Case.OTHER_VERSION):
                log.info("refused by a member, others are asked", member=note.who, reason=note.reason)
                refusals[note.who] = note.reason
    manifest = open_manifest(core.manifest)
    if manifest.hash != invite.manifest:  # all 32 bytes of it: the swarm's id is only half
        raise _why_not(invite, refusals, is_false=True, timeout=timeout)
    keeper = Gatekeeper(manifest)
    for encoded in gate.lists:
        with suppress(RevocationError):
            keeper.obey(encoded)
    return FetchedManifest(manifest, keeper.revocations)


def _have_all_refused(invite: Invite, refusals: Mapping[str, str]) -> bool:
    final = {endpoint for endpoint, reason in refusals.items() if reason != GRAYLISTED}
    refusers = {seed.key for seed in invite.seeds if str(seed.endpoint) in final}
    return refusers == {seed.key for seed in invite.seeds}


def _why_not(invite: Invite, refusals: Mapping[str, str], *, is_false: bool, timeout: float) -> JoinError:
    if is_false:
        return JoinError(
            f"the manifest of swarm {invite.name!r} is not the one that the invite names: do not join it",
            FALSE_MANIFEST,
            refusals,
        )
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
    return JoinError(f"swarm {invite.name!r} does not admit this node: {reason}", reason, refusals)

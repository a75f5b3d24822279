"""The checks of `gossamer doctor --swarm`: a swarm, looked at from outside by a stranger with nothing but the invite.

 1. Each seed is asked alone for the manifest, all at once. The invite's right is not shown, so no use of it is spent.
 2. A stranger with a key of its own enters for some seconds, asks for no rollouts, and counts whom it hears of.

An allowlist keeps the stranger out. That its seeds say so is all that can be seen from outside then.
"""

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

from node.errors import printable
from node.operations.diagnosis import Diagnosis
from node.swarm.peering import UPDATE, agent, other_form, release
from protocol.credentials.grants import Gatekeeper
from protocol.credentials.invite import Invite, SharedInvite
from protocol.credentials.manifest import SwarmManifest
from protocol.credentials.records import Address
from protocol.errors import JoinError
from protocol.host import Host
from protocol.identity import Identity
from protocol.joiner import AGENT, fetch_manifest
from protocol.limits.timing import LOCAL, WAN

PATIENCE_S = 10.0  # for a seed: a handshake, a hello and an answer over a slow line take a second or two
QUIET_S = 3.0  # without a new name the stranger has heard of all that its peers tell at once
LOOK_S = 20.0  # at most, where names go on coming
POLL_S = 0.1
LOOKER = "gossamer/doctor"
KEPT_OUT = "not_admitted"
NO_NODES = frozenset({LOOKER, AGENT})  # agents of those that only look, or only ask for the manifest
SOON_S = 3 * 24 * 3600.0  # before an invite's end, time to make another


class SeedAnswer(NamedTuple):
    """A seed's answer after `took` seconds: the manifest, or why not; `reason` is empty where it said nothing."""

    took: float
    manifest: SwarmManifest | None = None
    reason: str = ""
    error: str = ""


def examine_swarm(invite: Invite, patience: float = PATIENCE_S, quiet: float = QUIET_S) -> Iterator[Diagnosis]:
    """Yield what is found of the invite's swarm, one thing at a time.

    Args:
        invite: names the seeds.
        patience: seconds for each seed, and then for the stranger to enter.
        quiet: seconds without a new name after which no more are waited for.
    """
    with ThreadPoolExecutor(len(invite.seeds)) as pool:
        answers = list(pool.map(lambda seed: _ask(invite, seed, patience), invite.seeds))
    for seed, answer in zip(invite.seeds, answers, strict=True):
        yield _seed(seed, answer, patience)
    yield from _right(invite)
    manifest = next((answer.manifest for answer in answers if answer.manifest is not None), None)
    if manifest is not None:
        yield _manifest(manifest)
        yield from _enter(invite, manifest, patience, quiet)
    elif any(answer.reason == KEPT_OUT for answer in answers):
        yield Diagnosis("stranger", True, "is kept out, as an allowlist has it; a member's gossamer status sees more")


def _ask(invite: Invite, seed: Address, patience: float) -> SeedAnswer:
    alone = replace(invite, seeds=(seed,), grant=None)
    began = time.monotonic()
    try:
        fetched = fetch_manifest(Identity.generate(), alone, b"", patience)
    except JoinError as error:
        return SeedAnswer(time.monotonic() - began, reason=error.reason, error=str(error))
    return SeedAnswer(time.monotonic() - began, fetched.manifest)


def _seed(seed: Address, answer: SeedAnswer, patience: float) -> Diagnosis:
    at = str(seed.endpoint).removeprefix("tcp://")
    if answer.manifest is not None or answer.reason == KEPT_OUT:
        return Diagnosis("seed", True, f"{at} answers after {answer.took:.1f} s")
    if answer.reason:
        return Diagnosis("seed", False, f"{at}: {printable(answer.error)}", do="ask whoever runs it, or leave it out")
    remedy = "start it again on its folder, or give out an invite without it"
    return Diagnosis("seed", False, f"{at} does not answer within {patience:g} s", do=remedy)


def _right(invite: Invite) -> Iterator[Diagnosis]:
    """Look at the right that the invite brings, if it brings one."""
    if invite.grant is None:
        return
    certificate = invite.grant.certificate if isinstance(invite.grant, SharedInvite) else invite.grant
    left = certificate.expiry_ms / 1000 - time.time()
    day = time.strftime("%Y-%m-%d %H:%M", time.localtime(certificate.expiry_ms / 1000))
    remedy = "its owner makes another: gossamer invite FOLDER --uses N --expires 30d"
    if left <= 0:
        yield Diagnosis("invite", False, f"expired on {day}", do=remedy)
    else:
        yield Diagnosis("invite", left > SOON_S, f"admits until {day}; not tried, so no use is spent", False, remedy)


def _manifest(manifest: SwarmManifest) -> Diagnosis:
    day = time.strftime("%Y-%m-%d", time.localtime(manifest.created_ms / 1000))
    tasks = "one task" if len(manifest.tasks) == 1 else f"{len(manifest.tasks)} tasks"
    return Diagnosis(
        "manifest", True, f"the invite's: {tasks}, {manifest.policy}, founded on {day}; it does not expire"
    )


def _enter(invite: Invite, manifest: SwarmManifest, patience: float, quiet: float) -> Iterator[Diagnosis]:
    """Enter as a stranger; count who is there."""
    near = all(seed.endpoint.is_loopback for seed in invite.seeds)
    host = Host(
        Identity.generate(),
        manifest.swarm,
        None,
        invite.seeds,
        agent=LOOKER,
        timing=LOCAL if near else WAN,
        manifest=manifest.encoded,
        gate=Gatekeeper(manifest),
    )
    host.subscribe(frozenset(), 0.0)  # it asks for no rollouts
    began = time.monotonic()
    host.start()
    try:
        while not host.peers() and time.monotonic() < began + patience:
            time.sleep(POLL_S)
        took = time.monotonic() - began
        if not host.peers():
            dropped = ", ".join(f"{reason} {count}" for reason, count in sorted(host.counters().rejected.items()))
            why = f": {printable(host.refusal)}" if host.refusal else f"; dropped here: {dropped}" if dropped else ""
            remedy = "are its members full? Start a relay: gossamer join INVITE --set role=relay"
            yield Diagnosis("stranger", False, f"does not get in within {patience:g} s{why}", do=remedy)
            return
        yield Diagnosis("stranger", True, f"gets in after {took:.1f} s")
        known, changed = _look(host), time.monotonic()
        while time.monotonic() < min(changed + quiet, began + took + LOOK_S):
            time.sleep(POLL_S)
            if (now := _look(host)) != known:
                known, changed = now, time.monotonic()
        answering = {peer.node_id for peer in host.peers()}
        dialable = host.counters().dialable
    finally:
        host.stop()
    heard = "answers" if len(answering) == 1 else "answer"
    text = f"{len(known)} known by their records of the last day, {len(answering)} {heard} this stranger"
    yield Diagnosis("nodes", True, text)
    remedy = "start one more with --listen tcp://0.0.0.0:4001: when the one stops, the others lose each other"
    yield Diagnosis("dialable", dialable > 1, f"{dialable} can be dialled", needed=False, do=remedy)
    versions = Counter(known.values())
    text = ", ".join(f"{printable(name)} at {count}" for name, count in versions.most_common(4))
    yield Diagnosis("versions", set(versions) <= {agent()}, f"{text}; this is {agent()}", False, UPDATE)
    if others := other_form([*versions.elements()]):
        yield Diagnosis("groups", False, others, needed=False, do=UPDATE)


def _look(host: Host) -> dict[str, str]:
    """Return what each node runs that the stranger has heard of, by id, without those that only look."""
    return {record.node_id: release(record.agent) for record in host.records() if record.agent not in NO_NODES}

"""A joiner asks members for the manifest of its invite, and is told by the one who has it, whatever the others do."""

import random
from dataclasses import dataclass, field

import pytest
import structlog

from protocol.config import Gate, Instant, Setup
from protocol.core import Core
from protocol.credentials.grants import Gatekeeper
from protocol.credentials.invite import Invite, make_shared_invite
from protocol.credentials.manifest import JoinPolicy, ManifestTask, make_manifest
from protocol.credentials.records import Address, Endpoint, PeerRecord
from protocol.credentials.revocations import make_revocations
from protocol.driver import Driver
from protocol.errors import JoinError
from protocol.events import NetworkEvent
from protocol.identity import Identity
from protocol.joiner import FALSE_MANIFEST, FetchedManifest, fetch_over
from protocol.limits.limits import Limits
from protocol.membership.address_book import Book
from protocol.transport.memory import Conditions, MemoryNetwork, MemoryTransport
from protocol.wire.envelope import SWARM_BYTES

UNIX = 1_700_000_000.0
ME, FOUNDER, *OTHERS = (Identity(bytes([n + 1]) * 32) for n in range(12))
TASK = ManifestTask("t", 1, "ab", "{}")
CLUB = make_manifest(FOUNDER, "club", 1, JoinPolicy.ALLOWLIST, [TASK], [other.node_id for other in OTHERS])
FALSE = make_manifest(FOUNDER, "other", 1, JoinPolicy.OPEN, [TASK])
FULL = Limits(max_callers=0)


@dataclass(frozen=True)
class Rule(Gate):
    """A gate with one answer, which claims to obey a list."""

    answer: str = ""
    revision: int = 0
    revocations: bytes = b""

    def admits(self, record: PeerRecord, now: Instant) -> str:
        return self.answer if record.node_id == ME.node_id else ""


@dataclass(eq=False)
class Caller(MemoryTransport):
    """The joiner's transport: time passes while it polls, and one event comes at a time.

    At the second poll its process is stopped for `stop`.
    """

    members: list[Driver] = field(default_factory=list)
    stop: float = 0.0
    polls: int = 0
    waiting: list[NetworkEvent] = field(default_factory=list)

    def poll(self, timeout: float) -> list[NetworkEvent]:
        self.polls += 1
        self.network.now += timeout + (self.stop if self.polls == 2 else 0.0)
        self.network.deliver_due()
        for member in self.members:
            member.step(0.0)
        self.waiting += super().poll(0.0)
        return [self.waiting.pop(0)] if self.waiting else []


class World:
    """Members in memory, and a joiner that asks them."""

    def __init__(self) -> None:
        self.network = MemoryNetwork(Conditions(), random.Random(1), lambda frame: None)
        self.members: list[Driver] = []

    def clock(self) -> Instant:
        return Instant(self.network.now, UNIX + self.network.now)

    def member(
        self, identity: Identity, gate: Gate | None = None, manifest: bytes = CLUB.encoded, limits: Limits | None = None
    ) -> Address:
        endpoint = Endpoint(f"10.0.0.{len(self.members) + 1}", 1)
        limits = limits or Limits()
        setup = Setup(identity, CLUB.swarm, (endpoint,), limits, manifest=manifest, gate=gate or Rule())
        transport = MemoryTransport(self.network, identity.curve_key, str(endpoint), host=endpoint.host)
        core = Core(setup, Book((), limits), random.Random(1), self.clock())
        self.members.append(Driver(core, transport, self.clock, lambda item: None))
        return Address(endpoint, identity.curve_key)

    def join(
        self, *seeds: Address, grant: bytes = b"", stop: float = 0.0, manifest: bytes = CLUB.hash
    ) -> FetchedManifest:
        line = Caller(self.network, ME.curve_key, None, "10.0.0.99", members=self.members, stop=stop)
        return fetch_over(line, self.clock, ME, Invite("club", manifest, seeds), grant, timeout=30.0)


@pytest.fixture
def world() -> World:
    return World()


def gone(number: int, key: bytes) -> Address:
    return Address(Endpoint(f"192.168.0.{number}", 1), key)


def test_a_member_that_admits_us_gives_the_manifest_and_the_list_at_once(world: World) -> None:
    grant = make_shared_invite(FOUNDER, CLUB, 1, int((UNIX + 3600) * 1000)).ticket(CLUB.swarm, ME.public_key).encode()
    gate, listed = Gatekeeper(CLUB), make_revocations(FOUNDER, CLUB, [OTHERS[5].node_id], 1)
    gate.obey(listed.encoded)
    assert world.join(world.member(OTHERS[0], gate), grant=grant) == FetchedManifest(CLUB, listed.encoded)
    assert world.network.now < 1.0


def test_one_refusal_ends_nothing_and_all_of_them_do_at_once(world: World) -> None:
    refuser, other = world.member(OTHERS[0], Gatekeeper(CLUB)), world.member(OTHERS[1], Rule("invite_expired"))
    with structlog.testing.capture_logs() as logs, pytest.raises(JoinError) as refused:
        world.join(refuser, other)
    expected = {str(refuser.endpoint): "not_admitted", str(other.endpoint): "invite_expired"}
    assert refused.value.refusals == expected and world.network.now < 1.0
    assert {line["member"]: line["reason"] for line in logs if "others are asked" in line["event"]} == expected
    assert world.join(refuser, other, world.member(OTHERS[2])).manifest == CLUB


def test_a_join_waits_until_its_deadline_for_whoever_has_not_refused(world: World) -> None:
    refuser, silent = world.member(OTHERS[0], Rule("not_admitted")), gone(1, OTHERS[1].curve_key)
    world.network.firewalled.add(str(silent.endpoint))
    with pytest.raises(JoinError, match="not_admitted"):
        world.join(refuser, silent)
    assert 30.0 <= world.network.now < 30.5


def test_that_no_seed_answers_is_said_with_their_names() -> None:
    with pytest.raises(JoinError, match=r"no seed of the invite answered within 30 s \(tcp://192.168.0.1:1"):
        World().join(gone(1, OTHERS[0].curve_key))


@pytest.mark.parametrize("grants", [True, False])
def test_a_member_without_room_gives_the_manifest_to_whom_it_admits(world: World, grants: bool) -> None:
    full = world.member(OTHERS[0], Rule("" if grants else "not_admitted"), limits=FULL)
    if grants:
        assert world.join(full).manifest == CLUB and world.network.now < 1.0
    else:
        with pytest.raises(JoinError):
            world.join(full)


def test_a_member_without_room_and_manifest_names_others_who_are_asked(world: World) -> None:
    seed = world.member(OTHERS[0], manifest=b"", limits=FULL)
    other = world.member(OTHERS[1])
    seeds_core, others_core = (driver._core for driver in world.members)
    seeds_core.membership.book.add(others_core.membership.record, other.endpoint.host)
    assert world.join(seed).manifest == CLUB


def test_a_false_manifest_is_not_taken_and_said_if_there_is_no_other(world: World) -> None:
    liar = world.member(OTHERS[0], manifest=FALSE.encoded)
    with pytest.raises(JoinError) as refused:
        world.join(liar)
    assert refused.value.reason == FALSE_MANIFEST
    assert world.join(liar, world.member(OTHERS[1])).manifest == CLUB


def test_a_manifest_with_half_of_the_invites_hash_is_another_one(world: World) -> None:
    """That half is the swarm's id: of two manifests that agree in it, both of one founder's making, one is meant."""
    with pytest.raises(JoinError) as refused:
        world.join(world.member(OTHERS[0]), manifest=CLUB.hash[:SWARM_BYTES] + bytes(SWARM_BYTES))
    assert refused.value.reason == FALSE_MANIFEST


LIST = make_revocations(FOUNDER, CLUB, [], 1).encoded
ALTERED = LIST[:40] + bytes([LIST[40] ^ 1]) + LIST[41:]


@pytest.mark.parametrize("encoded", [b"no list", ALTERED, make_revocations(FOUNDER, FALSE, [], 1).encoded])
def test_a_list_that_the_owner_did_not_sign_is_left_out(world: World, encoded: bytes) -> None:
    assert world.join(world.member(OTHERS[0], Rule(revision=7, revocations=encoded))) == FetchedManifest(CLUB, b"")


@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_seed_is_found_at_the_last_of_its_addresses_though_the_others_swallow_what_comes(
    world: World, count: int
) -> None:
    seed = world.member(OTHERS[0])
    false = [gone(number, seed.key) for number in range(1, count + 1)]
    world.network.firewalled |= {str(address.endpoint) for address in false}
    assert world.join(*false, seed).manifest == CLUB
    assert world.network.now < 15.0


def test_a_joiner_that_was_stopped_holds_that_time_against_no_seed_and_not_against_its_deadline(world: World) -> None:
    assert world.join(world.member(OTHERS[0]), stop=100.0).manifest == CLUB

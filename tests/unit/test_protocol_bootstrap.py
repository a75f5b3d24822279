"""Asking for the manifest, driven by hand: whom the machine asks, with what, and when it gives up."""

import itertools
import random
from types import SimpleNamespace

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from protocol.bootstrap import FALSE_MANIFEST, MAX_FRAMES, MAX_NAMES, PATIENCE_S, Bootstrap
from protocol.config import Instant
from protocol.credentials.invite import Invite
from protocol.credentials.manifest import JoinPolicy, ManifestTask, SwarmManifest, make_manifest
from protocol.credentials.records import Address, Endpoint, make_record, open_record
from protocol.events import Arrived, Closed, Dial, HangUp, Link, Opened, SendFrame, Tick, TurnedAway
from protocol.identity import Identity
from protocol.joiner import drive
from protocol.limits.networks import scope_of
from protocol.notices import GRAYLISTED
from protocol.wire.envelope import HEADER_BYTES, SWARM_BYTES, Kind, seal
from protocol.wire.messages import Goodbye, Hello, Manifest, Peers
from protocol.wire.version import version_in
from tests.protocol_frames import frame_of, opened

UNIX = 1_700_000_000.0
FOUNDER, ME, *SEEDS = (Identity(bytes([n]) * 32) for n in range(40))
CLUB = make_manifest(FOUNDER, "club", 1, JoinPolicy.ALLOWLIST, [ManifestTask("t", 1, "ab", "{}")])
OTHER = make_manifest(FOUNDER, "other", 1, JoinPolicy.ALLOWLIST, [ManifestTask("t", 1, "ab", "{}")])


def at(seconds: float) -> Instant:
    return Instant(seconds, UNIX + seconds)


class Talk:
    """A machine that asks `seeds`, and what they say to it."""

    def __init__(self, *seeds: Identity, manifest: bytes = CLUB.hash) -> None:
        """A seed that is given twice has two addresses."""
        addresses = tuple(Address(Endpoint(f"s{n}", 1), seed.curve_key) for n, seed in enumerate(seeds))
        invite = Invite("club", manifest, addresses)
        self.machine = Bootstrap(ME, invite, b"grant", random.Random(1), at(0))
        self.now = 0.0
        self.actions: list[Dial | HangUp | SendFrame] = []
        self.sequence = 0

    def feed(self, event, now: float | None = None) -> list[Dial | HangUp | SendFrame]:
        self.now = self.now if now is None else now
        actions = self.machine.handle(event, at(self.now))
        self.actions += actions
        return actions

    def say(self, seed: Identity, kind: Kind, body: bytes) -> list[Dial | HangUp | SendFrame]:
        self.sequence += 1
        frame = frame_of(seed, CLUB.swarm, kind, self.sequence, int(UNIX * 1000), body)
        return self.feed(Arrived(link(seed), frame))

    def refuse(self, seed: Identity, reason: str) -> list[Dial | HangUp | SendFrame]:
        return self.say(seed, Kind.GOODBYE, Goodbye(reason).encode())

    def admit(self, seed: Identity) -> list[Dial | HangUp | SendFrame]:
        return self.say(seed, Kind.HELLO, Hello(record(seed).encoded).encode())

    def give(self, seed: Identity, manifest: SwarmManifest = CLUB) -> list[Dial | HangUp | SendFrame]:
        return self.say(seed, Kind.MANIFEST, Manifest(manifest.encoded).encode())

    def open(self, *seeds: Identity) -> None:
        self.feed(Tick())
        for seed in seeds:
            self.feed(Opened(link(seed)))

    @property
    def is_over(self) -> bool:
        return self.machine.is_over


def link(seed: Identity) -> Link:
    return Link(seed.curve_key, dialled=True)


def record(seed: Identity, host: str = "elsewhere"):
    return make_record(seed, CLUB.swarm, (Endpoint(host, 1),), 1, "", int((UNIX + 3600) * 1000))


def kinds(actions) -> list[tuple[Link, int]]:
    return [(a.link, opened(a.frame).kind) for a in actions if isinstance(a, SendFrame)]


def shown(actions) -> list[bytes]:
    frames = [opened(action.frame) for action in actions if isinstance(action, SendFrame)]
    hellos = [Hello.decode(frame.body) for frame in frames if frame.kind == Kind.HELLO]
    return [open_record(hello.record, CLUB.swarm, UNIX).grant for hello in hellos]


def test_a_member_that_admits_us_is_asked_for_the_manifest_and_that_is_all() -> None:
    talk = Talk(SEEDS[0])
    talk.open(SEEDS[0])
    assert shown(talk.actions) == [b"grant"] and not talk.is_over
    assert kinds(talk.admit(SEEDS[0])) == [(link(SEEDS[0]), Kind.ASK_MANIFEST)]
    assert talk.give(SEEDS[0]) == [HangUp(link(SEEDS[0]))]
    assert talk.is_over and talk.machine.manifest == CLUB


def test_one_refusal_ends_nothing_and_all_of_them_do() -> None:
    refuser, granter = SEEDS[:2]
    talk = Talk(refuser, granter)
    talk.open(refuser, granter)
    assert talk.refuse(refuser, "not_admitted") == [HangUp(link(refuser))]
    assert not talk.is_over
    talk.feed(Tick(), now=1.0)
    talk.admit(granter)
    talk.give(granter)
    assert talk.machine.manifest == CLUB
    talk = Talk(refuser, granter)
    talk.open(refuser, granter)
    talk.refuse(refuser, "not_admitted")
    talk.refuse(granter, "invite_expired")
    assert talk.is_over
    assert talk.machine.refusals == {"tcp://s0:1": "not_admitted", "tcp://s1:1": "invite_expired"}


def test_whoever_refused_is_asked_once_and_those_who_are_full_or_start_again_as_long_as_somebody_waits() -> None:
    refuser, full, starting = SEEDS[:3]
    talk = Talk(refuser, full, starting)
    talk.open(refuser, full)
    talk.refuse(refuser, "not_admitted")
    before = len(talk.actions)
    for second in range(20):
        dials = [action.address.key for action in talk.feed(Tick(), now=second) if isinstance(action, Dial)]
        if full.curve_key in dials:
            talk.feed(Opened(link(full)))
        talk.refuse(full, "full")
        talk.feed(Closed(link(starting)))
        assert not talk.is_over
    assert Dial(Address(Endpoint("s0", 1), refuser.curve_key)) not in talk.actions[before:]
    while Dial(Address(Endpoint("s2", 1), starting.curve_key)) not in talk.feed(Tick(), now=talk.now + 1):
        pass
    talk.feed(Opened(link(starting)))
    talk.admit(starting)
    talk.give(starting)
    assert talk.machine.manifest == CLUB


def test_who_refuses_our_key_in_the_handshake_is_named_and_may_admit_us_yet() -> None:
    talk = Talk(SEEDS[0])
    talk.feed(Tick())
    talk.feed(TurnedAway(link(SEEDS[0])))
    talk.feed(Closed(link(SEEDS[0])))
    assert talk.machine.refusals == {"tcp://s0:1": GRAYLISTED} and not talk.is_over
    assert Dial(Address(Endpoint("s0", 1), SEEDS[0].curve_key)) in talk.feed(Tick(), now=1.0)
    talk.feed(Opened(link(SEEDS[0])))
    talk.admit(SEEDS[0])
    talk.give(SEEDS[0])
    assert talk.machine.manifest == CLUB


def test_a_member_with_another_manifest_is_as_good_as_one_that_refuses() -> None:
    liar, honest = SEEDS[:2]
    talk = Talk(liar, honest)
    talk.open(liar, honest)
    talk.admit(liar)
    talk.give(liar, OTHER)
    assert talk.machine.manifest is None and talk.machine.refusals == {"tcp://s0:1": FALSE_MANIFEST}
    talk.admit(honest)
    talk.give(honest)
    assert talk.machine.manifest == CLUB


def test_a_manifest_with_half_of_the_invites_hash_is_another_one() -> None:
    """That half is the swarm's id: of two manifests that agree in it, both of one founder's making, one is meant."""
    talk = Talk(SEEDS[0], manifest=CLUB.hash[:SWARM_BYTES] + bytes(SWARM_BYTES))
    talk.open(SEEDS[0])
    talk.admit(SEEDS[0])
    talk.give(SEEDS[0])
    assert talk.machine.manifest is None and talk.machine.refusals == {"tcp://s0:1": FALSE_MANIFEST}


def test_a_member_without_room_names_others_who_are_asked_and_is_asked_again_later() -> None:
    full, *others = SEEDS
    talk = Talk(full)
    talk.open(full)
    talk.say(full, Kind.PEERS, Peers(tuple(record(other).encoded for other in others)).encode())
    talk.refuse(full, "full")
    talk.feed(Closed(link(full)))  # it had no manifest to give either
    assert not talk.is_over
    dials = [action.address.key for action in talk.feed(Tick()) if isinstance(action, Dial)]
    assert dials == [other.curve_key for other in others[: MAX_NAMES - 1]]
    again = [action.address.key for action in talk.feed(Tick(), now=1.0) if isinstance(action, Dial)]
    assert again == [full.curve_key]


def test_a_member_without_room_is_asked_for_the_manifest_before_it_hangs_up() -> None:
    talk = Talk(SEEDS[0])
    talk.open(SEEDS[0])
    assert kinds(talk.refuse(SEEDS[0], "full")) == [(link(SEEDS[0]), Kind.ASK_MANIFEST)]
    talk.give(SEEDS[0])
    assert talk.machine.manifest == CLUB


def names(*told: Identity) -> bytes:
    return Peers(tuple(record(seed).encoded for seed in told)).encode()


def test_who_fills_all_places_with_names_and_those_names_too_leaves_each_other_seed_its_share() -> None:
    hostile, full, third, *others = SEEDS
    theirs, ours = others[:24], others[24:33]
    talk = Talk(hostile, full, third)
    talk.open(hostile, full)
    talk.say(hostile, Kind.PEERS, names(*theirs[:20]))
    talk.open(*theirs[:3])
    assert len(talk.machine._members) == MAX_NAMES
    ended = talk.say(full, Kind.PEERS, names(*ours))
    asked = {action.address.key for action in talk.feed(Tick()) if isinstance(action, Dial)}
    share = (MAX_NAMES - 3) // 2  # the third seed names nobody
    assert asked == {our.curve_key for our in ours[:share]}
    # Those of whom least had come made room, the last first.
    assert ended == [HangUp(link(their)) for their in reversed(theirs[MAX_NAMES - 3 - share : MAX_NAMES - 3])]
    # Neither the hostile one nor whom it named takes anything back by more names.
    assert talk.say(hostile, Kind.PEERS, names(*theirs[16:])) == []
    assert talk.say(theirs[0], Kind.PEERS, names(*theirs[16:])) == []
    assert not [action for action in talk.feed(Tick()) if isinstance(action, Dial)]
    talk.open(ours[0])
    talk.admit(ours[0])
    talk.give(ours[0])
    assert talk.machine.manifest == CLUB


def test_of_those_whom_a_seed_named_one_that_refused_makes_room_first_and_one_that_admits_us_last() -> None:
    hostile, full, *others = SEEDS
    talk = Talk(hostile, full)
    talk.open(hostile, full)
    theirs = others[: MAX_NAMES - 2]
    talk.say(hostile, Kind.PEERS, names(*theirs))
    talk.open(*theirs)
    talk.refuse(theirs[0], "not_admitted")
    for their in theirs[2:]:
        talk.admit(their)
    for gone, told in zip((0, 1, -1), others[len(theirs) :], strict=False):
        told_and_more = Peers((record(told).encoded, b"no record")).encode()
        assert talk.say(full, Kind.PEERS, told_and_more) == [HangUp(link(theirs[gone]))]


def elsewhere(signer: Identity, named: Identity) -> bytes:
    """A record that holds: its signer says that another's key is at an address of its own."""
    key = SimpleNamespace(
        public_key=signer.public_key, node_id=signer.node_id, sign=signer.sign, curve_key=named.curve_key
    )
    return record(key, "false").encoded


def dialled(actions) -> list[tuple[bytes, str]]:
    return [(dial.address.key, dial.address.endpoint.host) for dial in actions if isinstance(dial, Dial)]


@pytest.mark.parametrize("count", [7, 14])
def test_whom_a_hostile_seed_names_at_false_addresses_is_dialled_where_another_seed_names_it(count: int) -> None:
    hostile, full, *others = SEEDS
    honest, throwaway = others[:count], others[-1]
    talk = Talk(hostile, full)
    talk.open(hostile, full)
    talk.say(hostile, Kind.PEERS, Peers(tuple(elsewhere(throwaway, seed) for seed in honest)).encode())
    assert dialled(talk.feed(Tick())) == [(peer.curve_key, "false") for peer in honest]
    talk.say(full, Kind.PEERS, names(*honest))
    asked = []
    while talk.now < PATIENCE_S:
        asked += dialled(talk.feed(Tick(), now=talk.now + 0.5))
    share = (MAX_NAMES - 2) // 2
    assert {key for key, host in asked if host == "elsewhere"} == {peer.curve_key for peer in honest[:share]}
    talk.feed(Opened(link(honest[0])))
    talk.admit(honest[0])
    talk.give(honest[0])
    assert talk.machine.manifest == CLUB


def test_a_key_is_tried_at_one_address_for_each_seed_in_turn_and_a_seed_only_where_the_invite_says() -> None:
    hostile, full, third, one = SEEDS[:4]
    talk = Talk(hostile, full, third)
    talk.open(hostile, full, third)
    for named in (one, full):
        talk.say(hostile, Kind.PEERS, Peers((elsewhere(third, named),)).encode())
    talk.feed(Tick())
    talk.say(hostile, Kind.PEERS, Peers((record(one, "more").encoded,)).encode())
    talk.say(full, Kind.PEERS, names(one))
    talk.say(third, Kind.PEERS, names(one))  # at the same address: no more of them
    talk.feed(Closed(link(full)))
    talk.actions.clear()
    while talk.now < 2.5 * PATIENCE_S:
        talk.feed(Tick(), now=talk.now + 0.25)
    asked = dialled(talk.actions)
    assert [host for key, host in asked if key == one.curve_key] == ["elsewhere", "false", "elsewhere"]
    assert {host for key, host in asked if key == full.curve_key} == {"s1"}


def test_a_seed_of_which_the_invite_has_many_addresses_is_tried_at_all_and_takes_no_places_of_others() -> None:
    twice, *full = SEEDS[:4]
    talk = Talk(twice, *full, *[twice] * 4)
    talk.open(*full)
    told = iter(SEEDS[4:])
    for seed in full:  # each its share, with one place more than there is room for
        talk.say(seed, Kind.PEERS, names(*itertools.islice(told, MAX_NAMES // 4)))
    while talk.now < PATIENCE_S:
        talk.feed(Tick(), now=talk.now + 0.25)
    asked = dialled(talk.actions)
    assert [host for key, host in asked if key == twice.curve_key] == ["s0", "s4", "s5", "s6", "s7"]
    assert len({key for key, host in asked if host == "elsewhere"}) == MAX_NAMES - 4


@pytest.mark.parametrize("count", [1, 2, 8])
def test_a_seed_with_many_addresses_is_met_over_a_line_on_which_a_link_takes_long_to_open(count: int) -> None:
    talk, opens_s = Talk(*SEEDS[:1] * count), 4.0
    dialled_at = None
    while not kinds(talk.actions):
        actions = talk.feed(Tick(), now=talk.now + 0.25)
        if dialled_at is not None and talk.now >= dialled_at + opens_s:
            talk.feed(Opened(link(SEEDS[0])))
        if any(isinstance(action, HangUp) for action in actions):
            dialled_at = None
        dialled_at = talk.now if dialled(actions) else dialled_at
        assert talk.now < 40


def test_a_name_that_makes_room_while_it_is_dialled_makes_way_for_the_next_of_its_key() -> None:
    hostile, full, *others = SEEDS
    last = others[MAX_NAMES - 4]
    talk = Talk(hostile, full)
    talk.open(hostile, full)
    theirs = [*others[: MAX_NAMES - 4], last]
    talk.say(hostile, Kind.PEERS, Peers(tuple(elsewhere(others[-1], their) for their in theirs)).encode())
    talk.feed(Tick())
    assert talk.say(full, Kind.PEERS, names(last)) == []
    assert talk.say(full, Kind.PEERS, names(others[-2])) == [HangUp(link(last))]
    assert dialled(talk.feed(Tick())) == [(last.curve_key, "elsewhere"), (others[-2].curve_key, "elsewhere")]


@pytest.mark.parametrize(
    ("teller", "reached"),
    [
        ("198.41.0.4", ["93.184.216.34", "a-name"]),
        ("192.168.0.9", ["93.184.216.34", "192.168.0.7", "a-name"]),
        ("127.0.0.1", ["93.184.216.34", "192.168.0.7", "127.0.0.1", "a-name"]),
        ("", ["93.184.216.34", "a-name"]),
    ],
)
def test_a_member_makes_no_joiner_connect_into_a_network_that_it_is_not_in_itself(
    teller: str, reached: list[str]
) -> None:
    full, *others = SEEDS
    talk = Talk(full)
    talk.feed(Tick())
    talk.feed(Opened(link(full), teller))
    hosts = ["93.184.216.34", "192.168.0.7", "127.0.0.1", "a-name"]
    told = [record(other, host).encoded for other, host in zip(others, hosts, strict=False)]
    talk.say(full, Kind.PEERS, Peers(tuple(told)).encode())
    dials = [action for action in talk.feed(Tick()) if isinstance(action, Dial)]
    assert [dial.address.endpoint.host for dial in dials] == reached
    assert {dial.scope for dial in dials} == {scope_of(teller)}  # where a name is looked up, it may mean anything


def test_a_link_that_fails_or_falls_silent_is_dialled_again_after_a_growing_pause() -> None:
    talk = Talk(SEEDS[0])
    dials, now = [], 0.0
    while now < 60.0:
        for action in talk.feed(Tick(), now):
            if isinstance(action, Dial):
                dials.append(now)
                talk.feed(Closed(link(SEEDS[0])))
        now += 0.1
    pauses = [after - before for before, after in itertools.pairwise(dials)]
    assert pauses[0] < 1.0 and max(pauses) < 8.2 and len(dials) < 20
    silent = Talk(SEEDS[0])
    silent.open(SEEDS[0])
    assert HangUp(link(SEEDS[0])) in silent.feed(Tick(), now=PATIENCE_S)


def test_a_member_that_talks_without_end_is_hung_up_on() -> None:
    talk = Talk(SEEDS[0])
    talk.open(SEEDS[0])
    for _ in range(MAX_FRAMES):
        assert talk.say(SEEDS[0], Kind.PING, b"x") == []
    assert HangUp(link(SEEDS[0])) in talk.say(SEEDS[0], Kind.PING, b"x")
    assert talk.is_over


events = st.one_of(
    st.just(Tick()),
    st.sampled_from(SEEDS[:3]).map(lambda seed: Opened(link(seed))),
    st.sampled_from(SEEDS[:3]).map(lambda seed: Closed(link(seed))),
    st.tuples(st.sampled_from(SEEDS[:3]), st.binary(max_size=300)).map(lambda pair: Arrived(link(pair[0]), pair[1])),
    st.tuples(st.sampled_from(SEEDS[:3]), st.sampled_from(list(Kind)), st.binary(max_size=60)).map(
        lambda said: Arrived(link(said[0]), frame_of(said[0], CLUB.swarm, said[1], 1, int(UNIX * 1000), said[2]))
    ),
)


@given(st.lists(st.tuples(events, st.floats(0, 3)), max_size=40))
def test_no_sequence_of_events_raises_or_gives_a_manifest_that_nobody_sent(sequence) -> None:
    talk = Talk(*SEEDS[:2])
    for event, wait in sequence:
        talk.feed(event, talk.now + wait)
    assert talk.machine.manifest is None
    assert len(talk.machine._members) <= MAX_NAMES


def test_a_member_of_another_version_is_told_ours_and_named() -> None:
    old, later = SEEDS[:2]
    talk = Talk(old, later)
    talk.open(old, later)
    answer = seal(old, CLUB.swarm, Kind.HELLO, 1, int(UNIX * 1000), Hello(record(old).encoded).encode())
    goodbye, end = talk.feed(Arrived(link(old), answer[:HEADER_BYTES] + b"\x02\x00" + answer[HEADER_BYTES + 2 :]))
    assert end == HangUp(link(old)) and b"other_version_4_0" in goodbye.frame
    assert talk.refuse(later, "other_version_4_1") == [HangUp(link(later))]
    assert list(map(version_in, talk.machine.refusals.values())) == ["2.0", "4.1"] and talk.is_over


@pytest.mark.parametrize(
    "reason", ["not_admitted", "other_version", "other_version_1", "x_other_version_1_0", "other_version_1_0_"]
)
def test_no_other_goodbye_names_a_version(reason: str) -> None:
    assert version_in(reason) == ""


class Answering:
    """A transport to one seed that answers at once; its second `poll` brings nothing if it lasts for a long `stop`."""

    def __init__(self, seed: Identity, *, stop: float = 0.1, refuses: bool = False) -> None:
        self.seed = seed
        self.time = 0.0
        self.waiting: list[Opened | Arrived] = []
        self.polls = iter([0.1, stop])
        self.refuses = refuses
        self.hung_up = 0

    def clock(self) -> Instant:
        return at(self.time)

    def dial(self, address: Address, scope: object) -> None:
        if address.key == self.seed.curve_key:
            self.waiting.append(Opened(link(self.seed)))

    def send(self, to: Link, frame: bytes) -> None:
        if self.refuses:
            self.answer(Kind.GOODBYE, Goodbye("not_admitted").encode())
        elif opened(frame).kind == Kind.HELLO:
            self.answer(Kind.HELLO, Hello(record(self.seed).encoded).encode())
        else:
            self.answer(Kind.MANIFEST, Manifest(CLUB.encoded).encode())

    def answer(self, kind: Kind, body: bytes) -> None:
        self.waiting.append(Arrived(link(self.seed), frame_of(self.seed, CLUB.swarm, kind, 1, int(UNIX * 1000), body)))

    def hang_up(self, to: Link) -> None:
        self.hung_up += 1

    def poll(self, timeout: float) -> list[Opened | Arrived]:
        passed = next(self.polls, 0.1)
        self.time += passed
        if passed > 1.0:
            return []
        arrived, self.waiting = self.waiting, []
        return arrived


def test_a_joiner_that_was_stopped_holds_that_time_against_no_seed_and_not_against_its_deadline() -> None:
    network = Answering(SEEDS[0], stop=25.0)
    machine = Talk(SEEDS[0]).machine
    drive(machine, network, network.clock, timeout=20.0)
    assert machine.manifest == CLUB
    assert network.hung_up == 1  # when it had what it came for


def test_a_join_waits_until_its_deadline_for_whoever_has_not_refused_and_says_at_once_who_has() -> None:
    network = Answering(SEEDS[0], refuses=True)
    talk = Talk(*SEEDS[:2])  # the other one is silent
    with structlog.testing.capture_logs() as logs:
        drive(talk.machine, network, network.clock, timeout=20.0)
    assert talk.machine.refusals == {"tcp://s0:1": "not_admitted"}
    assert [(line["member"], line["reason"]) for line in logs] == [("tcp://s0:1", "not_admitted")]
    assert 20.0 <= network.time < 20.5
    alone = Answering(SEEDS[0], refuses=True)
    with structlog.testing.capture_logs() as logs:
        drive(Talk(SEEDS[0]).machine, alone, alone.clock, timeout=20.0)
    assert alone.time < 1.0 and logs == []  # the error says it

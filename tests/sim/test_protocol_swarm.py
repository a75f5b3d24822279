"""Swarms of the real cores on a virtual clock and a network that delays, loses and kills."""

import pytest

from protocol.credentials.records import RECORD_LIFE_S
from protocol.events import ItemVerdict
from protocol.limits.timing import LAN, WAN
from protocol.membership.address_book import BUSY_S
from protocol.refusals import CLOCK_AHEAD, CLOCK_BEHIND
from protocol.simulator import SimulatedIdentity, Simulation
from protocol.simulator.overlay import mutual, unreached
from protocol.transport.memory import Conditions, NetworkCut
from protocol.wire.envelope import Kind

LARGE = bytes(200_000)


def spread(simulation: Simulation, *sizes: int) -> dict[bytes, int]:
    """Let every node publish one item of each size (bytes); return the ids and whose they are."""
    return {
        simulation.publish(name, f"{size} bytes of {name} at {simulation.network.now}".encode().ljust(size)): name
        for size in sizes
        for name in simulation.nodes
    }


def missing(simulation: Simulation, items: dict[bytes, int]) -> dict[int, int]:
    """Count, for each node that lacks any, the others' items that it lacks."""
    lacking = {
        name: sum(signer != name and item not in node.ids for item, signer in items.items())
        for name, node in simulation.nodes.items()
    }
    return {name: count for name, count in lacking.items() if count}


def run_until_spread(simulation: Simulation, items: dict[bytes, int], seconds: int) -> None:
    for _ in range(seconds):
        simulation.run(1.0)
        if not missing(simulation, items):
            return
    raise AssertionError(f"after {seconds} s some nodes still lack items: {missing(simulation, items)}")


def test_thirty_nodes_from_one_seed_know_each_other_and_share_everything_over_few_links() -> None:
    simulation = Simulation(seed=1)
    simulation.start_many(30)
    simulation.run(60.0)
    assert all(8 <= len(node.core.membership.peers) <= 16 for node in simulation.nodes.values())
    run_until_spread(simulation, spread(simulation, 1000), 4)
    simulation.run(3 * LAN.exchange_interval)  # nobody is known by the word of one, and whom one asks is drawn
    assert {len(node.core.membership.book) for node in simulation.nodes.values()} == {29}
    assert not any(node.core.scores.rejected for node in simulation.nodes.values())


def test_a_swarm_that_fits_into_its_links_is_linked_wholly_and_has_everything_from_its_signers() -> None:
    simulation = Simulation(seed=1)
    simulation.start_many(17)
    simulation.run(2 * BUSY_S)
    assert {len(node.core.membership.peers) for node in simulation.nodes.values()} == {16}
    asked = simulation.frames_sent[Kind.WANT]
    for _ in range(5):
        run_until_spread(simulation, spread(simulation, 1000), 1)
    assert simulation.frames_sent[Kind.WANT] - asked == 5 * 17 * 16, "each asks for each of the others' items once"
    assert {node.core.items_sent for node in simulation.nodes.values()} == {5 * 16}


@pytest.mark.parametrize(("kbytes", "size"), [(0, 1_000), (32, 100_000), (32, 300_000)])
@pytest.mark.parametrize("waits", [True, False])
def test_a_node_that_lives_for_one_question_leaves_its_answer_with_others(kbytes: int, size: int, waits: bool) -> None:
    conditions = Conditions(line=1000.0 * kbytes) if kbytes else Conditions()
    simulation, answers = Simulation(seed=1, conditions=conditions), dict[bytes, int]()
    simulation.start_many(3)
    simulation.run(20.0)
    for name in range(10, 14):
        node = simulation.start(name, dialable=False)
        simulation.run(1.0)
        answers |= {simulation.publish(name, b"the answer of %d".ljust(size) % name): name}
        for _ in range(300 if waits else 0):
            simulation.run(0.1)
            if not node.core.gossip.hand_over(simulation.clock()).untaken:
                break
        simulation.kill(name)
    simulation.run(120.0)
    assert bool(missing(simulation, answers)) is not waits


@pytest.mark.slow
def test_links_last_in_a_small_swarm_some_of_whose_nodes_cannot_be_dialled() -> None:
    simulation = Simulation(seed=1, identity=SimulatedIdentity)
    for name in range(22):
        simulation.start(name, dialable=name < 14)
    simulation.run(600.0)
    before = [set(node.core.membership.peers) for node in simulation.nodes.values()]
    simulation.run(120.0)
    after = [set(node.core.membership.peers) for node in simulation.nodes.values()]
    kept = sum(len(earlier & other) for earlier, other in zip(before, after, strict=True))
    assert kept > 0.9 * sum(map(len, before))
    assert all(len(peers) >= 13 for peers in after[:14]) and all(after)


def test_every_item_is_delivered_exactly_once_and_a_large_one_crosses_each_link_once() -> None:
    simulation = Simulation(seed=2)
    simulation.start_many(8)
    simulation.run(5.0)
    simulation.publish(0, LARGE)
    simulation.run(60.0)
    assert all(len(node.received) == 1 for name, node in simulation.nodes.items() if name)
    assert sum(node.core.items_sent for node in simulation.nodes.values()) == 7
    assert not any(node.core.duplicates for node in simulation.nodes.values())


@pytest.mark.parametrize("seed", [1, 2])
def test_a_tenth_of_all_frames_lost_delays_but_prevents_nothing(seed: int) -> None:
    simulation = Simulation(seed, Conditions(loss=0.1))
    simulation.start_many(12)
    simulation.run(20.0)
    run_until_spread(simulation, spread(simulation, 1000, 70_000), 60)


def test_at_high_loss_nobody_takes_a_peer_for_one_of_another_version() -> None:
    simulation = Simulation(13, Conditions(loss=0.4), identity=SimulatedIdentity)
    simulation.start_many(6)
    simulation.run(60.0)
    for node in simulation.nodes.values():
        assert len(node.core.membership.peers) >= 1
        assert not {"other_version", "forged"} & set(node.core.scores.rejected)


def test_two_nodes_alone_recover_lost_pushes() -> None:
    simulation = Simulation(3, Conditions(loss=0.1))
    simulation.start_many(2)
    simulation.run(30.0)
    for number in range(20):
        simulation.publish(0, b"item %d" % number)
    simulation.run(1.0)
    assert len(simulation.nodes[1].received) < 20
    simulation.run(60.0)
    assert len(simulation.nodes[1].received) == 20


def test_a_killed_node_comes_back_at_a_new_port_without_a_seed_and_catches_up() -> None:
    simulation = Simulation(seed=4)
    simulation.start_many(8)
    simulation.run(5.0)
    known = simulation.kill(3)
    missed = {simulation.publish(0, b"while you were away"), simulation.publish(1, LARGE)}
    simulation.run(10.0)
    back = simulation.start(3, known=known)
    simulation.run(10.0)
    assert missed <= back.ids
    assert len(back.core.membership.peers) == 7
    fresh = simulation.publish(3, b"here again")
    simulation.run(1.0)
    assert all(fresh in node.ids for name, node in simulation.nodes.items() if name != 3)


def test_the_seed_may_die_once_the_others_have_met() -> None:
    simulation = Simulation(seed=5)
    simulation.start_many(6)
    simulation.run(5.0)
    simulation.kill(0)
    simulation.run(5.0)
    assert {len(node.core.membership.peers) for node in simulation.nodes.values()} == {5 - 1}
    run_until_spread(simulation, spread(simulation, 1000), 2)


def test_nodes_that_cannot_be_dialled_give_and_get() -> None:
    simulation = Simulation(seed=6)
    simulation.start_many(3)
    for name in (3, 4):
        simulation.start(name, dialable=False)
    simulation.run(LAN.exchange_interval / 2)
    assert len(simulation.nodes[3].core.membership.peers) == 3  # all but the other that cannot be dialled
    simulation.start(5)
    simulation.run(2 * LAN.exchange_interval)
    assert len(simulation.nodes[3].core.membership.peers) == 4  # told of the newcomer, which could not find it
    run_until_spread(simulation, spread(simulation, 1000, 100_000), 10)


@pytest.mark.parametrize("seed", range(20))
def test_a_node_that_joined_by_one_seed_knows_those_that_came_later_at_once(seed: int) -> None:
    """If it asked at once, before the others came, and then half a minute later, one in ten stayed alone for good."""
    simulation = Simulation(seed, timing=WAN, identity=SimulatedIdentity)
    for name in range(4):
        simulation.start(name, dialable=name != 1)
        simulation.run(3.0)
    simulation.run(0.5)
    simulation.kill(0)
    simulation.run(WAN.death_bound)
    assert {len(node.core.membership.peers) for node in simulation.nodes.values()} == {2}


def test_everybody_restarting_in_turn_leaves_a_whole_mesh() -> None:
    simulation = Simulation(seed=7)
    simulation.start_many(6)
    simulation.run(5.0)
    for name in range(6):
        known = simulation.kill(name)
        simulation.run(2.0)
        simulation.start(name, known=known)
        simulation.run(5.0)
    simulation.run(60.0)
    assert {len(node.core.membership.peers) for node in simulation.nodes.values()} == {5}
    run_until_spread(simulation, spread(simulation, 1000), 2)


def test_a_liar_ends_up_refused_by_those_it_lied_to() -> None:
    simulation = Simulation(seed=8)
    simulation.start_many(4)
    simulation.run(5.0)
    for number in range(25):
        lie = simulation.publish(3, b"lie %d" % number)
        simulation.run(0.5)
        for name in range(3):
            if lie in simulation.nodes[name].ids:
                simulation.judge(name, lie, ItemVerdict.REJECT, "lie")
    simulation.run(1.0)
    for name in range(3):
        rejected = simulation.nodes[name].core.scores.rejected
        assert rejected["lie"] == 21 and rejected["graylisted"] > 0
        assert simulation.nodes[3].identity.node_id not in simulation.nodes[name].core.membership.peers
        assert len(simulation.nodes[name].core.membership.peers) == 2


def test_the_same_seed_gives_the_same_trace_and_another_seed_another() -> None:
    def trace(seed: int) -> str:
        simulation = Simulation(seed, Conditions(loss=0.1))
        simulation.start_many(5)
        simulation.run(5.0)
        spread(simulation, 1000)
        known = simulation.kill(2)
        simulation.run(5.0)
        simulation.start(2, known=known)
        simulation.run(10.0)
        return simulation.trace_hash

    assert trace(1) == trace(1) != trace(2)


@pytest.mark.parametrize(
    "life", [1200.0, pytest.param(RECORD_LIFE_S, marks=[pytest.mark.long, pytest.mark.timeout(900)])]
)
def test_two_halves_that_were_apart_for_longer_than_a_record_lives_become_one_swarm_within_minutes(
    life: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protocol.membership.directory.RECORD_LIFE_S", life)
    simulation = Simulation(9, timing=WAN, identity=SimulatedIdentity)
    simulation.start_many(8)
    simulation.run(5.0)
    for name in range(4, 8):  # everybody's seed is in the first half, and the second comes from its files alone
        known = simulation.kill(name)
        simulation.run(1.0)
        simulation.start(name, known=known)
    simulation.run(20.0)
    nodes = list(simulation.nodes.values())
    halves = nodes[:4], nodes[4:]
    cut = NetworkCut({node.transport.key: 1 for node in halves[1]}, frozenset({(0, 1), (1, 0)}))
    simulation.network.split(cut)
    simulation.run(life * 1.1)
    for half in halves:
        names = {node.identity.node_id for node in half}
        assert all({record.node_id for record in node.core.membership.book.records()} <= names for node in half)
    simulation.network.heal()

    def cut_off() -> int:
        names = {node.identity.node_id: node.name for node in nodes}
        return unreached(mutual({node.name: [names[peer] for peer in node.core.membership.peers] for node in nodes}))

    waited = 0
    while cut_off() and waited < 300:
        simulation.run(10.0)
        waited += 10
    assert waited < 300
    run_until_spread(simulation, spread(simulation, 1000), 10)


def test_a_node_that_restarts_after_all_records_in_its_file_have_expired_finds_its_swarm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("protocol.membership.directory.RECORD_LIFE_S", 100.0)
    simulation = Simulation(10, timing=WAN, identity=SimulatedIdentity)
    simulation.start_many(2)
    simulation.run(5.0)
    known = simulation.kill(1)
    simulation.run(150.0)
    back = simulation.start(1, known=known)
    assert len(back.core.membership.book) == 0
    simulation.run(120.0)
    assert back.core.membership.peers == [simulation.nodes[0].identity.node_id]


def test_two_nodes_of_one_identity_both_notice_and_a_restart_is_none() -> None:
    simulation = Simulation(11, identity=SimulatedIdentity)
    simulation.start_many(4)
    simulation.run(5.0)
    known = simulation.kill(3)
    simulation.run(1.0)
    first = simulation.start(3, known=known)
    simulation.run(30.0)
    assert all(node.core.membership.directory.twin is None for node in simulation.nodes.values())
    second = simulation.start(4, twin_of=3)
    simulation.run(60.0)
    for earlier, other in ((first, second), (second, first)):
        twin = earlier.core.membership.directory.twin
        assert twin is not None and twin.addresses == (other.address,)
    assert all(simulation.nodes[name].core.membership.directory.twin is None for name in range(3))


def test_a_clock_that_was_set_back_before_a_restart_is_no_twin() -> None:
    simulation = Simulation(12, identity=SimulatedIdentity)
    simulation.start_many(4)
    for skew in (300.0, 200.0, 100.0, 0.0):
        simulation.kill(3)
        simulation.start(3, skew=skew)
        simulation.run(20.0)
    assert simulation.nodes[3].core.membership.directory.twin is None
    assert len(simulation.nodes[3].core.membership.peers) == 3


@pytest.mark.parametrize("skew", [-1200.0, 7200.0])
def test_a_node_whose_clock_is_off_knows_by_how_much_and_the_others_know_that_theirs_are_right(skew: float) -> None:
    simulation = Simulation(1, timing=WAN, identity=SimulatedIdentity)
    for name in range(5):
        simulation.start(name, skew=skew if name == 4 else 0.0)
    simulation.run(30.0)
    off = {
        name: node.core.clocks.difference(simulation.clock(skew * (name == 4)))
        for name, node in simulation.nodes.items()
    }
    difference = off.pop(4)
    assert difference is not None and difference.peers == 4 and difference.ahead == pytest.approx(-skew, abs=1.0)
    assert [*off.values()] == [None] * 4


@pytest.mark.parametrize(("days", "reason"), [(-2, CLOCK_BEHIND), (8, CLOCK_AHEAD)])
@pytest.mark.parametrize("dialable", [False, True])
def test_a_node_whose_clock_is_off_by_days_is_told_so_and_so_is_whom_it_calls(
    days: int, reason: str, dialable: bool
) -> None:
    """Its hello was dropped in silence: its log said that its seeds were down, and theirs nothing."""
    simulation = Simulation(1, timing=WAN, identity=SimulatedIdentity)
    simulation.start(0)
    lost = simulation.start(1, skew=86400.0 * days, dialable=dialable)
    simulation.run(60.0)
    seed = simulation.nodes[0].core
    assert lost.core.membership.refusals.latest == reason and lost.core.membership.peers == []
    assert seed.membership.refusals.counts.keys() == {reason}
    assert seed.scores.score(lost.identity.node_id, simulation.clock()) == 0.0
    assert seed.clocks.difference(simulation.clock()) is None

"""What can happen to a swarm, and what must hold nevertheless: the simulator's scenarios at affordable sizes."""

import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import structlog

from protocol.limits.limits import Limits
from protocol.limits.timing import LOCAL, WAN
from protocol.simulator import SimulatedIdentity, Simulation
from protocol.simulator.__main__ import main
from protocol.simulator.matrices import CONDITIONS, FAMILIES, MATRICES, ArrivalRow, Crowd, admittance, arrival
from protocol.simulator.scenarios import MAX_HOSTILE_LINKS, SCENARIOS, Invariant, hostile_share, judge, suffer
from protocol.simulator.trial import LIMITS, SwarmPlan, SwarmTrial
from protocol.transport.memory import Conditions

ROOT = Path(__file__).parents[2]
PLAIN = ("steady", "kill", "partition", "rolling-restarts")  # the rest, and twice the nodes, are slow tests


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    yield
    structlog.reset_defaults()  # the command logs to the standard error of its own test


def failures(scenario: str, plan: SwarmPlan) -> list[str]:
    """Put a swarm through a scenario; return the invariants that do not hold."""
    chosen = SCENARIOS[scenario]
    return [str(check) for check in judge(SwarmTrial(chosen.adapt(plan), print), chosen) if not check.holds]


@pytest.mark.long
@pytest.mark.timeout(600)  # half a minute on a core of its own
def test_a_thousand_nodes_and_then_seven_hundred() -> None:
    # A small book keeps it affordable: every node fills its own when it joins.
    plan = SwarmPlan(
        nodes=1000,
        seed=1,
        faults_s=5.0,
        timing=WAN,
        limits=replace(LIMITS, max_known_peers=96),
        publishers=20,
        items_during_faults=2,
    )
    trial = SwarmTrial(plan, print)
    checks = [*judge(trial, SCENARIOS["steady"]), *suffer(trial, SCENARIOS["kill"])]
    assert [str(check) for check in checks if not check.holds] == []
    assert len(trial.simulation.nodes) == 701


@pytest.mark.parametrize("scenario", PLAIN)
def test_thirty_nodes(scenario: str) -> None:
    assert failures(scenario, SwarmPlan(nodes=30, seed=1, faults_s=20.0)) == []


@pytest.mark.slow
@pytest.mark.parametrize("scenario", sorted(set(SCENARIOS) - {"hostile", "hostile-callers"}))
def test_sixty_nodes(scenario: str) -> None:
    assert failures(scenario, SwarmPlan(nodes=60, seed=2, faults_s=20.0)) == []


@pytest.mark.slow
@pytest.mark.timeout(600)  # a minute on a core of its own
def test_a_fifth_of_sixty_nodes_is_hostile() -> None:
    """On lines of 4 Mbit/s: what the honest publish is everywhere at 80 % of the rate of swarms without attackers.

    Of four swarms together: how long the very last copy takes is one liar more or less on its way, in a single swarm
    from 0.78 to 1.00 of the time without them (twelve seeds, 0.91 on average).
    """
    took = {"steady": 0.0, "hostile": 0.0}
    for seed in range(1, 5):
        plan = SwarmPlan(nodes=60, seed=seed, faults_s=20.0, publishers=40, conditions=Conditions(line=500_000.0))
        for name in took:
            trial = SwarmTrial(SCENARIOS[name].adapt(plan), print)
            assert [str(check) for check in judge(trial, SCENARIOS[name]) if not check.holds] == []
            assert trial.spread_s is not None
            took[name] += trial.spread_s
    assert took["steady"] >= 0.8 * took["hostile"], took


@pytest.mark.slow
@pytest.mark.timeout(600)  # a minute on a core of its own
def test_nobody_is_cut_off_by_attackers_who_call_everybody_for_their_places() -> None:
    """On average at most two thirds of newcomers' links are hostile; in one swarm of twenty more are (0.51 to 0.69).

    Under seeds 1 and 6 two nodes were cut off when callers came first.
    """
    failed, shares = [], []
    for seed in range(1, 7):
        trial = SwarmTrial(SCENARIOS["hostile-callers"].adapt(SwarmPlan(60, seed, faults_s=30.0, publishers=20)), print)
        checks = judge(trial, SCENARIOS["hostile-callers"])
        failed += [str(check) for check in checks if not check.holds and "lead to hostile nodes" not in check.says]
        shares.append(hostile_share(trial)[0])
    assert failed == []
    assert statistics.mean(shares) <= MAX_HOSTILE_LINKS, shares


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_simulated_node_takes_as_little_memory_as_a_swarm_of_ten_thousand_leaves_it() -> None:
    """8 GiB are 838 KiB for each of 10,000 with books of 512. Of 300, who know of each other, one took 311 KiB."""

    def peak_mib(nodes: int) -> int:
        arguments = ["--nodes", str(nodes), "--timing", "wan", "--minutes", "0.5", "--publishers", "20"]
        command = [sys.executable, "-m", "protocol.simulator", *arguments]
        ran = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        (found,) = re.findall(r"s of CPU, (\d+) MiB", ran.stderr)
        return int(found)

    assert (peak_mib(300) - peak_mib(50)) / 250 < 0.4


@pytest.mark.slow
def test_who_eclipses_newcomers_may_call_all_others_too() -> None:
    callers: dict[str, int] = {}
    for name in ("hostile", "hostile-callers"):
        plan = SCENARIOS[name].adapt(SwarmPlan(nodes=24, seed=1, faults_s=5.0))
        trial = SwarmTrial(plan, print)
        trial.settle(20.0)
        SCENARIOS[name].faults(trial, plan.faults_s)
        voices = {trial.simulation.nodes[voice].identity.node_id for voice in trial.voices}
        spared = [node for node in trial.honest if node.name not in trial.victims]
        callers[name] = sum(peer in voices for node in spared for peer in node.core.membership.peers)
    assert callers["hostile"] < len(spared) < callers["hostile-callers"], callers


@pytest.mark.slow
@pytest.mark.timeout(300)  # three runs of five seconds each on a core of its own
def test_the_same_seed_prints_the_same_in_other_processes_with_other_hash_seeds() -> None:
    def run(hash_seed: str, seed: str) -> str:
        arguments = ["--nodes", "24", "--seed", seed, "--scenario", "hostile", "--minutes", "0.1", "--timing", "local"]
        return subprocess.run(
            [sys.executable, "-m", "protocol.simulator", *arguments],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            stdout=subprocess.PIPE,
            text=True,
            timeout=100,
        ).stdout

    first, second, other = run("1", "7"), run("2", "7"), run("1", "8")
    assert re.search(r"^trace [0-9a-f]{64}", first, re.MULTILINE)
    assert first == second != other


def test_the_command_fails_and_says_how_to_do_it_again_when_an_invariant_does_not_hold(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protocol.simulator.scenarios.MAX_FRAMES_PER_SECOND", 0.0)
    assert main(["--nodes", "8", "--seed", "5", "--minutes", "0.1", "--timing", "lan"]) == 1
    out = capsys.readouterr().out
    assert "FAIL  a node sends" in out
    assert "python -m protocol.simulator --nodes 8 --seed 5 --scenario steady --minutes 0.1 --timing lan" in out


def test_the_command_lists_its_scenarios(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [*SCENARIOS, *MATRICES]


def test_the_command_tries_the_rows_of_a_matrix_that_have_so_many_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--scenario", "everybody-gets-in", "--nodes", "3", "--minutes", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all("1 public nodes and 2 behind NAT of one address" in line for line in lines)
    assert main(["--scenario", "everybody-gets-in", "--nodes", "4"]) == 2
    rows = "3, 9, 15, 21, 31, 40, 41, 63, 64, 100, 500"
    said = f"error: --scenario everybody-gets-in has rows of {rows} nodes, and all without --nodes\n"
    assert capsys.readouterr().err == said


def test_a_swarm_that_stays_cut_in_two_is_found_out() -> None:
    """The checks themselves: a partition that never heals must fail them."""
    plan = SwarmPlan(nodes=30, seed=1, faults_s=20.0, timing=LOCAL, conditions=Conditions())
    trial = SwarmTrial(plan, print)
    trial.simulation.network.heal = lambda: None  # type: ignore[method-assign]
    failed = [str(check) for check in judge(trial, SCENARIOS["partition"]) if not check.holds]
    assert any("overlay" in line for line in failed) and any("fresh items" in line for line in failed)


@pytest.mark.parametrize("scenario", ["hostile", "hostile-callers"])
def test_a_swarm_too_small_for_its_attackers_is_told_how_many_nodes_it_wants(
    scenario: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--nodes", "23", "--scenario", scenario]) == 2
    assert capsys.readouterr().err == f"error: --scenario {scenario} wants --nodes 24 or more\n"


def unmet(*checks: Invariant) -> list[str]:
    return [str(check) for check in checks if not check.holds]


@pytest.mark.parametrize(
    "row",
    [
        ArrivalRow(2, 16_000_000, 100),
        ArrivalRow(8, 10_000, 1),
        ArrivalRow(8, 1_000_000, 10),
        ArrivalRow(8, 5_000_000, 1000),
    ],
)
def test_every_item_arrives_while_the_lines_can_carry_it(row: ArrivalRow) -> None:
    assert unmet(arrival(1, row)) == []


@pytest.mark.slow
@pytest.mark.timeout(600)  # a minute on a core of its own
@pytest.mark.parametrize("row", [ArrivalRow(16, 1_000_000, 1), ArrivalRow(16, 5_000_000, 10)])
def test_sixteen_nodes_lose_none_of_their_large_items(row: ArrivalRow) -> None:
    assert unmet(arrival(1, row)) == []


@pytest.mark.parametrize("crowd", [Crowd(1, 14), Crowd(2, 20), Crowd(1, 8, one_address=True), Crowd(1, 2, True)])
def test_every_home_user_gets_in_and_is_heard(crowd: Crowd) -> None:
    assert unmet(*admittance(1, crowd, 120.0)) == []


IN_VAIN = [
    *(Crowd(1, 20, in_vain=families) for families in FAMILIES),
    Crowd(1, 8, one_address=True, in_vain="46"),
    pytest.param(Crowd(2, 40, in_vain="46"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("crowd", IN_VAIN)
def test_every_home_user_who_listens_in_vain_gets_in_and_is_heard(crowd: Crowd) -> None:
    """Of 20 that one relay could have served 9 were alone for good, as a firewall closed the addresses they told."""
    assert unmet(*admittance(1, crowd, 120.0)) == []


def test_nodes_that_others_can_dial_have_no_more_links_because_home_nodes_get_in() -> None:
    """They had 26 links after a minute where each that was sent away came back as a home node at once."""
    assert unmet(*admittance(1, Crowd(40, 0), 60.0)) == []


def test_twenty_nodes_of_one_public_network_get_in() -> None:
    """Of 40 nodes in a school with public addresses 35 found no peer."""
    assert unmet(*admittance(1, Crowd(20, 0, one_network=True), 60.0)) == []


@pytest.mark.parametrize(("limit", "crowd"), [(14, Crowd(1, 14)), (8, Crowd(2, 14))])
def test_where_places_are_scarce_each_home_user_has_one_before_others_have_two(limit: int, crowd: Crowd) -> None:
    assert unmet(*admittance(1, crowd, 180.0, Limits(max_callers=limit))) == []


def test_a_home_user_whose_seed_is_full_is_told_of_nodes_that_can_be_dialled() -> None:
    assert unmet(*admittance(1, Crowd(3, 44), 60.0, Limits(max_callers=24))) == []


@pytest.mark.slow
@pytest.mark.timeout(600)  # a minute on a core of its own
def test_ninety_five_home_users_get_in_at_five_public_nodes() -> None:
    assert unmet(*admittance(1, Crowd(5, 95), 120.0)) == []


def test_eight_nodes_behind_one_address_give_each_other_all_that_they_publish_by_way_of_one_public_node() -> None:
    # Sixteen items a second each: what is given to a whole network is paid from one quota.
    homes, seconds, rate = range(1, 9), 10, 16
    simulation = Simulation(1, CONDITIONS, None, timing=WAN, identity=SimulatedIdentity)
    simulation.seen_at[0] = "60.1.0.1"
    simulation.start(0)
    simulation.run(0.2)
    for name in homes:
        simulation.seen_at[name] = "60.2.0.1"
        simulation.start(name, dialable=False)
    simulation.run(60)
    published: dict[int, set[bytes]] = {name: set() for name in homes}
    for turn in range(seconds * rate):
        for name in homes:
            published[name].add(simulation.publish(name, bytes([turn, name]) * 5000))
        simulation.run(1 / rate)
    simulation.run(5)
    items = set().union(*published.values())
    assert len(items) == len(homes) * seconds * rate
    assert [len(items - published[name] - simulation.nodes[name].ids) for name in homes] == [0] * len(homes)

"""What reports cost a swarm, and how many of them reach a board: a swarm of real cores on a virtual clock.

python -m tests.sim.test_board_reports 1000    # the figures in docs/board.md
"""

import sys
from typing import NamedTuple

import pytest

from node.swarm.reports import REPORTS_TOPIC, NodeReport, encode
from node.swarm.sharing import SEED_DEMAND
from protocol.identity import NodeId, id_of_bytes
from protocol.simulator import SimulatedIdentity, Simulation

TASK = b"one task"
GROUP_BYTES = 4096  # eight completions of some hundred tokens, compressed
ROUND_S, GROUPS, DEMAND = 10.0, 2, 2.0  # a round publishes two groups, and draws 16, or a fourth more: two a second
REPORTS_S = 300.0
TAIL_S = 5.0  # in which the last items still spread
BOARD = 0


class Measured(NamedTuple):
    """Bytes a second that a node sent, groups that came at one, and the part of all reports that came at the board."""

    sent: float
    groups: float
    at_board: float


def teacher(number: int) -> NodeId:
    return id_of_bytes(number.to_bytes(20, "big"))


def measure(nodes: int, seconds: int, *, reports: bool, settle: float = 30.0) -> Measured:
    """Let `nodes` nodes and a board share groups, and reports or not, for so many seconds after they settled."""
    simulation = Simulation(1, identity=SimulatedIdentity)
    for name in range(nodes + 1):
        simulation.start(name)
        beside = frozenset({REPORTS_TOPIC} if reports else ())
        demand, topics = (SEED_DEMAND, None) if name == BOARD else (DEMAND, beside | {TASK})
        simulation.subscribe(name, demand, topics, beside)
        simulation.run(0.01)
    simulation.run(settle)
    began, before = simulation.network.now, sum(simulation.bytes_sent.values())
    reported = set()
    for step in range(seconds * 10):
        at = step / 10
        for name in range(1, nodes + 1):
            if _is_due(name / nodes * ROUND_S, ROUND_S, at):
                for number in range(GROUPS):
                    simulation.publish(name, f"group {number} of {name} at {at}".encode().ljust(GROUP_BYTES), TASK)
            if reports and _is_due(name / nodes * REPORTS_S, REPORTS_S, at):
                taught = {teacher((name + other) % nodes): 7 for other in range(1, 25)}
                rewards = dict.fromkeys(("builtin/arithmetic", "builtin/sums", "builtin/weekdays"), 0.5)
                report = NodeReport(int(at), "gossamer/0.1.0", "Qwen3-0.6B", 7000, 0.5, 0.5, rewards, taught)
                reported.add(simulation.publish(name, encode(report), REPORTS_TOPIC))
        simulation.run(0.1)
    simulation.run(TAIL_S)
    seconds_in_all = simulation.network.now - began
    came = {item.id for item in simulation.nodes[BOARD].received}
    groups = sum(item.topic == TASK for node in simulation.nodes.values() for item in node.received) / nodes
    sent = (sum(simulation.bytes_sent.values()) - before) / seconds_in_all / nodes
    return Measured(sent, groups, len(reported & came) / len(reported) if reported else 0.0)


def _is_due(phase: float, period: float, at: float) -> bool:
    """Tell whether `at`, in tenths of a second, is the first at or after `phase` in a period."""
    return (at - phase) % period < 0.1 - 1e-9


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_reports_reach_a_board_and_cost_a_swarm_little() -> None:
    without, with_reports = (measure(40, 20, reports=reports) for reports in (False, True))
    assert with_reports.at_board > 0.9
    assert with_reports.sent < 1.05 * without.sent


if __name__ == "__main__":
    count = int(sys.argv[1])
    for reports in (False, True):
        one = measure(count, 10, reports=reports, settle=15.0)
        print(f"{count} nodes, {reports=}: {one.sent:.0f} bytes a second and node, {one.groups:.1f} groups a node,")
        print(f"    {one.at_board:.0%} of the reports at the board", flush=True)

"""How far a lie gets that is verified only where it is drawn: as far as any item, and that is as far as demand goes."""

import random

from protocol.events import ItemVerdict
from protocol.gossip.subscriptions import MIN_BURST
from protocol.simulator import SimulatedIdentity, Simulation

NODES, ROUNDS, ROUND_S = 10, 15, 1.0
MADE, DRAWN = 4, 4  # items a round, of each node
DEMAND = 2 * DRAWN / ROUND_S  # the most that `node.swarm.sharing` asks for


def test_a_lie_reaches_as_many_nodes_as_demand_carries_an_item_to_and_its_signer_pays_where_it_is_drawn() -> None:
    simulation = Simulation(1, identity=SimulatedIdentity)
    nodes = simulation.start_many(NODES)
    simulation.run(10.0)
    *honest, liar = nodes
    for node in nodes:
        simulation.subscribe(node.name, DEMAND)
    rng = random.Random(1)
    pools: dict[int, list] = {node.name: [] for node in honest}
    found = 0
    for number in range(ROUNDS):
        for node in nodes:
            for item in range(MADE):
                simulation.publish(node.name, b"%d of %d in round %d" % (item, node.name, number))
        simulation.run(ROUND_S)
        for node in honest:
            pool = pools[node.name]
            pool += node.received
            node.received.clear()
            for drawn in [pool.pop(rng.randrange(len(pool))) for _ in range(min(DRAWN, len(pool)))]:
                if drawn.signer == liar.identity.node_id:
                    found += 1
                    simulation.judge(node.name, drawn.id, ItemVerdict.REJECT, "false_reward")
    undrawn = sum(item.signer == liar.identity.node_id for pool in pools.values() for item in pool)
    reached = (found + undrawn) / (MADE * ROUNDS)
    print(f"a lie reached {reached:.2f} of {len(honest)} nodes, and was found by {found / (MADE * ROUNDS):.2f}")
    taken = MIN_BURST + DEMAND * ROUND_S * ROUNDS  # by a node, of what the others made
    assert 1.0 <= reached <= 1.2 * taken / (MADE * ROUNDS)
    assert 0 < found == sum(node.core.scores.rejected["false_reward"] for node in honest)

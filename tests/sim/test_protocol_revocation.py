"""A revocation list in a swarm of the real cores on a virtual clock: how soon everybody obeys it."""

from protocol.credentials.grants import Gatekeeper
from protocol.credentials.manifest import JoinPolicy, ManifestTask, make_manifest
from protocol.credentials.revocations import make_revocations
from protocol.events import Revoked
from protocol.identity import Identity
from protocol.limits.timing import LAN
from protocol.simulator import Simulation
from protocol.simulator.adversaries import SimulatedIdentity
from protocol.transport.memory import Conditions

FOUNDER = Identity(bytes(32))
OPEN = make_manifest(FOUNDER, "open", 1, JoinPolicy.OPEN, [ManifestTask("t", 1, "ab", "{}")])
NODES, FOE = 20, 7


def test_a_revoked_node_is_linked_to_nobody_known_to_nobody_and_heard_by_nobody_within_one_exchange() -> None:
    simulation = Simulation(1, Conditions(loss=0.1), identity=SimulatedIdentity)
    for name in range(NODES):
        simulation.start(name, gate=Gatekeeper(OPEN))
    simulation.run(20.0)
    foe = simulation.nodes[FOE].identity.node_id
    others = [node for name, node in simulation.nodes.items() if name != FOE]
    assert sum(foe in node.core.membership.peers for node in others) > 3
    revoked = make_revocations(FOUNDER, OPEN, [foe], 1)
    simulation.nodes[3].driver.feed(Revoked(revoked.encoded))
    simulation.run(LAN.exchange_interval)
    assert not any(foe in node.core.membership.peers for node in others)
    assert not any(foe in node.core.membership.book for node in others)
    # It comes again from a new place, and its items reach nobody by any way.
    known = simulation.kill(FOE)
    simulation.start(FOE, known=known, gate=Gatekeeper(OPEN))
    simulation.run(30.0)
    assert simulation.nodes[FOE].core.membership.refusals.latest == "revoked"
    item = simulation.publish(FOE, b"from the revoked one")
    # A newcomer that has heard of no list does not become its bridge.
    newcomer = simulation.start(NODES, gate=Gatekeeper(OPEN))
    simulation.run(60.0)
    assert newcomer.core.membership.peers
    for node in (*others, newcomer):
        assert foe not in node.core.membership.peers and item not in node.ids

"""The cores that the host runs, by the hundred or ten thousand, under a seed and a virtual clock.

`Simulation` is the driver. `python -m protocol.simulator` puts a swarm through a scenario
(`scenarios`), with hostile nodes (`hostile`) if it has any, and measures it (`trial`) against
what must hold (`invariants`).
"""

from protocol.simulator.identity import SimulatedIdentity
from protocol.simulator.simulation import SimulatedNode, Simulation

__all__ = ["SimulatedIdentity", "SimulatedNode", "Simulation"]

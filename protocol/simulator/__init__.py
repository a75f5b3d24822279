"""The simulator: up to ten thousand nodes with the host's cores, under a seed and a virtual clock.

simulation    many nodes, their timers, the virtual clock            trial        one swarm, and what is measured of it
scenarios     what can happen, and what must hold nevertheless       overlay      the graph of live links
adversaries   hostile cores, and keys that cost nothing              __main__     `python -m protocol.simulator`
matrices      does everything arrive, does everybody get in

A new scenario is a function of a trial and an entry of `scenarios.SCENARIOS`; a new adversary is a core and a place in
`SwarmTrial._assign_hostile`; a new size, line or crowd is a row of `matrices`.
"""

from protocol.simulator.adversaries import SimulatedIdentity
from protocol.simulator.simulation import SimulatedNode, Simulation

__all__ = ["SimulatedIdentity", "SimulatedNode", "Simulation"]

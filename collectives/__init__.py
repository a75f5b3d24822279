"""The computations of a group of nodes: all-reduce, shared state, DiLoCo. No master; any member may fail.

    from collectives import Communicator

    with Communicator.connect("run-1", ["tcp://10.0.0.1:7700"], "tcp://0.0.0.0:0", secret=secret) as comm:
        result = comm.all_reduce(gradient)  # in place: the mean of all members' gradients

docs/architecture.md draws a step of `Communicator.run`, from call to commit.

communicator  the public API, of:   types, errors            its words, and what can go wrong
                                    calls, operations        a call from beginning to verdict, and what each one does
                                    steps, step_runner       training steps that a group takes together
                                    driver                   the control thread between the mesh and the agreement
logs          where it logs
threads       waiting for them to be gone
diloco        many steps apart, then one together, by `outer_optimizer`

agreement/    who is in the group, and what became of each call: pure
mesh/         connections between members           reduce/       all-reduce: topologies, kernels, codecs
shared_state/ the same tensors at every member      simulator/    groups under a seed and a virtual clock
torch_backend/ the same streams as a backend of `torch.distributed`

A new operation is declared in `operations`, and has a method of `Communicator`. It all stands on `protocol` and serves
`node`, and imports nothing from `node`.
"""

from typing import TYPE_CHECKING, Any

from collectives.errors import (
    Aborted,
    CollectiveError,
    CommunicatorClosed,
    DeadlineExceeded,
    Evicted,
    InDoubt,
    Mismatch,
    NotEnoughPeers,
)
from collectives.types import Codec, Op, Protection, SyncStrategy

if TYPE_CHECKING:
    from collectives.communicator import Communicator
    from collectives.diloco import DiLoCo
    from collectives.shared_state.state import SharedState

__all__ = [
    "Aborted",
    "Codec",
    "CollectiveError",
    "Communicator",
    "CommunicatorClosed",
    "DeadlineExceeded",
    "DiLoCo",
    "Evicted",
    "InDoubt",
    "Mismatch",
    "NotEnoughPeers",
    "Op",
    "Protection",
    "SharedState",
    "SyncStrategy",
]


def __getattr__(name: str) -> Any:
    """Import what needs torch, which takes seconds, when it is asked for: a node's settings need the words alone."""
    if name == "Communicator":
        from collectives.communicator import Communicator

        return Communicator
    if name == "DiLoCo":
        from collectives.diloco import DiLoCo

        return DiLoCo
    if name == "SharedState":
        from collectives.shared_state.state import SharedState

        return SharedState
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

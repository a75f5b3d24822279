"""`gossamer demo`: a swarm that learns on any machine, with nothing but the installed package."""

from pathlib import Path

from node.cli.options import Debug, Seed, Settings, Tasks
from node.cli.swarm import Nodes, NoTable, Out, Rounds, swarm

CONFIG = Path(__file__).with_name("demo.toml")


def demo(  # one parameter for each option of the command
    nodes: Nodes = 4,
    rounds: Rounds = None,
    out: Out = None,
    task: Tasks = None,
    settings: Settings = None,
    seed: Seed = None,
    no_table: NoTable = False,
    debug: Debug = False,
) -> int:
    """Let four nodes learn on this machine, in under 3 minutes.

    Two cores suffice. It downloads nothing, and contacts no other machine. It is `gossamer swarm` on a configuration of
    the package.

    \b
    Example:
      gossamer demo
      gossamer demo -n 8 --rounds 100 --out runs/demo
      gossamer demo --task builtin/guess
    """
    return swarm(
        CONFIG,
        nodes=nodes,
        rounds=rounds,
        out=out,
        task=task,
        settings=settings,
        seed=seed,
        no_table=no_table,
        debug=debug,
    )

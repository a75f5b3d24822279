"""What a notebook or a script imports: `from gossamer import Node, Swarm, Exchange`.

All of it is `node.api`, `node.exchange`, `node.grpo_trainer` and `node.swarm_rollouts`, by the name of the package that
is installed. `node`, `collectives` and `protocol` stay what they are, and nothing is loaded twice. A file `node.py`
beside a script would be imported in place of ours, so that is looked at first.
"""

import importlib.metadata
import importlib.util
from pathlib import Path

for _name, _file in (("node", "state_folder.py"), ("collectives", "communicator.py"), ("protocol", "joiner.py")):
    _found = importlib.util.find_spec(_name)
    if _found is not None and _found.origin is not None and not Path(_found.origin).with_name(_file).exists():
        raise ImportError(f"{_found.origin} hides Gossamer's package {_name!r}: rename that file or folder")

try:
    from node.api import Node, Swarm, UserError
    from node.exchange import Exchange
    from node.grpo_trainer import GRPOTrainer
    from node.swarm_rollouts import SwarmRollouts
except ImportError as _error:
    from node.errors import overwritten

    raise ImportError(overwritten() or str(_error)) from _error

__version__ = importlib.metadata.version("gossamer")
__all__ = ["Exchange", "GRPOTrainer", "Node", "Swarm", "SwarmRollouts", "UserError", "__version__"]

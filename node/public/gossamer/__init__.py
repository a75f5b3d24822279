"""What a notebook or a script imports: `from gossamer import Node, Swarm`.

All of it is `node.api` and `node.grpo_trainer`, by the name of the package that is installed. `node`, `collectives`
and `protocol` stay what they are, and nothing is loaded twice.
"""

from node.api import Node, Swarm, UserError
from node.grpo_trainer import GRPOTrainer

__all__ = ["GRPOTrainer", "Node", "Swarm", "UserError"]

"""What a notebook or a script imports: `from gossamer import Node, Swarm`.

All of it is `node.api`, by the name of the package that is installed. `node`, `collectives` and `protocol` stay what
they are, and nothing is loaded twice.
"""

from node.api import Node, Swarm, UserError

__all__ = ["Node", "Swarm", "UserError"]

"""Write how many threads a real swarm's fork server has: `python -m tests.fakes.count_threads DIR`."""

import sys
from pathlib import Path

import psutil

from node.config import NodeConfig
from node.supervisor import start_child, start_server


def note(config: NodeConfig, folder: Path) -> None:
    """The node: write what its parent, the fork server, looks like, and whether torch is here already."""
    (folder / "threads").write_text(f"{psutil.Process().parent().num_threads()} {'torch' in sys.modules}")


if __name__ == "__main__":
    child = start_child(start_server(), note, NodeConfig(), Path(sys.argv[1]))
    child.process.join()

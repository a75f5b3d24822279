"""Write what a real swarm's fork server is like: `python -m tests.fakes.count_threads DIR`."""

import sys
from pathlib import Path

import psutil

from node.config import NodeConfig
from node.fleet.child_process import start_child, start_server


def note(config: NodeConfig, folder: Path) -> None:
    """The node: write its parent's threads, whether torch is here already, and whether asking it for a GPU is safe."""
    torch = sys.modules.get("torch")
    safe = torch is not None and torch.cuda._nvml_based_avail()
    (folder / "threads").write_text(f"{psutil.Process().parent().num_threads()} {torch is not None} {safe}")


if __name__ == "__main__":
    child = start_child(start_server(), note, NodeConfig(), Path(sys.argv[1]))
    child.process.join()

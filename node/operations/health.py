"""Is the node in this state folder alive? `python -m node.operations.health FOLDER` exits 0 if it is.

A node whose process died takes its container with it, so what a health check has to find is a
node that hangs. A working node writes to its folder in every round: it is healthy while the
newest of its files is younger than a limit well above the length of a round.

The image's HEALTHCHECK runs this. `/healthz` is for nodes that serve a page, and a node may serve none.
"""

import argparse
import time
from pathlib import Path

SIGNS_OF_LIFE = ("metrics.jsonl", "log.jsonl", "address")


def idle_seconds(folder: Path, now: float) -> float | None:
    """Seconds since the node in `folder` last wrote a sign of life; None if it never did."""
    written = [path.stat().st_mtime for name in SIGNS_OF_LIFE if (path := folder / name).exists()]
    return now - max(written) if written else None


def main() -> int:
    """Print one line on the node's state; 0 if it is healthy, 1 if not."""
    parser = argparse.ArgumentParser(
        prog="python -m node.operations.health", description="Check that a node is making progress."
    )
    parser.add_argument("folder", type=Path, help="the node's state folder")
    parser.add_argument("--limit", type=float, default=1800.0, help="longest silence, in seconds (default 1800)")
    options = parser.parse_args()
    idle = idle_seconds(options.folder, time.time())
    if idle is None:
        print(f"unhealthy: no node has written to {options.folder} yet")
        return 1
    healthy = idle <= options.limit
    print(f"{'healthy' if healthy else 'unhealthy'}: last sign of life {idle:.0f} s ago")
    return 0 if healthy else 1


if __name__ == "__main__":
    raise SystemExit(main())

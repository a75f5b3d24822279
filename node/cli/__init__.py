"""The `gossamer` command: a file for each verb, its entry and errors in `app.py`.

Nothing here imports torch, transformers or matplotlib before a verb needs them, so
that `gossamer --help` answers at once.
"""

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit, as `node.cli.app.main` says; Ctrl-C ends it quietly while it is imported, too."""
    try:
        from node.cli import app

        app.main(arguments)
    except KeyboardInterrupt:
        sys.exit(130)


__all__ = ["main"]

"""The `gossamer` command: a file for each verb, under its name (`eval` in `evaluate`), and what these share:

app      the command's entry, and its last word on an error
options  options of several verbs
running  how a node is started
here     what is said without a verb

To add a verb: write its file, with a function whose help ends with an `Example:`. Import the file in `app`, and
register the function there by `app.command`.

Nothing here imports torch, transformers or matplotlib before a verb needs them, so
that `gossamer --help` answers at once.
"""

import faulthandler
import sys
from collections.abc import Sequence

from node.errors import overwritten


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit, as `node.cli.app.main` says; Ctrl-C ends it quietly while it is imported, too.

    If native code crashes, stderr says in which line of Python. If a file of ours was overwritten, a line says by whom.
    """
    faulthandler.enable(2)  # the descriptor of stderr: `sys.stderr` may be none
    try:
        try:
            from node.cli import app
        except Exception:
            if not (line := overwritten()):
                raise
            sys.stderr.write(f"error: {line}\n")
            sys.exit(2)
        app.main(arguments)
    except KeyboardInterrupt:
        sys.exit(130)


__all__ = ["main"]

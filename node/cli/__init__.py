"""The `gossamer` command: a file for each verb, its errors in `explain.py`.

Nothing here imports torch, transformers or matplotlib before a verb needs them, so
that `gossamer --help` answers at once.
"""

from node.cli.app import main

__all__ = ["main"]

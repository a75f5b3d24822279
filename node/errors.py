"""Errors that a person can act on.

Anything a person got wrong (a key, a file, a port, a missing extra) is raised as
`UserError`. The command line prints its one line and exits with status 2; every
other exception is a defect and keeps its traceback.
"""

import shlex
from pathlib import Path


class UserError(Exception):
    """One clear line that says what is wrong and what to do about it."""


class PassingError(UserError):
    """What may go well at another try, once others hold less memory: who keeps a node running starts it again.

    The command line exits with 1.
    """


def one_line(error: Exception) -> str:
    """Return what `error` says, on one line."""
    return " ".join(str(error).split())


def for_shell(path: Path) -> str:
    """Return `path` as it stands in a command that a person is to paste into a shell."""
    return shlex.quote(str(path))

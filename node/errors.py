"""Errors that a person can act on.

Anything a person got wrong (a key, a file, a port, a missing extra) is raised as
`UserError`. The command line prints its one line and exits with status 2; every
other exception is a defect and keeps its traceback.
"""

import importlib.metadata
import shlex
import sys
from pathlib import Path

OWN_PACKAGES = ("node", "collectives", "protocol")
AGAIN = "start the node again, and it goes on from its last checkpoint"


class UserError(Exception):
    """One clear line that says what is wrong and what to do about it."""


class PassingError(UserError):
    """An error that another try may not meet, once others hold less memory: a supervisor starts the node again.

    The command line exits with 1.
    """


class DivergedError(UserError):
    """Training has reached numbers that are not finite: starting again with the same settings would repeat that."""

    def __init__(self, round_number: int, what: str, rate: float) -> None:
        super().__init__(
            f"training diverged in round {round_number}: {what}; lower trainer.learning_rate (it is {rate:g}) and "
            "start again: the node goes on from its last checkpoint"
        )


class NonFiniteError(UserError):
    """A policy's logits are not finite, so it says nothing; a node in training makes it a `DivergedError`."""

    def __init__(self) -> None:
        super().__init__(
            "the model's logits are not finite, so it cannot answer: its weights are damaged, or training diverged; "
            "name another model, or an earlier checkpoint"
        )


def one_line(error: BaseException) -> str:
    """Return what `error` says, on one line."""
    return " ".join(str(error).split())


def printable(text: str) -> str:
    """Return somebody's text with escapes for what a terminal obeys, or a log cannot encode."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def how_to_install(extra: str) -> str:
    """Return the command that installs an extra of ours into the environment of this process."""
    return f"{shlex.quote(sys.executable)} -m pip install 'gossamer[{extra}]'"


def for_shell(path: Path) -> str:
    """Return `path` as it stands in a command that a person is to paste into a shell."""
    return shlex.quote(str(path))


def namesakes() -> dict[str, list[str]]:
    """Return the distributions of others that were installed into our packages' folders, by package; PyPI has some."""
    owners = importlib.metadata.packages_distributions()
    found = {name: sorted({*owners.get(name, ())} - {"gossamer"}) for name in OWN_PACKAGES}
    return {name: others for name, others in found.items() if others}


def overwritten() -> str:
    """Return a line on others' packages that may have overwritten files of ours; empty if there are none."""
    others = " ".join(sorted({other for names in namesakes().values() for other in names}))
    return others and (
        f"another package writes into the same folders: {others}. Give gossamer an environment of its own (pipx does), "
        f"or pip uninstall {others}, and install gossamer anew"
    )

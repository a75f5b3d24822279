"""Which failures a person can correct, and the one line that says how."""

import errno

import typer

from node.errors import UserError
from protocol.errors import ProtocolError


def explain(error: Exception) -> str | None:
    """Return one line for the person, or None when `error` is a defect of the program."""
    if isinstance(error, UserError | ProtocolError):
        return _one_line(str(error))
    if isinstance(error, typer.TyperException):
        return _one_line(f"{error.format_message()} (see --help)")
    if isinstance(error, OSError):
        return _explain_os_error(error)
    return None


def _explain_os_error(error: OSError) -> str | None:
    where = f" {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full{' at' + where if where else ''}: free some space and start again"
    if error.filename and error.errno in (
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EEXIST,
    ):
        return f"cannot use{where}: {error.strerror}: choose another path, or change its permissions"
    return None


def _one_line(text: str) -> str:
    return " ".join(text.split())

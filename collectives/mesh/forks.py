"""What a forked process does not keep: the sockets of its parent.

A process forked from a member, such as a loader of data, would keep the member's connections open after the member is
killed, so that no other member sees them close. The child closes its copies. It must not take them out of the selector,
which is the parent's too.
"""

import os
import socket
import weakref
from contextlib import suppress

_sockets: "weakref.WeakSet[socket.socket]" = weakref.WeakSet()


def close_in_children(sock: socket.socket) -> socket.socket:
    """Let processes that are forked from this one close the socket; return it."""
    _sockets.add(sock)
    return sock


def _close_all() -> None:
    for sock in list(_sockets):
        with suppress(OSError):
            sock.close()
    _sockets.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_all)

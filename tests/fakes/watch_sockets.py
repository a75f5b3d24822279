"""Becomes `sitecustomize` of every Python process of a test: records whom it looks up or sends to off this machine.

Loopback is recorded too, as "self", so that an empty record shows nothing but a watch that did not work.
"""

import os
import sys
from pathlib import Path

RECORD = Path(os.environ["WATCHED_SOCKETS"])
HERE = ("127.", "::1", "localhost", "0.0.0.0")


def watch(event: str, arguments: tuple) -> None:
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    elif event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        if not isinstance(arguments[1], tuple):  # a Unix socket, or one that is connected
            return
        host = arguments[1][0]
    elif event == "socket.bind":
        host = "127."
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    here = not host or host.startswith(HERE)
    with RECORD.open("a") as file:
        file.write("self\n" if here else f"{host} {event} {' '.join(sys.argv)[:80]!r}\n")


sys.addaudithook(watch)

"""A process that knows a group's addresses and no secret: `python -m tests.fakes.collectives_stranger KIND ADDRESS...`

It does KIND to the members at these addresses until it is ended, and prints "at it" once it has begun.
"""

import os
import socket
import sys
import threading
import time
from itertools import count

from collectives.mesh.handshake import Handshake, Party, group_key
from collectives.types import Protection
from protocol.identity import Identity

PATIENCE_S = 5.0
SOURCE = ("127.0.0.2", 0)  # another prefix than the members': on loopback each address is one
_kept: list[socket.socket] = []


def dial(address: str) -> socket.socket:
    """Connect from another network than the members'."""
    host, port = address.removeprefix("tcp://").split(":")
    return socket.create_connection((host, int(port)), PATIENCE_S, SOURCE)


def idle(address: str) -> None:
    """Connect, and say nothing."""
    _kept.append(dial(address))
    del _kept[:-400]


def handshakes(address: str) -> None:
    """Begin handshakes, each under a new key, and prove the wrong secret."""
    party = Party(Identity.generate(), group_key("test", b"a guess"), os.urandom(8), Protection.ENCRYPTED)
    handshake = Handshake(party, initiator=True)
    with dial(address) as sock:
        sock.sendall(handshake.start() + bytes(1 << 16))
        while sock.recv(4096):
            pass


KINDS = {kind.__name__: kind for kind in (handshakes, idle)}


def attack(kind: str, address: str) -> None:
    """Go on, whatever the member does about it."""
    for _ in count():
        try:
            KINDS[kind](address)
        except OSError:
            time.sleep(0.001)  # hung up on: once more


if __name__ == "__main__":

    def give_up(arguments: threading.ExceptHookArgs) -> None:
        """End the process: an attack that does not take place must not look like one that costs nothing."""
        threading.__excepthook__(arguments)
        os._exit(1)

    threading.excepthook = give_up
    kind, *addresses = sys.argv[1:]
    for address in addresses:
        for _ in range(2):
            threading.Thread(target=attack, args=(kind, address), daemon=True).start()
    print("at it", flush=True)
    threading.Event().wait()

"""Addresses of host names, found on other threads: a name server may take many seconds.

libzmq would resolve a name on its only I/O thread, and take one family of addresses or the
other, whether or not anybody listens there.
"""

import socket
import threading
from collections import deque
from collections.abc import Callable

from protocol.credentials.records import Endpoint

MAX_LOOKUPS = 16  # in flight; each is a thread that waits
MAX_ADDRESSES = 4  # tried of one name

Found = tuple[object, list[Endpoint]]


class Resolver:
    """Looks names up. `wake` is called from another thread when there is something to `take`."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._found: deque[Found] = deque()
        self._slots = threading.BoundedSemaphore(MAX_LOOKUPS)

    def ask(self, asker: object, endpoint: Endpoint) -> bool:
        """Look `endpoint.host` up for `asker`; False: too many lookups wait already."""
        if not self._slots.acquire(blocking=False):
            return False
        threading.Thread(target=self._look_up, args=(asker, endpoint), name="gossamer-lookup", daemon=True).start()
        return True

    def take(self) -> list[Found]:
        """Return the askers that were answered since the last call, each with its endpoints, best first."""
        found = []
        while self._found:
            found.append(self._found.popleft())
        return found

    def _look_up(self, asker: object, endpoint: Endpoint) -> None:
        try:
            answers = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
            hosts = list(dict.fromkeys(str(address[0]) for *_, address in answers))
        except (OSError, UnicodeError):  # no such name; a label that no name can have
            hosts = []
        finally:
            self._slots.release()
        self._found.append((asker, [Endpoint(host, endpoint.port) for host in hosts[:MAX_ADDRESSES]]))
        self._wake()

"""A TCP relay that holds back the end of what one side says: libzmq itself never sends half a message."""

import socket
import threading
from contextlib import suppress

from protocol.credentials.records import Address, Endpoint

_PIECE = 1 << 16
_SMALL = 4096  # a handshake and a hello pass at once


class Withholding:
    """Relays one connection to `target`, and of what the dialler says (or the target, with `of_target`)
    only the first `size` bytes, in pieces that `allow` lets pass. It dials from the IP address `source`."""

    def __init__(self, target: Address, size: int, *, of_target: bool = False, source: str = "127.0.0.1") -> None:
        self._target, self._left, self._of_target, self._source = target, size, of_target, source
        self._allowed = threading.Semaphore(0)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = Address(Endpoint("127.0.0.1", self._listener.getsockname()[1]), target.key)
        self.cut = False  # either side closed
        threading.Thread(target=self._run, daemon=True).start()

    def allow(self, pieces: int) -> None:
        """Let so many pieces of up to 64 KiB pass."""
        self._allowed.release(pieces)

    def _run(self) -> None:
        here, _ = self._listener.accept()
        self._listener.close()
        endpoint = self._target.endpoint
        there = socket.create_connection((endpoint.host, endpoint.port), source_address=(self._source, 0))
        slow, fast = ((there, here), (here, there)) if self._of_target else ((here, there), (there, here))
        threading.Thread(target=self._pass_everything, args=fast, daemon=True).start()
        with suppress(OSError):
            while piece := slow[0].recv(_PIECE):
                if len(piece) > _SMALL:
                    self._allowed.acquire()
                slow[1].sendall(piece[: self._left])
                self._left -= min(self._left, len(piece))
        self._end(here, there)

    def _pass_everything(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while piece := source.recv(_PIECE):
                sink.sendall(piece)
        self._end(source, sink)

    def _end(self, *ends: socket.socket) -> None:
        self.cut = True
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

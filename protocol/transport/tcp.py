"""A second descriptor of a TCP connection that libzmq owns: to measure it and to end it.

libzmq names its connections by file descriptor. Duplicated, the descriptor stays ours after
libzmq closed its own, which tells who ended a connection, and no later connection that gets
the same number is mistaken for it. Where the system gives no such information (TCP_INFO is
read in Linux's layout only) connections are counted and cut, but not measured.
"""

import os
import socket
import struct
import sys
from contextlib import suppress
from dataclasses import dataclass

# struct tcp_info of Linux, stable since 4.2: the state, milliseconds since data came, bytes received.
_STATE_AT, _LAST_DATA_AT, _RECEIVED_AT = 0, 52, 128
_INFO_BYTES = 136
_ESTABLISHED = 1
# libzmq ends a silent connection after HEARTBEAT_TIMEOUT (15 s); a broken one at once.
_SILENT_MS = 5_000
_LINUX = sys.platform == "linux"


@dataclass(frozen=True, slots=True)
class Measured:
    """Bytes `received` by the kernel since the connection began, of which `unread` wait in its buffer."""

    received: int
    unread: int


class TcpView:
    """A look at one connection."""

    def __init__(self, descriptor: int) -> None:
        """Duplicate `descriptor`.

        Raises:
            OSError: it is no connected socket, or not any more.
        """
        self._socket = socket.socket(fileno=os.dup(descriptor))
        try:
            self.peer = str(self._socket.getpeername()[0])
        except OSError:
            self._socket.close()
            raise

    def measure(self) -> Measured | None:
        """Return how much came in, or None where that cannot be known."""
        info = self._info()
        if info is None:
            return None
        # The order matters: what arrives between the two calls counts as unread, never as held.
        return Measured(struct.unpack_from("=Q", info, _RECEIVED_AT)[0], self._unread())

    def was_ended_by_us(self) -> bool:
        """Tell, after libzmq closed its descriptor, whether it was libzmq that ended a lively connection.

        It does so for one reason: what came breaks ZMTP or CURVE, or is over MAXMSGSIZE.
        """
        info = self._info()
        return (
            info is not None
            and info[_STATE_AT] == _ESTABLISHED
            and struct.unpack_from("=I", info, _LAST_DATA_AT)[0] < _SILENT_MS
        )

    def shut_down(self) -> None:
        """End the connection; libzmq notices and cleans up."""
        with suppress(OSError):  # it has ended already
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the second descriptor back."""
        self._socket.close()

    def _info(self) -> bytes | None:
        if not _LINUX:
            return None
        try:
            info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
        except OSError:
            return None
        return info if len(info) == _INFO_BYTES else None

    def _unread(self) -> int:
        import fcntl
        import termios

        answer = fcntl.ioctl(self._socket.fileno(), termios.FIONREAD, b"\0\0\0\0")
        return int(struct.unpack("=i", answer)[0])

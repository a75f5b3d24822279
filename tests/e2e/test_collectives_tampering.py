"""Somebody on the way between two members changes a byte of what they send each other, over TCP."""

import socket
import threading
from contextlib import suppress

import pytest
import torch

from collectives import CollectiveError, Op, Protection
from collectives.mesh import mesh
from collectives.mesh.addresses import Address
from collectives.mesh.addresses import listen as listen_at
from tests.groups import group, together

LARGE = 16 << 10  # bytes at once: a tensor's, on a data stream


class OnTheWay:
    """A proxy in front of a member: of what passes after `arm`, it changes one byte, in the midst of a tensor."""

    def __init__(self):
        self.changed = threading.Event()
        self._armed = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = Address.parse(f"tcp://127.0.0.1:{self._listener.getsockname()[1]}")

    def listen(self, address):
        """Take the place of a member's `listen`: its peers are told the proxy's address."""
        listener, target = listen_at(address)
        threading.Thread(target=self._accept, args=(target.port,), daemon=True).start()
        return listener, self.address

    def arm(self):
        """Change the next large piece."""
        self.changed.clear()
        self._armed.set()

    def close(self):
        self._listener.close()

    def _accept(self, port):
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(near, port), daemon=True).start()

    def _serve(self, near, port):
        with near, socket.create_connection(("127.0.0.1", port)) as far:
            back = threading.Thread(target=self._pass, args=(far, near), daemon=True)
            back.start()
            self._pass(near, far)
            back.join()

    def _pass(self, source, target):
        with suppress(OSError):
            while data := bytearray(source.recv(1 << 20)):
                if len(data) >= LARGE and self._armed.is_set():
                    self._armed.clear()
                    data[len(data) // 2] ^= 0x40
                    self.changed.set()
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def on_the_way(monkeypatch):
    proxy = OnTheWay()
    ways = iter([proxy.listen])

    def listen(address):
        return next(ways, listen_at)(address)

    monkeypatch.setattr(mesh, "listen", listen)
    monkeypatch.setattr(mesh, "listen_locally", lambda _: None)
    yield proxy
    proxy.close()


def sums(comms):
    """Return each member's sum, or what its call raised."""

    def one(comm, factor):
        return comm.all_reduce(torch.arange(1_000_000) * factor, op=Op.SUM).value

    return together(*(lambda c=c, f=f: one(c, f) for f, c in enumerate(comms, 1)))


@pytest.mark.parametrize("protection", Protection)
def test_what_was_changed_on_the_way_is_in_no_sum_but_where_a_group_calls_itself_unauthenticated(
    on_the_way, protection
):
    right = torch.arange(1_000_000) * 3
    with group(2, protection=protection) as comms:
        assert all(torch.equal(value, right) for value in sums(comms))
        on_the_way.arm()
        results = sums(comms)
        assert on_the_way.changed.is_set()
        wrong = [result for result in results if isinstance(result, torch.Tensor) and not torch.equal(result, right)]
        if protection is Protection.UNAUTHENTICATED:
            assert wrong and not any(isinstance(result, CollectiveError) for result in results)
            return
        assert not wrong
        assert all(isinstance(result, CollectiveError) for result in results)
        for _ in range(20):  # they call again, as documented: the connection has yet to come back
            results = sums(comms)
            if not any(isinstance(result, CollectiveError) for result in results):
                break
        assert all(torch.equal(value, right) for value in results)

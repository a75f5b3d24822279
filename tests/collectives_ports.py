"""Ports in memory: members are threads, payloads are copied from one to another, in an order that a seed gives."""

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from collectives.errors import Aborted, DeadlineExceeded
from protocol.identity import NodeId

PATIENCE_S = 20.0
Result = TypeVar("Result")


def members(count: int) -> list[NodeId]:
    return [NodeId(f"member{i}") for i in range(count)]


class MemoryTicket:
    def __init__(self, into: memoryview) -> None:
        self.into = into
        self.filled = threading.Event()

    def done(self) -> bool:
        return self.filled.is_set()


class Network:
    """Delivers in random order; with `queue`, in order on each link, and senders wait while that many are queued.

    The latter is the strictest that a real port may be: one stream a link, nothing held that is not expected.
    """

    def __init__(self, seed: int = 0, queue: int = 0) -> None:
        self._lock = threading.Lock()
        self._rng = random.Random(seed)
        self._queue = queue
        self._waiting: list[tuple[NodeId, NodeId, int, memoryview]] = []
        self._expected: dict[tuple[NodeId, NodeId, int], MemoryTicket] = {}
        self._used: set[tuple[NodeId, NodeId, int]] = set()
        self.lost: str = ""

    def send(self, source: NodeId, to: NodeId, slot: int, payload: memoryview) -> None:
        with self._lock:
            assert (to, source, slot) not in self._used, f"slot {slot} from {source} to {to} is used twice"
            self._used.add((to, source, slot))
            self._waiting.append((to, source, slot, payload))

    def expect(self, source: NodeId, to: NodeId, slot: int, into: memoryview) -> MemoryTicket:
        assert not into.readonly
        with self._lock:
            assert (to, source, slot) not in self._expected
            ticket = self._expected[to, source, slot] = MemoryTicket(into)
            return ticket

    def deliver_one(self) -> bool:
        with self._lock:
            heads: dict[object, tuple[NodeId, NodeId, int, memoryview]] = {}
            for item in self._waiting:
                heads.setdefault(item[:2] if self._queue else item[:3], item)
            ready = [item for item in heads.values() if item[:3] in self._expected]
            if not ready:
                return False
            item = self._rng.choice(ready)
            self._waiting.remove(item)
            ticket = self._expected[item[:3]]
            assert len(ticket.into) == len(item[3]), f"{len(item[3])} bytes for {len(ticket.into)}"
            ticket.into[:] = item[3]
            ticket.filled.set()
            return True

    def queued(self, source: NodeId, to: NodeId | None = None) -> int:
        with self._lock:
            return sum(item[1] == source and to in (None, item[0]) for item in self._waiting)

    def is_full(self, source: NodeId, to: NodeId) -> bool:
        return bool(self._queue) and self.queued(source, to) >= self._queue


class MemoryPort:
    def __init__(self, network: Network, own: NodeId) -> None:
        self._network = network
        self.own = own
        self.bytes_sent = 0
        self.bytes_received = 0

    def send(self, to: NodeId, slot: int, payload: memoryview) -> None:
        assert to != self.own
        self._until(lambda: not self._network.is_full(self.own, to))
        self.bytes_sent += len(payload)
        self._network.send(self.own, to, slot, payload)

    def expect(self, source: NodeId, slot: int, into: memoryview) -> MemoryTicket:
        assert source != self.own
        return self._network.expect(source, self.own, slot, into)

    def wait(self, ticket: MemoryTicket) -> None:
        self._until(ticket.done)
        self.bytes_received += len(ticket.into)

    def flush(self) -> None:
        self._until(lambda: not self._network.queued(self.own))

    def cancel(self, reason: str) -> None:
        self._network.lost = reason

    def check(self, member: NodeId) -> None:
        if self._network.lost:
            raise Aborted(self._network.lost)

    def serve(self, handler: object) -> None:
        raise NotImplementedError

    def request(self, source: NodeId, question: bytes, into: memoryview) -> MemoryTicket:
        raise NotImplementedError

    def _until(self, reached: Callable[[], bool]) -> None:
        """Wait; whoever waits moves the network's payloads, anybody's."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            if self._network.lost:
                raise Aborted(self._network.lost)
            if reached():
                return
            if not self._network.deliver_one():
                time.sleep(0.0002)
        raise DeadlineExceeded(f"{self.own} waited too long")


def together(
    order: Sequence[NodeId], work: Callable[[MemoryPort, int], Result], seed: int = 0, queue: int = 0
) -> list[Result]:
    """Run `work(port, index)` of every member on a thread of its own; return what each gave."""
    network = Network(seed, queue)
    if len(order) == 1:
        return [work(MemoryPort(network, order[0]), 0)]
    with ThreadPoolExecutor(len(order)) as pool:
        futures = [pool.submit(work, MemoryPort(network, member), i) for i, member in enumerate(order)]
        done = [future.result(timeout=2 * PATIENCE_S) for future in futures]
    assert not any(map(network.queued, order)), "something was sent that nobody expected"
    return done

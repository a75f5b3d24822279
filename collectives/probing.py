"""Measuring links on request: a round trip of a few bytes, then a payload and its receipt, to each member in turn.

In round r every member probes the one r places after it, so all are busy and none is probed twice at once.
"""

import threading
import time
from collections.abc import Sequence
from contextlib import suppress

from collectives.errors import CollectiveError
from collectives.mesh.port import Port
from collectives.reduce.bandwidth import PROBE_BYTES, Estimates
from protocol.identity import NodeId

_PINGS = 3  # the first waits for a member that is late; the least of the others counts
_SIZES = (1,) * _PINGS + (PROBE_BYTES,)
_SLOTS = 2 * len(_SIZES)  # of one round: each probe and its receipt


def probe(port: Port, order: Sequence[NodeId], estimates: Estimates) -> None:
    """Measure this member's links to all others of `order`, which all call this.

    Raises:
        Aborted, DeadlineExceeded: the port was cancelled or is out of time.
    """
    own = list(order).index(port.own)
    # A member's receipts are given on a thread of their own: what it waits for itself must not delay them.
    receipts = threading.Thread(target=_give_receipts, args=(port, order, own), name="gossamer-probe", daemon=True)
    receipts.start()
    for distance in range(1, len(order)):
        target = order[(own + distance) % len(order)]
        *trips, took = (_send_one(port, target, distance * _SLOTS + 2 * i, size) for i, size in enumerate(_SIZES))
        trip = min(trips[1:])
        estimates.answered(target, trip, time.monotonic())
        estimates.carried(target, PROBE_BYTES, max(took - trip, 1e-6), time.monotonic())
    receipts.join()
    port.flush()


def _send_one(port: Port, target: NodeId, slot: int, size: int) -> float:
    """Return the seconds from sending a payload to having its receipt."""
    receipt = port.expect(target, slot + 1, memoryview(bytearray(1)))
    began = time.perf_counter()
    port.send(target, slot, memoryview(bytes(size)))
    port.wait(receipt)
    return time.perf_counter() - began


def _give_receipts(port: Port, order: Sequence[NodeId], own: int) -> None:
    with suppress(CollectiveError):  # who probes sees it too
        for distance in range(1, len(order)):
            source = order[own - distance]
            for i, size in enumerate(_SIZES):
                slot = distance * _SLOTS + 2 * i
                port.wait(port.expect(source, slot, memoryview(bytearray(size))))
                port.send(source, slot + 1, memoryview(b"\0"))

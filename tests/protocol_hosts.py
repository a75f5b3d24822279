"""Hosts on real sockets for the tests: in this process, and in a child that can be killed or stopped."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from node.swarm.notices import Notices
from protocol.config import Instant, read_clock
from protocol.core import Core
from protocol.credentials.records import Address
from protocol.host import Host, Received
from protocol.identity import Identity
from tests.waiting import wait_until

SWARM = b"a swarm of tests"
ROOT = Path(__file__).parents[1]
NEXT_MINOR = ROOT / "tests" / "fakes" / "next_minor"  # on PYTHONPATH it makes a process one of the next minor version
LOOK_S = 0.5  # for which a host is waited for until the deadline is looked at


def written() -> Callable[[Core, Instant], None]:
    """Return what writes the notices of a node to the log, for a host's `watch`."""
    return Notices((), b"", read_clock()).write


@contextmanager
def running(*seeds: Address, listen: str | None = "tcp://127.0.0.1:0", swarm: bytes = SWARM, **options):
    """A started host and its address."""
    host = Host(options.pop("identity", None) or Identity.generate(), swarm, listen, seeds, **options)
    address = host.start()
    try:
        yield host, address
    finally:
        host.stop()


@contextmanager
def mesh(size: int) -> Iterator[list[Host]]:
    """`size` hosts that know each other, from the first as the only seed."""
    with ExitStack() as stack:
        first, address = stack.enter_context(running())
        hosts = [first] + [stack.enter_context(running(address))[0] for _ in range(size - 1)]
        wait_until(lambda: all(host.counters().peers == size - 1 for host in hosts), 20, "the mesh")
        yield hosts


def collect(host: Host, count: int, timeout: float = 20) -> list[Received]:
    """Wait for `count` items."""
    items: list[Received] = []

    def enough() -> bool:
        items.extend(host.receive(1000, LOOK_S, count - len(items)))
        return len(items) >= count

    wait_until(enough, timeout, f"{count} items")
    return items


def spawn(folder: Path, *seeds: Address, newer: bool = False) -> tuple[subprocess.Popen[bytes], Address]:
    """Start `protocol_node.py`, as a node of the next minor version if it is `newer`, and wait until it listens."""
    address = folder / "address"
    address.unlink(missing_ok=True)
    command = [sys.executable, str(ROOT / "tests" / "protocol_node.py"), str(folder), SWARM.hex()]
    path = os.pathsep.join([*([str(NEXT_MINOR)] if newer else []), str(ROOT)])
    child = subprocess.Popen([*command, *map(str, seeds)], cwd=ROOT, env={**os.environ, "PYTHONPATH": path})
    wait_until(address.exists, 30, "the child's address")
    return child, Address.parse(address.read_text())


def ask(host: Host, question: str, timeout: float = 40) -> None:
    """Publish a question and wait for the child's answer."""
    host.publish(f"ask {question}".encode())
    answer = f"answer {question}".encode()
    wait_until(
        lambda: any(item.body == answer for item in host.receive(100, LOOK_S)), timeout, f"the answer to {question!r}"
    )

"""Links that are slow on purpose: namespaces behind token buckets, and proxies that delay."""

import asyncio
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

BURST_BYTES = 32 << 10  # of a token bucket: 1.3 ms at 200 Mbit/s, so that bursts do not pass for bandwidth
READ_BYTES = 32 << 10  # of a proxy at a time
SEGMENT_BYTES = 1400  # what fits an Ethernet frame
QUEUE_MS = 50  # what waits longer than this is dropped, as in a router


class SlowLinkError(Exception):
    """This machine cannot make such a link; the text says what it lacks."""


@dataclass(frozen=True)
class Space:
    """A network namespace: how a command is run inside, and its address."""

    command: list[str]
    address: str


@contextmanager
def shaped(mbits: Sequence[float], queue_ms: float = QUEUE_MS) -> Iterator[list[Space]]:
    """Namespaces on one bridge, each of which sends at most so many megabits a second.

    Raises:
        SlowLinkError: not Linux, not root, or no `ip` and `tc`.
    """
    with _connected_spaces(len(mbits)) as (names, spaces):
        for name, mbit in zip(names, mbits, strict=True):
            bucket = f"tbf rate {mbit:g}mbit burst {BURST_BYTES} latency {queue_ms:g}ms"
            _run(f"ip netns exec {name} tc qdisc add dev wire root {bucket}")
        yield spaces


@contextmanager
def _connected_spaces(count: int) -> Iterator[tuple[list[str], list[Space]]]:
    """Namespaces on one bridge, which is in a namespace of its own; their names, and the spaces."""
    if os.name != "posix" or os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("tc"):
        raise SlowLinkError("a shaped link needs Linux, root, and the commands ip and tc (iproute2)")
    prefix = f"bench-{os.getpid()}"
    names = [f"{prefix}-{number}" for number in range(count)]
    hub = f"{prefix}-hub"
    with ExitStack() as stack:
        for name in (hub, *names):
            _run(f"ip netns add {name}")
            stack.callback(_run, f"ip netns delete {name}")
        _run(f"ip -n {hub} link add bridge type bridge")
        _run(f"ip -n {hub} link set bridge up")
        spaces = []
        for number, name in enumerate(names):
            _run(f"ip -n {hub} link add port{number} type veth peer name wire netns {name}")
            _run(f"ip -n {hub} link set port{number} master bridge up")
            _run(f"ip -n {name} address add 10.78.0.{number + 1}/24 dev wire")
            _run(f"ip -n {name} link set lo up")
            _run(f"ip -n {name} link set wire up")
            spaces.append(Space(["ip", "netns", "exec", name], f"10.78.0.{number + 1}"))
        yield names, spaces


def _run(command: str) -> None:
    done = subprocess.run(command.split(), capture_output=True, text=True, timeout=30, check=False)
    if done.returncode:
        raise SlowLinkError(f"{command}: {done.stderr.strip()}")


@dataclass(frozen=True)
class Front:
    """A proxy's port, and the port that it forwards to."""

    port: int
    target: int


@contextmanager
def delayed(count: int, delay: float, window: int) -> Iterator[list[Front]]:
    """Proxies on loopback; each byte arrives `delay` seconds later, either way.

    Of each connection and direction at most `window` bytes are under way or not acknowledged: a byte
    counts for two delays, as with TCP. Nothing has to listen at `target` yet.
    """
    fronts = [Front(_free_port(), _free_port()) for _ in range(count)]
    loop = asyncio.new_event_loop()
    ready = threading.Event()

    async def serve() -> None:
        for front in fronts:
            proxy = _Proxy(front.target, delay, window)
            listener = socket.create_server(("127.0.0.1", front.port))
            _make_narrow(listener)
            await asyncio.start_server(proxy.accept, sock=listener, limit=READ_BYTES)
        ready.set()

    def work() -> None:
        serving = loop.create_task(serve())
        loop.run_forever()
        serving.cancel()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()

    thread = threading.Thread(target=work, name="proxies", daemon=True)
    thread.start()
    if not ready.wait(10.0):
        raise SlowLinkError("the proxies did not start")
    try:
        yield fronts
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10.0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _make_narrow(sock: socket.socket) -> None:
    """Keep the kernel from holding more than the window does.

    Linux gives a sender room for 20 segments at least, and a segment on loopback has 64 KiB.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, READ_BYTES)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT_BYTES)


def _connected(port: int) -> socket.socket:
    sock = socket.socket()
    _make_narrow(sock)
    sock.connect(("127.0.0.1", port))  # on loopback: at once, or refused
    sock.setblocking(False)
    return sock


class _Proxy:
    def __init__(self, target: int, delay: float, window: int) -> None:
        self._target, self._delay, self._window = target, delay, window

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there_reader, there_writer = await asyncio.open_connection(sock=_connected(self._target), limit=READ_BYTES)
        except OSError:
            writer.close()
            return
        await asyncio.gather(self._forward(reader, there_writer), self._forward(there_reader, writer))

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        room = self._window
        freed = asyncio.Event()

        def acknowledge(count: int) -> None:
            nonlocal room
            room += count
            freed.set()

        with suppress(OSError):
            while True:
                while room <= 0:
                    freed.clear()
                    await freed.wait()
                data = await reader.read(min(room, READ_BYTES))
                if not data:
                    break
                room -= len(data)
                loop.call_later(self._delay, writer.write, data)
                loop.call_later(2 * self._delay, acknowledge, len(data))
        loop.call_later(self._delay, writer.close)

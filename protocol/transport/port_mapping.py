"""Port mapping: a node at home asks its router to forward its port, by UPnP or NAT-PMP, so others can dial it.

The router's word alone is not believed. The outer address that it names counts as one voice, beside those of peers
(see `membership.reachability`): a node tells others of it once a peer has seen the node there and dialled it back.

All this runs on a thread of its own. UPnP runs in a process of its own (`upnp`), as a router's answer is hostile input.
NAT-PMP (`nat_pmp`), with answers of 16 bytes, is tried if UPnP got no port.
"""

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from protocol.limits.networks import Scope, read_address, scope_of
from protocol.transport import nat_pmp

RENEWAL_S = 1200.0  # a third of the lease
RETRY_S = 600.0  # a router may be switched on, or its UPnP
ANSWER_S = 20.0  # more than the child's own limit
STOP_S = 6.0  # to find the router again takes two or three seconds
MAX_ANSWER = 4096
PROGRAM = Path(__file__).with_name("upnp.py")
MAX_REASON = 200
NO_LIBRARY = "the router was not asked by UPnP: pip install miniupnpc"


class Mapping(NamedTuple):
    """A router's answer: its outer IP address if it forwards the port, and why that failed or is of no use, if so."""

    external: str = ""
    failure: str = ""


def ask_by_upnp(verb: str, port: int) -> Mapping:
    """Ask for the port ("map") or give it back ("unmap") by UPnP; waits up to `ANSWER_S` seconds."""
    if find_spec("miniupnpc") is None:
        return Mapping(failure=NO_LIBRARY)
    command = [sys.executable, "-P", str(PROGRAM), verb, str(port)]
    quiet = subprocess.DEVNULL
    try:
        child = subprocess.Popen(command, stdin=quiet, stdout=subprocess.PIPE, stderr=quiet)
    except OSError as error:
        return Mapping(failure=f"the router was not asked: {error}")
    with child:
        end = threading.Timer(ANSWER_S, child.kill)
        end.start()
        try:
            assert child.stdout is not None
            return read_answer(child.stdout.read(MAX_ANSWER))
        finally:
            end.cancel()
            child.kill()


def read_answer(answer: bytes) -> Mapping:
    """Read what `upnp` printed. Parts of it come from the router."""
    try:
        reply = json.loads(answer)
    except (ValueError, RecursionError):
        reply = None
    return judge(reply) if isinstance(reply, dict) else Mapping(failure="the router's answer cannot be read")


def judge(said: dict[str, str]) -> Mapping:
    """Make a mapping of a router's outer address, if it is one, or of the reason why there is none."""
    external, failure = str(said.get("external", "")), str(said.get("failure", ""))
    if failure or not external:
        text = "".join(character if character.isprintable() else "?" for character in failure[:MAX_REASON])
        return Mapping(failure=text or "the router names no address of its own")
    if read_address(external) is None:
        return Mapping(failure="the router names no address of its own")
    external = str(read_address(external))
    if scope_of(external) is not Scope.PUBLIC:
        return Mapping(external, f"the router is itself behind another one, which knows it as {external}")
    return Mapping(external)


def ask_by_nat_pmp(verb: str, port: int) -> Mapping:
    """Ask for the port or give it back by NAT-PMP; waits up to three times the sum of `nat_pmp.WAITS_S`."""
    return judge(nat_pmp.act(verb, port))


Way = Callable[[str, int], Mapping]
WAYS: tuple[Way, ...] = (ask_by_upnp, ask_by_nat_pmp)


class PortMapping:
    """Keeps `port` forwarded from `start` to `stop`; `tell` is called from its thread with each news.

    The `ways` are tried in order until one gets the port. The port is given back in the same way.
    """

    def __init__(self, port: int, tell: Callable[[Mapping], None], ways: Sequence[Way] = WAYS) -> None:
        self._port = port
        self._tell = tell
        self._ways = ways
        self._way: Way | None = None  # that got the port
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gossamer-port", daemon=True)
        self.said: Mapping | None = None  # None: it did not answer yet

    def start(self) -> None:
        """Begin to ask. Waits for nothing."""
        self._thread.start()

    def stop(self) -> None:
        """Give the port back; waits up to `STOP_S` seconds for that."""
        self._stopping.set()
        self._thread.join(STOP_S)

    def _run(self) -> None:
        while not self._stopping.is_set():
            mapping = self._map()
            if mapping != self.said:
                self.said = mapping
                self._tell(mapping)
            self._stopping.wait(RENEWAL_S if mapping.external else RETRY_S)
        if self._way is not None:
            self._way("unmap", self._port)

    def _map(self) -> Mapping:
        failures: dict[str, None] = {}  # in order, each once
        for way in self._ways:
            mapping = way("map", self._port)
            if mapping.external:
                self._way = way
                return mapping
            failures[mapping.failure] = None
        self._way = None
        return Mapping(failure="; ".join(failures))

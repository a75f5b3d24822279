"""Port mapping: a node at home asks its router to forward its port, by UPnP, so that others can dial it.

The router's word is never believed alone. Its outer address, as it says, counts as one voice, beside those of peers
(see `membership.reachability`): a node tells others to dial it there once a peer has seen it there and dialled it back.

Everything here happens on a thread of its own, and each talk with the router in a process of its own (`upnp`): what a
router answers is hostile input.
"""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from protocol.limits.networks import Scope, read_address, scope_of

RENEWAL_S = 1200.0  # a third of the lease
RETRY_S = 600.0  # a router may be switched on, or its UPnP
ANSWER_S = 20.0  # which the child's own limits are within
STOP_S = 6.0  # to find the router again takes two or three
MAX_ANSWER = 4096
PROGRAM = Path(__file__).with_name("upnp.py")
MAX_REASON = 200
NO_LIBRARY = "the router was not asked: pip install miniupnpc"


class Mapping(NamedTuple):
    """What a router said: its outer IP address if it forwards the port, and why that is of no use, if it is of none."""

    external: str = ""
    failure: str = ""


def ask_router(verb: str, port: int) -> Mapping:
    """Ask for the port ("map") or give it back ("unmap"); waits up to `ANSWER_S` seconds."""
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
    """Read what `upnp` printed, which a router may have had a hand in."""
    try:
        said = json.loads(answer)
        external, failure = str(said.get("external", "")), str(said.get("failure", ""))
    except (ValueError, AttributeError, RecursionError):
        return Mapping(failure="the router's answer cannot be read")
    if failure or not external:
        text = "".join(character if character.isprintable() else "?" for character in failure[:MAX_REASON])
        return Mapping(failure=text or "the router names no address of its own")
    if read_address(external) is None:
        return Mapping(failure="the router names no address of its own")
    external = str(read_address(external))
    if scope_of(external) is not Scope.PUBLIC:
        return Mapping(external, f"the router is itself behind another one, which knows it as {external}")
    return Mapping(external)


class PortMapping:
    """Keeps `port` forwarded from `start` to `stop`; `tell` is called from its thread with each news."""

    def __init__(
        self, port: int, tell: Callable[[Mapping], None], ask: Callable[[str, int], Mapping] = ask_router
    ) -> None:
        self._port = port
        self._tell = tell
        self._ask = ask
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
            said = self._ask("map", self._port)
            if said != self.said:
                self.said = said
                self._tell(said)
            self._stopping.wait(RENEWAL_S if said.external else RETRY_S)
        if self.said is not None and self.said.external:
            self._ask("unmap", self._port)

"""Asks the router for a port by UPnP, as a program: python upnp.py map|unmap PORT prints one line of JSON.

A router's answer is parsed in C (miniupnpc). An answer that makes it crash, hang or grow ends this process only. This
file imports nothing of ours, so it starts in a tenth of a second.
"""

import json
import resource
import signal
import sys
from contextlib import suppress
from typing import Any

LEASE_S = 3600  # a node that is killed leaves its port for an hour at most
DISCOVERY_MS = 2000
LIMIT_S = 15
MEMORY_BYTES = 256 << 20


def bound_ourselves() -> None:
    """End this process if it takes longer, or more memory, than an honest router's answers need."""
    signal.alarm(LIMIT_S)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


def act(verb: str, port: int) -> dict[str, str]:
    """Map or unmap a port; return the router's outer address, or why there is no mapping."""
    import miniupnpc  # of which there is a wheel for most machines, and not for all

    router = miniupnpc.UPnP()
    router.discoverdelay = DISCOVERY_MS
    try:
        router.discover()
        router.selectigd()
    except Exception:  # noqa: BLE001  # miniupnpc raises nothing more specific
        return {"failure": "no router of this network answers UPnP"}
    held = None
    with suppress(Exception):  # miniupnpc raises if nobody has the port
        held = router.getspecificportmapping(port, "TCP")
    if held is not None and held[0] != router.lanaddr:
        return {"failure": f"the router forwards port {port} to another machine: listen on another port"}
    if verb == "unmap":
        with suppress(Exception):  # its lease ends
            router.deleteportmapping(port, "TCP")
        return {}
    try:
        add(router, port)
        return {"external": router.externalipaddress()}
    except Exception as error:  # noqa: BLE001  # likewise
        return {"failure": f"the router refuses to forward port {port}: {error}"}


def add(router: Any, port: int) -> None:
    """Have the port forwarded, for good where the router knows no leases."""
    try:
        router.addportmapping(port, "TCP", router.lanaddr, port, "gossamer", "", LEASE_S)
    except Exception as error:
        if "ermanent" not in str(error):
            raise
        router.addportmapping(port, "TCP", router.lanaddr, port, "gossamer", "", 0)


if __name__ == "__main__":
    bound_ourselves()
    sys.stdout.write(json.dumps(act(sys.argv[1], int(sys.argv[2]))))

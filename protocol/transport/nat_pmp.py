"""Asks the router for a port by NAT-PMP (RFC 6886), for routers that do not speak UPnP.

    to map a port      0  2    0 0         port here (2)  port outside (2)  seconds (4)
    its answer         0  130  result (2)  router's clock (4)  port here (2)  port outside (2)  seconds (4)
    for the address    0  0
    its answer         0  128  result (2)  router's clock (4)  the router's outer IPv4 address (4)

The router is the default gateway, which Linux tells. The socket is connected to it, so no other machine's answer comes
in. Most routers that speak PCP (RFC 6887) answer this, too. PyPI's libraries for either were last released in 2023.
"""

import socket
import struct
from contextlib import suppress
from pathlib import Path

PORT = 5351
ADDRESS, MAP_TCP = 0, 2
LEASE_S = 3600  # as by UPnP
WAITS_S = (0.25, 0.5, 1.0)  # the RFC doubles up to a minute, which no router at home needs
ROUTES = Path("/proc/net/route")
SILENT = "no router of this network answers NAT-PMP"
RESULTS = {1: "it speaks another version", 2: "its owner does not allow it", 3: "it has no address itself"}


def act(verb: str, port: int, gateway: str | None = None) -> dict[str, str]:
    """Map or unmap a port; return the router's outer address, or why there is no mapping.

    Waits up to three times the sum of `WAITS_S`. Without a `gateway` it asks this machine's.
    """
    gateway = gateway or default_gateway()
    if gateway is None:
        return {"failure": SILENT}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((gateway, PORT))
            if verb == "unmap":
                _map(sock, port, 0)
                return {}
            if _map(sock, port, LEASE_S) != port:  # peers dial us at the port where we listen
                _map(sock, port, 0)
                return {"failure": f"the router forwards port {port} to another machine: listen on another port"}
            return {"external": socket.inet_ntoa(_ask(sock, bytes([0, ADDRESS]), 12)[8:])}
        except PermissionError as error:
            return {"failure": str(error)}
        except OSError:  # no answer, or nothing listens there
            return {"failure": SILENT}


def _map(sock: socket.socket, port: int, seconds: int) -> int:
    """Have the port forwarded for so long (0: no longer); return the router's port for it."""
    answer = _ask(sock, struct.pack(">BBHHHI", 0, MAP_TCP, 0, port, port if seconds else 0, seconds), 16)
    return int.from_bytes(answer[10:12], "big")


def _ask(sock: socket.socket, question: bytes, length: int) -> bytes:
    for wait in WAITS_S:
        sock.settimeout(wait)
        sock.send(question)
        with suppress(TimeoutError):
            answer = sock.recv(length)
            if answer[:2] == bytes([0, 128 + question[1]]) and len(answer) >= 4:
                if result := int.from_bytes(answer[2:4], "big"):
                    why = RESULTS.get(result, f"result {result}")
                    raise PermissionError(f"the router refuses to forward the port by NAT-PMP: {why}")
                if len(answer) == length:
                    return answer
    raise TimeoutError


def default_gateway() -> str | None:
    """Return the IPv4 address of the default gateway, if there is one and this machine tells."""
    with suppress(OSError, ValueError):
        for line in ROUTES.read_text().splitlines()[1:]:
            _, destination, gateway, *_ = line.split()
            if int(destination, 16) == 0 != int(gateway, 16):
                return socket.inet_ntoa(struct.pack("=I", int(gateway, 16)))
    return None

"""The host's view of a network: links, frames over them, and events.

A link is a connection with the holder of one CURVE key, which the handshake proved; one that we dialled and one that
the other end dialled are two links. Frames on a link arrive in order, or the link closes.

zeromq     `Transport` on ZeroMQ, of:   inbound    the ROUTER that peers dial, and who may (ZAP)
                                        outbound   the DEALERs with which we dial
                                        sockets    their options, and the poller
                                        tcp        the connections below them: measured, and ended
                                        addresses  names and addresses, ours and others'
port_mapping     asks the router to forward the port, by `upnp` in a process of its own, then by `nat_pmp`
local_discovery  finds nodes of the swarm in one's own network
memory     `Transport` on a network in memory, under a virtual clock: for the simulator

To add a transport, implement `Transport` and give it to a `Driver`.
"""

from collections.abc import Callable
from typing import Protocol

from protocol.credentials.records import Address
from protocol.events import Link, NetworkEvent
from protocol.limits.networks import Scope

Make = Callable[[Link], bytes]  # returns the frame of the next item that waits for a link, empty if none waits


class Transport(Protocol):
    """A network as seen from one node. All methods but `wake` belong to one thread."""

    def dial(self, address: Address, scope: Scope = Scope.LOOPBACK) -> None:
        """Begin to open a link to `address`; `Opened` follows, or `Closed`, or nothing. To dial twice is to dial once.

        A host name is dialled only at its addresses that are at least of `scope`, as a name can mean anything.
        """
        ...

    def hang_up(self, link: Link) -> None:
        """Close a link without waiting for what was sent. Nothing happens if there is no such link."""
        ...

    def serve(self, make: Make) -> None:
        """Let `make` make the frames of items that wait for a link."""
        ...

    def send(self, link: Link, frame: bytes) -> bool:
        """Queue a message's frame; False if the link is gone or its queue is full. Never blocks.

        Messages keep their order, and overtake items.
        """
        ...

    def fill(self, link: Link) -> None:
        """Send the items that wait for a link, until none is left: `make` makes each frame when the link is free."""
        ...

    def charge(self, link: Link, points: float) -> None:
        """Charge the network at the other end of a link, if it is known, with `points` for an offence."""
        ...

    def poll(self, timeout: float) -> list[NetworkEvent]:
        """Wait up to `timeout` seconds for something to happen; return a bounded number of events."""
        ...

    def wake(self) -> None:
        """Make a `poll` in progress, or else the next one, return at once. Safe from any thread."""
        ...

    def close(self) -> None:
        """Close every link and socket."""
        ...

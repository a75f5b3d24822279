"""Pairing: who is near whom for the time being (rendezvous hashing, Thaler and Ravishankar 1998).

Every two networks are at a distance that anybody can compute and that neither of them sets. Whom a node dials are
mostly those that are near, of some that it draws (`Dialing`), and where there is no room a near caller takes the place
of a far one (`Links`). So honest nodes find places where they look first. A node that calls everybody is near to few,
as all are. So its network gets about as many places in all as an honest node's, however often and under however many
keys it calls. With time it gets some more, as nobody replaces the callers that have stayed longest. In an order that
each node keeps secret, the attacker who calls all has those places of each where it comes first, while an honest node
cannot know where to call.

An attacker can compute what a network is near to before renting it, so one with many to choose from is near to its
victim. Therefore not all places go by distance, nor all dials. And a pair's distance is another after `PERIOD_S`, each
pair's at a time of its own, so that nobody is near to another for good.

A caller counts as of the network in which it is seen, and knows that of its own first public endpoint only. Where the
two differ, as with a domain name, a second address family or NAT, it looks for room where it is no nearer than others
are, and is turned away as often as a node that dials at random.
"""

import hashlib

from protocol.limits.networks import Scope, read_address, scope_of

PERIOD_S = 3600.0  # longer than most links last that are replaced by turns (see `Timing.rotate_interval`)


def name_of(network: str, host: str, key: bytes) -> str:
    """Return as whom a node is near or far: its public network, else its address, or on this machine its CURVE key.

    A key costs nothing, so whoever is in our own network, or behind a gateway that hides who calls, would make some
    until one is near. On one machine there is nobody to keep out, and nothing else to tell nodes apart by.
    """
    return network or (key.hex() if scope_of(host) is Scope.LOOPBACK else str(read_address(host) or host))


def distance(one: str, other: str, unix: float) -> int:
    """Return how far two names are from each other at a time: below 2**64, and the same both ways."""
    pair = "|".join(sorted((one, other))).encode()
    phase = int.from_bytes(hashlib.blake2b(pair, digest_size=4).digest()) / 2**32
    return int.from_bytes(hashlib.blake2b(pair + b"|%d" % (unix / PERIOD_S + phase), digest_size=8).digest())

"""What peers say to each other: identity, envelopes, transport, membership and gossip.

The cores (`membership`, `gossip`, `limits`, joined in `core`) are pure state machines:
`handle(event, now) -> actions`, without sockets, clocks or threads. `host` drives them
on real sockets in one network thread, `simulator` on a virtual clock.
"""

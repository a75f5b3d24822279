"""The messages between peers: identity, envelopes, transport, membership and gossip.

The cores (`membership`, `gossip`, `limits`, joined in `core`) are pure state machines:
`handle(event, now) -> actions`, without sockets, clocks or threads. `host` drives them
on real sockets in one network thread, `joiner` for a node that is yet to join, `simulator` on a virtual clock.
docs/architecture.md draws a group's way from the socket to the update.

core         one node's whole machine             joiner     asking for a swarm's manifest, before there is a node
driver       its step, on any transport           host       the network thread, and the way to it
events       the cores' events and actions        config     limits, timing, clocks
refusals     who refused whom, and peers' clocks  identity   keys and node ids
value        immutable values                     lru        bounded mappings
storage      files that survive a crash
errors       what is raised

wire/        messages as bytes                    gossip/     getting items around
credentials/ what is signed and kept              limits/     bounds on what others do to us
membership/  links and nodes                      transport/  links, frames, sockets
simulator/   many nodes under a virtual clock
"""

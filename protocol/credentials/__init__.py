"""What is signed and kept: who a peer is, what a swarm's rules are, who may come in.

records   where a node is and what it says of itself       manifest  a swarm's name, rules and limits
grants    who may be in a swarm with an allowlist          invite    the line with which a person joins
revocations  what the owner took back, and who the owner is

`grants.Gatekeeper.admits` says who may be here. `membership` asks it at each hello. Each signed thing has a domain of
its own for its signature, a class, and a description of its bytes in docs/swarms.md.
"""

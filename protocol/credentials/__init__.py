"""What is signed and kept: who a peer is, what a swarm's rules are, who may come in."""

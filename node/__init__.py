"""The node: one policy, its rollouts, its training and its place in a swarm."""

"""Rollouts: from a round's groups to the swarm and back into what is trained on.

group           a question's completions with their rewards, and their wire form
sampling        what a round trains on: pure functions from groups to weighted completions
sharing         between the loop and the network; what the node asks the swarm for
ingest          what a peer's group must pass
replay_buffer   peers' verified groups, on disk and bounded
"""

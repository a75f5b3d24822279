"""One path to a swarm and from it.

opening   what stands between a node's folder and its peers: the network, what is shared, the replay buffer
drawing   a round's draw of peers' groups, with lies reported and uses remembered

A node's run opens its part of the swarm by `opening`, and its loop draws by `drawing`. Nothing here needs torch: no
model, no tokenizer, no engine.
"""

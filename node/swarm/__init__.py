"""A node among its peers: what it says of itself, and what it gives and takes.

peering     the host that meets peers, from a node's settings and folder
founding    found a swarm, invite to it, join it
sharing     groups to peers and from them; what the node asks the swarm for
reports     what each tells the others of itself, where the swarm asks for it
averaging   weights averaged with peers of the same architecture, in the background
"""

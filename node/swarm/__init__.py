"""A node among its peers: what it says of itself, and what it gives and takes.

peering       the host that meets peers, from a node's settings and folder
founding      a swarm's manifest, and the folder of its first node
inviting      invites, passes, and where to dial
joining       a folder becomes a node of a swarm
revoking      what the owner takes back, and whom it hands the swarm to
agreed_tasks  the manifest's tasks, and what a joiner takes from it
swarm_folder  what a node's folder holds of its swarm
sharing       groups to peers and from them; what the node asks the swarm for
reports       what each tells the others of itself, where the swarm asks for it
notices       what an operator is told of the network, in the log
averaging     weights averaged with peers of the same architecture, in the background
"""

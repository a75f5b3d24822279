"""Several nodes of one person: a run of N of them, on this machine or on a cluster.

local_swarm     one run: its folder, its nodes, its end
supervisor      starts, watches, restarts and stops the nodes
child_process   one node's process
progress        how far a running node is
live_table      the nodes in a terminal, as they run
swarm_page      the same in a browser
report          the same as a page with plots
on_ray          the nodes on a Ray cluster, each an actor
mirror          a node's folder there and here: what goes from one to the other
ray_cluster     a Ray cluster: how to reach it, and the files that travel to its machines
"""

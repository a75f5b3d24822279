"""Archives: groups of a swarm that allows it, kept for good, for whoever trains the next base.

store     the folder: signed groups, each in a file named by its id
judging   archived groups scored anew, by the tasks of this machine
keeping   a relay that keeps what it hears, once it is judged
rows      what is judged as rows for other trainers, with a card

Nothing here needs torch.
"""

"""How a member that lacks the group's state gets it: which state counts, and how it is fetched.

    state          what a member shares, its revision and its parts' hashes
    selection      which members' state counts
    transfer       one synchronisation: who fetches what from whom, until all hold the same
    fetch          parts from several sources at once, each verified by its hash

What is chosen is a pure function of what all members said; how it is fetched is nobody else's matter.
"""

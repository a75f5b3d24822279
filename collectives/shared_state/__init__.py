"""How a member that lacks the group's state gets it: which state counts, and how it is fetched."""

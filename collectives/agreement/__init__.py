"""What the members of a group agree on: who they are, and what became of each call. Pure; start at `agreement`."""

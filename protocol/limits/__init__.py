"""What a peer may cost us."""

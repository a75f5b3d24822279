"""Who is here: the links that a node keeps, the addresses that it knows, and who has failed."""

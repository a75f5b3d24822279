"""What `gossamer bench` runs: each module's `run` yields rows, one JSON object a line, last the ratios."""

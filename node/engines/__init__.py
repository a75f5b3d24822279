"""Who generates the rollouts: engines behind one protocol (`base.py`)."""

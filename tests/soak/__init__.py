"""Endurance: a swarm under churn and heavy traffic, watched for what grows.

run        starts it, kills and restarts nodes, measures, and judges:  python -m tests.soak.run --minutes 60
strangers  peers in a process of their own that publish valid groups at a steady rate
bounds     what may not be exceeded, and what may not grow
"""

"""A swarm's public page, served by a node that trains nothing.

history    what it remembers, on disk
standing   what others report to have learned from a node, by a rule that made-up identities cannot raise
"""

"""A swarm's public page, served by a node that trains nothing.

standing   what others report to have learned from a node, by a rule that made-up identities cannot raise
"""

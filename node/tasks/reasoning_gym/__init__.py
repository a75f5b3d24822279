"""Data sets of the package reasoning-gym.

data_sets            with scorers of our own, or the package's own in a cage
propositional_logic  does a statement follow from premises
"""

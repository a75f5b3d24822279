"""A swarm's public page, served by a node that trains nothing.

serving    a relay that reads what it passes on, and serves pages of it
site       the paths, and who may keep an answer for how long
view       what is shown at one moment; svg draws it, the templates beside them lay it out
history    what it remembers, on disk
standing   what others report to have learned from a node, by a rule that made-up identities cannot raise

To show something more: add it to `BoardView` and to a template, and to `BoardView.tree` for those who read JSON.
"""

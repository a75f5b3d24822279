"""Operations that keep a node in good order.

presets     settings that fit a model's size and the machine
diagnosis   is this machine, and this configuration, fit to run a node (`gossamer doctor`)
preflight   what can be told before torch is imported (`gossamer node`, `gossamer swarm`)
backup      a node's folder in one file, and back
health      is the node in this folder alive (`python -m node.operations.health`)
"""

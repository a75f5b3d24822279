"""Operations: start a node, and keep it in good order.

settling         a node's settings, from all their sources
given            tasks, rewards, rows and invites as a person names them
config_text      a configuration as TOML
presets          settings that fit a model's size and the machine
diagnosis        is this machine, and this configuration, fit to run a node (`gossamer doctor`)
swarm_diagnosis  is this swarm well, seen from outside (`gossamer doctor --swarm`)
preflight        what can be told before torch is imported (`gossamer node`, `gossamer swarm`)
trained          a checkpoint, a node's folder or a model, as a person names it
model_export     what a node trained as an ordinary model folder
health           is the node in this folder alive (`python -m node.operations.health`)
"""

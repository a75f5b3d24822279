"""The node: one policy, its rollouts, its training and its place in a swarm.

loop          the algorithm
run           a node put together and run to its end      relay           a node that trains nothing
config        every setting                               presets         those that fit a model and this machine
detection     which model and machine these are           footprint       the memory that a model takes
budget        when a run is over                          machine         what depends on the operating system
state_folder  a node's folder                             backup          the same in one file
journal       a record of each round                      replay          the rounds again, from that
founding      found, invite, join                         peering         the node's place in its swarm
local_swarm   N nodes on this machine                     supervisor      starts, watches and restarts them
diagnosis     what `gossamer doctor` finds                health          is the node of a folder alive?
signals       being asked to stop                         worker_process  what must not run in the node itself
names         short names for node ids                    errors          what a person can act on

policy/  the model        engines/   what generates        tasks/      what is asked
rollouts/  groups, and what is trained on      training/   the update     telemetry/  what is told of it all
cli/     the command      lab/       experiments

Libraries beneath it report their use unless they are told not to, and they look when they are imported. This is
imported before them in every process of a node, and what it says its child processes inherit. Who set a variable
keeps it.
"""

import os

for _variable in ("HF_HUB_DISABLE_TELEMETRY", "VLLM_NO_USAGE_STATS"):
    os.environ.setdefault(_variable, "1")

"""The node: one policy, its rollouts, its training and its place in a swarm.

Top layer first: a folder imports only what stands below it. A `layers` contract in pyproject.toml checks that.

cli/            a verb a file
grpo_trainer    a node that takes the arguments of TRL's trainer
api             a node for a notebook: `from gossamer import Node` (the package in public/)
lab/            experiments: arms x seeds, attacks, churn
board/          a swarm's public page
fleet/          several nodes on this machine
run             a node put together and run to its end
relay           a node that trains nothing
replay          a node's rounds again, from its journal
loop            the algorithm
operations/     settings settled, presets, diagnosis, export, backup
training/       the update
telemetry/      what is told of it all
journal         a record of each round
swarm/          a node among its peers
engines/        what generates
rollouts/       groups, and what is trained on
policy/         the model
tasks/          what is asked
state_folder    a node's folder
config          every setting
metrics         every metric
earlier_settings  those of earlier releases
errors          what a person can act on
processes/      processes and the operating system

Libraries beneath it report their use unless they are told not to, and they look when they are imported. This is
imported before them in every process of a node, and what it says its child processes inherit. A variable that was set
keeps its value.
"""

import logging
import os

for _variable in ("HF_HUB_DISABLE_TELEMETRY", "VLLM_NO_USAGE_STATS"):
    os.environ.setdefault(_variable, "1")

# It warns at each import on a processor that a faster kernel, which it would fetch, is not there.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

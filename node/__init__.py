"""The node: one policy, its rollouts, its training and its place in a swarm.

Top layer first: a folder imports only what stands below it. A `layers` contract in pyproject.toml checks that.
docs/architecture.md draws a round, and a peer's group on its way, function by function.

cli/            the `gossamer` command, one file for each verb
grpo_trainer    a node that takes the arguments of TRL's trainer
swarm_rollouts  TRL's own trainer, as a member
grpo_metrics    what TRL's trainer says of an evaluation
grpo_config     what becomes of each field of TRL's configuration
api             a node for a notebook: `from gossamer import Node` (the package in public/)
lab/            experiments: arms x seeds, attacks, churn
board/          a swarm's public page
fleet/          several nodes on this machine
run             a node put together and run to its end
relay           a node that trains nothing
loop            the algorithm
operations/     settings settled, presets, diagnosis, export
training/       the update
archive/        a swarm's groups, kept for good
exchange/       one path to a swarm and from it, for any trainer
telemetry/      logs, metrics, plots, status and dashboard
swarm/          a node among its peers
engines/        what generates
rollouts/       groups, and what is trained on
policy/         the model
tasks/          what is asked
state_folder    a node's folder
config          every setting
metrics         every metric
errors          what a person can act on
processes/      processes and the operating system

Some libraries report their use unless a variable forbids it. They read the variable when they are imported, so it is
set here, before that. Child processes inherit it. A value that was set before stays.
"""

import logging
import os

for _variable in ("HF_HUB_DISABLE_TELEMETRY", "VLLM_NO_USAGE_STATS"):
    os.environ.setdefault(_variable, "1")

# On a CPU it warns at each import that a faster kernel, which it would download, is missing.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

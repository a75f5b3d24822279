"""The node: one policy, its rollouts, its training and its place in a swarm.

Libraries beneath it report their use unless they are told not to, and they look when they are imported. This is
imported before them in every process of a node, and what it says its child processes inherit. Who set a variable
keeps it.
"""

import os

for _variable in ("HF_HUB_DISABLE_TELEMETRY", "VLLM_NO_USAGE_STATS"):
    os.environ.setdefault(_variable, "1")

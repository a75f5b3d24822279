"""Metrics rows as a real node writes them, made up."""

import math
import random
from typing import Any


def make_row(node: int, number: int, began: float = 1_800_000_000.0) -> dict[str, Any]:
    """Return round `number` (from 1) of node `node`: sparse at first, learning with time."""
    rng = random.Random(node * 100_003 + number)
    reward = 0.6 / (1 + math.exp(-(number - 140 - 9 * node) / 30)) + rng.gauss(0.01, 0.02)
    generate, train, share = rng.gauss(0.14, 0.01), rng.gauss(0.09, 0.01), rng.gauss(0.006, 0.001)
    return {
        "round": number,
        "policy_version": number - 1,
        "began": began + number * 0.26,
        "time": began + number * 0.26 + 0.25,
        "reward": max(reward, 0.0),
        "groups_local": 4,
        "groups_external": min(4, number - 1),
        "generated": 32,
        "tokens_generated": 120,
        "tokens_trained": 100,
        "loss": rng.gauss(0, 0.01),
        "swarm/peers": 3,
        "swarm/buffer": 12 * number,
        "swarm/bytes_sent": 5_000 * number,
        "swarm/bytes_received": 14_000 * number,
        "swarm/rejected": {"unknown_task": number // 3, "false_reward": number // 50} if node % 2 else {},
        "time/questions": 0.002,
        "time/generate": generate,
        "time/verify": 0.003,
        "time/share": share,
        "time/draw": 0.001,
        "time/train": train,
        "time/round": generate + train + share + 0.02,
    }

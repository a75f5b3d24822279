"""A round's metrics: what its own groups, the peers' groups that it drew, and its samples come to. Pure.

`node.metrics` declares each name.
"""

import statistics
from collections import Counter
from collections.abc import Sequence

from node.engines.episodes import Played
from node.rollouts.draw import Draw
from node.rollouts.group import EncodedGroup, Group
from node.rollouts.rule import Sample, effective_size, external_share, is_informative
from node.rollouts.screening import BLAMELESS
from node.tasks.scoring.verdicts import OutOfTime, Scored
from node.telemetry.metrics_file import Row

LEFT_OUT = ("swarm/too_long", "swarm/over_long", "swarm/too_surprising", "swarm/quotes_held_out")
"""Counts of peers' completions."""


def metrics_of_own(
    own: Sequence[EncodedGroup], completions: Sequence[Sequence[Played]], retokenized: Sequence[bool]
) -> Row:
    """Return the metrics of what a node generated: `own` groups of it could be scored.

    `retokenized` tells of each scored completion whether its text stands for other tokens than were sampled.
    """
    episodes = [episode for group in completions for episode in group]
    rewards = [reward for group in own for reward in group.group.rewards]
    return {
        **({"reward": statistics.fmean(rewards), "reward_std": statistics.pstdev(rewards)} if rewards else {}),
        **_rewards_by_name([encoded.group for encoded in own]),
        "groups_informative": sum(is_informative(group.group.rewards) for group in own),
        "generated": len(episodes),
        "unscorable": len(episodes) - len(rewards),
        "out_of_time": sum(isinstance(reward, OutOfTime) for reward in rewards),
        "tokens_generated": sum(episode.sampled for episode in episodes),
        "completions/finished": statistics.fmean(episode.finished for episode in episodes),
        "completions/retokenized": statistics.fmean(retokenized) if retokenized else 0.0,
        "completions/mean_length": statistics.fmean(episode.sampled for episode in episodes),
        "completions/turns": statistics.fmean(len(episode.turns) for episode in episodes),
    }


def metrics_of_draw(draw: Draw, external: Sequence[Sample], version: int) -> Row:
    """Return the metrics of what a round drew from peers, and of the `external` samples that it trains on.

    Ages are how long the drawn groups have waited here. A peer's version is its own count of rounds and may be
    anything: the median of how far behind `version` the makers say that they were is shown, and decides nothing.
    """
    used = draw.used
    row: Row = {
        "tokens_scored": draw.tokens_scored,
        "groups_external": len({sample.group for sample in external}),
        "groups_unusable": sum(group.reason in BLAMELESS for group in draw.refused),
        **{f"swarm/{why}": count for why, count in draw.left_out.items()},
        "swarm/taught_by": dict(Counter(candidate.peer for candidate in used)),
    }
    if used:
        seconds = [draw.taken_at - candidate.received for candidate in used]
        rounds = [version + 1 - candidate.first_round for candidate in used]
        lags = [version - encoded.group.policy_version for encoded in draw.usable.values()]
        row |= {
            "swarm/age_seconds": statistics.fmean(seconds),
            "swarm/age_seconds_max": max(seconds),
            "swarm/age_rounds": statistics.fmean(rounds),
            "swarm/age_rounds_max": max(rounds),
            "swarm/claimed_lag": statistics.median(lags),
        }
    return row


def metrics_of_samples(samples: Sequence[Sample], iterations: int) -> Row:
    """Return the metrics of what a round trains on, `iterations` times."""
    return {
        "trained": sum(sample.advantage != 0 for sample in samples),
        "tokens_trained": iterations * sum(sample.sampled for sample in samples if sample.advantage != 0),
        "swarm/external_share": external_share(samples),
        "effective_samples": effective_size(samples),
    }


def prompts_trained_on(samples: Sequence[Sample], iterations: int) -> int:
    """Return how many tokens of prompts and observations a round's update reads: a prompt once for its group."""
    trained = [sample for sample in samples if sample.advantage != 0]
    prompts = {sample.group: len(sample.prompt) for sample in trained}
    return iterations * (sum(prompts.values()) + sum(len(sample.given) for sample in trained))


def _rewards_by_name(groups: Sequence[Group]) -> Row:
    """Return mean and spread of the rewards of each task that was asked, and of each of a task's reward functions.

    The names are as TRL's for a reward function.
    """
    rewards: dict[str, list[float]] = {}
    for group in groups:
        rewards.setdefault(group.task.name, []).extend(group.rewards)
        for reward in group.rewards:
            for function, part in reward.parts.items() if isinstance(reward, Scored) else ():
                rewards.setdefault(function, []).append(part)
    row: Row = {}
    for name, values in rewards.items():
        row |= {f"rewards/{name}/mean": statistics.fmean(values), f"rewards/{name}/std": statistics.pstdev(values)}
    return row

"""What TRL's `GRPOTrainer` says of an evaluation: metrics and loss of sampled completions to held-out rows.

TRL evaluates by batches and gives the mean over them. Here all completions are one batch. The weights that are
evaluated have drawn the completions, so every ratio of the loss is 1. Then nothing is clipped, and most losses follow
from advantages and lengths; the others need the completions' log-probabilities.

Left out: `num_tokens`, which would count the prompts of the training, and `model_preparation_time`.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from node.engines.episodes import Played
from node.policy.load import Policy
from node.training.evaluation import Answers
from node.training.likelihood import of_each_token

STD_FLOOR = 1e-4  # TRL's, beneath which a group's standard deviation divides no advantage
CLIPPING = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")  # losses with these metrics
CLIPPED = ("low_mean", "low_min", "high_mean", "high_max", "region_mean")


def evaluation_metrics(policy: Policy, found: Answers, args: Any) -> dict[str, float]:
    """Return TRL's metrics of an evaluation, by its names without a prefix; {} if nothing was answered.

    Args:
        policy: which has drawn the completions.
        found: questions with as many completions each.
        args: a `GRPOConfig`, for its loss, advantages and temperature.
    """
    outcomes = [outcome for of_task in found.values() for outcome in of_task]
    if not outcomes:
        return {}
    rewards = torch.tensor([list(map(float, outcome.rewards)) for outcome in outcomes])  # (questions, completions)
    episodes = [answer for outcome in outcomes for answer in outcome.answers]
    rows = [(policy.encode_prompt(outcome.item), answer.tokens) for outcome in outcomes for answer in outcome.answers]
    told = [of.cpu() for of in of_each_token(policy, rows, _logp_and_entropy, args.temperature)]  # (tokens, 2) each
    parts: dict[str, list[float]] = {}
    for outcome in outcomes:
        for reward in outcome.rewards:
            for name, part in getattr(reward, "parts", {}).items():
                parts.setdefault(name, []).append(part)
    counts = [len(of) for of in told]
    return {
        "loss": loss(advantages(rewards, args.scale_rewards).flatten(), [of[:, 0] for of in told], episodes, args),
        "reward": rewards.mean().item(),
        "reward_std": _std(rewards.flatten().tolist()),
        "frac_reward_zero_std": statistics.fmean(len(set(group)) == 1 for group in rewards.tolist()),
        **{f"rewards/{name}/mean": statistics.fmean(values) for name, values in parts.items()},
        **{f"rewards/{name}/std": _std(values) for name, values in parts.items()},
        **_lengths(episodes),
        "entropy": sum(of[:, 1].sum().item() for of in told) / max(sum(counts), 1),
        **({f"clip_ratio/{name}": 0.0 for name in CLIPPED} if args.loss_type in CLIPPING else {}),
    }


def advantages(rewards: torch.Tensor, scale_rewards: Any) -> torch.Tensor:
    """Return rewards (questions, completions) less the mean of their question; by "group", over its deviation."""
    centred = rewards - rewards.mean(1, keepdim=True)
    if str(scale_rewards) in ("none", "False") or rewards.shape[1] < 2:
        return centred
    return centred / (rewards.std(1, keepdim=True) + STD_FLOOR)


def loss(advantage: torch.Tensor, logps: Sequence[torch.Tensor], made: Sequence[Played], args: Any) -> float:
    """Return TRL's loss of completions at the weights that drew them.

    Args:
        advantage: of each completion.
        logps: of its tokens, in nats.
        made: the completions; those that were cut off count for nothing if `args.mask_truncated_completions`.
        args: a `GRPOConfig`.
    """
    counts = torch.tensor(
        [0 if args.mask_truncated_completions and not episode.finished else episode.sampled for episode in made]
    )
    match args.loss_type:
        case "cispo":
            high = args.epsilon if args.epsilon_high is None else args.epsilon_high
            of_each = -min(1.0, high) * advantage * torch.stack([of.mean() for of in logps])
        case "vespo":
            of_each = -advantage * torch.stack([of.mean() for of in logps])
        case "sapo":
            warm, cold = args.sapo_temperature_pos, args.sapo_temperature_neg
            of_each = -advantage * 2 / torch.where(advantage > 0, warm, cold)
        case _:
            of_each = -advantage
    summed = of_each * counts  # over a completion's tokens
    match args.loss_type:
        case "grpo" | "sapo":
            return (summed / counts.clamp(min=1)).mean().item()
        case "dr_grpo":
            return (summed.mean() / args.max_completion_length).item()
        case "luspo":
            return summed.mean().item()
    return (summed.sum() / counts.sum().clamp(min=1)).item()


def _logp_and_entropy(logps: torch.Tensor, sampled: torch.Tensor) -> torch.Tensor:
    return torch.stack([logps.gather(-1, sampled[:, None])[:, 0], -(logps.exp() * logps).sum(-1)], -1)


def _lengths(made: Sequence[Played]) -> Mapping[str, float]:
    lengths = [episode.sampled for episode in made]
    ended = [episode.sampled for episode in made if episode.finished] or [0]
    found = {
        "clipped_ratio": statistics.fmean(not episode.finished for episode in made),
        "mean_length": statistics.fmean(lengths),
        "min_length": min(lengths),
        "max_length": max(lengths),
        "mean_terminated_length": statistics.fmean(ended),
        "min_terminated_length": min(ended),
        "max_terminated_length": max(ended),
    }
    return {f"completions/{name}": float(value) for name, value in found.items()}


def _std(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0

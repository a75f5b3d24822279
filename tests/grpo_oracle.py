"""The loss of a round, once more, in plain PyTorch: what TRL at our seam must agree with.

Written from the papers' formulas: GRPO (arXiv 2402.03300, eq. 3), DAPO (2503.14476, eq. 8),
Dr. GRPO (2503.20783, section 3.2), CISPO (2506.13585, eq. 4), GSPO (2507.18071, eq. 7), Soft Adaptive
Policy Optimization (2511.20347), LUSPO (2602.05261), VESPO (2602.10693). No batch, no padding, no
micro-batches: one sequence at a time, then the aggregation over the whole round. What an environment said in between is
read, and is no token of a sequence.

Rows have weights. Where a paper takes the mean over sequences, ours sums them by their weights.
Where it takes the mean over all tokens, ours takes it over the tokens of all own sequences, and of
each external group, and sums these means by the weight of their sequences. Either sum is divided by the
weight of a round that has all that the node is configured for, and not by that of the rows which are there.
"""

from collections.abc import Sequence

import torch

from node.rollouts.rule import Sample


def completion_logps(model: torch.nn.Module, row: Sample, temperature: float) -> torch.Tensor:
    """Return the log-probability of each token of `row` that a policy drew, shape (tokens,)."""
    ids = torch.tensor([[*row.prompt, *row.completion]])
    logits = model(input_ids=ids).logits[0, len(row.prompt) - 1 : -1].float() / temperature
    logps = logits.log_softmax(-1).gather(1, torch.tensor(row.completion)[:, None])[:, 0]
    return logps[drawn(row)]


def drawn(row: Sample) -> torch.Tensor:
    """Return which tokens of `row` a policy drew, and no environment said, (tokens,) bool."""
    return torch.tensor([at not in row.given for at in range(len(row.completion))], dtype=torch.bool)


def round_loss(
    logps: Sequence[torch.Tensor],
    old_logps: Sequence[torch.Tensor],
    rows: Sequence[Sample],
    full_weight: float,
    loss_type: str,
    epsilon: float,
    epsilon_high: float,
    max_completion_length: int,
    level: str = "token",
    corrections: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return the loss of a round: one tensor of log-probabilities a row.

    `full_weight` is that of a round which has all that it is configured for.
    `corrections` are what each row's advantages are multiplied by, one for each token, where there are any.
    """
    sums, lengths, weights = [], [], []
    for at, (new, old, row) in enumerate(zip(logps, old_logps, rows, strict=True)):
        advantage = torch.tensor(row.advantage).expand(len(new))
        if corrections is not None:
            advantage = advantage * corrections[at]
        log_ratio = new - old
        ratio = (log_ratio.sum() / max(len(new), 1)).exp() if level == "sequence" else log_ratio.exp()
        if loss_type == "cispo":
            objective = ratio.clamp(max=epsilon_high).detach() * advantage * new
        elif loss_type == "sapo":
            temperature = torch.where(advantage > 0, 1.0, 1.05)
            objective = 4 / temperature * torch.sigmoid(temperature * (ratio - 1)) * advantage
        elif loss_type == "vespo":
            k, rate = torch.where(advantage >= 0, 2.0, 3.0), torch.where(advantage >= 0, 3.0, 2.0)
            weight = log_ratio.sum().exp().detach()
            objective = weight**k * (rate * (1 - weight)).exp() * advantage * new
        else:
            objective = torch.minimum(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon_high) * advantage)
        sums.append(-objective.sum())
        lengths.append(len(new))
        weights.append(row.weight)
    if loss_type in ("grpo", "sapo"):
        terms = [weight * total / max(length, 1) for weight, total, length in zip(weights, sums, lengths, strict=True)]
    elif loss_type == "luspo":
        terms = [weight * total for weight, total in zip(weights, sums, strict=True)]
    elif loss_type == "dr_grpo":
        terms = [weight * total / max_completion_length for weight, total in zip(weights, sums, strict=True)]
    else:
        external = sorted({row.group for row in rows if row.external})
        sides = [[at for at, row in enumerate(rows) if not row.external]]
        sides += [[at for at, row in enumerate(rows) if row.external and row.group == number] for number in external]
        terms = [
            sum(weights[at] for at in side) * sum(sums[at] for at in side) / sum(lengths[at] for at in side)
            for side in sides
            if sum(lengths[at] for at in side)
        ]
    return torch.stack(terms).sum() / full_weight


def clipped_fraction(
    logps: Sequence[torch.Tensor],
    old_logps: Sequence[torch.Tensor],
    advantages: Sequence[float],
    low: float,
    high: float,
) -> float:
    """Return the part of the tokens with an advantage whose clipping takes their gradient away."""
    clipped = tokens = 0
    for new, old, advantage in zip(logps, old_logps, advantages, strict=True):
        ratio = (new - old).exp()
        beyond = ratio > 1 + high if advantage > 0 else ratio < 1 - low
        clipped += int(beyond.sum()) if advantage else 0
        tokens += len(new) if advantage else 0
    return clipped / tokens

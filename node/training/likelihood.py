"""How likely completions are under a policy, without a gradient: for rules and bounds that ask, and for evaluations."""

import math
from collections.abc import Iterator, Sequence

import torch

from node.policy import Policy

ROWS = 32  # sequences that go through the model at once
Row = tuple[Sequence[int], Sequence[int]]  # the tokens of a prompt, and of its completion


@torch.no_grad()
def log_distributions(policy: Policy, rows: Sequence[Row], temperature: float = 1.0) -> Iterator[torch.Tensor]:
    """Yield, for each row, the log-probabilities (T, V), in nats, from which its completion's T tokens were drawn."""
    device = policy.model.device
    training = policy.model.training
    policy.model.eval()
    for start in range(0, len(rows), ROWS):
        part = rows[start : start + ROWS]
        width = max(len(prompt) + len(made) for prompt, made in part)
        whole = [[*prompt, *made] for prompt, made in part]
        ids = torch.tensor([row + [policy.pad_token_id] * (width - len(row)) for row in whole], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in whole], device=device)
        with policy.autocast():
            logits = policy.model(input_ids=ids, attention_mask=mask).logits
        for (prompt, made), found in zip(part, logits, strict=True):
            drawn_from = found[len(prompt) - 1 : len(prompt) + len(made) - 1].float()
            yield (drawn_from / temperature).log_softmax(-1)
    policy.model.train(training)


def mean_logprobs(policy: Policy, rows: Sequence[Row], temperature: float = 1.0) -> list[float]:
    """Return the mean log-probability, in nats a token, of each row's completion; each has a token at least."""
    return [
        float(found.gather(-1, torch.tensor(made, device=found.device)[:, None]).mean())
        for (_, made), found in zip(rows, log_distributions(policy, rows, temperature), strict=True)
    ]


def surprises(policy: Policy, rows: Sequence[Row], temperature: float = 1.0) -> list[float]:
    """Return how surprising each row's completion of T tokens is, in nats: -ln(T t), t the least of its tokens' tails.

    A token's tail is the probability, under the policy, of all tokens that are no likelier than it at its place. Of
    completions that the policy drew itself, with T tokens, a part of at most exp(-s) is more surprising than s,
    whatever model it is and however large its vocabulary: a tail of less than u is drawn with a probability of at most
    u, and there are T of them. Likely tokens around an unlikely one do not hide it, as they do in a mean.
    """
    return [
        -math.log(max(len(made) * float(_tails(found, made).min()), math.ulp(0.0)))
        for (_, made), found in zip(rows, log_distributions(policy, rows, temperature), strict=True)
    ]


def _tails(distributions: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    """Return the tail (T,) of each token, from the log-probabilities (T, V) that it was drawn from."""
    drawn = distributions.gather(-1, torch.tensor(tokens, device=distributions.device)[:, None])
    return (distributions.exp() * (distributions <= drawn)).sum(-1)

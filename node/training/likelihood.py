"""How likely completions are under a policy, without a gradient: for rules and bounds that ask, and for evaluations.

A distribution has as many numbers as the vocabulary, and a completion has one at each place: no more of them are in
memory than `LOGITS` says, or than one sequence has.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch

from node.policy import Policy

ROWS = 32  # sequences that go through the model at once, at most
LOGITS = 1 << 27  # numbers that it may return of them, 512 MiB as float32: of a large vocabulary that is few sequences
PLACES = 1 << 24  # numbers of one sequence that are looked at together
Row = tuple[Sequence[int], Sequence[int]]  # the tokens of a prompt, and of its completion

# From log-probabilities (t, V), in nats, and the tokens (t,) that were drawn there, to something of each (t, ...).
Of = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@torch.no_grad()
def of_each_token(policy: Policy, rows: Sequence[Row], of: Of, temperature: float = 1.0) -> Iterator[torch.Tensor]:
    """Yield, for each row, what `of` says of the distributions from which its completion's T tokens were drawn."""
    device, vocabulary = policy.model.device, policy.model.config.get_text_config().vocab_size
    slice_of = max(1, PLACES // vocabulary)
    training = policy.model.training
    policy.model.eval()
    for part in _parts(rows, vocabulary):
        width = max(len(prompt) + len(made) for prompt, made in part)
        whole = [[*prompt, *made] for prompt, made in part]
        ids = torch.tensor([row + [policy.pad_token_id] * (width - len(row)) for row in whole], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in whole], device=device)
        with policy.autocast():
            logits = policy.model(input_ids=ids, attention_mask=mask).logits
        for (prompt, made), found in zip(part, logits, strict=True):
            places = torch.split(found[len(prompt) - 1 : len(prompt) + len(made) - 1], slice_of)
            tokens = torch.split(torch.tensor(made, device=device), slice_of)
            yield torch.cat(
                [
                    of((some.float() / temperature).log_softmax(-1), drawn)
                    for some, drawn in zip(places, tokens, strict=True)
                ]
            )
    policy.model.train(training)


def _parts(rows: Sequence[Row], vocabulary: int) -> Iterator[list[Row]]:
    """Cut rows into parts that may go through the model at once."""
    part: list[Row] = []
    width = 0
    for prompt, made in rows:
        width = max(width, len(prompt) + len(made))
        if part and (len(part) == ROWS or (len(part) + 1) * width * vocabulary > LOGITS):
            yield part
            part, width = [], len(prompt) + len(made)
        part.append((prompt, made))
    if part:
        yield part


def mean_logprobs(policy: Policy, rows: Sequence[Row], temperature: float = 1.0) -> list[float]:
    """Return the mean log-probability, in nats a token, of each row's completion; each has a token at least."""
    return [float(found.mean()) for found in of_each_token(policy, rows, _drawn, temperature)]


def entropies(policy: Policy, rows: Sequence[Row], temperature: float = 1.0) -> list[torch.Tensor]:
    """Return the entropies (T,), in nats, of the distributions from which each row's completion was drawn."""
    return list(of_each_token(policy, rows, lambda logps, _: -(logps.exp() * logps).sum(-1), temperature))


def surprises(policy: Policy, rows: Sequence[Row], temperature: float = 1.0) -> list[float]:
    """Return how surprising each row's completion of T tokens is, in nats: -ln(T t), t the least of its tokens' tails.

    A token's tail is the probability, under the policy, of all tokens that are no likelier than it at its place. Of
    completions that the policy drew itself, with T tokens, a part of at most exp(-s) is more surprising than s,
    whatever model it is and however large its vocabulary: a tail of less than u is drawn with a probability of at most
    u, and there are T of them. Likely tokens around an unlikely one do not hide it, as they do in a mean.
    """
    return [
        -math.log(max(len(tails) * float(tails.min()), math.ulp(0.0)))
        for tails in of_each_token(policy, rows, _tails, temperature)
    ]


def _drawn(logps: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the log-probability (t,) of each token."""
    return logps.gather(-1, tokens[:, None]).squeeze(-1)


def _tails(logps: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the tail (t,) of each token."""
    return (logps.exp() * (logps <= _drawn(logps, tokens)[:, None])).sum(-1)

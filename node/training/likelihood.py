"""How likely completions are under a policy, without a gradient: for rules and bounds that ask, and for evaluations.

A distribution has as many numbers as the vocabulary, and a completion has one at each place: no more of them are in
memory than `LOGITS` says, or than one completion has. Prompts have none: the head runs over completions alone.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from node.policy.load import Policy
from node.training.head import only_at

ROWS = 32  # sequences that go through the model at once, at most
COMMON = 1 / 2000  # a token this likely is no surprise: SmolLM2's right answers have them, planted text hardly ever
LOGITS = (
    1 << 27
)  # numbers that it may return of them, 512 MiB as float32: of a large vocabulary that is few completions
PLACES = 1 << 24  # numbers of one sequence that are looked at together
Row = tuple[Sequence[int], Sequence[int]]  # the tokens of a prompt, and of its completion

# From log-probabilities (t, V), in nats, and the tokens (t,) that were drawn there, to something of each (t, ...).
Of = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Distributions = Callable[[Of], torch.Tensor]  # of a completion's T tokens: from that to what it says of all, (T, ...)


def of_each_token(policy: Policy, rows: Sequence[Row], of: Of, temperature: float = 1.0) -> Iterator[torch.Tensor]:
    """Yield, for each row, what `of` says of the distributions from which its completion's T tokens were drawn."""
    return (distributions(of) for distributions in _distributions(policy, rows, temperature))


@torch.no_grad()
def _distributions(policy: Policy, rows: Sequence[Row], temperature: float) -> Iterator[Distributions]:
    """Yield the distributions from which each row's completion was drawn, with the tokens that were."""
    device, vocabulary = policy.model.device, policy.model.config.get_text_config().vocab_size
    slice_of = max(1, PLACES // vocabulary)
    training = policy.model.training
    policy.model.eval()
    for part in _parts(rows, vocabulary):
        width = max(len(prompt) + len(made) for prompt, made in part)
        whole = [[*prompt, *made] for prompt, made in part]
        ids = torch.tensor([row + [policy.pad_token_id] * (width - len(row)) for row in whole], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in whole], device=device)
        begins = [at * width + len(prompt) - 1 for at, (prompt, _) in enumerate(part)]
        places = [begin + at for begin, (_, made) in zip(begins, part, strict=True) for at in range(len(made))]
        with policy.autocast(), only_at(policy.model, torch.tensor(places, device=device)):
            logits = policy.model(input_ids=ids, attention_mask=mask).logits.squeeze(0)
        for (_, made), found in zip(part, torch.split(logits, [len(made) for _, made in part]), strict=True):
            tokens = torch.split(torch.tensor(made, device=device), slice_of)
            yield partial(_by_slices, list(zip(torch.split(found, slice_of), tokens, strict=True)), temperature)
    policy.model.train(training)


def _by_slices(slices: Sequence[tuple[torch.Tensor, torch.Tensor]], temperature: float, of: Of) -> torch.Tensor:
    """Return what `of` says of the distributions that logits (t, V) and the tokens (t,) drawn there make, (T, ...)."""
    return torch.cat([of((logits.float() / temperature).log_softmax(-1), drawn) for logits, drawn in slices])


def _parts(rows: Sequence[Row], vocabulary: int) -> Iterator[list[Row]]:
    """Cut rows into parts that may go through the model at once."""
    part: list[Row] = []
    numbers = 0
    for row in rows:
        of_row = len(row[1]) * vocabulary
        if part and (len(part) == ROWS or numbers + of_row > LOGITS):
            yield part
            part, numbers = [], 0
        part.append(row)
        numbers += of_row
    if part:
        yield part


def mean_logprobs(policy: Policy, rows: Sequence[Row], temperature: float = 1.0) -> list[float]:
    """Return the mean log-probability, in nats a token, of each row's completion; each has a token at least."""
    return [float(found.mean()) for found in of_each_token(policy, rows, _drawn, temperature)]


def entropies(policy: Policy, rows: Sequence[Row], temperature: float = 1.0) -> list[torch.Tensor]:
    """Return the entropies (T,), in nats, of the distributions from which each row's completion was drawn."""
    return list(of_each_token(policy, rows, lambda logps, _: -(logps.exp() * logps).sum(-1), temperature))


def surprises(policy: Policy, rows: Sequence[Row], temperature: float = 1.0) -> list[float]:
    """Return how surprising each row's completion is under the policy, in nats: see `surprise`."""
    return [surprise(distributions) for distributions in _distributions(policy, rows, temperature)]


def surprise(distributions: Distributions) -> float:
    """Return how surprising a completion is, in nats: -ln n, with p the probability of its least likely token and

        n = sum over its places of the probability there of all tokens that are no likelier than p

    which is how many tokens as unlikely as that one the policy would say in such a completion: so it is large where
    a token stands out, however many rare ones there are beside it at its place, and sure tokens around it hide
    nothing, as they do in a mean. It is 0 where p is at least `COMMON`, or n at least 1. Of completions that the policy
    drew itself a part of exp(-s) at most is more surprising than s, where what is said at one place does not change
    what is likely at the others; of models that were measured about that part is, without the first exception.

    Others who go by the least likely tokens of a text: ONION (arXiv 2011.10369) against planted triggers, Min-K% Prob
    (arXiv 2310.16789) to tell what a model was trained on.

    Args:
        distributions: from which its tokens were drawn, with these tokens.
    """
    least = distributions(_drawn).min()
    if least >= math.log(COMMON):
        return 0.0
    rare = distributions(lambda logps, _: torch.where(logps <= least, logps.exp(), 0).sum(-1))
    return max(0.0, -math.log(max(float(rare.sum()), math.ulp(0.0))))


def _drawn(logps: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the log-probability (t,) of each token."""
    return logps.gather(-1, tokens[:, None]).squeeze(-1)

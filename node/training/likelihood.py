"""How likely completions are under a policy, without a gradient: for the bound on surprise, and for evaluations.

A completion has a distribution at each place, with as many numbers as the vocabulary. At most `LOGITS` of these numbers
are in memory, or those of one completion. Prompts need none: the head runs over completions alone.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import structlog
import torch

from node.errors import UserError
from node.policy.load import Policy
from node.processes.machine import free_memory, is_out_of_memory
from node.rollouts.draw import ScoredRow
from node.training.head import only_at

log = structlog.get_logger()

ROWS = 32  # sequences that go through the model at once, at most
COMMON = 1 / 2000  # a token this likely is no surprise: SmolLM2's right answers have them, planted text hardly ever
LOGITS = 1 << 27  # that one pass may return, 512 MiB as float32: few completions, if the vocabulary is large
PLACES = 1 << 24  # numbers of one sequence that are looked at together

# From log-probabilities (t, V), in nats, and the tokens (t,) that were sampled there, to something of each (t, ...).
Of = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Distributions = Callable[[Of], torch.Tensor]  # of a row's T sampled tokens: from that to what it says of all, (T, ...)


def of_each_token(
    policy: Policy, rows: Sequence[ScoredRow], of: Of, temperature: float = 1.0
) -> Iterator[torch.Tensor]:
    """Yield `of`, for each row, of the distributions from which its policy drew T tokens."""
    return (distributions(of) for distributions in _distributions(policy, rows, temperature))


def _distributions(policy: Policy, rows: Sequence[ScoredRow], temperature: float) -> Iterator[Distributions]:
    """Yield the distributions from which each row's tokens were sampled, with these tokens."""
    device, vocabulary = policy.model.device, policy.model.config.get_text_config().vocab_size
    slice_of = max(1, PLACES // vocabulary)
    training = policy.model.training
    policy.model.eval()
    waiting = deque(_parts(rows, vocabulary))
    while waiting:
        part = waiting.popleft()
        logits = _logits(policy, part)
        if logits is None:
            free_memory()
            most = len(part) // 2
            waiting = deque(some[at : at + most] for some in [part, *waiting] for at in range(0, len(some), most))
            continue
        for (_, made), found in zip(part, torch.split(logits, [made.sampled for _, made in part]), strict=True):
            sampled = [token for at, token in enumerate(made.ids) if at not in made.given]
            tokens = torch.split(torch.tensor(sampled, device=device), slice_of)
            yield partial(_by_slices, list(zip(torch.split(found, slice_of), tokens, strict=True)), temperature)
    policy.model.train(training)


@torch.no_grad()
def _logits(policy: Policy, rows: Sequence[ScoredRow]) -> torch.Tensor | None:
    """Return the logits of the rows' sampled tokens, one after another, (N, V); None without memory for so many rows.

    Raises:
        UserError: there is none for a single row.
    """
    device = policy.model.device
    width = max(len(prompt) + len(made.ids) for prompt, made in rows)
    whole = [[*prompt, *made.ids] for prompt, made in rows]
    ids = torch.tensor([row + [policy.pad_token_id] * (width - len(row)) for row in whole], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in whole], device=device)
    begins = [at * width + len(prompt) - 1 for at, (prompt, _) in enumerate(rows)]
    places = [
        begin + at
        for begin, (_, made) in zip(begins, rows, strict=True)
        for at in range(len(made.ids))
        if at not in made.given
    ]
    try:
        with policy.autocast(), only_at(policy.model, torch.tensor(places, device=device)):
            logits: torch.Tensor = policy.model(input_ids=ids, attention_mask=mask).logits.squeeze(0)
        return logits
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if len(rows) == 1:
            raise UserError(
                f"out of memory for the likelihood of one completion and its prompt ({width} tokens): bound texts by "
                "engine.max_prompt_length and engine.max_completion_length, or choose a smaller model"
            ) from error
        log.warning("out of memory: fewer completions at once for their likelihood", rows=len(rows) // 2)
        return None


def _by_slices(slices: Sequence[tuple[torch.Tensor, torch.Tensor]], temperature: float, of: Of) -> torch.Tensor:
    """Return what `of` says of the distributions of logits (t, V), with the tokens (t,) sampled there: (T, ...)."""
    return torch.cat([of((logits.float() / temperature).log_softmax(-1), sampled) for logits, sampled in slices])


def _parts(rows: Sequence[ScoredRow], vocabulary: int) -> Iterator[list[ScoredRow]]:
    """Cut rows into parts that may go through the model at once."""
    part: list[ScoredRow] = []
    numbers = 0
    for row in rows:
        of_row = row[1].sampled * vocabulary
        if part and (len(part) == ROWS or numbers + of_row > LOGITS):
            yield part
            part, numbers = [], 0
        part.append(row)
        numbers += of_row
    if part:
        yield part


def entropies(policy: Policy, rows: Sequence[ScoredRow], temperature: float = 1.0) -> list[torch.Tensor]:
    """Return the entropies (T,), in nats, of the distributions from which each row's completion was sampled."""
    return list(of_each_token(policy, rows, lambda logps, _: -(logps.exp() * logps).sum(-1), temperature))


def surprises(policy: Policy, rows: Sequence[ScoredRow], temperature: float = 1.0) -> list[float]:
    """Return how surprising each row's completion is under the policy, in nats: see `surprise`."""
    return [surprise(distributions) for distributions in _distributions(policy, rows, temperature)]


def surprise(distributions: Distributions) -> float:
    """Return how surprising a completion is, in nats: -ln n, with p the probability of its least likely token and

        n = sum over its places of the probability there of all tokens that are no likelier than p

    n is how many tokens as unlikely as that one the policy would draw in such a completion. So the surprise is large
    where a token stands out, however many other rare tokens its place has, and sure tokens around it hide nothing, as
    they do in a mean. It is 0 if p is at least `COMMON`, or n at least 1. If places were independent, a part of at most
    exp(-s) of the policy's own completions would be more surprising than s; of measured models about that part is,
    without the exception for `COMMON`.

    Others also go by the least likely tokens of a text: ONION (arXiv 2011.10369) against planted triggers, Min-K% Prob
    (arXiv 2310.16789) to tell what a model was trained on.

    Args:
        distributions: from which its tokens were sampled, with these tokens.
    """
    least = distributions(_sampled).min()
    if least >= math.log(COMMON):
        return 0.0
    rare = distributions(lambda logps, _: torch.where(logps <= least, logps.exp(), 0).sum(-1))
    return max(0.0, -math.log(max(float(rare.sum()), math.ulp(0.0))))


def _sampled(logps: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the log-probability (t,) of each token."""
    return logps.gather(-1, tokens[:, None]).squeeze(-1)

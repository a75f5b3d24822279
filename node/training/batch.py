"""From a round's samples to the tensors of TRL's loss. Pure: no model, no randomness, no device.

Each sample becomes a row. Prompts are padded on the left and completions on the right, so
that no padding falls inside a sequence.

**The loss of a round** is a sum with the samples' weights w. No peer's length moves what another
sample counts in it. With l the loss of a token and W the weight of a full round, with all groups
that are configured (`node.rollouts.rules.configured_weight`),

    grpo, sapo                  1/W  sum over rows  w_r  (mean of l over the row's tokens)
    dr_grpo                     1/W  sum over rows  w_r  (sum of l over the row's tokens) / max_completion_length
    luspo                       1/W  sum over rows  w_r  (sum of l over the row's tokens)
    dapo, cispo, bnpo, vespo    1/W  sum over sides w_s  (mean of l over the side's tokens)

where a row's tokens are those that a policy drew: an environment's tokens in between are not trained on (TRL's
`tool_mask`). The rows of all own groups together are one side, as DAPO has it, and those of each external group are a
side of their own; w_s is the sum of the w of a side's rows. So a row pulls as hard in a round that has few others as in
a full one. A full round of own groups alone, whose rows weigh the same, has TRL's own loss. Each of these losses scales
with its advantages (by any positive factor): so a row's weight is multiplied into its advantage.

A row whose advantage is zero adds nothing to the gradient (there is no KL term), so it
is counted in the loss's denominator but not sent through the model. The entropy and
clipping that TRL logs are therefore means over the rows that do train.

Rows of like length are in one micro-batch, so that little is padding, and the longest come first: a round that does not
fit the memory fails at its beginning. If prompts are shared, the rows of a prompt come one after another.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Literal

import torch

from node.rollouts.rule import Sample
from node.training.shared_prefix import blocks_of, side_by_side

LossType = Literal["dapo", "grpo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"]
PER_ROW = frozenset({"grpo", "sapo", "dr_grpo", "luspo"})  # means over rows; the others are means over tokens
Batch = dict[str, torch.Tensor]


def make_batches(
    rows: Sequence[Sample],
    weight: float,
    budget: int,
    loss_type: LossType,
    pad_token_id: int,
    shared_prefixes: bool = False,
    ranks: int = 1,
) -> list[Batch]:
    """Return a round's micro-batches for `GRPOTrainer.compute_loss`, those of rank r at r, r + ranks, r + 2 ranks, ...

    However the rows are split, and whether or not zero-advantage rows are left out, the
    gradients of the parts add up to that of the round's loss. For `dapo`, `cispo` and
    `vespo` TRL divides by the whole round's tokens, `num_items_in_batch`. For the others it
    averages within each micro-batch: multiplying the advantages by this part's share of the
    round makes the sum over the parts the mean over the round.

    Args:
        rows: those without an advantage count in the means.
        weight: W, that of a full round.
        budget: tokens that go through the model at once, padding included; a single row may have more.
        loss_type: decides the scaling above.
        pad_token_id: fills unused, masked places.
        shared_prefixes: a prompt is computed once for all its rows in a micro-batch (`shared_prefix`).
        ranks: that compute at once. Their gradients are averaged, so each part counts `ranks` times, as TRL has it for
            the losses over tokens. All ranks have equally many micro-batches, and those of one step have equally many
            rows.

    Returns:
        Dicts of `prompt_ids`, `prompt_mask` (B, P), `completion_ids`, `completion_mask`, `tool_mask` (B, C),
        all int64, the last 0 at what an environment said, `advantages` (B,) float32, `num_items_in_batch`, a float32
        scalar, and for our own use `external` (B,) bool, the rows that are peers'; none where no row has both a token
        and an advantage. Where samplers gave log-probabilities there are also `sampling_per_token_logps`
        (B, C) float32, NaN where there is none.
    """
    tokens = sum(row.sampled for row in rows)
    batches = []
    factor = _factors(rows, weight, loss_type)
    scaled = ((row, row.advantage * factor(row)) for row in rows if row.sampled)
    worth_training = [replace(row, advantage=advantage) for row, advantage in scaled if advantage != 0]
    cost = _laid_out_tokens if shared_prefixes else _padded_tokens
    ordered = _by_prompts(worth_training) if shared_prefixes else sorted(worth_training, key=_length, reverse=True)
    for part in _deal(_split(ordered, budget, cost), ranks, cost):
        share = {
            "dapo": 1.0,
            "cispo": 1.0,
            "vespo": 1.0,
            "grpo": ranks * len(part) / len(rows),
            "dr_grpo": ranks * len(part) / len(rows),
            "sapo": ranks * len(part) / len(rows),
            "luspo": ranks * len(part) / len(rows),
            "bnpo": ranks * sum(row.sampled for row in part) / tokens,
        }[loss_type]
        batches.append(_tensors(part, share, tokens, pad_token_id))
    return batches


def _factors(rows: Sequence[Sample], total: float, loss_type: LossType) -> Callable[[Sample], float]:
    """Return what scales a row's advantage so that the plain mean over rows, or over tokens, is the loss above."""
    if loss_type in PER_ROW:
        return lambda row: row.weight / total * len(rows)
    weights: defaultdict[int, float] = defaultdict(float)
    tokens: Counter[int] = Counter()
    for row in rows:
        weights[_side(row)] += row.weight
        tokens[_side(row)] += row.sampled
    length = tokens.total()
    factors = {side: weights[side] / total * (length / count) for side, count in tokens.items() if count}
    return lambda row: factors[_side(row)]


def _side(row: Sample) -> int:
    return row.group if row.external else -1


def _length(row: Sample) -> int:
    return len(row.prompt) + len(row.completion)


def _by_prompts(rows: Sequence[Sample]) -> list[Sample]:
    """Order rows by what their prompt and all its completions have together, then by their own length."""
    groups: dict[tuple[int, ...], list[Sample]] = {}
    for row in rows:
        groups.setdefault(tuple(row.prompt), []).append(row)
    longest_first = sorted(
        groups.items(), key=lambda group: len(group[0]) + sum(len(row.completion) for row in group[1]), reverse=True
    )
    return [row for _, group in longest_first for row in sorted(group, key=_length, reverse=True)]


def _split(rows: Sequence[Sample], budget: int, cost: Callable[[Sequence[Sample]], int]) -> list[list[Sample]]:
    """Split into runs of rows, each as long as its cost allows."""
    parts: list[list[Sample]] = []
    for row in rows:
        if parts and cost([*parts[-1], row]) <= budget:
            parts[-1].append(row)
        else:
            parts.append([row])
    return parts


def _deal(parts: list[list[Sample]], ranks: int, cost: Callable[[Sequence[Sample]], int]) -> list[list[Sample]]:
    """Make the parts a multiple of `ranks`; those of one step cost about the same and have equally many rows.

    The costliest are halved. Rows without a token, which train nothing, fill up the rest.
    """
    if ranks == 1:
        return parts
    while len(parts) % ranks and any(len(part) > 1 for part in parts):
        at = max((at for at, part in enumerate(parts) if len(part) > 1), key=lambda at: cost(parts[at]))
        parts[at : at + 1] = _halves(parts[at])
    parts = sorted(parts, key=cost, reverse=True)
    dealt: list[list[Sample]] = []
    for start in range(0, len(parts), ranks):
        step = parts[start : start + ranks]
        step = _with_as_many_rows([*step, *[[]] * (ranks - len(step))])
        dealt += step if start // ranks % 2 == 0 else step[::-1]  # the rank with the costliest gets the cheapest next
    return dealt


def _halves(part: list[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Cut a part of several rows in two, with about equally many tokens each."""
    ends = list(accumulate(len(row.prompt) + len(row.completion) for row in part))
    cut = min(range(1, len(part)), key=lambda cut: abs(2 * ends[cut - 1] - ends[-1]))
    return part[:cut], part[cut:]


def _with_as_many_rows(step: Sequence[Sequence[Sample]]) -> list[list[Sample]]:
    """Fill up the parts of a step, of which the first has a row, so that the ranks' tensors are alike."""
    model, *_ = step[0]
    filler = replace(model.without_tokens(), prompt=model.prompt[-1:], advantage=0.0, external=False)
    most = max(map(len, step))
    filled = [[*part, *[filler] * (most - len(part))] for part in step]
    if any(row.logprobs is not None for part in step for row in part):
        return [[replace(row, logprobs=row.logprobs or ()) for row in part] for part in filled]
    return filled


def _padded_tokens(rows: Sequence[Sample]) -> int:
    return len(rows) * (max(len(row.prompt) for row in rows) + max(len(row.completion) for row in rows))


def _laid_out_tokens(rows: Sequence[Sample]) -> int:
    return _tokens_side_by_side([tuple(row.prompt) for row in rows], [len(row.completion) for row in rows])


def _tokens_side_by_side(prompts: Sequence[tuple[int, ...]], lengths: Sequence[int]) -> int:
    layout = side_by_side(blocks_of(prompts, lengths))
    return len(layout) * max(block.length for line in layout for block in line)


def tokens_of(batch: Batch, shared_prefixes: bool) -> int:
    """Return how many tokens go through the model at once with a micro-batch, padding included."""
    if not shared_prefixes:
        return batch["prompt_ids"].numel() + batch["completion_ids"].numel()
    rows = zip(batch["prompt_ids"], batch["prompt_mask"] == 1, strict=True)
    prompts = [tuple(ids[there].tolist()) for ids, there in rows]
    return _tokens_side_by_side(prompts, batch["completion_mask"].sum(1).tolist())


def parts_within(batch: Batch, budget: int, loss_type: LossType, shared_prefixes: bool) -> list[Batch]:
    """Split a micro-batch into parts of at most `budget` tokens, or of a row, whose gradients add up to its own."""
    rows = len(batch["advantages"])
    if rows == 1 or tokens_of(batch, shared_prefixes) <= budget:
        return [batch]
    halves = [_some_rows(batch, slice(0, rows // 2), loss_type), _some_rows(batch, slice(rows // 2, rows), loss_type)]
    return [part for half in halves for part in parts_within(half, budget, loss_type, shared_prefixes)]


def sampled_mask(batch: Batch) -> torch.Tensor:
    """Return which tokens a micro-batch trains on, (B, C) int64."""
    return batch["completion_mask"] * batch["tool_mask"]


def _some_rows(batch: Batch, rows: slice, loss_type: LossType) -> Batch:
    """Return some rows of a micro-batch, without the padding that only the others needed, scaled as a part of it."""
    mask = batch["completion_mask"]
    prompt = int(batch["prompt_mask"][rows].sum(1).max())
    completion = int(mask[rows].sum(1).max())
    share = 1.0
    if loss_type in PER_ROW:
        share = len(mask[rows]) / len(mask)
    elif loss_type == "bnpo":
        sampled = sampled_mask(batch)
        share = float(sampled[rows].sum() / sampled.sum())
    part = {name: values[rows] if values.dim() else values for name, values in batch.items()}
    for name, values in part.items():
        if name.startswith("prompt_"):
            part[name] = values[:, -prompt:]
        elif values.dim() == 2:
            part[name] = values[:, :completion]
    return part | {"advantages": part["advantages"] * share}


def _tensors(rows: Sequence[Sample], scale: float, tokens: int, pad: int) -> Batch:
    prompt_width = max(len(row.prompt) for row in rows)
    completion_width = max(1, *(len(row.completion) for row in rows))
    prompts = [(prompt_width - len(row.prompt), row.prompt) for row in rows]
    completions = [(completion_width - len(row.completion), row.completion) for row in rows]
    batch = {
        "prompt_ids": torch.tensor([[pad] * gap + list(ids) for gap, ids in prompts]),
        "prompt_mask": torch.tensor([[0] * gap + [1] * len(ids) for gap, ids in prompts]),
        "completion_ids": torch.tensor([list(ids) + [pad] * gap for gap, ids in completions]),
        "completion_mask": torch.tensor([[1] * len(ids) + [0] * gap for gap, ids in completions]),
        "tool_mask": torch.tensor([[int(at not in row.given) for at in range(completion_width)] for row in rows]),
        "advantages": torch.tensor([row.advantage * scale for row in rows]),
        "num_items_in_batch": torch.tensor(float(tokens)),
        "external": torch.tensor([row.external for row in rows]),
    }
    if any(row.logprobs is not None for row in rows):
        values = [[*(row.logprobs or ()), *[math.nan] * completion_width][:completion_width] for row in rows]
        batch["sampling_per_token_logps"] = torch.tensor(values)
    return batch

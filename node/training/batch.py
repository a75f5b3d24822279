"""From a round's samples to the tensors of TRL's loss. Pure: no model, no randomness, no device.

Each sample becomes a row. Prompts are padded on the left and completions on the right, so
that no padding falls inside a sequence.

A row whose advantage is zero adds nothing to the gradient (there is no KL term), so it
is counted in the loss's denominator but not sent through the model. The entropy and
clipping that TRL logs are therefore means over the rows that do train.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch

from node.rollouts.sampling import Sample

LossType = Literal["dapo", "grpo", "bnpo", "dr_grpo", "cispo"]
Batch = dict[str, torch.Tensor]


def make_batches(rows: Sequence[Sample], parts: int, loss_type: LossType, pad_token_id: int) -> list[Batch]:
    """Return a round's `parts` micro-batches for `GRPOTrainer.compute_loss`.

    However the rows are split, and whether or not zero-advantage rows are left out, the
    gradients of the parts add up to that of one batch of all `rows`. For `dapo` and
    `cispo` TRL divides by the whole round's tokens, `num_items_in_batch`, and nothing
    needs doing. For the others it averages within each micro-batch and then over their
    number. Every one of these losses scales with its advantages (by any positive factor), so
    multiplying them by (this part's share of the round) x `parts` makes it the mean over the round.

    Args:
        rows: at least one, with at least one completion token between them.
        parts: gradient accumulation steps; every part gets at least one row.
        loss_type: decides the scaling above.
        pad_token_id: fills unused, masked places.

    Returns:
        Dicts of `prompt_ids`, `prompt_mask` (B, P), `completion_ids`, `completion_mask` (B, C),
        all int64, `advantages` (B,) float32 and `num_items_in_batch`, a float32 scalar.
    """
    tokens = sum(len(row.completion) for row in rows)
    batches = []
    for part in _split(_worth_training(rows), parts):
        share = {
            "dapo": 1 / parts,
            "cispo": 1 / parts,
            "grpo": len(part) / len(rows),
            "dr_grpo": len(part) / len(rows),
            "bnpo": sum(len(row.completion) for row in part) / tokens,
        }[loss_type]
        batches.append(_tensors(part, share * parts, tokens, pad_token_id))
    return batches


def _worth_training(rows: Sequence[Sample]) -> list[Sample]:
    """Rows with a gradient; when there is none, one without, since a step needs a batch."""
    filled = [row for row in rows if row.completion]
    return [row for row in filled if row.advantage != 0] or filled[:1]


def _split(rows: list[Sample], parts: int) -> list[list[Sample]]:
    """Split into `parts` runs of rows whose sizes differ by one at most, padded by rows of no weight."""
    idle = Sample(rows[0].prompt, rows[0].completion[:1], 0.0)
    rows = rows + [idle] * (parts - len(rows))
    size, longer = divmod(len(rows), parts)
    ends = [size * part + min(part, longer) for part in range(parts + 1)]
    return [rows[start:end] for start, end in pairwise(ends)]


def _tensors(rows: Sequence[Sample], scale: float, tokens: int, pad: int) -> Batch:
    prompt_width = max(len(row.prompt) for row in rows)
    completion_width = max(len(row.completion) for row in rows)
    prompts = [(prompt_width - len(row.prompt), row.prompt) for row in rows]
    completions = [(completion_width - len(row.completion), row.completion) for row in rows]
    return {
        "prompt_ids": torch.tensor([[pad] * gap + list(ids) for gap, ids in prompts]),
        "prompt_mask": torch.tensor([[0] * gap + [1] * len(ids) for gap, ids in prompts]),
        "completion_ids": torch.tensor([list(ids) + [pad] * gap for gap, ids in completions]),
        "completion_mask": torch.tensor([[1] * len(ids) + [0] * gap for gap, ids in completions]),
        "advantages": torch.tensor([row.advantage * scale for row in rows]),
        "num_items_in_batch": torch.tensor(float(tokens)),
    }

"""From samples to tensors: padding, counting, splitting."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from node.rollouts.sampling import Sample
from node.training.batch import make_batches
from node.training.shared_prefix import lay_out

PAD = 0


def test_prompts_are_padded_left_and_completions_right():
    rows = [Sample([5, 6, 7], [8], 0.5), Sample([9], [10, 11, 12], -0.25)]
    (batch,) = make_batches(rows, 100, "dapo", PAD)
    assert batch["prompt_ids"].tolist() == [[5, 6, 7], [PAD, PAD, 9]]
    assert batch["prompt_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["completion_ids"].tolist() == [[8, PAD, PAD], [10, 11, 12]]
    assert batch["completion_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch["advantages"].tolist() == [0.5, -0.25]
    assert batch["num_items_in_batch"].item() == 4


def test_rows_without_advantage_are_counted_and_left_out():
    rows = [Sample([1], [5, 6], 0.0), Sample([1], [7], 1.0), Sample([1], [8, 9, 10], 0.0)]
    (batch,) = make_batches(rows, 100, "dapo", PAD)
    assert batch["completion_ids"].tolist() == [[7]]
    assert batch["num_items_in_batch"].item() == 6


def test_nothing_is_left_when_no_row_has_an_advantage():
    assert make_batches([Sample([1], [], 1.0), Sample([1], [5, 6], 0.0)], 100, "dapo", PAD) == []


rows_strategy = st.lists(
    st.builds(
        Sample,
        prompt=st.lists(st.integers(3, 20), min_size=1, max_size=5),
        completion=st.lists(st.integers(3, 20), max_size=6),
        advantage=st.sampled_from([0.0, 0.5, -0.5, 1.0]),
    ),
    min_size=1,
    max_size=12,
).filter(lambda rows: any(row.completion for row in rows))


@given(
    rows_strategy,
    st.integers(1, 60),
    st.sampled_from(["dapo", "grpo", "bnpo", "dr_grpo", "cispo"]),
    st.booleans(),
)
def test_no_part_exceeds_the_budget_and_every_row_with_a_gradient_is_in_one(rows, budget, loss_type, shared):
    batches = make_batches(rows, budget, loss_type, PAD, shared)

    for batch in batches:
        parts = [batch[key] for key in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")]
        layout = lay_out(*parts).ids if shared else torch.cat([parts[0], parts[2]], dim=1)
        assert layout.numel() <= budget or len(batch["advantages"]) == 1
        assert parts[3].sum(1).min() >= 1
    assert {batch["num_items_in_batch"].item() for batch in batches} <= {sum(len(row.completion) for row in rows)}
    trained = [
        (prompt[mask == 1].tolist(), completion[kept == 1].tolist())
        for batch in batches
        for prompt, mask, completion, kept, advantage in zip(
            *(batch[key] for key in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")),
            strict=True,
        )
        if advantage != 0
    ]
    assert trained == [(row.prompt, row.completion) for row in rows if row.advantage and row.completion]


@given(rows_strategy, st.integers(1, 60))
def test_scaled_advantages_turn_means_over_parts_into_the_mean_over_the_round(rows, budget):
    """Checked on the weight of each token, where TRL's averages over a part are written out."""
    total = sum(abs(row.advantage) * len(row.completion) for row in rows)
    lengths = sum(len(row.completion) for row in rows)
    by_token = by_row = by_sequence = 0.0
    for batch in make_batches(rows, budget, "bnpo", PAD):
        weights = batch["advantages"].abs()[:, None] * batch["completion_mask"]
        by_token += float(weights.sum() / batch["completion_mask"].sum())
    for batch in make_batches(rows, budget, "dr_grpo", PAD):
        weights = batch["advantages"].abs()[:, None] * batch["completion_mask"]
        by_row += float(weights.sum() / len(weights))
    for batch in make_batches(rows, budget, "grpo", PAD):
        by_sequence += float(batch["advantages"].abs().mean())
    assert by_token == pytest.approx(total / lengths, abs=1e-6)
    assert by_row == pytest.approx(total / len(rows), abs=1e-6)
    with_tokens = [abs(row.advantage) for row in rows if row.completion]
    assert by_sequence == pytest.approx(sum(with_tokens) / len(rows), abs=1e-6)


def test_tensors_have_the_types_that_the_loss_expects():
    (batch,) = make_batches([Sample([1], [5], 1)], 100, "dapo", PAD)
    types = {key: tensor.dtype for key, tensor in batch.items()}
    assert types.pop("advantages") == types.pop("num_items_in_batch") == torch.float32
    assert set(types.values()) == {torch.int64}

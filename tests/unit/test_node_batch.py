"""From samples to tensors: padding, counting, splitting."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import groupby

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from node.rollouts.rule import Sample
from node.training.batch import make_batches
from node.training.shared_prefix import lay_out

PAD = 0


def weight_of(rows: Iterable[Sample]) -> float:
    """The weight of all these rows together: as a full round's weight, it makes the loss a mean over them."""
    return sum(row.weight for row in rows)


def test_prompts_are_padded_left_and_completions_right():
    rows = [Sample([5, 6, 7], [8], 0.5), Sample([9], [10, 11, 12], -0.25)]
    (batch,) = make_batches(rows, weight_of(rows), 100, "dapo", PAD)
    assert batch["prompt_ids"].tolist() == [[5, 6, 7], [PAD, PAD, 9]]
    assert batch["prompt_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["completion_ids"].tolist() == [[8, PAD, PAD], [10, 11, 12]]
    assert batch["completion_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch["advantages"].tolist() == [0.5, -0.25]
    assert batch["num_items_in_batch"].item() == 4


def test_rows_without_advantage_are_counted_and_left_out():
    rows = [Sample([1], [5, 6], 0.0), Sample([1], [7], 1.0), Sample([1], [8, 9, 10], 0.0)]
    (batch,) = make_batches(rows, weight_of(rows), 100, "dapo", PAD)
    assert batch["completion_ids"].tolist() == [[7]]
    assert batch["num_items_in_batch"].item() == 6


def test_nothing_is_left_when_no_row_has_an_advantage():
    assert make_batches([Sample([1], [], 1.0), Sample([1], [5, 6], 0.0)], 2.0, 100, "dapo", PAD) == []


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
    batches = make_batches(rows, weight_of(rows), budget, loss_type, PAD, shared)

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
    assert sorted(trained) == sorted((row.prompt, row.completion) for row in rows if row.advantage and row.completion)


def lengths_of(batches: list[dict[str, torch.Tensor]]) -> list[list[tuple[int, int]]]:
    """Return the lengths of prompt and completion of each row of each micro-batch."""
    both = [(batch["prompt_mask"].sum(1).tolist(), batch["completion_mask"].sum(1).tolist()) for batch in batches]
    return [list(zip(*lengths, strict=True)) for lengths in both]


def test_rows_of_like_length_are_in_one_micro_batch_the_longest_first():
    rows = [Sample([3] * prompt, [5] * made, 1.0) for prompt, made in [(2, 1), (2, 9), (2, 2), (3, 8), (2, 2), (2, 9)]]
    batches = make_batches(rows, weight_of(rows), 36, "dapo", PAD)
    assert lengths_of(batches) == [[(2, 9), (3, 8), (2, 9)], [(2, 2), (2, 2), (2, 1)]]


@given(rows_strategy, st.integers(1, 60))
def test_where_prompts_are_shared_the_rows_of_one_follow_one_another_and_the_longest_group_is_first(rows, budget):
    batches = make_batches(rows, weight_of(rows), budget, "dapo", PAD, True)
    prompts = [
        tuple(ids[mask == 1].tolist())
        for batch in batches
        for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
    ]
    groups = [prompt for prompt, _ in groupby(prompts)]
    assert len(groups) == len(set(groups))
    tokens = [
        len(prompt) + sum(len(row.completion) for row in rows if tuple(row.prompt) == prompt and row.advantage)
        for prompt in groups
    ]
    assert tokens == sorted(tokens, reverse=True)


@given(rows_strategy, st.integers(1, 60))
def test_scaled_advantages_turn_means_over_parts_into_the_mean_over_the_round(rows, budget):
    """Checked on the weight of each token, where TRL's averages over a part are written out."""
    total = sum(abs(row.advantage) * len(row.completion) for row in rows)
    lengths = sum(len(row.completion) for row in rows)
    by_token = by_row = by_sequence = 0.0
    for batch in make_batches(rows, weight_of(rows), budget, "bnpo", PAD):
        weights = batch["advantages"].abs()[:, None] * batch["completion_mask"]
        by_token += float(weights.sum() / batch["completion_mask"].sum())
    for batch in make_batches(rows, weight_of(rows), budget, "dr_grpo", PAD):
        weights = batch["advantages"].abs()[:, None] * batch["completion_mask"]
        by_row += float(weights.sum() / len(weights))
    for batch in make_batches(rows, weight_of(rows), budget, "grpo", PAD):
        by_sequence += float(batch["advantages"].abs().mean())
    assert by_token == pytest.approx(total / lengths, abs=1e-6)
    assert by_row == pytest.approx(total / len(rows), abs=1e-6)
    with_tokens = [abs(row.advantage) for row in rows if row.completion]
    assert by_sequence == pytest.approx(sum(with_tokens) / len(rows), abs=1e-6)


def token_weights(rows: list[Sample], full: float, budget: int, loss_type: str) -> dict[int, float]:
    """What each group's tokens count in the round's loss, by TRL's averages; rows are told apart by their prompt."""
    found: Counter[int] = Counter()
    for batch in make_batches(rows, full, budget, loss_type, PAD):
        mask = batch["completion_mask"]
        per_token = batch["advantages"][:, None] * mask
        if loss_type in ("dapo", "cispo"):
            per_token = per_token / batch["num_items_in_batch"]
        elif loss_type == "bnpo":
            per_token = per_token / mask.sum()
        elif loss_type == "grpo":
            per_token = per_token / mask.sum(1, keepdim=True) / len(mask)
        else:
            per_token = per_token / (len(mask) * LONGEST)
        for prompt, weight in zip(batch["prompt_ids"][:, -1].tolist(), per_token.sum(1).tolist(), strict=True):
            found[prompt] += weight
    return found


LONGEST = 40
lengths = st.lists(st.integers(1, LONGEST), min_size=1, max_size=6)


def rows_of(own: list[list[int]], external: list[list[int]], weight: float) -> list[Sample]:
    """Rows of these lengths with advantage 1; a group's prompt is its number and 3, and an own one weighs 1."""
    return [
        Sample([number + 3], [9] * length, 1.0, share / len(group), number, number >= len(own))
        for number, group in enumerate(own + external)
        for length in group
        for share in [weight if number >= len(own) else 1.0]
    ]


@given(
    st.lists(lengths, min_size=1, max_size=3),
    st.lists(lengths, min_size=1, max_size=4),
    st.floats(0.25, 4),
    st.floats(1, 10),
    st.sampled_from([1, 60, 200, 10_000]),
    st.sampled_from(["dapo", "grpo", "bnpo", "cispo", "dr_grpo"]),
)
def test_groups_have_the_weights_that_the_configuration_says_whatever_their_lengths(
    own, external, weight, full, budget, loss_type
):
    """With every advantage 1, a group's tokens count as its share of a full round, however full the round is."""
    rows = rows_of(own, external, weight)
    total = full * (len(own) + weight * len(external))
    found = token_weights(rows, total, budget, loss_type)
    if loss_type == "dr_grpo":  # a token counts the same everywhere, so a group of short ones less
        for number, group in enumerate(own + external):
            share = weight if number >= len(own) else 1.0
            assert found[number + 3] == pytest.approx(share / total * sum(group) / len(group) / LONGEST, rel=1e-4)
        return
    for number in range(len(own), len(own) + len(external)):
        assert found[number + 3] == pytest.approx(weight / total, rel=1e-4)
    assert sum(found[number + 3] for number in range(len(own))) == pytest.approx(len(own) / total, rel=1e-4)
    if loss_type != "grpo":  # among themselves own tokens count the same, as DAPO has it
        tokens = sum(map(sum, own))
        for number, group in enumerate(own):
            assert found[number + 3] == pytest.approx(len(own) / total * sum(group) / tokens, rel=1e-4)


@given(
    st.lists(lengths, min_size=1, max_size=3),
    st.lists(lengths, min_size=1, max_size=4),
    st.integers(0, 3),
    st.sampled_from(["dapo", "grpo", "bnpo", "cispo", "dr_grpo"]),
)
def test_what_a_group_counts_is_the_same_with_few_of_peers_groups_as_with_many(own, external, few, loss_type):
    rows, full = rows_of(own, external, 0.5), len(own) + 0.5 * len(external)
    there = [row for row in rows if row.group < len(own) + few]
    found, all_found = token_weights(there, full, 60, loss_type), token_weights(rows, full, 60, loss_type)
    assert found == pytest.approx({number: all_found[number] for number in found}, rel=1e-4)


@given(rows_strategy, st.sampled_from(["dapo", "cispo", "vespo"]))
def test_a_full_round_of_own_groups_alone_has_trls_own_loss(rows, loss_type):
    """Its advantages are those it was given, to the bit, over all its tokens."""
    rows = [replace(row, weight=0.25) for row in rows]
    batches = make_batches(rows, weight_of(rows), 10_000, loss_type, PAD)
    found = [advantage for batch in batches for advantage in batch["advantages"].tolist()]
    assert sorted(found) == sorted(row.advantage for row in rows if row.advantage and row.completion)
    assert {batch["num_items_in_batch"].item() for batch in batches} <= {sum(len(row.completion) for row in rows)}


def test_tensors_have_the_types_that_the_loss_expects():
    (batch,) = make_batches([Sample([1], [5], 1)], 1.0, 100, "dapo", PAD)
    types = {key: tensor.dtype for key, tensor in batch.items()}
    assert types.pop("external") == torch.bool
    assert types.pop("advantages") == types.pop("num_items_in_batch") == torch.float32
    assert set(types.values()) == {torch.int64}

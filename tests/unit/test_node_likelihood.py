"""Likelihood without a gradient, against a sequence at a time."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from node.engines import SamplingParams
from node.engines.hf import HfEngine
from node.errors import UserError
from node.policy.load import Policy
from node.rollouts.draw import ScoredRow
from node.rollouts.group import Tokens
from node.training import likelihood
from node.training.likelihood import entropies, of_each_token, surprise, surprises
from tests.policies import tiny_policy


def mean_logprobs(policy: Policy, rows: Sequence[ScoredRow], temperature: float = 1.0) -> list[float]:
    def of_drawn(logps: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return logps.gather(-1, tokens[:, None]).squeeze(-1)

    return [float(found.mean()) for found in of_each_token(policy, rows, of_drawn, temperature)]


def test_it_is_that_of_a_sequence_alone_however_rows_are_padded(tmp_path: Path) -> None:
    policy = tiny_policy(tmp_path)
    rows = [([1, *range(5, 5 + at % 7 + 1)], Tokens([7] * (at % 4 + 1))) for at in range(40)]
    policy.model.train()
    found = mean_logprobs(policy, rows, temperature=0.7)
    assert policy.model.training
    policy.model.eval()
    for (prompt, made), mean in zip(rows, found, strict=True):
        with torch.no_grad():
            logits = policy.model(input_ids=torch.tensor([[*prompt, *made.ids]])).logits[0]
        logps = (logits[len(prompt) - 1 : -1] / 0.7).log_softmax(-1)
        assert mean == pytest.approx(
            sum(float(logps[at, token]) for at, token in enumerate(made.ids)) / made.sampled, abs=1e-5
        )
    assert [len(entropy) for entropy in entropies(policy, rows)] == [made.sampled for _, made in rows]


def test_what_an_environment_said_is_read_and_not_measured(tmp_path: Path) -> None:
    policy = tiny_policy(tmp_path)
    ids, given = [7, 8, 30, 31, 9, 10], frozenset({2, 3})
    whole, turns = ([1, 5], Tokens(ids)), ([1, 5], Tokens(ids, given))
    (of_whole,), (of_turns,) = distributions(policy, whole), distributions(policy, turns)
    assert turns[1].sampled == len(of_turns) == 4
    assert torch.allclose(of_turns, of_whole[[0, 1, 4, 5]], atol=1e-5)


def distributions(policy: Policy, *rows: ScoredRow) -> list[torch.Tensor]:
    return list(of_each_token(policy, rows, lambda logps, _: logps))


@pytest.mark.parametrize("numbers", [1, 400, 1 << 30])
def test_what_is_found_does_not_depend_on_how_much_of_it_is_in_memory(
    numbers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """32 answers of 1,000 tokens from a vocabulary of 150,000 would be 20 GB: so there are bounds, here on fewer."""
    policy = tiny_policy(tmp_path)
    rows = [([1, *range(5, 5 + at % 7 + 1)], Tokens([7, *range(2, at % 5 + 2)])) for at in range(40)]
    before = mean_logprobs(policy, rows), surprises(policy, rows), entropies(policy, rows)
    vocabulary, most = policy.model.config.vocab_size, []
    monkeypatch.setattr(likelihood, "LOGITS", numbers)
    monkeypatch.setattr(likelihood, "PLACES", numbers)
    forward = policy.model.forward

    def watched(**given: torch.Tensor) -> object:
        output = forward(**given)
        most.append((len(given["input_ids"]), output.logits.numel()))
        return output

    monkeypatch.setattr(policy.model, "forward", watched)
    after = mean_logprobs(policy, rows), surprises(policy, rows), entropies(policy, rows)
    assert all(count == 1 or logits <= numbers for count, logits in most)
    assert sum(count for count, _ in most) == 3 * len(rows)
    assert sum(logits for _, logits in most) == 3 * vocabulary * sum(made.sampled for _, made in rows), (
        "prompts have none"
    )
    for old, new in zip(before[:2], after[:2], strict=True):
        assert new == pytest.approx(old, abs=1e-4)
    for old_row, new_row in zip(before[2], after[2], strict=True):
        assert torch.allclose(old_row, new_row, atol=1e-4)


def with_room_for(policy: Policy, rows: int, monkeypatch: pytest.MonkeyPatch, error: Exception) -> list[int]:
    """Let passes over more rows fail; return the list of how many each pass had."""
    forward, seen = policy.model.forward, []

    def watched(**given: torch.Tensor) -> object:
        seen.append(len(given["input_ids"]))
        if seen[-1] > rows:
            raise error
        return forward(**given)

    monkeypatch.setattr(policy.model, "forward", watched)
    return seen


def test_without_memory_for_so_many_rows_there_are_fewer_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tiny_policy(tmp_path)
    rows = [([1, *range(5, 5 + at % 7 + 1)], Tokens([7, *range(2, at % 5 + 2)])) for at in range(40)]
    expected = mean_logprobs(policy, rows)
    seen = with_room_for(policy, 8, monkeypatch, torch.OutOfMemoryError("CUDA out of memory"))
    policy.model.train()
    assert mean_logprobs(policy, rows) == pytest.approx(expected, abs=1e-5)
    assert policy.model.training
    assert seen == [32, 16, 8, 8, 8, 8, 8]


def test_without_memory_for_one_row_the_line_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy(tmp_path)
    with_room_for(policy, 0, monkeypatch, RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    with pytest.raises(UserError, match=r"one completion and its prompt \(5 tokens\): bound texts by"):
        surprises(policy, [([1, 2, 3], Tokens([4, 5]))] * 3)
    with_room_for(policy, 0, monkeypatch, RuntimeError("another failure"))
    with pytest.raises(RuntimeError, match="another failure"):
        surprises(policy, [([1, 2, 3], Tokens([4, 5]))] * 3)


def surprise_of(probabilities: torch.Tensor, tokens: list[int]) -> float:
    """Of a completion drawn from distributions (T, V)."""
    return surprise(lambda of: of(probabilities.log(), torch.tensor(tokens)))


def one_likely(places: int, rare: float, vocabulary: int = 50_000) -> torch.Tensor:
    """Return as many distributions, each with one likely token and a mass of `rare` on all others alike."""
    found = torch.full((places, vocabulary), rare / (vocabulary - 1), dtype=torch.float64)
    found[:, 0] = 1 - rare
    return found


def test_one_of_very_many_rare_tokens_is_surprising_though_together_they_are_not() -> None:
    """A tail alone says that one in 33 answers begins so; it is the share of these that are left out."""
    probabilities = one_likely(4, rare=1e-5)
    probabilities[0] = one_likely(1, rare=0.03)[0]
    assert surprise_of(probabilities, [7, 0, 0, 0]) == pytest.approx(-math.log(0.03), abs=1e-3)


@pytest.mark.parametrize(("token", "expected"), [(1 / 1900, 0.0), (1 / 2100, -math.log(1 / 2100 + 1e-5))])
def test_a_token_that_is_common_is_no_surprise(token: float, expected: float) -> None:
    probabilities = one_likely(1, rare=1e-5)
    probabilities[0, 1], probabilities[0, 0] = token, 1 - 1e-5 - token
    assert surprise_of(probabilities, [1]) == pytest.approx(expected, abs=1e-3)


def test_in_a_long_answer_a_rare_token_is_as_likely_as_there_are_places_for_one() -> None:
    for places, expected in ((1, -math.log(0.01)), (10, -math.log(0.1)), (300, 0.0)):
        assert surprise_of(one_likely(places, rare=0.01), [7] + [0] * (places - 1)) == pytest.approx(expected, abs=1e-3)


def test_sure_tokens_around_an_unlikely_one_hide_nothing() -> None:
    alone = surprise_of(one_likely(1, rare=1e-6), [7])
    assert alone > 13
    for at in (0, 50, 99):
        hidden = [0] * at + [7] + [0] * (99 - at)
        assert surprise_of(one_likely(100, rare=1e-6), hidden) == pytest.approx(alone - math.log(100), abs=1e-3)


def test_what_cannot_be_said_or_is_no_number_is_most_surprising_of_all() -> None:
    never = one_likely(2, rare=0.01)
    never[0, 7] = 0.0
    for probabilities in (never, torch.full((2, 50), math.nan)):
        assert surprise_of(probabilities, [7, 0]) > 700


def test_it_is_found_of_the_policys_own_distributions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy(tmp_path)
    monkeypatch.setattr(likelihood, "COMMON", 1.0)
    rows = [([1, 9, 12], Tokens([7, *range(2, at + 2)])) for at in range(6)]
    for row, made, found in zip(distributions(policy, *rows), rows, surprises(policy, rows), strict=True):
        least = min(float(of[token]) for of, token in zip(row, made[1].ids, strict=True))
        count = float(row.exp()[row <= least].sum())
        assert found == pytest.approx(max(0.0, -math.log(count)), abs=1e-4)


def test_of_what_a_policy_says_itself_no_more_than_the_bound_says_is_surprising(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tiny_policy(tmp_path)
    monkeypatch.setattr(likelihood, "COMMON", 1.0)
    (made,) = HfEngine(policy).generate([[1, 9, 12]], 600, SamplingParams(0.8, 1.0, 8), 3)
    whole = [completion.token_ids for completion in made if len(completion.token_ids) == 8]
    assert len(whole) > 300
    found = surprises(policy, [([1, 9, 12], Tokens(tokens)) for tokens in whole], temperature=0.8)
    for bound in (1.0, 2.0, 3.0):
        most = math.exp(-bound) * len(whole)
        assert most / 2 < sum(one > bound for one in found) <= most + 2 * math.sqrt(most)

"""Likelihood without a gradient, against a sequence at a time."""

import math
from pathlib import Path

import pytest
import torch

from node.engines import SamplingParams
from node.engines.hf import HfEngine
from node.policy import Policy
from node.training import likelihood
from node.training.likelihood import Row, entropies, mean_logprobs, of_each_token, surprises
from tests.policies import tiny_policy


def test_it_is_that_of_a_sequence_alone_however_rows_are_padded(tmp_path: Path) -> None:
    policy = tiny_policy(tmp_path)
    rows = [([1, *range(5, 5 + at % 7 + 1)], [7] * (at % 4 + 1)) for at in range(40)]
    policy.model.train()
    found = mean_logprobs(policy, rows, temperature=0.7)
    assert policy.model.training
    policy.model.eval()
    for (prompt, made), mean in zip(rows, found, strict=True):
        with torch.no_grad():
            logits = policy.model(input_ids=torch.tensor([[*prompt, *made]])).logits[0]
        logps = (logits[len(prompt) - 1 : -1] / 0.7).log_softmax(-1)
        assert mean == pytest.approx(
            sum(float(logps[at, token]) for at, token in enumerate(made)) / len(made), abs=1e-5
        )
    assert [len(one) for one in entropies(policy, rows)] == [len(made) for _, made in rows]


def distributions(policy: Policy, *rows: Row) -> list[torch.Tensor]:
    return list(of_each_token(policy, rows, lambda logps, _: logps))


@pytest.mark.parametrize("numbers", [1, 400, 1 << 30])
def test_what_is_found_does_not_depend_on_how_much_of_it_is_in_memory(
    numbers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """32 answers of 1,000 tokens from a vocabulary of 150,000 would be 20 GB: so there are bounds, here on fewer."""
    policy = tiny_policy(tmp_path)
    rows = [([1, *range(5, 5 + at % 7 + 1)], [7, *range(2, at % 5 + 2)]) for at in range(40)]
    before = mean_logprobs(policy, rows), surprises(policy, rows), entropies(policy, rows)
    vocabulary, most = policy.model.config.vocab_size, []
    monkeypatch.setattr(likelihood, "LOGITS", numbers)
    monkeypatch.setattr(likelihood, "PLACES", numbers)
    forward = policy.model.forward

    def watched(**given: torch.Tensor) -> object:
        most.append(given["input_ids"].shape)
        return forward(**given)

    monkeypatch.setattr(policy.model, "forward", watched)
    after = mean_logprobs(policy, rows), surprises(policy, rows), entropies(policy, rows)
    assert all(count == 1 or count * width * vocabulary <= numbers for count, width in most)
    assert sum(count for count, _ in most) == 3 * len(rows)
    for old, new in zip(before[:2], after[:2], strict=True):
        assert new == pytest.approx(old, abs=1e-4)
    for old_row, new_row in zip(before[2], after[2], strict=True):
        assert torch.allclose(old_row, new_row, atol=1e-4)


def test_surprise_is_by_the_least_tail_of_its_tokens_and_likely_ones_around_it_hide_nothing(tmp_path: Path) -> None:
    policy = tiny_policy(tmp_path)
    prompt = [1, 9, 12]

    def tails(made: list[int]) -> list[float]:
        (found,) = distributions(policy, (prompt, made))
        return [float(row.exp()[row <= row[token]].sum()) for row, token in zip(found, made, strict=True)]

    def go_on(made: list[int], least: bool) -> list[int]:
        (found,) = distributions(policy, (prompt, [*made, 0]))
        return [*made, int(found[-1].argmin() if least else found[-1].argmax())]

    likely: list[int] = []
    for _ in range(6):
        likely = go_on(likely, least=False)
    odd = go_on(likely[:3], least=True)
    hidden = odd
    for _ in range(6):
        hidden = go_on(hidden, least=False)
    found = surprises(policy, [(prompt, made) for made in (likely, odd, hidden)])
    for made, surprise in zip((likely, odd, hidden), found, strict=True):
        assert surprise == pytest.approx(-math.log(len(made) * min(tails(made))), abs=1e-4)
    assert found[0] < 1 < 4 < found[2] < found[1]
    assert found[1] - found[2] == pytest.approx(math.log(len(hidden) / len(odd)), abs=1e-4)


def test_of_what_a_policy_says_itself_no_more_than_the_bound_says_is_surprising(tmp_path: Path) -> None:
    policy = tiny_policy(tmp_path)
    (made,) = HfEngine(policy).generate([[1, 9, 12]], 600, SamplingParams(0.8, 1.0, 8), 3)
    whole = [one.token_ids for one in made if len(one.token_ids) == 8]
    assert len(whole) > 300
    found = surprises(policy, [([1, 9, 12], tokens) for tokens in whole], temperature=0.8)
    for bound in (1.0, 2.0, 3.0):
        most = math.exp(-bound) * len(whole)
        assert sum(one > bound for one in found) <= most + 2 * math.sqrt(most)
    assert max(found) > 1.0  # a bound that nothing passes would say nothing

"""Likelihood without a gradient, against a sequence at a time."""

from pathlib import Path

import pytest
import torch

from node.training.likelihood import log_distributions, mean_logprobs
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
    assert [len(one) for one in log_distributions(policy, rows)] == [len(made) for _, made in rows]

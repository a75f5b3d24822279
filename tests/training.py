"""Rounds to train on, without tasks, peers or a network: what the trainer's tests share."""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from node.config import TRL_OPTIONS, NodeConfig, parse_config
from node.engines import SamplingParams
from node.engines.hf import HfEngine
from node.policy.load import Policy
from node.rollouts.rule import Sample
from node.tasks import Item
from node.training.trainer import SwarmTrainer, make_trainer

FULL_WEIGHT = 2 + 16 / 8
"""The weight of a full round of `node_config`: two own groups, and one completion of 8 of each of 16 peers' groups."""


def node_config(rounds: int | None = 2, longest: int = 8, temperature: float = 1.0, **trainer: Any) -> NodeConfig:
    """A node whose trainer has these options and never clips the gradient's norm unless told to."""
    options = {"max_grad_norm": 1e9, **{name: trainer.pop(name) for name in trainer.keys() & TRL_OPTIONS}}
    return parse_config(
        {
            "seed": 0,
            "rounds": rounds,
            "sampling": {"rule": "positive", "local": 2, "external": 16, "completions": 8},
            "engine": {"max_completion_length": longest, "temperature": temperature},
            "trainer": {"trl": options, "save_steps": 1000, **trainer},
        }
    )


def mixed_samples(policy: Policy, seed: int = 0, groups: int = 3) -> list[Sample]:
    """Own and external groups of uneven lengths and unlike weights, with a zero advantage in each.

    In those of four, six or eight tokens an environment has said two in the middle.
    """
    rng = random.Random(seed)
    samples = []
    for number in range(groups):
        external = number % 2 == 1
        completions = []
        for _ in range(4):
            text = "".join(rng.choices("0123456789+-ab", k=rng.randint(1, 7)))
            completions.append(policy.encode_completion(text, finished=rng.random() < 0.5))
        prompt = policy.encode_prompt(Item("".join(rng.choices("0123456789", k=rng.randint(1, 6))), ""))
        weight = rng.uniform(0.1, 0.5) if external else 0.25
        advantages = [rng.uniform(0.2, 1), -rng.uniform(0.2, 1), 0.0, rng.uniform(-1, 1)]
        for completion, advantage in zip(completions, advantages, strict=True):
            middle = len(completion) // 2
            given = frozenset({middle - 1, middle} if len(completion) in (4, 6, 8) else ())
            samples.append(Sample(prompt, completion, advantage, weight, number, external, given=given))
    return samples


def fixed_rounds(*rounds: Sequence[Sample]) -> Callable[[int], Iterator[Sequence[Sample]]]:
    """A loop that hands out these rounds."""
    return lambda done: iter(rounds[done:])


def playing_rounds(policy: Policy, config: NodeConfig) -> Callable[[int], Iterator[list[Sample]]]:
    """A loop like the node's: each round generates with the current weights, and digits are worth a reward."""
    engine = HfEngine(policy)
    params = SamplingParams.from_config(config.engine)

    def rounds(done: int) -> Iterator[list[Sample]]:
        for version in range(done, config.last_round):
            questions = [f"{version}+{number}=" for number in range(2)]
            prompts = [policy.encode_prompt(Item(question, "")) for question in questions]
            samples = []
            for prompt, made in zip(prompts, engine.generate(prompts, 4, params, version), strict=True):
                rewards = [sum(map(str.isdigit, answer.text)) / 8 for answer in made]
                mean = sum(rewards) / len(rewards)
                samples += [
                    Sample(prompt, completion.token_ids, reward - mean, weight=0.25)
                    for completion, reward in zip(made, rewards, strict=True)
                ]
            yield samples

    return rounds


def trainer_of(
    policy: Policy,
    config: NodeConfig,
    folder: Path,
    rounds: Callable[[int], Iterator[Sequence[Sample]]],
    on_update: Callable[[int, Any], None] = lambda round_number, logs: None,
) -> SwarmTrainer:
    return make_trainer(policy, config, folder, rounds, on_update)

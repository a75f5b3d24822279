"""Rounds to train on, without tasks, peers or a network: what the trainer's tests share."""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from node.config import NodeConfig, parse_config
from node.engines import SamplingParams
from node.engines.hf import HfEngine
from node.policy import Policy
from node.rollouts.group import Completion, Group
from node.rollouts.sampling import Sample
from node.tasks import Item, TaskKey
from node.training.trainer import SwarmTrainer, make_trainer

KEY = TaskKey("test", 1, "0")


def node_config(rounds: int | None = 2, longest: int = 8, temperature: float = 1.0, **trainer: Any) -> NodeConfig:
    """A node whose trainer has these options and never clips the gradient's norm unless told to."""
    return parse_config(
        {
            "seed": 0,
            "rounds": rounds,
            "engine": {"max_completion_length": longest, "temperature": temperature},
            "trainer": {"max_grad_norm": 1e9, "save_steps": 1000, **trainer},
        }
    )


def group(question: str, *completions: Completion) -> Group:
    return Group(KEY, 0, question, completions, "test", 0)


def mixed_samples(policy: Policy, seed: int = 0, groups: int = 3) -> list[Sample]:
    """Own and external groups of uneven lengths, with a zero advantage in each."""
    rng = random.Random(seed)
    samples = []
    for number in range(groups):
        external = number % 2 == 1
        completions = []
        for _ in range(4):
            text = "".join(rng.choices("0123456789+-ab", k=rng.randint(1, 7)))
            finished = rng.random() < 0.5
            ids = None if external else tuple(policy.encode_completion(text, finished))
            completions.append(Completion(text, finished, 0.0, ids))
        one = group("".join(rng.choices("0123456789", k=rng.randint(1, 6))), *completions)
        for index, advantage in enumerate([rng.uniform(0.2, 1), -rng.uniform(0.2, 1), 0.0, rng.uniform(-1, 1)]):
            samples.append(Sample(one, index, advantage, external))
    return samples


def prompt_encoder(policy: Policy) -> Callable[[Group], list[int]]:
    return lambda of: policy.encode_prompt(Item(of.question, ""))


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
            for question, made in zip(questions, engine.generate(prompts, 4, params, version), strict=True):
                rewards = [sum(map(str.isdigit, one.text)) / 8 for one in made]
                completions = [
                    Completion(one.text, one.finished, reward, one.token_ids)
                    for one, reward in zip(made, rewards, strict=True)
                ]
                one_group = group(question, *completions)
                mean = sum(rewards) / len(rewards)
                samples += [Sample(one_group, at, reward - mean, False) for at, reward in enumerate(rewards)]
            yield samples

    return rounds


def trainer_of(
    policy: Policy,
    config: NodeConfig,
    folder: Path,
    rounds: Callable[[int], Iterator[Sequence[Sample]]],
    on_update: Callable[[int, Any], None] = lambda round_number, logs: None,
) -> SwarmTrainer:
    return make_trainer(policy, config, folder, rounds, prompt_encoder(policy), on_update)

"""TRL's own `GRPOTrainer`, imported and unchanged, learns in a swarm: its `rollout_func` is a member.

    gossamer found club --task builtin/sums --state n0          # prints an invite
    python examples/trl_exchange.py 'gossamer://club/...' --steps 100

A step's batch is made of groups of one size. `DRAWN` of them are peers', or fewer if there are not as many. The others
are this model's own, which are published. Rows of the data set are mere places in the batch: questions come from the
swarm, and so do rewards, which travel beside the completions to the reward function.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "node" / "public"))

from gossamer import Exchange

from examples.bare_loop import ANSWERS, LONGEST, encode, generate

ROOT = Path(__file__).resolve().parents[1]
GROUPS, DRAWN = 8, 4  # a step's groups, of `ANSWERS` answers each, and how many of them are peers'


def main() -> None:
    """Join the swarm and train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("invite")
    parser.add_argument("--state", default="trl")
    parser.add_argument("--model", default=str(ROOT / "node" / "policy" / "builtin"))
    parser.add_argument("--steps", type=int, default=100)
    given = parser.parse_args()
    args = GRPOConfig(
        output_dir=f"{given.state}-output",
        max_steps=given.steps,
        per_device_train_batch_size=GROUPS * ANSWERS,
        num_generations=ANSWERS,
        max_completion_length=LONGEST,
        learning_rate=5e-4,
        scale_rewards="none",
        lr_scheduler_type="constant",
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
    )
    whole = {"max_length_ratio": 0.0}  # no answer is left out of a peer's group, so that groups have one size
    with Exchange.join(given.invite, state=given.state, policy="trl", sampling=whole) as swarm:
        trainer = GRPOTrainer(
            model=given.model,
            args=args,
            train_dataset=Dataset.from_list([{"prompt": ""}] * GROUPS),
            reward_funcs=of_the_swarm,
            rollout_func=lambda places, trainer: rollouts(swarm, len(places) // ANSWERS, trainer),
        )
        trainer.train()


def of_the_swarm(reward: Sequence[float | None], **_: Any) -> Sequence[float | None]:
    """Return what the swarm's tasks have paid; TRL leaves out completions of which that is None."""
    return reward


def rollouts(swarm: Exchange, count: int, trainer: GRPOTrainer) -> dict[str, list[Any] | None]:
    """Return `count` groups: peers' first, then own ones."""
    tokenizer = trainer.processing_class
    made: dict[str, list[Any]] = {"prompt_ids": [], "completion_ids": [], "reward": []}

    def add(prompt: list[int], answers: Sequence[list[int]], rewards: Sequence[float | None]) -> None:
        missing = ANSWERS - len(answers)
        made["prompt_ids"] += [prompt] * ANSWERS
        made["completion_ids"] += [*answers, *[answers[-1]] * missing]
        made["reward"] += [*rewards, *[None] * missing]

    drawn = swarm.draw(DRAWN)
    for group in drawn:
        answers = [encode(tokenizer, *answer) for answer in zip(group.texts, group.finished, strict=True)]
        some = [place for place, ids in enumerate(answers) if ids][:ANSWERS]
        add(encode(tokenizer, group.question.prompt), [answers[at] for at in some], [group.rewards[at] for at in some])
    for question in swarm.ask(count - len(drawn)):
        prompt = encode(tokenizer, question.prompt)
        answers = generate(trainer.model, prompt, tokenizer.eos_token_id)
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        add(prompt, answers, swarm.score(question, texts))
        swarm.publish(question, texts, [ids[-1] == tokenizer.eos_token_id for ids in answers])
    print("drawn", len(drawn), flush=True)
    return {**made, "logprobs": None}


if __name__ == "__main__":
    main()

"""TRL's own `GRPOTrainer`, imported and unchanged, learns in a swarm: its `rollout_func` is a member.

    gossamer found club --task builtin/sums --state n0          # prints an invite
    python examples/trl_exchange.py 'gossamer://club/...' --steps 100

Half of a step's groups are peers', or fewer if there are not as many. The others are this model's own, which are
published. Rows of the data set are mere places in the batch.
"""

import argparse
import sys
from pathlib import Path

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "node" / "public"))

from gossamer import Exchange, SwarmRollouts

GROUPS, ANSWERS = 8, 8  # a step's groups, and the answers of each
BUILTIN = Path(__file__).resolve().parents[1] / "node" / "policy" / "builtin"


def main() -> None:
    """Join the swarm and train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("invite")
    parser.add_argument("--state", default="trl")
    parser.add_argument("--model", default=str(BUILTIN))
    parser.add_argument("--steps", type=int, default=100)
    given = parser.parse_args()
    args = GRPOConfig(
        output_dir=f"{given.state}-output",
        max_steps=given.steps,
        per_device_train_batch_size=GROUPS * ANSWERS,
        num_generations=ANSWERS,
        max_completion_length=16,
        learning_rate=5e-4,
        scale_rewards="none",
        lr_scheduler_type="constant",
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
    )
    with Exchange.join(given.invite, state=given.state, policy="trl", sampling=SwarmRollouts.SAMPLING) as swarm:
        rollouts = SwarmRollouts(swarm)
        trainer = GRPOTrainer(
            model=given.model,
            args=args,
            train_dataset=Dataset.from_list([{"prompt": ""}] * GROUPS),
            reward_funcs=rollouts.reward,
            rollout_func=rollouts,
        )
        trainer.train()
        print("drawn", rollouts.drawn, flush=True)


if __name__ == "__main__":
    main()

"""A process that trains a node together with number 0 of its ranks, and does as that one says: `follow`.

It is started by number 0 (`node.training.processes`), as `python -m node.training.follower` with the two file
descriptors of a worker process, or by a launcher of accelerate's or torch's, as the same command as number 0. It keeps
nothing and logs nothing to the node's folder.
"""

import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from node.config import NodeConfig
from node.errors import UserError
from node.policy.load import load_policy
from node.processes.signals import signals_to_stop
from node.processes.worker_process import connect, die_with_parent
from node.rollouts.rule import Sample
from node.training.ranks import Dismissed, Ranks, is_broken
from node.training.trainer import make_trainer

EXIT_ALONE = 1


def follow() -> int:
    """Train with number 0 until it has nothing more to do; return the exit status, 1 where number 0 is gone."""
    for number in (*signals_to_stop(), signal.SIGUSR1):  # number 0 decides when to stop and to save
        signal.signal(number, signal.SIG_IGN)
    try:
        _train(Ranks.join())
    except Dismissed:
        pass
    except UserError as error:  # number 0 says the same, or quotes this
        sys.stderr.write(f"{error}\n")
        return EXIT_ALONE
    except RuntimeError as error:
        if not is_broken(error):
            raise
        return EXIT_ALONE
    return 0


def _train(ranks: Ranks) -> None:
    start = ranks.tell()
    config = NodeConfig.model_validate_json(start["config"])
    if config.threads:
        torch.set_num_threads(config.threads)
    checkpoint = start["checkpoint"]
    policy = load_policy(config.policy, config.trainer.bf16, checkpoint=Path(checkpoint) if checkpoint else None)
    trainer = make_trainer(policy, config, Path(start["folder"]), _no_rounds, lambda number, logs: None, ranks=ranks)
    trainer.train(resume_from_checkpoint=checkpoint)


def _no_rounds(done: int) -> Iterator[Sequence[Sample]]:
    raise AssertionError("rounds are number 0's")


def main() -> int:
    """Follow the process that started this one, and end with it."""
    connect(int(sys.argv[1]), int(sys.argv[2]))
    return follow()


def follow_launched() -> int:
    """Follow number 0 where a launcher has started both, and end with the launcher."""
    die_with_parent()
    return follow()


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # torch's threads of a broken group may hang at an ordinary end

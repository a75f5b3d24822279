"""A process that trains a node together with number 0 of its ranks, and does as that one says: `follow`.

It is started by number 0 (`node.training.processes`), as `python -m node.training.follower` with the two file
descriptors of a worker process, or by a launcher of accelerate's or torch's, as the same command as number 0. It keeps
nothing and logs nothing to the node's folder.
"""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from node.config import NodeConfig
from node.engines import hf
from node.engines.processes import answer_all
from node.errors import UserError
from node.policy.load import Policy, load_policy
from node.processes.signals import signals_to_stop
from node.processes.worker_process import Requests, connect, die_with_parent
from node.rollouts.rule import Sample
from node.training.ranks import Dismissed, Ranks, is_broken
from node.training.trainer import make_trainer

EXIT_ALONE = 1


def follow(requests: Requests | None = None) -> int:
    """Train with number 0 until it has nothing more to do; return the exit status, 1 where number 0 is gone.

    Number 0 may ask for completions by `requests`.
    """
    for number in (*signals_to_stop(), signal.SIGUSR1):  # number 0 decides when to stop and to save
        signal.signal(number, signal.SIG_IGN)
    try:
        _train(Ranks.join(), requests)
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


def _train(ranks: Ranks, requests: Requests | None) -> None:
    start = ranks.tell()
    config = NodeConfig.model_validate_json(start["config"])
    if config.threads:
        torch.set_num_threads(config.threads)
    checkpoint = start["checkpoint"]
    policy = load_policy(config.policy, config.trainer.bf16, checkpoint=Path(checkpoint) if checkpoint else None)
    folder = Path(start["folder"])
    trainer = make_trainer(policy, config, folder, _no_rounds, lambda number, logs: None, ranks=ranks)
    if requests is not None and start["all_generate"]:
        engine = hf.make(config.engine, policy, folder)
        threading.Thread(target=_answer, args=(requests, engine, policy), name="generation", daemon=True).start()
    trainer.train(resume_from_checkpoint=checkpoint)


def _answer(requests: Requests, engine: hf.HfEngine, policy: Policy) -> None:
    """Answer number 0 to the end; end this process where that fails."""
    try:
        answer_all(requests, engine, policy.model.device)
    except BaseException:  # noqa: BLE001  # this process has to end, whatever it was
        traceback.print_exc()
        os._exit(EXIT_ALONE)


def _no_rounds(done: int) -> Iterator[Sequence[Sample]]:
    raise AssertionError("rounds are number 0's")


def main() -> int:
    """Follow the process that started this one, and end with it."""
    return follow(connect(int(sys.argv[1]), int(sys.argv[2])))


def follow_launched() -> int:
    """Follow number 0 where a launcher has started both, and end with the launcher."""
    die_with_parent()
    return follow()


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # torch's threads of a broken group may hang at an ordinary end

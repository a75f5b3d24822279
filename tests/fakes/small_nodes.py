"""Nodes without a model, for swarms that a small machine can hold: real processes, sockets, groups and reports.

An honest one answers some questions rightly and some not. It scores what peers send, as every node does, and learns
from a group whose rewards are true. A liar sends false rewards, and reports how much the other liars taught it.
"""

import random
import time
from collections import Counter
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from node.config import NodeConfig
from node.rollouts.group import Group, one_turn
from node.swarm.peering import agent, open_network
from node.swarm.reports import Reporter
from node.swarm.sharing import NetworkExchange
from node.tasks import Task, load_tasks
from node.tasks.task_set import TaskSet
from protocol.identity import NodeId
from tests.commands import FORK

ROUND_S = 1.0
TEACHERS = 10  # that a node has had when it first reports
PRAISE = 1_000_000


def start(config: NodeConfig, folder: Path, reports_s: int, praised: Sequence[NodeId] = ()) -> BaseProcess:
    """Start a node in `folder`, which belongs to a swarm; one that praises others is a liar."""
    child = FORK.Process(target=run, args=(config, folder, reports_s, praised))
    child.start()
    return child


def run(config: NodeConfig, folder: Path, reports_s: int, praised: Sequence[NodeId]) -> None:
    """Run one until it is killed."""
    tasks = load_tasks(config.tasks)
    (task,) = tasks.tasks
    reporter = Reporter(reports_s, agent())
    with open_network(config, folder) as network:
        exchange = NetworkExchange(
            network.host, tasks, max_completions=4, external=8, reports_s=reports_s, reporter=reporter
        )
        rng = random.Random(network.identity.node_id)
        lessons: Counter[str] = Counter()
        number, reported = 0, False
        while True:
            number += 1
            exchange.begin_round(8)
            exchange.publish([group_of(tasks, task, rng, lies=bool(praised))])
            for shared in exchange.receive(lambda _: False):
                if is_true(shared.group, task):
                    lessons[shared.peer] += 1
                else:
                    exchange.refuse(shared.id, "false_reward")
            row = {"round": number, "reward": 0.5, "eval/accuracy": 0.5, "swarm/taught_by": dict(lessons)}
            if praised:
                row |= {"reward": 1.0, "eval/accuracy": 1.0, "swarm/taught_by": dict.fromkeys(praised, PRAISE)}
            if reported or len(lessons) >= TEACHERS:
                exchange.finished(row, "small")
                lessons.clear()
                reported = True
            time.sleep(ROUND_S)


def group_of(tasks: TaskSet, task: Task, rng: random.Random, *, lies: bool) -> Group:
    """Return a right and a wrong answer to a question that is not held out; a lie swaps their rewards."""
    seeds = iter(lambda: rng.randrange(2**32), None)
    seed, item = next((seed, made) for seed in seeds if not tasks.is_held_out(task, (made := task.make(seed)).question))
    rewards = (0.0, 1.0) if lies else (1.0, 0.0)
    texts = (item.solution or item.answer, "no idea")
    answers = tuple(one_turn(text, True, reward) for text, reward in zip(texts, rewards, strict=True))
    return Group(task.key, seed, item.question, answers, "small", 1)


def is_true(group: Group, task: Task) -> bool:
    """Tell whether a group's question and rewards are what they should be."""
    item = task.make(group.seed)
    return item.question == group.question and all(
        task.verify(item, completion.text) == completion.reward for completion in group.completions
    )

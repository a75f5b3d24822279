"""Peers of a swarm that publish groups as honest nodes do, `RATE` a second together:

    python -m tests.soak.strangers FOLDER RATE

FOLDER is that of the swarm's relay: its address and its manifest. They take nothing: what a peer has to give is the
nodes' and the relay's to carry. The end of standard input is the end; then they print what they published.
"""

import itertools
import json
import os
import select
import sys
import time
from pathlib import Path

from node.config import TaskConfig
from node.rollouts.group import Group, encode, one_turn
from node.swarm.sharing import topic_of
from node.swarm.swarm_folder import load_manifest
from node.tasks import Task, derive_seed, load_tasks
from protocol.credentials.records import Address
from protocol.host import Host
from protocol.identity import Identity
from protocol.limits.limits import Limits
from protocol.limits.timing import LOCAL

HOSTS = 8
COMPLETIONS = 8
TICK = 0.1  # seconds
DRAIN = 4096
AT_ONCE = 128  # between two looks at whether this is the end: twice what a tick has at 640 a second


def main(folder: str, rate: str) -> None:
    """Publish until the end of input."""
    tasks = load_tasks([TaskConfig(name="builtin")])
    manifest = load_manifest(Path(folder))
    assert manifest is not None, f"{folder} belongs to no swarm"
    seeds = [Address.parse((Path(folder) / "address").read_text())]
    limits = Limits(max_item_age_s=float(manifest.limits.max_item_age_s))
    hosts = [
        Host(Identity.generate(), manifest.swarm, "tcp://127.0.0.1:0", seeds, limits, timing=LOCAL)
        for _ in range(HOSTS)
    ]
    for host in hosts:
        host.subscribe(frozenset(), 0.0)
        host.start()
    began, tried = time.monotonic(), 0
    tick, numbers = began, itertools.count()
    while not select.select([sys.stdin], [], [], max(0.0, tick - time.monotonic()))[0]:
        tick = max(tick + TICK, time.monotonic())
        due = int((time.monotonic() - began) * float(rate)) - tried
        for _ in range(min(due, AT_ONCE)):
            number = next(numbers)
            (one,) = tasks.questions(derive_seed("stranger", folder, number), 1)
            hosts[number % HOSTS].publish(encode(_group(one.task, one.seed)), topic_of(one.task.key))
        tried += max(due, 0)  # what a busy machine has no time for is left out, and told at the end
        for host in hosts:
            host.check()
            host.receive(DRAIN)
    published, seconds, took = next(numbers), time.monotonic() - began, sum(os.times()[:2])
    print(json.dumps({"published": published, "seconds": seconds, "processor_seconds": took}), flush=True)
    for host in hosts:
        host.stop()


def _group(task: Task, seed: int) -> Group:
    """A group as an honest peer would send it: one right answer, the others those of other questions."""
    item = task.make(seed)
    texts = [item.answer, *(task.make(derive_seed(seed, at)).answer for at in range(1, COMPLETIONS))]
    made = tuple(one_turn(text, True, task.verify(item, text)) for text in texts)
    return Group(task.key, seed, item.question, made, "stranger", 0)


if __name__ == "__main__":
    main(*sys.argv[1:])

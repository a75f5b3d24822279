"""Peers of a swarm that publish groups as honest nodes do, `RATE` a second together:

    python -m tests.soak.strangers ADDRESS SWARM RATE

They take nothing: what a peer has to give is the nodes' and the relay's to carry. The end of standard input is the end.
"""

import itertools
import os
import select
import sys
import time

from node.config import TaskConfig
from node.rollouts.group import Completion, Group, encode
from node.rollouts.sharing import topic_of
from node.tasks import Task, derive_seed, load_tasks
from protocol.config import LOCAL
from protocol.credentials.records import Address
from protocol.host import Host
from protocol.identity import Identity

HOSTS = 8
COMPLETIONS = 8
TICK = 0.1  # seconds
DRAIN = 4096
AT_ONCE = 64  # as much as a tick has at 640 a second; between two looks at whether this is the end


def main(address: str, swarm: str, rate: str) -> None:
    """Publish until the end of input."""
    tasks = load_tasks([TaskConfig(name="builtin")])
    seeds = [Address.parse(address)]
    hosts = [
        Host(Identity.generate(), bytes.fromhex(swarm), "tcp://127.0.0.1:0", seeds, timing=LOCAL) for _ in range(HOSTS)
    ]
    for host in hosts:
        host.subscribe(frozenset(), 0.0)
        host.start()
    began, published = time.monotonic(), 0
    numbers = itertools.count()
    while not select.select([sys.stdin], [], [], TICK)[0]:
        due = int((time.monotonic() - began) * float(rate)) - published
        for _ in range(min(due, AT_ONCE)):
            number = next(numbers)
            ((task, seed),) = tasks.sample(derive_seed("stranger", swarm, number), 1)
            hosts[number % HOSTS].publish(encode(_group(task, seed)), topic_of(task.key))
        published += max(due, 0)  # what a busy machine has no time for is left out, and told at the end
        for host in hosts:
            host.check()
            host.receive(DRAIN)
    took = sum(os.times()[:2])
    print(
        f"published {next(numbers)} groups in {time.monotonic() - began:.0f} s, {took:.0f} s of processor time",
        flush=True,
    )
    for host in hosts:
        host.stop()


def _group(task: Task, seed: int) -> Group:
    """A group as an honest peer would send it: one right answer, the others those of other questions."""
    item = task.make(seed)
    texts = [item.answer, *(task.make(derive_seed(seed, at)).answer for at in range(1, COMPLETIONS))]
    made = tuple(Completion(text, True, task.verify(item, text)) for text in texts)
    return Group(task.key, seed, item.question, made, "stranger", 0)


if __name__ == "__main__":
    main(*sys.argv[1:])

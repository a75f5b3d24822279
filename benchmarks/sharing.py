"""What sharing costs a round: the same rounds with a network and peers, and alone.

All sides train on their own groups only, so what is timed is taking part. A node signs and sends its groups. It
receives, checks, reads, stores and relays as many of its peers' groups as its sampler can use (`node.swarm.sharing`).
It draws as many of them as a round has of its own: it makes their questions again, scores them and encodes them. The
rule draws peers' groups, but no update trains on them, or the policies would part. How surprising they are is not
measured, since that is a forward pass.

The peers live in a child process. At each end of a round here they publish what as many nodes of this size publish in
one. They take from each other as much as the node does.

A node is alone in two ways: with nothing beside it, and beside the same peers, who then have one of their own in its
place. Cores that share caches and pipelines are slower while others work, whoever these are: what taking part costs
the node is the difference to the second, and what company on its machine costs it is that between the two.

Rounds go before those that are timed: a node asks for everything until it knows its own pace and its peers'.
"""

import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import msgpack

from benchmarks.block import Block, time_gossamer
from node.config import NodeConfig
from node.rollouts.group import Group, encode, one_turn
from node.rollouts.group_buffer import ReceivedGroup
from node.swarm.sharing import NetworkExchange, NoExchange, topic_of
from node.tasks import derive_seed
from node.tasks.task_set import TaskSet, TrainingQuestion
from protocol.credentials.records import Address
from protocol.host import Host
from protocol.identity import Identity

Bodies = list[list[list[tuple[bytes, bytes]]]]  # (topic, body) of each item of each round of each peer
JOIN_TIMEOUT = 30.0  # seconds for the peers to start and link


def time_sharing(config: NodeConfig, tasks: TaskSet, peers: int, warm: int) -> tuple[Block, int]:
    """Time rounds among `peers` peers, after `warm`; return them and how many of the peers' groups came in them.

    Raises:
        RuntimeError: the peers did not join, or a group of theirs was rejected.
    """
    swarm = secrets.token_bytes(16)
    host = Host(Identity.generate(), swarm, "tcp://127.0.0.1:0", [])
    address = host.start()
    if address is None:
        raise RuntimeError("a host that listens has an address")
    try:
        with feeder(address, swarm, _bodies(config, tasks, peers), config.sampling.local) as publish:
            wait_for_peers(host, peers)
            exchange = _Fed(host, tasks, publish, config, warm)
            sampling = config.sampling.model_copy(
                update={
                    "rule": "sapo",
                    "external": config.sampling.local,
                    "max_surprise": 0.0,
                }
            )
            block = time_gossamer(config.model_copy(update={"sampling": sampling}), tasks, exchange, warm)
        rejected = dict(host.counters().rejected)
    finally:
        host.stop()
    if rejected:
        raise RuntimeError(f"groups were rejected, so this measures something else: {rejected}")
    return block, exchange.received


def time_beside(config: NodeConfig, tasks: TaskSet, peers: int, warm: int) -> Block:
    """Time rounds of a node alone, after `warm`, beside a swarm of so many peers and one more that is none of its."""
    with feeder(None, secrets.token_bytes(16), _bodies(config, tasks, peers), config.sampling.local) as publish:
        return time_gossamer(config, tasks, _Beside(publish), warm)


class _Beside(NoExchange):
    """A node alone, which lets others publish a round whenever it has made its own."""

    def __init__(self, publish: Callable[[], None]) -> None:
        self._let_others_publish = publish

    def publish(self, groups: Sequence[Group]) -> int:
        self._let_others_publish()
        return 0


class _Fed(NetworkExchange):
    """The node's exchange, which lets the peers publish a round whenever it publishes its own."""

    def __init__(self, host: Host, tasks: TaskSet, publish: Callable[[], None], config: NodeConfig, warm: int) -> None:
        local, completions = config.sampling.local, config.sampling.completions
        super().__init__(host, tasks, max_completions=4 * completions, external=local)
        self._let_peers_publish = publish
        self._warm = warm
        self.received = 0  # since it is warm

    def publish(self, groups: Sequence[Group]) -> int:
        self._warm -= 1
        self._let_peers_publish()
        return super().publish(groups)

    def receive(self, known: Callable[[bytes], bool]) -> list[ReceivedGroup]:
        shared = super().receive(known)
        self.received += len(shared) if self._warm < 0 else 0
        return shared


@contextmanager
def feeder(address: Address | None, swarm: bytes, bodies: Bodies, external: int = 0) -> Iterator[Callable[[], None]]:
    """Run peers in a child process; each call of what is yielded lets all of them publish a round.

    They join the node at `address`, or one of their own where that is None, and ask for what a node does that draws
    `external` groups a round; for 0, for what only relays.
    """
    with tempfile.NamedTemporaryFile() as file:
        file.write(msgpack.packb(bodies))
        file.flush()
        arguments = [str(address or "-"), swarm.hex(), file.name, str(external)]
        command = [sys.executable, "-m", "benchmarks.feeder", *arguments]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as child:
            if child.stdin is None:
                raise RuntimeError("the child's input was asked for")
            pipe = child.stdin

            def publish() -> None:
                pipe.write(b"\n")
                pipe.flush()

            try:
                yield publish
            except BaseException:
                child.kill()
                raise


def wait_for_peers(host: Host, peers: int) -> None:
    """Wait until `host` has `peers` peers; raises `RuntimeError` after `JOIN_TIMEOUT`."""
    deadline = time.monotonic() + JOIN_TIMEOUT
    while host.counters().peers < peers:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{host.counters().peers} of {peers} peers joined in {JOIN_TIMEOUT:g} s")
        time.sleep(0.05)


def _bodies(config: NodeConfig, tasks: TaskSet, peers: int) -> Bodies:
    count = config.sampling.questions_per_round
    return [
        [
            [
                (topic_of(question.task.key), encode(_group(question, config.sampling.completions)))
                for question in tasks.questions(derive_seed("peer", peer, number), count)
            ]
            for number in range(config.last_round)
        ]
        for peer in range(peers)
    ]


def _group(asked: TrainingQuestion, completions: int) -> Group:
    """A group of one right answer and wrong ones, most of them the answers to other questions."""
    task, seed, item = asked
    texts = [task.make(derive_seed(seed, at)).answer for at in range(completions - 1)]
    wrong = [one_turn(text if task.verify(item, text) == 0 else "no", True, 0.0) for text in texts]
    made = (one_turn(item.answer, True, 1.0), *wrong)
    return Group(task.key, seed, item.question, made, "benchmark", 0)

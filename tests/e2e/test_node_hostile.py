"""A real node process is sent everything a hostile peer can send: each kind is counted, none is trained on.

An honest peer shares through all of it, and its groups are trained on.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from node.config import TaskConfig
from node.rollouts.group import MAX_COMPLETIONS, MAX_GROUP_BYTES, MAX_TEXT_BYTES, Episode, Group, encode, one_turn
from node.tasks import load_tasks
from protocol.credentials.records import Address, make_record
from protocol.events import Arrived, Link, Opened
from protocol.host import Host
from protocol.identity import Identity
from protocol.transport.zeromq import ZmqTransport
from protocol.wire.compression import pack_content
from protocol.wire.envelope import MAX_FRAME_BYTES, Kind, claimed_id, read_control
from protocol.wire.messages import NO_TOPIC, Entry, Have, Hello, Want
from tests.commands import start_node
from tests.protocol_frames import frame_of
from tests.swarms import UNBOUNDED, rows_of, small_config
from tests.waiting import wait_until

SWARM = bytes(range(16))
TASKS = load_tasks(small_config(1).tasks)


def honest_group(number: int, is_held_out: bool = False) -> Group:
    """One right and seven wrong answers, to a question that training may ask, or to a held-out one."""
    task = TASKS.tasks[number % len(TASKS.tasks)]
    seeds = count(1000 * number)
    seed = next(seed for seed in seeds if TASKS.is_held_out(task, task.make(seed).question) == is_held_out)
    item = task.make(seed)
    right = one_turn(item.answer, True, 1.0)
    return Group(task.key, seed, item.question, (right, *[one_turn("no", True, 0.0)] * 7), "p", 0)


def false_reward(seed: int) -> bytes:
    """It claims the opposite reward for each answer: a node scores only those that it would train on."""
    group = honest_group(seed)
    lies = tuple(completion._replace(reward=1 - completion.reward) for completion in group.completions)
    return encode(replace(group, completions=lies))


class Attacker:
    """A member by its own valid record, which then sends frames of its choosing."""

    def __init__(self, address: Address, swarm: bytes = SWARM) -> None:
        self.identity = Identity.generate()
        self.swarm = swarm
        self.sequence = 0
        self.link = Link(address.key, dialled=True)
        self.transport = ZmqTransport(self.identity, None)
        self.transport.dial(address)
        wait_until(lambda: any(isinstance(event, Opened) for event in self.transport.poll(0.05)), 20, "the handshake")
        record = make_record(self.identity, swarm, (), 1, "attacker", int((time.time() + 3600) * 1000))
        self.send(self.frame(Kind.HELLO, Hello(record.encoded).encode()))

    def frame(self, kind: int, body: bytes, at: float | None = None) -> bytes:
        self.sequence += 1
        body = NO_TOPIC + pack_content(body) if kind == Kind.ITEM else body
        return frame_of(self.identity, self.swarm, kind, self.sequence, int((at or time.time()) * 1000), body)

    def give(self, frame: bytes) -> None:
        """Announce an item, and send it when we are asked for it."""
        item = claimed_id(frame)
        self.send(self.frame(Kind.HAVE, Have((Entry(item, len(frame), NO_TOPIC),)).encode()))

        def is_asked() -> bool:
            heard = [event.frame for event in self.transport.poll(0.05) if isinstance(event, Arrived)]
            said = [message for frame in heard if (message := read_control(frame)) and message.kind == Kind.WANT]
            return any(item in dict(Want.decode(want.body).parts) for want in said)

        wait_until(is_asked, 20, "it to be asked for")
        self.send(frame)

    def send(self, frame: bytes) -> None:
        assert self.transport.send(self.link, frame)
        self.transport.poll(0.01)

    def item(self, seed: int, at: float | None = None) -> bytes:
        return self.frame(Kind.ITEM, encode(honest_group(seed)), at)


def garbage(attacker: Attacker) -> None:
    attacker.send(os.urandom(500))


def truncated(attacker: Attacker) -> None:
    attacker.send(attacker.item(901)[:60])


def forged(attacker: Attacker) -> None:
    frame = bytearray(attacker.item(902))
    frame[-1] ^= 1
    attacker.give(bytes(frame))


def unasked(attacker: Attacker) -> None:
    attacker.send(attacker.frame(Kind.ITEM, false_reward(903)))


def stale(attacker: Attacker) -> None:
    attacker.give(attacker.item(904, at=time.time() - 7200))


def oversized(attacker: Attacker) -> None:
    attacker.send(bytes(MAX_FRAME_BYTES + 1))


def nonsense(attacker: Attacker) -> None:
    attacker.give(attacker.frame(Kind.ITEM, b"\x93\x01\x02\x03"))


def huge_group(attacker: Attacker) -> None:
    group = honest_group(905)
    made = [completion._replace(texts=("x" * (MAX_TEXT_BYTES + 1),)) for completion in group.completions]
    attacker.give(attacker.frame(Kind.ITEM, encode(replace(group, completions=tuple(made)))))


def unpacking_to_more_than_is_allowed(attacker: Attacker) -> None:
    attacker.give(attacker.frame(Kind.ITEM, bytes(MAX_GROUP_BYTES + 1)))


def lying_about_the_reward(attacker: Attacker) -> None:
    attacker.give(attacker.frame(Kind.ITEM, false_reward(906)))


def lying_about_the_question(attacker: Attacker) -> None:
    group = honest_group(907)
    attacker.give(attacker.frame(Kind.ITEM, encode(replace(honest_group(907 + 7), seed=group.seed))))


def on_a_question_of_the_evaluation(attacker: Attacker) -> None:
    attacker.give(attacker.frame(Kind.ITEM, encode(honest_group(911, is_held_out=True))))


def of_an_unknown_task(attacker: Attacker) -> None:
    group = honest_group(908)
    attacker.give(attacker.frame(Kind.ITEM, encode(replace(group, task=group.task._replace(name="none")))))


def too_many_completions(attacker: Attacker) -> None:
    group = honest_group(909)
    completions = group.completions * MAX_COMPLETIONS
    attacker.give(attacker.frame(Kind.ITEM, encode(replace(group, completions=completions))))


def several_turns_where_there_is_one(attacker: Attacker) -> None:
    group = honest_group(911)
    made = [
        completion._replace(texts=(*completion.texts, "you have won", *completion.texts))
        for completion in group.completions
    ]
    attacker.give(attacker.frame(Kind.ITEM, encode(replace(group, completions=tuple(made)))))


ATTACKS: list[tuple[Callable[[Attacker], None], str]] = [
    (garbage, "forged"),
    (truncated, "malformed"),
    (forged, "forged"),
    (unasked, "unasked_item"),
    (stale, "stale"),
    (oversized, "oversized"),
    (nonsense, "malformed"),
    (huge_group, "malformed"),
    (unpacking_to_more_than_is_allowed, "oversized"),
    (lying_about_the_reward, "false_reward"),
    (lying_about_the_question, "false_question"),
    (on_a_question_of_the_evaluation, "held_out"),
    (of_an_unknown_task, "unknown_task"),
    (too_many_completions, "malformed"),
    (several_turns_where_there_is_one, "turns"),
]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Path]:
    """A node that has begun to train, in a process of its own."""
    network = {"swarm": SWARM.hex(), "listen": "tcp://127.0.0.1:0"}
    # Only what peers share is trained on, so a group that slipped through would be seen.
    config = small_config(1_000_000, network=network, sampling={"local": 0, "external": 4, "questions": 1, **UNBOUNDED})
    child = start_node(config, tmp_path)
    try:
        wait_until(lambda: rows_of(tmp_path), 60, "the first round")
        yield tmp_path
        assert child.is_alive()
        os.kill(child.pid or 0, signal.SIGTERM)
        child.join(30)
        assert child.exitcode == 0
    finally:
        child.kill()


def rejected(node: Path) -> dict[str, int]:
    return rows_of(node)[-1]["swarm/rejected"]


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_each_attack_is_counted_and_nothing_of_it_is_trained_on(node: Path) -> None:
    address = Address.parse((node / "address").read_text())
    peer = Host(Identity.generate(), SWARM, None, [address])
    peer.start()
    try:
        wait_until(lambda: peer.counters().peers, 20, "the honest peer's link")
        honest = 0
        for attack, reason in ATTACKS:
            before = rejected(node).get(reason, 0)
            attacker = Attacker(address)
            try:
                attack(attacker)
                wait_until(lambda: rejected(node).get(reason, 0) > before, 20, f"{attack.__name__} as {reason}")  # noqa: B023
            finally:
                attacker.transport.close()
            peer.publish(encode(honest_group(honest)))
            honest += 1
            wait_until(lambda: sum(row["groups_external"] for row in rows_of(node)) == honest, 20, "the honest group")  # noqa: B023
        stranger = Attacker(address, swarm=bytes(16))
        try:
            wait_until(lambda: rejected(node).get("wrong_swarm", 0) > 0, 20, "the stranger")
            stranger.send(stranger.item(910))
        finally:
            stranger.transport.close()
        peer.publish(encode(honest_group(honest)))
        wait_until(lambda: rows_of(node)[-1]["swarm/buffer"] == honest + 1, 20, "the last honest group")
        assert sum(row["groups_external"] for row in rows_of(node)) <= honest + 1
    finally:
        peer.stop()


GAMES = load_tasks([TaskConfig(name="builtin/guess")])
LIES = (
    Episode(("8", "higher=", "8", "higher=", "8"), True, 1.0),  # so it is told, and it has lost
    Episode(("8", "you have won=", "8"), True, 1.0),  # so it is not told
)


def forged_game(number: int) -> Group:
    """A game of which one episode is a lie."""
    [task] = GAMES.tasks
    seed = next(one for one in count(1000 * number) if not GAMES.is_held_out(task, task.make(one).question))
    lost = Episode(("9", "higher=", "9", "higher=", "9"), True, 0.0)
    return Group(task.key, seed, task.make(seed).question, (LIES[number % 2], *[lost] * 7), "p", 0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_swarm_learns_a_game_of_turns_while_a_liar_forges_games_which_costs_the_liar(tmp_path: Path) -> None:
    tables = {
        "tasks": [{"name": "builtin/guess"}],
        "sampling": {"local": 8, "external": 16, "completions": 8, **UNBOUNDED},
        "trainer": {"learning_rate": 5e-4},
    }
    folders = [tmp_path / name for name in ("n0", "n1")]
    network = {"swarm": SWARM.hex(), "listen": "tcp://127.0.0.1:0"}
    children = [start_node(small_config(1_000_000, network=network, **tables), folders[0])]
    liar: Host | None = None
    try:
        wait_until(lambda: rows_of(folders[0]), 120, "the first round")
        address = (folders[0] / "address").read_text()
        second = small_config(1_000_000, network={**network, "seeds": [address]}, **{**tables, "seed": 2})
        children.append(start_node(second, folders[1]))
        liar = Host(Identity.generate(), SWARM, None, [Address.parse(address)])
        liar.start()
        wait_until(lambda: liar.counters().peers, 60, "the liar's link")
        numbers = count()

        def is_refused() -> bool:
            liar.publish(encode(forged_game(next(numbers))))
            found = rejected(folders[0])
            return found.get("unscorable", 0) > 0 and found.get("false_reward", 0) > 0 and "graylisted" in found

        wait_until(is_refused, 300, "the refusal of the liar")
        for folder in folders:
            wait_until(lambda: len(rows_of(folder)) >= 80, 400, "80 rounds")  # noqa: B023
            rows = rows_of(folder)
            assert sum(row["groups_external"] for row in rows) > 0
            assert sum(row["reward"] for row in rows[-10:]) / 10 > 0.2 > 0.1 > rows[0]["reward"]
            assert rows[-1]["swarm/peers"] >= 1
    finally:
        if liar is not None:
            liar.stop()
        for child in children:
            child.kill()

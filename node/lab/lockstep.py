"""The runner "memory": every node of a swarm in one process, in lockstep, for a fraction of the processor time.

Each node is a thread that runs `node.run.train_node`, the very loop, draw and update of a real node, on its own
weights, folder and seed. One thread runs at a time: a node runs until it wants completions, then the next one does;
when all of them wait, one batch is generated for all that are small and alike (`node.lab.ensemble`), and one for each
of the others. So a run is a function of its settings and seed, which a swarm of processes is not: there, what a node
finds in its buffer depends on how fast the others are.

What is left out: processes, sockets and gossip. A group that a node publishes is checked as any peer's is, once for
all, and lies in the buffer of every other node `delay` rounds after it was made, at the next round with `delay` 0.
A node of pace p takes p rounds of the fastest for each of its own. Under churn a node that is away sits out rounds of
the others, and so does one that joins late; when it is there it gets what was posted meanwhile, as a real one is
announced what its peers hold. Weights are averaged by a node's own code (`node.lab.averaging`).
Under an attack the last nodes are hostile: they live as the others do, and what they publish is the attack's.
After a kill a run is not resumed: it begins anew.
"""

import gc
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from collectives.types import Codec
from node.config import NodeConfig
from node.engines import Generated, SamplingParams, in_process
from node.errors import UserError
from node.fleet.local_swarm import RunPlan, make_folders, node_config, node_folders, record_plan, write_run_summary
from node.lab.attacks import ATTACKS, LOOK_BACK, LabAttack, Scene
from node.lab.averaging import Averaging, LockstepWeights, optimizers_known
from node.lab.churn import Departures, stretches
from node.lab.controls import CONTROLS
from node.lab.damage import Witness
from node.lab.ensemble import Request, generate, kind_of
from node.lab.plan import AttackConfig, ChurnConfig, Moments
from node.policy.load import Policy, load_policy
from node.rollouts.group import Group, encode
from node.rollouts.group_buffer import ReceivedGroup, as_received
from node.rollouts.screening import check
from node.run import Parts, train_node
from node.swarm.sharing import published_form
from node.tasks import TaskKey, derive_seed, load_tasks
from node.tasks.task_set import TaskSet
from node.telemetry.metrics_file import MetricsLog
from node.telemetry.summary import Summary
from node.training.budget import Spent, part_done
from protocol.host import Counters

ALIKE: Mapping[str, Sequence[float]] = {}


def run_in_memory(
    plan: RunPlan,
    delay: int,
    *,
    started: float,
    attack: AttackConfig | None = None,
    tempo: Mapping[str, Sequence[float]] = ALIKE,
    churn: ChurnConfig | None = None,
    control: str | None = None,
    moments: Moments = "kept",
) -> Summary:
    """Run `plan` to its end in this process; leave a run's folder, but no report.

    Args:
        plan: from `make_plan`.
        delay: rounds that a group needs to get to the others.
        started: when the command was given, Unix seconds.
        attack: of the last of the nodes on the others.
        tempo: of each node its `pace`, and in `begins` the part of its run that the first node has done when it joins.
        churn: of all nodes; None: they are there from the first round to the last.
        control: the rule of all nodes, one of `node.lab.controls`; None: that of their settings.
        moments: Adam's, when weights are averaged.

    Raises:
        UserError: the settings cannot be used, or ask for what only a real node has.
    """
    make_folders(plan)
    record_plan(plan)
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # what is imported stays: else each collection looks at it again, a fifth of a short run's time
    configs = [node_config(plan, index, cores=1) for index in range(plan.nodes)]
    for config in configs:
        _check(config)
    turns = Turns(plan.nodes, batched)
    tasks = _tasks_of(configs)
    mail = Mail(tasks[0], 4 * plan.config.sampling.completions, delay)
    witness = Witness(tasks[0])
    paces, begins = tempo.get("pace", [1] * plan.nodes), tempo.get("begins", [0] * plan.nodes)
    averaging = Averaging(delay, moments, _averaging(configs, begins))
    part_of: dict[int, Callable[[], float]] = {}  # of its run that each node has done
    honest = plan.nodes - (attack.nodes if attack else 0)

    def node(index: int, folder: Path) -> None:
        config = configs[index]
        policy = load_policy(config.policy, config.trainer.bf16)
        if attack is not None and index >= honest:
            exchange: MailExchange = HostileExchange(mail, index, attack, config)
        else:
            exchange = mail.exchange(index, witness)
        weights = None
        if config.weights.mode != "off":
            weights = LockstepWeights(index, averaging, config.weights, policy, lambda: exchange.now)
        pause = partial(turns.skip, index)
        exchange.slow_down(int(paces[index]), pause)
        part_of[index] = lambda: part_done(config, *exchange.done)
        departures = Departures(stretches(churn, plan.seed, index)) if churn else None
        come_and_go = _Presence(exchange, weights, pause, departures, begins[index], part_of[0])
        engine = _LockstepEngine(turns, index, policy, come_and_go)
        metrics = MetricsLog(folder / "metrics.jsonl")
        rule = CONTROLS[control](part_of[index]) if control else None
        parts = Parts(config, folder, config.seed or 0, policy, engine, tasks[index], exchange, metrics, rule=rule)
        train_node(parts if weights is None else parts._replace(weights=weights.while_there()))

    with optimizers_known():
        turns.run([partial(node, index, folder) for index, folder in enumerate(node_folders(plan).values())])
    witness.write(plan.out, honest)
    also = {
        "delay": delay,
        "attack": attack and attack.model_dump(),
        "tempo": dict(tempo),
        "moments": moments,
        "control": control,
        "cpu_seconds": time.process_time(),
    }
    return write_run_summary(plan, started, **also, churn=churn and churn.model_dump())


def _check(config: NodeConfig) -> None:
    for key, wrong in {
        "engine beside the trainer (engine.kind, engine.ahead)": not config.engine.own_weights,
        "codec for weights (weights.codec)": config.weights.codec != Codec.NONE.value,
    }.items():
        if wrong:
            raise UserError(f"the runner 'memory' has no {key}: choose runner = \"processes\"")


def _averaging(configs: Sequence[NodeConfig], begins: Sequence[float]) -> set[int]:
    """Return the nodes that average weights from the start.

    Raises:
        UserError: nodes that average weights cannot do so with each other.
    """
    nodes = [index for index, config in enumerate(configs) if config.weights.mode != "off"]
    if any(
        (configs[index].policy, configs[index].weights.mode)
        != (configs[nodes[0]].policy, configs[nodes[0]].weights.mode)
        for index in nodes
    ):
        raise UserError("nodes average weights of different policies, or in different ways: give them one of each")
    return {index for index in nodes if begins[index] == 0}


def _tasks_of(configs: Sequence[NodeConfig]) -> list[TaskSet]:
    """Return the tasks of each node: their keys are the same at all, and each asks them in its own way."""
    sets: list[TaskSet] = []
    for index, config in enumerate(configs):
        alike = index > 0 and config.tasks == configs[index - 1].tasks
        sets.append(sets[-1] if alike else load_tasks(config.tasks))
    return sets


@dataclass(slots=True)
class _Presence:
    """Has a node sit out rounds of the others: until it joins, and when it is away. To be called before its rounds."""

    exchange: "MailExchange"
    weights: LockstepWeights | None
    pause: Callable[[], None]
    departures: Departures | None
    begins: float
    first: Callable[[], float]  # the part of its run that the first node has done

    def __call__(self, rounds: int) -> None:
        """Return when the node is there, and has done so many rounds."""
        if self.begins:
            while self.first() < self.begins:
                self.exchange.stay_away(1, self.pause)
            self.begins = 0.0
            self._is_back()
        if self.departures is not None and (away := self.departures.due(rounds)):
            if self.weights is not None:
                self.weights.leave()
            self.exchange.stay_away(away, self.pause)
            self._is_back()

    def _is_back(self) -> None:
        if self.weights is not None:
            self.weights.back()


class Turns:
    """Threads of which one runs at a time, in their order, and whose calls are answered together.

    When no thread can run, `answer` gets the requests of all that wait, by thread, and returns an answer to each. A
    thread that skips waits with them and asks nothing. Rounds may have different numbers of requests (episodes have
    turns): a thread that has begun a later round than another waits for that one.
    """

    def __init__(
        self, count: int, answer: Callable[[Mapping[int, Request]], Mapping[int, list[list[Generated]]]]
    ) -> None:
        self._answer = answer
        self._turns = [threading.Semaphore(0) for _ in range(count)]
        self._live = list(range(count))
        self._due = list(self._live)  # the threads that run before the next answers
        self._requests: dict[int, Request | None] = {}
        self._rounds = [0] * count
        self._answers: dict[int, list[list[Generated]]] = {}
        self._error: BaseException | None = None

    def run(self, work: Sequence[Callable[[], None]]) -> None:
        """Run `work`, a thread each, to its end; raise the first error of any."""
        threads = [
            threading.Thread(target=self._thread, args=(index, target), name=f"n{index}", daemon=True)
            for index, target in enumerate(work)
        ]
        for thread in threads:
            thread.start()
        self._turns[0].release()
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def begin_round(self, index: int) -> None:
        """Note that thread `index` begins a round."""
        self._rounds[index] += 1

    def call(self, index: int, request: Request) -> list[list[Generated]]:
        """Wait for the answer to a request of thread `index`, while the others run."""
        self._wait(index, request)
        return self._answers.pop(index)

    def skip(self, index: int) -> None:
        """Let thread `index` wait until the others are done with its round, and begin the next one."""
        self._wait(index, None)
        self.begin_round(index)

    def _wait(self, index: int, request: Request | None) -> None:
        self._requests[index] = request
        self._next(index)
        self._turns[index].acquire()
        if self._error is not None:
            raise _EndedError

    def _thread(self, index: int, work: Callable[[], None]) -> None:
        self._turns[index].acquire()
        try:
            if self._error is None:
                work()
        except _EndedError:
            pass
        except BaseException as error:  # noqa: BLE001  # `run` raises it
            self._error = self._error or error
        self._live.remove(index)
        self._next(index)

    def _next(self, index: int) -> None:
        """Give the turn to the next thread that can run; when all wait, answer those of the earliest round."""
        following = next((other for other in self._due if other > index), None)
        if following is None and self._live:
            earliest = min(self._rounds[other] for other in self._live)
            self._due = [other for other in self._live if self._error or self._rounds[other] == earliest]
            following = self._due[0]
            waiting = [(other, self._requests.pop(other, None)) for other in self._due]
            requests = {other: request for other, request in waiting if request is not None}
            if self._error is None and requests:
                try:
                    self._answers = dict(self._answer(requests))
                except BaseException as error:  # noqa: BLE001  # `run` raises it
                    self._error = error
        if following is not None:
            self._turns[following].release()


class _EndedError(Exception):
    """Another thread failed: this one ends too."""


def batched(requests: Mapping[int, Request]) -> dict[int, list[list[Generated]]]:
    """Answer requests: those of one kind together, and others by an engine each, one after another."""
    alike: dict[Hashable, list[int]] = {}
    for index, request in requests.items():
        alike.setdefault(kind_of(request), []).append(index)
    answers: dict[int, list[list[Generated]]] = {}
    for index in alike.pop(None, []):
        request = requests[index]
        answers[index] = in_process(request.policy).generate(request.prompts, request.n, request.sampling, request.seed)
    for members in alike.values():
        answers |= zip(members, generate([requests[index] for index in members]), strict=True)
    return answers


class _LockstepEngine:
    """A node's side of the common generation; `begins` is called before each round with the rounds that are done."""

    def __init__(self, turns: Turns, index: int, policy: Policy, begins: Callable[[int], None]) -> None:
        self._turns = turns
        self._index = index
        self._policy = policy
        self._begins = begins
        self._version = -1

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: SamplingParams, seed: int
    ) -> list[list[Generated]]:
        """Return `n` completions for each prompt; see `RolloutEngine.generate`."""
        return self._turns.call(self._index, Request(self._policy, prompts, n, sampling, seed))

    def load(self, version: int) -> None:
        """Begin a round, or evaluate before it; the trainer's weights are this engine's."""
        if version > self._version:
            self._version = version
            self._turns.begin_round(self._index)
        self._begins(version)

    def rest(self) -> None:
        """Do nothing: the weights are the trainer's."""

    def close(self) -> None:
        """Do nothing: the model belongs to the trainer."""


@dataclass(slots=True)
class Mail:
    """Takes the place of a network: groups of each round, checked once, for all others."""

    tasks: TaskSet
    max_completions: int
    delay: int
    _letters: list[tuple[int, int, ReceivedGroup]] = field(default_factory=list)  # sender, its round, the group
    _rejected: Counter[str] = field(default_factory=Counter)

    def exchange(self, index: int, witness: Witness | None = None) -> "MailExchange":
        """Return the exchange of node `index`; `witness` sees what it makes."""
        return MailExchange(self, index, witness)

    def post(self, sender: int, round_number: int, group: Group, key: int = 0) -> int:
        """Check a group that node `sender` made in its round `round_number`; return the bytes that it has.

        A node signs with its first key, or with another one of its own.
        """
        body = encode(group)
        checked, reason = check(body, self.tasks, self.max_completions)
        if checked is None:
            self._rejected[reason] += 1
        else:
            name = f"n{sender}.{key}" if key else f"n{sender}"
            shared = as_received(checked, time.time())._replace(peer=name)
            self._letters.append((sender, round_number, shared))
        return len(body)

    def read(self, reader: int, start: int, round_number: int) -> tuple[list[ReceivedGroup], int]:
        """Return the others' groups from place `start` on that are there by the reader's round, and the next place.

        They are in the order of rounds and nodes, whoever was late in a round for an evaluation before it.
        """
        end = start
        while end < len(self._letters) and self._letters[end][1] + self.delay < round_number:
            end += 1
        letters = sorted(self._letters[start:end], key=lambda letter: (letter[1], letter[0]))
        return [shared for sender, _, shared in letters if sender != reader], end

    def groups_of_others(self, reader: int, count: int) -> list[Group]:
        """Return the groups that others posted among the last `count`."""
        return [shared.group for sender, _, shared in self._letters[-count:] if sender != reader]


class MailExchange:
    """A node's place at the mail (`node.swarm.sharing.GroupExchange`)."""

    def __init__(self, mail: Mail, index: int, witness: Witness | None = None) -> None:
        self._mail = mail
        self._index = index
        self._witness = witness
        self._round = 0
        self._pace, self._pause = 1, _no_pause
        self.done = (0, Spent())  # rounds, and what the node has spent in them
        self._place = 0
        self._sent = self._received = self._items_sent = self._items_received = 0

    def begin_round(self, external: int) -> None:
        """Ask nobody: all that is posted comes."""

    def publish(self, groups: Sequence[Group]) -> int:
        """Post this round's groups."""
        self._next_round()
        if self._witness is not None:
            self._witness.saw(self._round, groups)
        posted = [shared for group in groups if (shared := published_form(group, self._mail.tasks)) is not None]
        for group in posted:
            self._post(group)
        return len(posted)

    @property
    def now(self) -> int:
        """The lockstep's round that this node is in."""
        return self._round

    def slow_down(self, pace: int, pause: Callable[[], None]) -> None:
        """Let each round take `pace` of the others', after the first of which this node does nothing but `pause`."""
        self._pace, self._pause = pace, pause

    def stay_away(self, rounds: int, pause: Callable[[], None]) -> None:
        """Let so many rounds of the others go by, in which this node does nothing but call `pause`."""
        for _ in range(rounds):
            pause()
            self._round += 1

    def _next_round(self) -> None:
        self._round += 1
        self.stay_away(self._pace - 1, self._pause)

    def _post(self, group: Group, key: int = 0) -> None:
        self._sent += self._mail.post(self._index, self._round, group, key)
        self._items_sent += 1

    def receive(self, known: Callable[[bytes], bool]) -> list[ReceivedGroup]:
        """Return the others' groups of earlier rounds."""
        shared, self._place = self._mail.read(self._index, self._place, self._round)
        self._received += sum(len(item.body) for item in shared)
        self._items_received += len(shared)
        return [item._replace(received=time.time()) for item in shared if not known(item.id)]

    def revoked(self, signers: Collection[str]) -> list[str]:
        """Return nobody."""
        return []

    def drew(self, groups: int, left: int, easy: Collection[TaskKey]) -> None:
        """Ask nobody: all that is posted comes."""

    def refuse(self, group_id: bytes, reason: str) -> None:
        """Tell nobody: `post` has checked the group, and a question too long for this node is nobody's fault."""

    def finished(self, row: Mapping[str, Any], model: str) -> None:
        """Tell nobody."""
        self.done = row["round"], self.done[1].after(row)

    def taught(self) -> Mapping[str, int]:
        """See `GroupExchange.taught`: nobody reports."""
        return {}

    def traffic(self) -> Counters:
        """Return what went through the mail: bytes of groups alone, a group sent once."""
        return Counters(self._sent, self._received, self._items_sent, self._items_received, 0, 0, 0, {})


def _no_pause() -> None:
    pass


class HostileExchange(MailExchange):
    """A hostile node's place: it publishes what its attack makes of a round."""

    def __init__(self, mail: Mail, index: int, attack: AttackConfig, config: NodeConfig) -> None:
        super().__init__(mail, index)
        self._attack: LabAttack = ATTACKS[attack.kind]
        self._count = attack.groups
        self._config = config

    def publish(self, groups: Sequence[Group]) -> int:
        """Post the attack's groups in place of this round's, under each of its keys in turn."""
        self._next_round()
        config = self._config
        scene = Scene(
            self._round / config.last_round,
            groups,
            self._mail.groups_of_others(self._index, LOOK_BACK),
            self._mail.tasks,
            self._count,
            config.sampling.completions,
            config.engine.max_completion_length - 1,  # of one token each, and the end of text
            random.Random(derive_seed(config.seed, "attack", self._round)),
        )
        posted = self._attack.publish(scene)
        for at, group in enumerate(posted):
            self._post(group, at % self._attack.keys)
        return len(posted)

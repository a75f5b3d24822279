"""Sends the loop's groups to the network and returns peers' groups; nothing here waits.

`GroupExchange` is all that the loop knows of its peers. `NetworkExchange` speaks through
the protocol's host; `NoExchange` is a node alone, for which the loop is plain GRPO.

Demand: a node asks the swarm for its tasks' topics, and for as many groups a second as it can use. Groups that are all
right have topics of their own, which it asks for while it draws such groups.

The demand is what the sampler draws, times `OVERSAMPLING`, over the measured seconds of a round. `OVERSAMPLING` falls
to `SPARE` while rounds find what they want, and to `LESS` while they leave enough for the next. A node that trains on
no peer's groups still takes `RELAY_DEMAND` and passes it on: a node that relays nothing wastes its neighbours' links.
"""

import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import structlog

from node.rollouts.draw import GroupSource
from node.rollouts.group import FORMAT, MAX_GROUP_BYTES, Group, GroupError, encode
from node.rollouts.group_buffer import ReceivedGroup, as_received
from node.rollouts.rule import is_informative, is_right
from node.rollouts.screening import BLAMELESS, GroupBounds, ReadResult, read
from node.swarm.peering import UPDATE, other_form
from node.swarm.reports import REPORTS_TOPIC, Reporter, ReportError, ReportIntake
from node.tasks import UNIT, TaskKey, is_in_range, told_outside
from node.tasks.scoring.verdicts import OutOfTime, Scored
from node.tasks.task_set import TaskSet, outside, unshared
from protocol.errors import OutboxFull
from protocol.host import Counters, Host, ItemVerdict, Received
from protocol.identity import NodeId
from protocol.wire.envelope import ItemId
from protocol.wire.messages import MAX_TOPICS, TOPIC_BYTES

log = structlog.get_logger()

OWN_REFUSED = {  # from why a peer would refuse a group to the name under which its maker counts it
    "": "",
    "malformed": "own_malformed",
    "oversized": "own_oversized",
    "group_size": "own_group_size",
    "turns": "own_turns",
}
MAX_EASY = 2  # answers that are sent of a group that is all right: a second may show another way
MAX_PUPILS = 256  # peers whose reports on this node are counted
RECEIVE_LIMIT = 1024  # items looked at in one round; the rest wait in the host's bounded inbox


class GroupExchange(GroupSource, Protocol):
    """How a round shares its groups and gets others'. No method waits."""

    def publish(self, groups: Sequence[Group]) -> int:
        """Offer this round's own groups to the swarm; return how many were sent."""
        ...

    def finished(self, row: Mapping[str, Any], model: str) -> None:
        """Note that a round of `model` is done, with its metrics: a report may be due."""
        ...

    def taught(self) -> Mapping[str, int]:
        """Return how many of this node's groups peers have trained on since it started, as they report, by peer."""
        ...

    def traffic(self) -> Counters: ...


class NoExchange:
    """A node alone."""

    def begin_round(self, external: int) -> None:
        """Ask nobody."""

    def publish(self, groups: Sequence[Group]) -> int:
        """Drop the groups: nobody is there."""
        return 0

    def receive(self, known: Callable[[bytes], bool]) -> list[ReceivedGroup]:
        """Return nothing."""
        return []

    def revoked(self, signers: Collection[str]) -> list[str]:
        """Return nobody."""
        return []

    def drew(self, groups: int, left: int, easy: Collection[TaskKey]) -> None:
        """Ask nobody."""

    def refuse(self, group_id: bytes, reason: str) -> None:
        """Tell nobody."""

    def finished(self, row: Mapping[str, Any], model: str) -> None:
        """Tell nobody."""

    def taught(self) -> Mapping[str, int]:
        """Return nothing."""
        return {}

    def traffic(self) -> Counters:
        """Return zeros."""
        return Counters(0, 0, 0, 0, 0, 0, 0, {})


class GroupReader:
    """Decides whether what a peer sent may enter the group buffer; pure.

    Args:
        tasks: that this node verifies.
        limits: of a group.
    """

    def __init__(self, tasks: TaskSet, limits: GroupBounds) -> None:
        self._tasks = tasks
        self._limits = limits
        shared = [task.key for task in tasks.tasks if not unshared(task)]
        self.topics = frozenset(topic_of(key, is_easy) for key in shared for is_easy in (False, True))

    def read(self, body: bytes, topic: bytes) -> ReadResult:
        """Return the group in `body`, which came under `topic`, or why it is refused; nothing in it is verified.

        If the topic is ours and is not the group's, the group is refused as `false_topic`.
        """
        try:
            group = read(body, self._tasks, self._limits.completions, self._limits.bytes)
        except GroupError as error:
            is_lie = error.reason == "unknown_task" and topic in self.topics
            return ReadResult(None, "false_topic" if is_lie else error.reason)
        if topic in self.topics and topic != topic_of_group(group):
            return ReadResult(None, "false_topic")
        return ReadResult(group, "")


class NetworkExchange:
    """Shares through a running `Host`, which relays, deduplicates and counts."""

    def __init__(  # each is a thing of its own
        self,
        host: Host,
        tasks: TaskSet,
        *,
        max_completions: int,
        external: int,
        max_bytes: int = MAX_GROUP_BYTES,
        reports_s: int = 0,
        reporter: Reporter | None = None,
        node: str = "",
    ) -> None:
        """Share over `host`; ask it for as many of the tasks' groups as a node that draws `external` a round needs.

        In a swarm whose nodes report every `reports_s` seconds, it passes on their reports; `reporter` makes this
        node's. `node` is this node's id, for `taught`.
        """
        self._host = host
        self._node = NodeId(node)
        self._tasks = tasks
        self._reader = GroupReader(tasks, GroupBounds(max_completions, max_bytes))
        self._unsent: Counter[str] = Counter()  # own groups, by why they were not sent
        self._demand = Demand(external)
        self._reports = ReportIntake(reports_s) if reports_s else None
        self._reporter = reporter
        self._taught: Counter[str] = Counter()
        self._beside = frozenset({REPORTS_TOPIC} if reports_s else ())
        self._always = frozenset(topic_of(task.key) for task in tasks.tasks if not unshared(task)) | self._beside
        self._topics = self._always
        self._others = ""  # what was said last of peers with another form of groups
        self._subscribe()

    def begin_round(self, external: int) -> None:
        """See `GroupSource.begin_round`."""
        if self._demand.next_round(time.monotonic(), external):
            self._subscribe()

    def publish(self, groups: Sequence[Group]) -> int:
        """Hand groups to the network thread, in their `published_form`; return how many it has taken.

        One that peers would refuse, or that the network thread has no room for, is counted, not sent.
        """
        sent = 0
        for group in filter(None, (published_form(group, self._tasks) for group in groups)):
            body, topic = encode(group), topic_of_group(group)
            reason = OWN_REFUSED[self._reader.read(body, topic).reason]
            if not reason:
                sent += self._publish(body, topic)
                continue
            if reason not in self._unsent:
                log.warning("a group of this node's own is not shared, as peers would refuse it", counted_as=reason)
            self._unsent[reason] += 1
        return sent

    def receive(self, known: Callable[[bytes], bool]) -> list[ReceivedGroup]:
        """Read what the host has collected; a bad item costs its signer and nobody else."""
        shared = []
        for item in self._host.receive(RECEIVE_LIMIT):
            if self._reports is not None and item.topic == REPORTS_TOPIC:
                self._pass_on(self._reports, item)
                continue
            if known(item.id):
                continue
            now = time.time()
            group, reason = self._reader.read(item.body, item.topic)
            if group is not None:
                shared.append(ReceivedGroup(item.id, item.sender, now, group, item.body))
            else:
                self.refuse(item.id, reason)
        return shared

    def _pass_on(self, reports: ReportIntake, item: Received) -> None:
        """Take a report, and note what it says of this node; unless it is bad the host passes it on."""
        try:
            groups = reports.take(item.body, item.sender, item.time).taught_by.get(self._node, 0)
        except ReportError as error:
            self.refuse(item.id, error.reason)
        else:
            if groups and (item.sender in self._taught or len(self._taught) < MAX_PUPILS):
                self._taught[item.sender] += groups

    def revoked(self, signers: Collection[str]) -> list[str]:
        """See `GroupSource.revoked`."""
        return [signer for signer in signers if self._host.is_revoked(NodeId(signer))]

    def drew(self, groups: int, left: int, easy: Collection[TaskKey]) -> None:
        """See `GroupSource.drew`: the next round's demand follows."""
        self._demand.drew(groups, left)
        asked = sorted(topic_of(key, is_easy=True) for key in easy if self._tasks.shared(key))
        topics = self._always.union(asked[: max(0, MAX_TOPICS - len(self._always))])  # more would count as all topics
        if topics != self._topics:
            self._topics = topics
            self._subscribe()

    def _subscribe(self) -> None:
        self._host.subscribe(self._topics, self._demand.told, self._beside)

    def refuse(self, group_id: bytes, reason: str) -> None:
        """Tell the host, which counts the reason; if it is somebody's fault, it costs the group's signer."""
        self._host.judge(ItemId(group_id), ItemVerdict.IGNORE if reason in BLAMELESS else ItemVerdict.REJECT, reason)

    def finished(self, row: Mapping[str, Any], model: str) -> None:
        """See `GroupExchange.finished`. A report names the tasks that are shared, and no others."""
        others = other_form([peer.agent for peer in self._host.peers()])
        if others and others != self._others:
            log.warning(others, do=UPDATE)
        self._others = others
        if self._reporter is None:
            return
        names = {f"rewards/{task.key.name}/mean" for task in self._tasks.tasks if not unshared(task)}
        row = {key: value for key, value in row.items() if key in names or not key.startswith("rewards/")}
        if (report := self._reporter.after_round(row, model, time.time())) is not None:
            self._publish(report, REPORTS_TOPIC)

    def _publish(self, body: bytes, topic: bytes) -> bool:
        """Publish without waiting, as the training does not wait for the network thread; tell whether it was taken."""
        try:
            self._host.publish(body, topic, timeout=0.0)
        except OutboxFull:
            self._unsent["outbox_full"] += 1
            return False
        return True

    def taught(self) -> Mapping[str, int]:
        """See `GroupExchange.taught`; nothing in a swarm without reports."""
        return dict(self._taught)

    def traffic(self) -> Counters:
        """Return the host's counts."""
        counters = self._host.counters()
        return replace(counters, rejected=Counter(counters.rejected) + self._unsent) if self._unsent else counters


def traffic_row(traffic: Counters) -> dict[str, object]:
    """Return the counts under the names that they have in a row of metrics."""
    return {
        "swarm/peers": traffic.peers,
        "swarm/known": traffic.known,
        "swarm/bytes_sent": traffic.bytes_sent,
        "swarm/bytes_received": traffic.bytes_received,
        "swarm/items_sent": traffic.items_sent,
        "swarm/items_received": traffic.items_received,
        "swarm/duplicates": traffic.duplicates,
        "swarm/rejected": dict(traffic.rejected),
    }


# Some groups have no advantage, some are too long or too surprising, and some are too old when their turn comes. So a
# node asks for more than it draws (`OVERSAMPLING`). While every round finds as many as it wants, a few more are enough
# (`SPARE`): beyond them signatures would be checked, and bytes stored, for groups that nobody draws, and what is drawn
# would be older. While enough are left for the next round and for `RESERVE_S` (they come in bursts), the node asks for
# less than it draws (`LESS`): else what waits would grow, and grow old. A round that finds too few raises it again.
OVERSAMPLING, SPARE, LESS = 2.0, 1.25, 0.9
RESERVE_S = 1.0
EASE = 0.97  # of the factor, a round: from OVERSAMPLING to LESS in 27 well supplied rounds
RELAY_DEMAND = 2.0  # items a second: about 20 kB a second of an ordinary node's line
SEED_DEMAND = 32.0  # of a node that only relays: in an hour as many as it remembers (`Limits.max_seen`)
SHORTEST_ROUND_S = 1e-3
FIRST_ROUNDS = 3  # measured before anything is declined: the first are slow, and a guess could starve the node
WEIGHT = 0.2  # of the latest round in the average
TELL_RATIO = 1.1  # a change by less is not worth waking the network thread


def published_form(group: Group, tasks: TaskSet) -> Group | None:
    """Return what a node sends of a group of its own; None if that is nothing.

    A group with differing rewards is sent whole. Of one that is all right two answers are sent, or one where all have
    the same texts: they teach whoever is not yet all right. Other groups teach nobody. A task may not be shared, and a
    reward may be out of its range. Answers that took too long here are left out.
    """
    in_time = tuple(completion for completion in group.completions if not isinstance(completion.reward, OutOfTime))
    if not in_time:
        return None
    group = replace(group, completions=in_time)
    if tasks.shared(group.task) is None or not all(map(is_in_range, group.rewards)):
        return None
    if is_informative(group.rewards):
        return group
    if not is_easy(group):
        return None
    first = {completion.texts: completion for completion in reversed(group.completions)}
    different = [completion for completion in group.completions if first[completion.texts] is completion]
    return replace(group, completions=tuple(different[:MAX_EASY]))


def as_from_peers(groups: Sequence[Group], tasks: TaskSet) -> list[ReceivedGroup]:
    """Return what peers would get of a node's own groups, as if it had come from a peer now."""
    now = time.time()
    return [as_received(shared, now) for group in groups if (shared := published_form(group, tasks)) is not None]


def figures_of(exchange: GroupExchange, buffered: int) -> dict[str, object]:
    """Return the swarm's part of a round's row of metrics; the buffer holds so many groups."""
    taught = exchange.taught()
    return {"swarm/buffer": buffered, **traffic_row(exchange.traffic()), **({"swarm/taught": taught} if taught else {})}


class RewardsOutside:
    """Counts rewards outside of the range of a task that is shared, and tells of a task's first."""

    def __init__(self, tasks: TaskSet) -> None:
        self._tasks = tasks
        self._told = {task.key for task in tasks.tasks if outside(task)}  # when they were loaded or since

    def count(self, groups: Sequence[Group]) -> int:
        """Return how many such rewards own groups have: these groups are not sent."""
        count = 0
        for group in groups:
            task = self._tasks.shared(group.task)
            rewards = [] if task is None else [reward for reward in group.rewards if not is_in_range(reward)]
            count += len(rewards)
            if rewards and group.task not in self._told:
                self._told.add(group.task)
                parts = rewards[0].parts if isinstance(rewards[0], Scored) else {}
                log.warning(told_outside(group.task.name, rewards[0], parts, getattr(task, "range", UNIT)))
        return count


def is_easy(group: Group) -> bool:
    """Tell whether all answers of a group are right, as its signer claims."""
    return is_right(min(group.rewards))


def topic_of_group(group: Group) -> bytes:
    """Return the topic under which a group is shared."""
    return topic_of(group.task, is_easy(group))


def topic_of(key: TaskKey, is_easy: bool = False) -> bytes:
    """Return the topic (8 bytes) under which groups of the task are shared: of a SHA-256 over their format and its key.

    So nodes of releases whose groups have another format do not ask for them, and take no honest node for a liar.
    Groups that are all right have a topic of their own: only nodes that draw them ask for them. Else they would take
    the place of others on the links of a swarm that has mastered a task.
    """
    text = "\x1f".join((str(FORMAT), key.name, str(key.version), key.config, *(["easy"] if is_easy else [])))
    return hashlib.sha256(text.encode()).digest()[:TOPIC_BYTES]


class Demand:
    """Groups a second that a node with `external` groups a round can use; unbounded until it is measured."""

    def __init__(self, external: int) -> None:
        self._external = external
        self._rounds = 0
        self._factor = OVERSAMPLING
        self._began: float | None = None
        self._seconds = 0.0
        self.told = math.inf if external else RELAY_DEMAND  # the demand that the host was told last

    def drew(self, groups: int, left: int) -> None:
        """Note how many groups a round drew, and how many that it might have drawn are left."""
        enough = self._external * max(1.0, RESERVE_S / max(self._seconds, SHORTEST_ROUND_S))
        least = LESS if left >= enough else SPARE
        self._factor = OVERSAMPLING if groups < self._external else max(least, EASE * self._factor)

    def next_round(self, now: float, external: int | None = None) -> bool:
        """Note that a round begins at `now` (s, monotonic); True if `told` has become another number.

        `external` is how many of peers' groups a round draws from now on, if it is another number.
        """
        self._external = self._external if external is None else external
        if self._began is not None:
            took = now - self._began
            self._seconds = took if self._rounds == 0 else self._seconds + WEIGHT * (took - self._seconds)
            self._rounds += 1
        self._began = now
        if self._external == 0:
            return False
        demand = math.inf
        if self._rounds >= FIRST_ROUNDS:
            demand = max(RELAY_DEMAND, self._factor * self._external / max(self._seconds, SHORTEST_ROUND_S))
        if self.told / TELL_RATIO <= demand <= self.told * TELL_RATIO:
            return False
        self.told = demand
        return True

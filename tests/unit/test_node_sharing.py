"""What a node asks for: its topics, and as much as its sampler uses; and what it makes of a false label."""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
from structlog.testing import capture_logs

from node.rollouts.group import MAX_NAME_BYTES, MAX_TEXT_BYTES, Episode, Group, GroupError, encode, one_turn
from node.rollouts.screening import rebuild
from node.swarm import reports, sharing
from node.swarm.peering import AGENT, agent, count_drawing, other_form, release
from node.swarm.reports import REPORTS_TOPIC, NodeReport, decode, reporter_of
from node.swarm.sharing import (
    FIRST_ROUNDS,
    LESS,
    OVERSAMPLING,
    RELAY_DEMAND,
    SPARE,
    TELL_RATIO,
    Demand,
    NetworkExchange,
    published_form,
    topic_of,
)
from node.tasks import Item, TaskKey, Wrapper
from node.tasks.builtin.families import FAMILIES
from node.tasks.questions import Split
from node.tasks.scoring.verdicts import OutOfTime
from node.tasks.task_set import TaskSet
from protocol.errors import OutboxFull
from protocol.host import Counters, ItemVerdict, PeerInfo, Received
from protocol.identity import id_of_bytes
from protocol.wire.messages import MAX_TOPICS, NO_TOPIC, TOPIC_BYTES

WHOLE = Split(0.0)  # nothing is held out
TASKS = TaskSet([(FAMILIES[name](), 1.0) for name in sorted(FAMILIES)[:2]], WHOLE)
ONE, OTHER = TASKS.tasks


def told(demand: Demand, seconds: float, rounds: int, start: float = 0.0) -> list[float]:
    return [demand.told for number in range(rounds) if demand.next_round(start + number * seconds)]


def test_everything_is_wanted_until_some_rounds_were_measured() -> None:
    demand = Demand(4)
    assert demand.told == math.inf
    assert told(demand, 0.5, FIRST_ROUNDS) == []
    assert told(demand, 0.5, 10, start=0.5 * FIRST_ROUNDS) == [OVERSAMPLING * 4 / 0.5]


def test_the_demand_follows_the_pace_of_the_rounds_and_not_their_jitter() -> None:
    demand = Demand(4)
    told(demand, 1.0, 20)
    assert told(demand, 1.08, 20, start=20) == []
    later = told(demand, 2.7, 40, start=20 + 19 * 1.08 + 2.7)
    assert later == sorted(later, reverse=True)
    assert OVERSAMPLING * 4 / 2.7 <= later[-1] <= TELL_RATIO * OVERSAMPLING * 4 / 2.7


def test_the_demand_follows_how_many_groups_a_round_draws() -> None:
    demand = Demand(4)
    told(demand, 0.5, FIRST_ROUNDS + 1)
    assert demand.next_round(0.5 * (FIRST_ROUNDS + 1), external=40)
    assert demand.told == OVERSAMPLING * 40 / 0.5


@pytest.mark.parametrize(("left", "factor"), [(0, SPARE), (7, SPARE), (8, LESS)])
def test_little_more_is_wanted_than_is_drawn_or_less_while_enough_wait(left: int, factor: float) -> None:
    demand = Demand(4)
    for number in range(40):
        demand.drew(4, left)
        demand.next_round(0.5 * number)
    assert factor * 4 / 0.5 <= demand.told <= TELL_RATIO * factor * 4 / 0.5
    demand.drew(3, left)
    assert demand.next_round(0.5 * 40)
    assert demand.told == OVERSAMPLING * 4 / 0.5


def test_a_node_of_slow_rounds_has_enough_if_its_next_round_has() -> None:
    demand = Demand(400)
    for number in range(40):
        demand.drew(400, 400)
        demand.next_round(10.0 * number)
    assert LESS * 40 <= demand.told <= TELL_RATIO * LESS * 40


def test_a_node_that_uses_nothing_or_is_slow_still_relays() -> None:
    nothing = Demand(0)
    assert nothing.told == RELAY_DEMAND
    assert told(nothing, 0.1, 20) == []
    assert told(Demand(1), 3600.0, 20) == [RELAY_DEMAND]


def test_who_only_publishes_asks_for_everything_once_it_draws() -> None:
    demand = Demand(0)
    assert not demand.next_round(0.0, external=0) and demand.told == RELAY_DEMAND
    assert demand.next_round(1.0, external=3) and demand.told == math.inf


def test_a_topic_names_a_task_with_its_version_and_config(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [TaskKey("sums", 1, "aa"), TaskKey("sums", 2, "aa"), TaskKey("sums", 1, "ab"), TaskKey("sum", 1, "saa")]
    assert len({topic_of(key) for key in keys}) == 4
    assert {len(topic_of(key)) for key in keys} == {TOPIC_BYTES}
    now = topic_of(ONE.key)
    monkeypatch.setattr(sharing, "FORMAT", 1)
    assert topic_of(ONE.key) != now, "nodes whose groups have another format do not meet"


@pytest.mark.parametrize(
    ("agents", "says"),
    [
        ([], ""),
        (
            [
                "gossamer/0.1.0 groups/3",
                "gossamer/2.0.0+local.1 groups/3",
                "gossamer/doctor",
                "gossamer/joining",
                "else",
            ],
            "",
        ),
        (["gossamer/0.1.0", "gossamer/0.1.0 groups/3 draws", "gossamer/0.2.0 groups/4 draws"], "2 of 3 peers have"),
        (["gossamer/0.1.0 groups/33", "a", "gossamer/0.1.0 groups/3 "], "1 of 1 peers has"),
    ],
)
def test_peers_with_another_form_of_groups_are_told_once(agents: list[str], says: str) -> None:
    assert AGENT.match(agent()) and other_form([agent()]) == other_form([agent(draws=True)]) == ""
    assert release(agent(draws=True)) == release(agent()) == agent()
    assert count_drawing([*agents, agent()]) == agents.count("gossamer/0.1.0 groups/3 draws")
    told = f"{says} another form of groups: nothing is shared with them" if says else ""
    assert other_form(agents) == told
    host = _Host()
    exchange = NetworkExchange(host, TASKS, max_completions=8, external=4)
    host.agents = agents
    with capture_logs() as logs:
        for _ in range(3):
            exchange.finished({}, "model")
    assert [line["event"] for line in logs] == [told] * bool(told)


class _Host:
    """What `NetworkExchange` uses of a host."""

    def __init__(self) -> None:
        self.subscribed: list[tuple[frozenset[bytes], float]] = []
        self.published: list[tuple[bytes, bytes]] = []
        self.is_full = False
        self.reports: list[tuple[ItemVerdict, str]] = []
        self.inbox: list[Received] = []
        self.revoked: set[str] = set()
        self.agents: list[str] = []

    def peers(self) -> list[PeerInfo]:
        return [PeerInfo(id_of_bytes(b""), "", agent, "well", None, 0.0, 0, 0, 0.0) for agent in self.agents]

    def subscribe(self, topics, demand, beside) -> None:
        assert beside <= topics
        self.subscribed.append((topics, demand))

    def publish(self, body, topic, timeout) -> None:
        assert timeout == 0.0
        if self.is_full:
            raise OutboxFull("no room")
        self.published.append((topic, body))

    def receive(self, limit) -> list[Received]:
        taken, self.inbox = self.inbox[:limit], self.inbox[limit:]
        return taken

    def judge(self, _, verdict, reason) -> None:
        self.reports.append((verdict, reason))

    def is_revoked(self, node) -> bool:
        return node in self.revoked

    def counters(self) -> Counters:
        return Counters(0, 0, 0, 0, 0, 0, 0, {})


def group(task=ONE) -> Group:
    item = task.make(1)
    texts = (item.answer, "no answer")
    made = tuple(one_turn(text, True, float(task.verify(item, text))) for text in texts)
    return Group(task.key, 1, item.question, made, "tests", 0)


def test_a_group_is_shared_under_its_tasks_topic() -> None:
    host = _Host()
    exchange = NetworkExchange(host, TASKS, max_completions=8, external=4)
    exchange.publish([group(ONE), group(OTHER)])
    assert [topic for topic, _ in host.published] == [topic_of(ONE.key), topic_of(OTHER.key)]
    assert host.subscribed == [(frozenset([topic_of(ONE.key), topic_of(OTHER.key)]), math.inf)]


@pytest.mark.parametrize(
    ("texts", "sent"),
    [
        (("7", "8", "no"), ("7", "8", "no")),
        (("7", "7", "7"), ("7",)),
        (("7", "8", "7", "9"), ("7", "8")),
        (("no", "none"), None),
        (("7",), ("7",)),
    ],
)
def test_of_a_group_that_is_all_right_two_different_answers_are_sent_at_most(
    texts: tuple[str, ...], sent: tuple[str, ...] | None
) -> None:
    made = tuple(one_turn(text, True, float(text.isdigit())) for text in texts)
    whole = replace(group(ONE), completions=made)
    shared = published_form(whole, TASKS)
    assert (shared and tuple(completion.text for completion in shared.completions)) == sent
    assert shared is None or len(encode(shared)) <= len(encode(whole))
    host = _Host()
    NetworkExchange(host, TASKS, max_completions=8, external=4).publish([whole])
    is_easy = sent is not None and "no" not in sent
    assert host.published == ([(topic_of(ONE.key, is_easy), encode(shared))] if shared else [])


@pytest.mark.parametrize(
    ("rewards", "sent"),
    [((1.0, None, 0.0), (1.0, 0.0)), ((1.0, None, None), (1.0,)), ((0.0, None), None), ((None, None), None)],
)
def test_an_answer_that_took_too_long_here_trains_this_node_alone(
    rewards: tuple[float | None, ...], sent: tuple[float, ...] | None
) -> None:
    made = tuple(
        one_turn(str(at), True, OutOfTime() if reward is None else reward) for at, reward in enumerate(rewards)
    )
    shared = published_form(replace(group(ONE), completions=made), TASKS)
    assert (shared and shared.rewards) == sent


def test_groups_that_are_all_right_are_asked_for_while_the_node_draws_them() -> None:
    host = _Host()
    exchange = NetworkExchange(host, TASKS, max_completions=8, external=4)
    mixed = frozenset([topic_of(ONE.key), topic_of(OTHER.key)])
    exchange.drew(0, 0, frozenset([ONE.key]))
    exchange.drew(0, 0, frozenset([ONE.key]))
    exchange.drew(0, 0, frozenset([TaskKey("not here", 1, "c")]))
    assert [topics for topics, _ in host.subscribed] == [mixed, mixed | {topic_of(ONE.key, is_easy=True)}, mixed]


@dataclass(frozen=True, slots=True)
class Numbered(Wrapper):
    number: int

    @property
    def key(self) -> TaskKey:
        return TaskKey(f"task {self.number}", 1, "c")

    def make(self, seed: int) -> Item:
        return self.base.make(seed)

    def verify(self, item: Item, text: str) -> float | None:
        return self.base.verify(item, text)


@pytest.mark.parametrize("count", [40, MAX_TOPICS, MAX_TOPICS + 1])
def test_groups_that_are_all_right_are_asked_for_of_as_many_tasks_as_there_is_room_for(count: int) -> None:
    """More topics than a message holds count as all topics."""
    host, tasks = _Host(), TaskSet([(Numbered(ONE, number), 1.0) for number in range(count)], WHOLE)
    exchange = NetworkExchange(host, tasks, max_completions=8, external=4)
    exchange.drew(0, 0, [task.key for task in tasks.tasks])
    assert len(host.subscribed[-1][0]) == max(count, MAX_TOPICS)


def test_a_group_under_the_other_topic_of_its_task_has_a_false_one() -> None:
    """Else a flood of easy groups would come to nodes that do not ask for them."""
    host = _Host()
    exchange = NetworkExchange(host, TASKS, max_completions=8, external=4)
    easy = replace(group(ONE), completions=group(ONE).completions[:1])
    for body, is_easy in ((encode(easy), False), (encode(group(ONE)), True), (encode(easy), True)):
        topic = topic_of(ONE.key, is_easy)
        host.inbox.append(Received(b"i" * 32, id_of_bytes(b"s" * 20), body, 0.0, topic))
    assert [received.group for received in exchange.receive(lambda _: False)] == [easy]
    assert host.reports == [(ItemVerdict.REJECT, "false_topic")] * 2


@pytest.mark.parametrize(
    ("topic", "of", "reports"),
    [
        (topic_of(ONE.key), group(ONE), []),
        (NO_TOPIC, group(ONE), []),
        (topic_of(OTHER.key), group(ONE), [(ItemVerdict.REJECT, "false_topic")]),
    ],
    ids=["true", "none", "false"],
)
def test_a_false_label_costs_its_signer(topic: bytes, of: Group, reports: list[tuple[ItemVerdict, str]]) -> None:
    host = _Host()
    exchange = NetworkExchange(host, TASKS, max_completions=8, external=4)
    host.inbox = [Received(b"i" * 32, id_of_bytes(b"s" * 20), encode(of), 0.0, topic)]
    shared = exchange.receive(lambda _: False)
    assert host.reports == reports
    assert len(shared) == (not reports)


def test_an_unknown_task_under_one_of_our_topics_is_a_lie_and_under_another_is_not() -> None:
    unknown = group()
    unknown = Group(TaskKey("riddles", 1, "aa"), 1, unknown.question, unknown.completions, "tests", 0)
    host = _Host()
    exchange = NetworkExchange(host, TASKS, max_completions=8, external=4)
    host.inbox = [
        Received(b"i" * 32, id_of_bytes(b"s" * 20), encode(unknown), 0.0, topic)
        for topic in (topic_of(ONE.key), NO_TOPIC)
    ]
    assert exchange.receive(lambda _: False) == []
    assert host.reports == [(ItemVerdict.REJECT, "false_topic"), (ItemVerdict.IGNORE, "unknown_task")]


@dataclass(frozen=True, slots=True)
class AtHome(Wrapper):
    unshared = "its rewards differ from one time to the next"

    @property
    def key(self) -> TaskKey:
        return self.base.key


def test_groups_that_the_network_thread_has_no_room_for_are_counted_and_the_training_goes_on() -> None:
    host = _Host()
    exchange = NetworkExchange(host, TaskSet([(ONE, 1.0)], WHOLE), max_completions=8, external=4)
    host.is_full = True
    exchange.publish([group(ONE), group(ONE)])
    assert host.published == [] and exchange.traffic().rejected["outbox_full"] == 2


def test_groups_of_a_task_that_is_not_shared_are_neither_sent_nor_taken_and_cost_nobody() -> None:
    host = _Host()
    tasks = TaskSet([(AtHome(ONE), 1.0), (OTHER, 1.0)], WHOLE)
    exchange = NetworkExchange(host, tasks, max_completions=8, external=4)
    assert host.subscribed == [(frozenset([topic_of(OTHER.key)]), math.inf)]
    exchange.publish([group(ONE), group(OTHER)])
    assert host.published == [(topic_of(OTHER.key), encode(group(OTHER)))]
    host.inbox = [Received(b"i" * 32, id_of_bytes(b"s" * 20), encode(group(ONE)), 0.0, topic_of(ONE.key))]
    assert exchange.receive(lambda _: False) == []
    assert host.reports == [(ItemVerdict.IGNORE, "unknown_task")]
    with pytest.raises(GroupError, match="unknown_task"):  # one that the buffer held already
        rebuild(group(ONE), tasks, lambda item: ())


@pytest.mark.parametrize("reward", [-18.0, -1e-3, 1.001, 7.0, 1e15])
def test_a_peers_reward_stays_from_0_to_1_and_own_groups_beyond_it_stay_at_home(reward: float) -> None:
    host = _Host()
    exchange = NetworkExchange(host, TASKS, max_completions=8, external=4)
    first, *others = group().completions
    beyond = replace(group(), completions=(first._replace(reward=reward), *others))
    exchange.publish([beyond, group()])
    assert [body for _, body in host.published] == [encode(group())]
    host.inbox = [Received(b"i" * 32, id_of_bytes(b"s" * 20), encode(beyond), 0.0, topic_of(ONE.key))]
    assert exchange.receive(lambda _: False) == []
    assert host.reports == [(ItemVerdict.REJECT, "malformed")]


def test_the_swarms_limit_on_a_groups_size_holds_both_ways() -> None:
    host, size = _Host(), len(encode(group()))
    exchange = NetworkExchange(host, TASKS, max_completions=8, external=4, max_bytes=size - 1)
    exchange.publish([group()])
    assert (host.published, exchange._unsent) == ([], {"own_oversized": 1})
    host.inbox = [Received(b"i" * 32, id_of_bytes(b"s" * 20), encode(group()), 0.0, topic_of(ONE.key))]
    assert exchange.receive(lambda _: False) == []
    assert host.reports == [(ItemVerdict.REJECT, "oversized")]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"completions": (one_turn("", True, 1.0), one_turn("-" * MAX_TEXT_BYTES, False, 0.0))}, ""),
        ({"completions": (one_turn("", True, 1.0), one_turn("-" * (MAX_TEXT_BYTES + 1), False, 0.0))}, "malformed"),
        ({"policy": "n" * MAX_NAME_BYTES}, ""),
        ({"policy": "é" * MAX_NAME_BYTES}, "malformed"),
        ({"completions": (one_turn("", True, 1.0),) + (one_turn("no", True, 0.0),) * 7}, ""),
        ({"completions": (one_turn("", True, 1.0),) + (one_turn("no", True, 0.0),) * 8}, "group_size"),
        ({"completions": (one_turn("", True, 1.0), Episode(("a", "b", "c"), True, 0.0))}, "turns"),
        ({"policy_version": 2**63}, "malformed"),
    ],
)
def test_what_peers_would_refuse_is_not_sent_and_told_once(changed: dict[str, Any], reason: str) -> None:
    host = _Host()
    exchange = NetworkExchange(host, TASKS, max_completions=8, external=4)
    with capture_logs() as logs:
        exchange.publish([replace(group(), **changed)])
        exchange.publish([replace(group(), **changed)])
    assert len(host.published) == (0 if reason else 2)
    assert exchange._unsent == ({f"own_{reason}": 2} if reason else {})
    assert [row["log_level"] for row in logs] == (["warning"] if reason else [])
    sender = id_of_bytes(b"s" * 20)
    host.inbox = [Received(b"i" * 32, sender, body, 0.0, topic) for topic, body in host.published[:1]]
    assert len(exchange.receive(lambda _: False)) == (0 if reason else 1) and host.reports == []


def test_a_report_is_passed_on_and_no_group_and_a_false_one_costs_its_signer() -> None:
    host = _Host()
    exchange = NetworkExchange(
        host, TASKS, max_completions=8, external=4, reports_s=300, reporter=reporter_of(300, True, "a/1")
    )
    assert host.subscribed[0][0] == {topic_of(ONE.key), topic_of(OTHER.key), REPORTS_TOPIC}
    teacher = id_of_bytes(b"t" * 20)
    exchange.finished({"round": 1, "reward": 0.5, "swarm/taught_by": {teacher: 2}}, "tests")
    ((topic, body),) = host.published
    assert topic == REPORTS_TOPIC
    for sender, time in ((b"s" * 20, 0.0), (b"s" * 20, 1.0), (b"t" * 20, 0.0)):
        host.inbox.append(Received(b"i" * 32, id_of_bytes(sender), body, time, REPORTS_TOPIC))
    assert exchange.receive(lambda _: False) == []
    assert host.reports == [(ItemVerdict.IGNORE, "early_report"), (ItemVerdict.REJECT, "self_praise")]


def test_a_node_counts_whom_its_groups_taught_by_what_peers_report_once_and_no_more_peers_than_it_has_room_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("node.swarm.sharing.MAX_PUPILS", 2)
    host, own, other = _Host(), id_of_bytes(b"o" * 20), id_of_bytes(b"x" * 20)
    exchange = NetworkExchange(host, TASKS, max_completions=8, external=4, reports_s=300, node=own)

    def report(sender: bytes, time: float, **taught_by: int) -> None:
        body = reports.encode(NodeReport(0, "a/1", "tests", 1, None, None, {}, {own: taught_by["own"], other: 5}))
        host.inbox.append(Received(b"i" * 32, id_of_bytes(sender), body, time, REPORTS_TOPIC))

    for sender, time, groups in ((b"s", 0.0, 3), (b"s", 1.0, 4), (b"s", 300.0, 2), (b"t", 0.0, 1), (b"u", 0.0, 9)):
        report(sender * 20, time, own=groups)
    exchange.receive(lambda _: False)
    assert exchange.taught() == {id_of_bytes(b"s" * 20): 5, id_of_bytes(b"t" * 20): 1}


def test_a_report_does_not_name_a_task_whose_groups_stay_at_home() -> None:
    host = _Host()
    tasks = TaskSet([(AtHome(ONE), 1.0), (OTHER, 1.0)], WHOLE)
    exchange = NetworkExchange(
        host, tasks, max_completions=8, external=4, reports_s=300, reporter=reporter_of(300, True, "a/1")
    )
    rewards = {f"rewards/{task.key.name}/mean": 0.5 for task in (ONE, OTHER)}
    exchange.finished({"round": 1, "reward": 0.5, **rewards}, "tests")
    ((_, body),) = host.published
    assert decode(body, id_of_bytes(b"s" * 20)).rewards == {OTHER.key.name: 0.5}


def test_nothing_is_reported_where_the_swarm_or_the_node_does_not_want_it() -> None:
    for reports_s, enabled in ((0, True), (300, False), (300, "private")):
        host, reporter = _Host(), reporter_of(reports_s, enabled, "a/1")
        exchange = NetworkExchange(host, TASKS, max_completions=8, external=4, reports_s=reports_s, reporter=reporter)
        exchange.finished({"round": 1, "reward": 0.5}, "tests")
        assert host.published == []
        assert (REPORTS_TOPIC in host.subscribed[0][0]) == (reports_s > 0)


def test_what_is_nobodys_fault_is_counted_and_a_lie_costs_its_signer() -> None:
    host = _Host()
    exchange = NetworkExchange(host, TASKS, max_completions=8, external=4)
    exchange.refuse(b"i" * 32, "prompt_too_long")
    exchange.refuse(b"j" * 32, "false_reward")
    assert host.reports == [(ItemVerdict.IGNORE, "prompt_too_long"), (ItemVerdict.REJECT, "false_reward")]


def test_groups_without_advantage_are_not_sent() -> None:
    host = _Host()
    exchange = NetworkExchange(host, TASKS, max_completions=8, external=4)
    flat = Group(ONE.key, 2, ONE.make(2).question, (one_turn("1", True, 0.0), one_turn("2", True, 0.0)), "tests", 0)
    exchange.publish([flat, group()])
    assert [body for _, body in host.published] == [encode(group())]


def test_a_group_on_a_question_that_is_held_out_is_refused_when_it_comes_and_costs_nobody() -> None:
    host, split = _Host(), Split(0.5)
    exchange = NetworkExchange(host, TaskSet([(ONE, 1.0)], split), max_completions=8, external=4)
    held = {split.holds_out(ONE.key.name, ONE.make(seed).question): seed for seed in range(99)}
    for part in (True, False):
        question = ONE.make(held[part]).question
        body = encode(Group(ONE.key, held[part], question, group().completions, "tests", 0))
        host.inbox.append(Received(bytes([part]) * 32, id_of_bytes(b"s" * 20), body, 0.0, topic_of(ONE.key)))
    assert [item.id for item in exchange.receive(lambda _: False)] == [bytes(32)]
    assert host.reports == [(ItemVerdict.IGNORE, "held_out")]


def test_who_was_put_out_is_what_the_host_says() -> None:
    host = _Host()
    exchange = NetworkExchange(host, TASKS, max_completions=8, external=4)
    one, other = (id_of_bytes(bytes([number]) * 20) for number in (1, 2))
    assert exchange.revoked([one, other]) == []
    host.revoked = {other, "another"}
    assert exchange.revoked([one, other]) == [other]

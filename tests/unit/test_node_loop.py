"""A round of the loop: what a peer sent never makes a sequence that the policy has no positions for."""

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import node.loop as loop_module
from node.config import NodeConfig, TaskConfig, parse_config
from node.engines import Generated
from node.engines.hf import HfEngine
from node.errors import UserError
from node.loop import LOOKED_AT, Loop, longest_prompt
from node.policy.load import Policy
from node.rollouts.group import Completion, Group, encode
from node.rollouts.replay_buffer import ReplayBuffer, Shared
from node.rollouts.sampling import Sample
from node.rollouts.screening import BLAMELESS
from node.swarm.sharing import NoExchange
from node.tasks import Item, Task, TaskKey, TaskSet, load_tasks
from node.telemetry.metrics import MetricsLog
from node.training import likelihood
from node.training.batch import make_batches
from node.training.likelihood import surprises
from node.training.trainer import make_trainer
from tests.policies import tiny_policy
from tests.swarms import UNBOUNDED

HostileRound = Callable[[str, list[Group]], list[Sample]]
POSITIONS = 128  # of the tiny policy
LONGEST = 16
SHORT, LONG = "1+1=", "1" * 60_000


@pytest.fixture
def policy(tmp_path: Path) -> Policy:
    return tiny_policy(tmp_path / "policy")


@pytest.fixture
def tasks(tmp_path: Path) -> TaskSet:
    """A file of two questions: one of four characters, one that is far too long for the policy."""
    rows = [{"question": SHORT, "answer": "2"}, {"question": LONG, "answer": "2"}]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_tasks([TaskConfig(name="dataset", options={"path": str(tmp_path / "questions.jsonl")})])


def node_config(**engine: int) -> NodeConfig:
    return parse_config(
        {
            "rounds": 2,
            "engine": {"max_completion_length": LONGEST, **engine},
            "sampling": {"local": 1, "external": 4, "completions": 2, "rule": "sapo", **UNBOUNDED},
        }
    )


def group_of(task: Task, question: str, padding: str = "") -> Group:
    seed = next(seed for seed in range(100) if task.make(seed).question == question)
    texts = ("2", "3" + padding)
    made = tuple(Completion(text, True, task.verify(task.make(seed), text)) for text in texts)
    return Group(task.key, seed, question, made, "peer", 0)


class Peer(NoExchange):
    """Hands over these groups once, as from a peer, and keeps what is said of those that were of no use."""

    def __init__(self, *groups: Group) -> None:
        self.groups = groups
        self.reasons: list[str] = []
        self.drew_and_left: list[tuple[int, int]] = []

    def receive(self, known: Callable[[bytes], bool]) -> list[Shared]:
        groups, self.groups = self.groups, ()
        return [share(group, number) for number, group in enumerate(groups)]

    def report(self, group_id: bytes, reason: str) -> None:
        self.reasons.append(reason)

    def drew(self, groups: int, left: int) -> None:
        self.drew_and_left.append((groups, left))


def share(group: Group, number: int) -> Shared:
    return Shared(number.to_bytes(32, "big"), "peer", time.time(), group, encode(group))


def train(policy: Policy, tasks: TaskSet, folder: Path, peer: Peer, *before: Group) -> tuple[list[dict], list[bytes]]:
    """Run two rounds over a pool that holds the groups of `before`; return the metrics and what is in the pool then."""
    config = node_config()
    folder.mkdir(exist_ok=True)
    metrics = MetricsLog(folder / "metrics.jsonl")
    with ReplayBuffer(folder / "pool.sqlite", config.pool) as pool:
        pool.add([share(group, 100 + number) for number, group in enumerate(before)], time.time(), 1)
        loop = Loop(config, 0, policy, HfEngine(policy), tasks, pool, peer, metrics)
        make_trainer(policy, config, folder, loop.rounds, loop.finish).train()
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return rows, [one.id for one in pool.candidates(time.time(), 2, max_uses=9)]


def test_a_question_without_room_in_the_policy_is_drawn_in_vain_once(
    policy: Policy, tasks: TaskSet, tmp_path: Path
) -> None:
    (task,) = tasks.tasks
    peer = Peer(group_of(task, LONG), group_of(task, SHORT))
    rows, held = train(policy, tasks, tmp_path, peer)
    assert peer.reasons == ["prompt_too_long"]
    assert held == [(1).to_bytes(32, "big")]
    assert [row["groups_external"] for row in rows] == [1, 0]


def test_one_that_is_in_the_pool_already_is_dropped_and_counted(policy: Policy, tasks: TaskSet, tmp_path: Path) -> None:
    (task,) = tasks.tasks
    gone = replace(group_of(task, SHORT), task=task.key._replace(config="0" * 16))  # the node ran another task then
    rows, _ = train(policy, tasks, tmp_path, Peer(), group_of(task, LONG), group_of(task, SHORT), gone)
    assert [(row["groups_external"], row["groups_unusable"]) for row in rows] == [(1, 2), (0, 0)]


def first_round(policy: Policy, tasks: TaskSet, folder: Path, exchange: NoExchange, engine: HfEngine) -> list[Sample]:
    config = node_config()
    with ReplayBuffer(folder / "pool.sqlite", config.pool) as pool:
        loop = Loop(config, 0, policy, engine, tasks, pool, exchange, MetricsLog(folder / "metrics.jsonl"))
        return list(next(loop.rounds(0)))


def test_nodes_that_ask_otherwise_train_each_others_answers_each_under_its_own_prompt(
    policy: Policy, tmp_path: Path
) -> None:
    ways: list[dict[str, Any]] = [{}, {"examples": 2, "instruction": "Add."}, {"examples": 1}]
    (bare,), (told,), (shown,) = (load_tasks([TaskConfig(name="builtin/sums", **way)]).tasks for way in ways)
    prompts = {id(task): policy.encode_prompt(task.make(3)) for task in (bare, told, shown)}
    assert len(set(map(tuple, prompts.values()))) == 3
    for number, (mine, theirs) in enumerate([(bare, told), (told, bare), (told, shown)]):
        item = theirs.make(3)
        made = tuple(Completion(text, True, theirs.verify(item, text)) for text in (item.answer, "no"))
        peer = Peer(Group(theirs.key, 3, item.question, made, "peer", 0))
        folder = tmp_path / str(number)
        folder.mkdir()
        samples = first_round(policy, TaskSet([(mine, 1.0)]), folder, peer, HfEngine(policy))
        external = [one for one in samples if one.external]
        assert [list(one.prompt) for one in external] == [list(prompts[id(mine)])] * 2
        assert list(external[0].completion) == policy.encode_completion(item.answer, finished=True)


def test_a_peers_completion_that_is_too_long_is_left_out_and_counted(
    policy: Policy, tasks: TaskSet, tmp_path: Path
) -> None:
    (task,) = tasks.tasks
    peer = Peer(group_of(task, SHORT, padding="3" * 10_000))
    rows, _ = train(policy, tasks, tmp_path / "trained", peer)
    assert [(row["groups_external"], row["swarm/too_long"]) for row in rows] == [(1, 1), (0, 0)]
    peer = Peer(group_of(task, SHORT, padding="3" * 10_000))
    (short,) = (one for one in first_round(policy, tasks, tmp_path, peer, HfEngine(policy)) if one.external)
    assert list(short.completion) == policy.encode_completion("2", finished=True)
    assert (short.advantage, short.weight) == (0.5, 0.5)  # as in the whole group, and no more of the round for it


@pytest.mark.parametrize(("end", "fits"), [(True, False), (False, True)])
def test_the_end_of_text_counts(policy: Policy, tasks: TaskSet, tmp_path: Path, end: bool, fits: bool) -> None:
    (task,) = tasks.tasks
    one = group_of(task, SHORT)
    text = "3" * LONGEST
    made = (one.completions[0], Completion(text, end, task.verify(task.make(one.seed), text)))
    peer = Peer(replace(one, completions=made))
    samples = first_round(policy, tasks, tmp_path, peer, HfEngine(policy))
    assert (policy.encode_completion(text, end) in [one.completion for one in samples]) == fits


def test_own_samples_are_the_tokens_that_were_sampled_with_their_samplers_logprobs(
    policy: Policy, tasks: TaskSet, tmp_path: Path
) -> None:
    made: list[Generated] = []

    class Recorder(HfEngine):
        def generate(self, *args: Any) -> list[list[Generated]]:
            groups = [
                [replace(one, logprobs=tuple(-0.1 * token for token in one.token_ids)) for one in group]
                for group in super().generate(*args)
            ]
            made.extend(one for group in groups for one in group)
            return groups

    samples = first_round(policy, tasks, tmp_path, NoExchange(), Recorder(policy))
    assert [(one.completion, one.logprobs) for one in samples] == [(one.token_ids, one.logprobs) for one in made]
    assert {tuple(one.prompt) for one in samples} == {tuple(policy.encode_prompt(Item(SHORT, "2")))}


def test_a_round_says_how_many_groups_it_drew_and_how_many_it_left(tmp_path: Path, policy: Policy) -> None:
    sums = load_tasks([TaskConfig(name="builtin/sums")])
    (task,) = sums.tasks
    made = [(seed, task.make(seed)) for seed in range(6)]
    groups = [
        Group(
            task.key, seed, item.question, (Completion(item.answer, True, 1.0), Completion("no", True, 0.0)), "peer", 0
        )
        for seed, item in made
    ]
    peer = Peer(*groups)
    first_round(policy, sums, tmp_path, peer, HfEngine(policy))
    assert peer.drew_and_left == [(4, 2)]


def test_own_completions_whose_text_stands_for_other_tokens_are_counted(
    policy: Policy, tasks: TaskSet, tmp_path: Path
) -> None:
    class Scripted(HfEngine):
        """Says "22", once by its tokens, once with a special token inside, which no text shows."""

        def generate(self, *_: Any) -> list[list[Generated]]:
            plain = policy.encode_completion("22", finished=True)
            return [[Generated(tuple(ids), "22", True) for ids in (plain, [plain[0], policy.pad_token_id, *plain[1:]])]]

    config = node_config()
    with ReplayBuffer(tmp_path / "pool.sqlite", config.pool) as pool:
        metrics = MetricsLog(tmp_path / "metrics.jsonl")
        loop = Loop(config, 0, policy, Scripted(policy), tasks, pool, NoExchange(), metrics)
        next(loop.rounds(0))
    assert loop.row["completions/retokenized"] == 0.5


def test_a_question_is_made_once_for_an_own_group_and_once_for_a_peers(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = load_tasks([TaskConfig(name="builtin/sums")])
    (task,) = tasks.tasks
    item = task.make(0)
    answers = (Completion(item.answer, True, 1.0), Completion("no", True, 0.0))
    peer = Peer(Group(task.key, 0, item.question, answers, "peer", 0))
    made: list[int] = []
    make = type(task).make
    monkeypatch.setattr(type(task), "make", lambda self, seed: made.append(seed) or make(self, seed))
    samples = first_round(policy, tasks, tmp_path, peer, HfEngine(policy))
    assert [one.external for one in samples] == [False, False, True, True]
    assert len(made) == 2 and made[1] == 0


def test_what_is_drawn_is_true_and_what_is_not_is_reported_once_and_makes_room_for_another(
    policy: Policy, tmp_path: Path
) -> None:
    task = Guess()

    def group(seed: int, *rewards: float, question: str = "") -> Group:
        texts = ("11", "1")
        made = tuple(Completion(text, True, reward) for text, reward in zip(texts, rewards, strict=True))
        return Group(task.key, seed, question or task.make(seed).question, made, "peer", 0)

    lies = [group(seed, 0.0, 1.0) for seed in range(20)]
    others = [group(7, 1.0, 0.0), group(8, 1.0, 0.0, question="7"), group(30, 0.0, 0.0)]
    config = parse_config({"rounds": 3, "sampling": {"local": 1, "external": 1, "completions": 2, **UNBOUNDED}})
    peer = Peer(*lies, *others)
    path = tmp_path / "pool.sqlite"

    def rounds(first: int, exchange: Peer) -> list[dict[str, Any]]:
        with ReplayBuffer(path, config.pool) as pool:
            pool.rewind(first)
            metrics = MetricsLog(tmp_path / "metrics.jsonl")
            loop = Loop(config, 0, policy, HfEngine(policy), TaskSet([(task, 1.0)]), pool, exchange, metrics)
            return [dict(loop.row) for _ in loop.rounds(first)]

    rows = rounds(0, peer)
    assert [row["groups_external"] for row in rows] == [1, 0, 0]  # the true one of a question of which a lie came first
    assert Counter(peer.reasons) == {"false_reward": 20, "false_question": 1}
    assert all(row["groups_unusable"] == 0 for row in rows)
    again = Peer()
    assert [row["groups_external"] for row in rounds(1, again)] == [0, 0] and len(again.reasons) < 21


class Guess:
    """A task that a random policy solves now and then: any text with an even number of characters."""

    key = TaskKey("guess", 1, "c")

    def make(self, seed: int) -> Item:
        return Item(f"{seed % 10**6}", "")

    def verify(self, item: Item, text: str) -> float:
        return float(len(text) % 2 == 0)


def test_trained_tokens_count_once_for_each_iteration(policy: Policy, tasks: TaskSet, tmp_path: Path) -> None:
    class Scripted(HfEngine):
        """Says the right answer and a longer wrong one."""

        def generate(self, *_: Any) -> list[list[Generated]]:
            texts = ("2", "333")
            return [[Generated(tuple(policy.encode_completion(text, True)), text, True) for text in texts]]

    trainer = node_config().trainer.model_copy(update={"num_iterations": 3})
    config = node_config().model_copy(update={"trainer": trainer})
    with ReplayBuffer(tmp_path / "pool.sqlite", config.pool) as pool:
        metrics = MetricsLog(tmp_path / "metrics.jsonl")
        loop = Loop(config, 0, policy, Scripted(policy), tasks, pool, NoExchange(), metrics)
        next(loop.rounds(0))
    assert loop.spent == (6, 18, 0)  # two tokens and four, of which each update takes all


def replaying(policy: Policy, folder: Path, done: int, most: int) -> list[list[Sample]]:
    """Rounds `done` + 1 to `most` of a node that replays its own groups and does not train."""
    config = parse_config(
        {
            "rounds": most,
            "engine": {"max_completion_length": 6},
            "sampling": {"local": 3, "external": 2, "completions": 4, "source": "self"},
        }
    )
    tasks = TaskSet([(Guess(), 1.0)])
    with ReplayBuffer(folder / "pool.sqlite", config.pool) as pool:
        pool.rewind(done)
        metrics = MetricsLog(folder / "metrics.jsonl")
        loop = Loop(config, 0, policy, HfEngine(policy), tasks, pool, NoExchange(), metrics)
        return [list(samples) for samples in loop.rounds(done)]


UNITS = ["1", "ab ", "<eos>", "<pad><bos>", "\u00e9", "\u0130", "\U0001f600", "\x00", "\ud7ff", "\n\n", "-" * 997]
texts = st.builds(lambda unit, times: (unit * times)[: 1 << 14], st.sampled_from(UNITS), st.integers(0, 1 << 14))
pairs = st.tuples(texts, texts).map(lambda pair: [text[:100] for text in pair] * 64)
hostile = st.lists(st.tuples(st.lists(texts, min_size=2, max_size=9) | pairs, st.booleans()), max_size=8)


@example([(["1", "11"] * 64, False)] * 3, "sapo")
@settings(max_examples=25, deadline=None)
@given(hostile, st.sampled_from(["sapo", "uniform", "correct"]))
def test_no_peer_moves_the_bounds_of_a_round(
    hostile_round: HostileRound, groups: list[tuple[list[str], bool]], rule: str
) -> None:
    """Rows: (I + J) x L. Tokens of each: `max_prompt_length` and `max_completion_length`. Weight: I + J x w."""
    task = Guess()
    made = []
    for seed, (found, finished) in enumerate(groups):
        item = task.make(seed)
        completions = tuple(Completion(text, finished, task.verify(item, text)) for text in found)
        made.append(Group(task.key, seed, item.question, completions, "peer", 2**62))
    samples = hostile_round(rule, made)
    external = [one for one in samples if one.external]
    assert len(samples) - len(external) == 3 * 4 and len(external) <= 2 * 4
    assert all(len(one.prompt) <= 20 and len(one.completion) <= 6 for one in samples)
    by_group = Counter[int]()
    for one in samples:
        by_group[one.group] += one.weight
    assert all(weight <= 1 + 1e-9 for weight in by_group.values())
    assert len({one.group for one in external}) <= 2
    if groups == [(["1", "11"] * 64, False)] * 3:
        assert len(external) == 2 * 4
    for batch in make_batches(samples, 100, "dapo", 0):
        assert batch["completion_ids"].size(1) <= 6 and len(batch["advantages"]) <= 5 * 4
        assert torch.isfinite(batch["advantages"]).all()


@pytest.fixture(scope="module")
def hostile_round(tmp_path_factory: pytest.TempPathFactory) -> HostileRound:
    """One round of three own groups and up to two of a peer that sends these."""
    policy = tiny_policy(tmp_path_factory.mktemp("policy"))
    tasks = TaskSet([(Guess(), 1.0)])

    def run(rule: str, groups: list[Group]) -> list[Sample]:
        config = parse_config(
            {
                "rounds": 1,
                "engine": {"max_completion_length": 6, "max_prompt_length": 20},
                "sampling": {"local": 3, "external": 2, "completions": 4, "rule": rule, **UNBOUNDED},
            }
        )
        metrics = MetricsLog(tmp_path_factory.mktemp("node") / "metrics.jsonl")
        with ReplayBuffer(Path(":memory:"), config.pool) as pool:
            loop = Loop(config, 0, policy, HfEngine(policy), tasks, pool, Peer(*groups), metrics)
            return list(next(loop.rounds(0)))

    return run


def test_the_age_of_what_is_drawn_is_counted_here_and_a_peers_own_count_only_shown(
    policy: Policy, tmp_path: Path
) -> None:
    config = parse_config(
        {
            "rounds": 3,
            "engine": {"max_completion_length": 6},
            "sampling": {"local": 1, "external": 1, "completions": 2, "rule": "sapo", **UNBOUNDED},
        }
    )
    task = Guess()
    answers = (Completion("11", True, 1.0), Completion("1", True, 0.0))
    claims = [0, 2**63 - 1, 1]
    groups = [
        Group(task.key, seed, task.make(seed).question, answers, "peer", claim) for seed, claim in enumerate(claims)
    ]
    tasks = TaskSet([(task, 1.0)])
    metrics = MetricsLog(tmp_path / "metrics.jsonl")
    with ReplayBuffer(tmp_path / "pool.sqlite", config.pool) as pool:
        loop = Loop(config, 0, policy, HfEngine(policy), tasks, pool, Peer(*groups), metrics)
        rows = [dict(loop.row) for _ in loop.rounds(0)]
    assert [row["swarm/age_rounds"] for row in rows] == [row["swarm/age_rounds_max"] for row in rows] == [0, 1, 2]
    assert all(0 <= row["swarm/age_seconds"] <= row["swarm/age_seconds_max"] < 600 for row in rows)
    lags = {row["swarm/claimed_lag"] for row in rows}
    assert any(lag < -(2**62) for lag in lags) and len(lags) == 3
    assert all(0 < row["swarm/external_share"] <= 1 and row["effective_samples"] >= 2 for row in rows)


def prompts(samples: list[Sample], external: bool) -> set[tuple[int, ...]]:
    return {tuple(one.prompt) for one in samples if one.external == external}


def test_self_replay_draws_the_nodes_own_groups_of_earlier_rounds_once_each(policy: Policy, tmp_path: Path) -> None:
    rounds = replaying(policy, tmp_path, done=0, most=6)
    assert prompts(rounds[0], external=True) == set()
    assert len(prompts(rounds[5], external=True)) == 2
    drawn: set[tuple[int, ...]] = set()
    earlier: set[tuple[int, ...]] = set()
    for samples in rounds:
        again = prompts(samples, external=True)
        assert again <= earlier and not again & drawn
        earlier |= prompts(samples, external=False)
        drawn |= again


def test_self_replay_draws_the_same_when_rounds_are_done_again(policy: Policy, tmp_path: Path) -> None:
    rounds = replaying(policy, tmp_path, done=0, most=6)
    assert replaying(policy, tmp_path, done=2, most=6) == rounds[2:]


def test_a_prompt_has_the_room_that_the_longest_completion_leaves(policy: Policy) -> None:
    assert longest_prompt(node_config().engine, policy) == POSITIONS - LONGEST
    assert longest_prompt(node_config(max_prompt_length=20).engine, policy) == 20
    with pytest.raises(UserError, match="max_completion_length=128 leaves no room"):
        longest_prompt(node_config(max_completion_length=POSITIONS).engine, policy)


def test_the_draw_follows_what_a_probe_says_of_peers_and_a_node_that_goes_on_measures_the_same(
    policy: Policy, tmp_path: Path
) -> None:
    config = parse_config(
        {
            "rounds": 4,
            "tasks": [{"name": "builtin/sums"}],
            "engine": {"max_completion_length": 6},
            "sampling": {"local": 1, "external": 1, "completions": 2, "rule": "correct", "probe": 3, **UNBOUNDED},
        }
    )
    tasks = load_tasks(config.tasks)
    (task,) = tasks.tasks

    def sent(seed: int) -> Group:
        item = task.make(seed)
        answers = (Completion(item.answer, True, 1.0), Completion("no", True, 0.0))
        return Group(task.key, seed, item.question, answers, "peer", 0)

    def rounds(done: int, last: int) -> list[float]:
        with ReplayBuffer(tmp_path / "pool.sqlite", config.pool) as pool:
            pool.rewind(done)
            metrics = MetricsLog(tmp_path / "metrics.jsonl")
            peer = Peer(*(sent(seed) for seed in range(5)))
            loop = Loop(config, 0, policy, HfEngine(policy), tasks, pool, peer, metrics)
            made = loop.rounds(done)
            scores = []
            for _ in range(done, last):
                next(made)
                scores.append(loop.row["swarm/probe"])
                assert loop.row["tokens_scored"] > 0
            assert [lesson.score for lesson in pool.lessons(last + 1)][done:] == scores
            assert all(set(lesson.pulls) <= {"peer"} for lesson in pool.lessons(last + 1))
            return scores

    first = rounds(0, 3)
    assert first[0] < 0 and first == [first[0]] * 3  # nobody trains here: the policy stands still
    assert rounds(2, 4) == [first[0]] * 2


def test_a_probe_of_tasks_without_a_known_answer_is_refused(policy: Policy, tmp_path: Path) -> None:
    class Unknown(Guess):
        def verify(self, item: Item, text: str) -> float:
            return 0.0

    config = node_config().model_copy(update={"sampling": node_config().sampling.model_copy(update={"probe": 1})})
    with ReplayBuffer(tmp_path / "pool.sqlite", config.pool) as pool:
        metrics = MetricsLog(tmp_path / "metrics.jsonl")
        tasks = TaskSet([(Unknown(), 1.0)])
        loop = Loop(config, 0, policy, HfEngine(policy), tasks, pool, NoExchange(), metrics)
        with pytest.raises(UserError, match=r"sampling\.probe"):
            next(loop.rounds(0))


class Says(HfEngine):
    """A policy that answers every question with the same texts."""

    def __init__(self, policy: Policy, *texts: str) -> None:
        super().__init__(policy)
        self.made = [Generated(tuple(policy.encode_completion(text, True)), text, True) for text in texts]

    def generate(self, prompts: Any, *_: Any) -> list[list[Generated]]:
        return [self.made for _ in prompts]


class Recite(Guess):
    """A task that pays its answer, four digits, alone but for blanks around it."""

    def make(self, seed: int) -> Item:
        return Item(f"{seed % 10**6}", f"{seed % 10**4:04}")

    def verify(self, item: Item, text: str) -> float:
        return float(text.strip() == item.answer)


class ReadsTheLastNumber(Recite):
    """The same where anything may stand before the answer."""

    answer_mode = "last_number"

    def verify(self, item: Item, text: str) -> float:
        return float(text.endswith(item.answer))


class SaysNoMode(ReadsTheLastNumber):
    """The same, and it does not say so, as no data set does."""

    answer_mode = "whole"


class Fails(Recite):
    """A task that fails at a text of more than one line."""

    def verify(self, item: Item, text: str) -> float:
        if "\n" in text:
            raise UserError("no")
        return super().verify(item, text)


def sent(seed: int, *texts: str, task: Task = Guess()) -> Group:  # noqa: B008  # it has no state
    """A group of the task with these completions."""
    item = task.make(seed)
    made = tuple(Completion(text, True, task.verify(item, text)) for text in texts)
    return Group(task.key, seed, item.question, made, "peer", 0)


def drawn_by(
    policy: Policy,
    folder: Path,
    groups: dict[str, list[Group]],
    own: tuple[str, ...] = ("11", "1"),
    task: Task = Guess(),  # noqa: B008  # it has no state
    **sampling: Any,
) -> tuple[dict[str, Any], list[str], list[str]]:
    """One round among these groups of signers: its row, what was drawn of peers, what was said of the rest."""
    settings = {"local": 1, "external": 1, "completions": 2, "rule": "correct", **UNBOUNDED, **sampling}
    config = parse_config({"rounds": 1, "engine": {"max_completion_length": LONGEST}, "sampling": settings})
    peer = Peer()
    now = time.time()
    with ReplayBuffer(folder / "pool.sqlite", config.pool) as pool:
        everyone = [(name, group) for name, mine in groups.items() for group in mine]
        pool.add([share(one, at)._replace(peer=name) for at, (name, one) in enumerate(everyone)], now, 1)
        metrics = MetricsLog(folder / "metrics.jsonl")
        loop = Loop(config, 0, policy, Says(policy, *own), TaskSet([(task, 1.0)]), pool, peer, metrics)
        samples = next(loop.rounds(0))
    return loop.row, [policy.decode(one.completion) for one in samples if one.external], peer.reasons


def test_an_answer_far_longer_than_own_right_ones_is_given_up_and_another_drawn(policy: Policy, tmp_path: Path) -> None:
    padded = [sent(seed, "2" * 6, "1") for seed in range(4)]
    groups = {"loud": padded, "plain": [sent(9, "2222", "1")]}
    row, drawn, said = drawn_by(policy, tmp_path, groups, max_length_ratio=2, external=2)  # own right: three tokens
    assert drawn == ["2222"] and said == ["over_long"] * 4 and "over_long" in BLAMELESS
    assert row["swarm/over_long"] == row["groups_unusable"] == 4
    for number in range(2):  # the bound is of use only where it is set, and its measure is no peer's
        (tmp_path / str(number)).mkdir()
    assert drawn_by(policy, tmp_path / "0", {"loud": padded})[1] == ["222222"]
    longer = ("1111", "1")
    assert drawn_by(policy, tmp_path / "1", {"loud": padded}, longer, max_length_ratio=2)[1] == ["222222"]


def test_an_answer_that_this_policy_would_hardly_say_is_given_up_and_another_drawn(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(likelihood, "COMMON", 1.0)  # of so few tokens none is rare
    texts = ["ab", "zz", "5?", "##", "77", "qQ"]
    prompt = policy.encode_prompt(Guess().make(0))
    rows = [
        (policy.encode_prompt(Guess().make(at)), policy.encode_completion(text, True)) for at, text in enumerate(texts)
    ]
    assert rows[0][0] == prompt
    found = surprises(policy, rows)
    bound = min(found) + 1e-3  # one of them is likely enough
    likely = texts[found.index(min(found))]
    groups = {"peer": [sent(at, text, "1") for at, text in enumerate(texts)]}
    row, drawn, said = drawn_by(policy, tmp_path, groups, max_surprise=bound, external=2)
    assert drawn == [likely] and said == ["too_surprising"] * 5
    assert row["swarm/too_surprising"] == 5 and row["tokens_scored"] == 3 * len(texts)


@pytest.mark.parametrize(("own", "why"), [(("1", "22"), "over_long"), (("123456", "654321"), "too_surprising")])
@pytest.mark.parametrize(
    ("task", "text", "is_drawn"),
    [
        (Recite(), "0003", True),
        (Recite(), "0003 ", False),  # a blank may be planted
        (ReadsTheLastNumber(), "0003", False),  # the bare answer would teach not to think
        (SaysNoMode(), "0003", False),
        (Fails(), "0003", False),
    ],
)
def test_the_bare_answer_is_looked_at_no_further_where_a_task_takes_nothing_else(
    own: tuple[str, ...],
    why: str,
    task: Task,
    text: str,
    is_drawn: bool,
    policy: Policy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loop_module, "surprises", lambda _policy, rows, _temperature: [9.0] * len(rows))
    groups = {"peer": [sent(3, text, "1", task=task)]}
    row, drawn, said = drawn_by(policy, tmp_path, groups, own, task, max_surprise=8.9, max_length_ratio=1, external=2)
    assert (drawn, said) == (([text], []) if is_drawn else ([], [why]))
    assert row.get("tokens_scored", 0) == (len(text) + 1 if why == "too_surprising" and not is_drawn else 0)


def test_where_a_completion_says_nothing_there_is_nothing_to_be_surprised_at(policy: Policy, tmp_path: Path) -> None:
    right = sent(3, "0003", task=Recite())
    silent = replace(right, completions=(*right.completions, Completion("", False, 0.0)))
    row, drawn, said = drawn_by(policy, tmp_path, {"peer": [silent]}, task=Recite(), rule="sapo", max_surprise=1.2)
    assert (drawn, said, row["tokens_scored"]) == (["0003", ""], [], 0)


def test_a_flood_of_what_is_given_up_is_looked_at_within_a_bound(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "surprises", lambda _policy, rows, _temperature: [9.0] * len(rows))
    groups = {"loud": [sent(at, "22", "1") for at in range(60)]}
    row, drawn, said = drawn_by(policy, tmp_path, groups, max_surprise=8.9, external=3)
    assert drawn == [] and row["groups_external"] == 0
    assert len(said) == LOOKED_AT * 3 and row["tokens_scored"] == LOOKED_AT * 3 * 3


def test_a_signer_has_no_more_of_a_draw_than_its_even_share_times_what_is_set(policy: Policy, tmp_path: Path) -> None:
    groups = {"loud": [sent(at, "22", "1") for at in range(40)]}
    groups |= {f"quiet{at}": [sent(100 + at, "4444", "1")] for at in range(3)}
    row, drawn, _ = drawn_by(policy, tmp_path, groups, max_signer_share=1.5, external=4)
    assert len(drawn) == 4 and row["swarm/taught_by"]["loud"] <= 2
    (tmp_path / "alone").mkdir()
    row, drawn, _ = drawn_by(policy, tmp_path / "alone", {"loud": groups["loud"]}, max_signer_share=1.5, external=4)
    assert len(drawn) == 4  # who is alone has all of it

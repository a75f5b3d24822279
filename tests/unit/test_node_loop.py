"""A round of the loop: what it takes from a peer is true, fits the policy's positions, and is used no more often than
it may be. It trains on no held-out question.
"""

import json
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

import node.loop as loop_module
from node.config import NodeConfig, PolicyConfig, SamplingConfig, TaskConfig, parse_config
from node.engines import Generated
from node.engines.hf import HfEngine
from node.errors import UserError
from node.loop import Loop
from node.metrics import is_declared
from node.policy.load import Policy, load_policy
from node.rollouts.draw import MAX_DRAWN_PER_SLOT
from node.rollouts.group import Group, Tokens, decode, encode, one_turn
from node.rollouts.group_buffer import GroupBuffer, ReceivedGroup
from node.rollouts.rule import Sample
from node.rollouts.rules import configured_weight
from node.rollouts.screening import BLAMELESS
from node.swarm.sharing import NoExchange
from node.tasks import Item, Task, TaskKey, load_tasks
from node.tasks.questions import Split, question_id
from node.tasks.scoring.verdicts import OutOfTime, Scored, Submission, Verdict, already
from node.tasks.task_set import TaskSet
from node.telemetry.metrics_file import MetricsLog
from node.training import likelihood
from node.training.batch import make_batches
from node.training.likelihood import surprises
from node.training.trainer import make_trainer
from tests.policies import CHAT_MODELS, tiny_policy, write_chat_policy
from tests.swarms import UNBOUNDED

HostileRound = Callable[[str, list[Group]], list[Sample]]
POSITIONS = 128  # of the tiny policy
LONGEST = 16
SHORT, LONG = "1+1=", "1" * 60_000
WHOLE = Split(0.0)  # nothing is held out


def alone(task: Task) -> TaskSet:
    return TaskSet([(task, 1.0)], WHOLE)


@pytest.fixture
def policy(tmp_path: Path) -> Policy:
    return tiny_policy(tmp_path / "policy")


@pytest.fixture
def tasks(tmp_path: Path) -> TaskSet:
    """A file of two questions: one of four characters, one that is far too long for the policy."""
    rows = [{"question": SHORT, "answer": "2"}, {"question": LONG, "answer": "2"}]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_tasks([TaskConfig(name="dataset", options={"path": str(tmp_path / "questions.jsonl")})], WHOLE)


def node_config(**engine: int) -> NodeConfig:
    return parse_config(
        {
            "rounds": 2,
            "eval": {"every": 0},
            "engine": {"max_completion_length": LONGEST, **engine},
            "sampling": {"local": 1, "external": 4, "completions": 2, "rule": "sapo", **UNBOUNDED},
        }
    )


def group_of(task: Task, question: str, padding: str = "") -> Group:
    seed = next(seed for seed in range(100) if task.make(seed).question == question)
    texts = ("2", "3" + padding)
    made = tuple(one_turn(text, True, task.verify(task.make(seed), text)) for text in texts)
    return Group(task.key, seed, question, made, "peer", 0)


class Peer(NoExchange):
    """Hands over these groups once, as from a peer, and keeps what is said of those that were of no use."""

    def __init__(self, *groups: Group) -> None:
        self.groups = groups
        self.reasons: list[str] = []
        self.drew_and_left: list[tuple[int, int]] = []

    def receive(self, known: Callable[[bytes], bool]) -> list[ReceivedGroup]:
        groups, self.groups = self.groups, ()
        return [share(group, number) for number, group in enumerate(groups)]

    def refuse(self, group_id: bytes, reason: str) -> None:
        self.reasons.append(reason)

    def drew(self, groups: int, left: int, easy: Collection[TaskKey]) -> None:
        self.drew_and_left.append((groups, left))


def share(group: Group, number: int) -> ReceivedGroup:
    """A group as it comes: who signed it is who made it, as it says."""
    return ReceivedGroup(number.to_bytes(32, "big"), group.policy, time.time(), group, encode(group))


def train(policy: Policy, tasks: TaskSet, folder: Path, peer: Peer, *before: Group) -> tuple[list[dict], list[bytes]]:
    """Run two rounds over a buffer that holds the groups of `before`; return the metrics and what it holds then."""
    config = node_config()
    folder.mkdir(exist_ok=True)
    metrics = MetricsLog(folder / "metrics.jsonl")
    with GroupBuffer(folder / "pool.sqlite", config.buffer) as buffer:
        buffer.add([share(group, 100 + number) for number, group in enumerate(before)], time.time(), 1)
        loop = Loop(config, 0, policy, HfEngine(policy), tasks, buffer, peer, metrics)
        make_trainer(policy, config, folder, loop.rounds, loop.finish).train()
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [key for row in rows for key in row if not is_declared(key)] == []
        with sqlite3.connect(folder / "pool.sqlite") as db:
            held = db.execute("SELECT id FROM groups WHERE id NOT IN (SELECT id FROM buried) ORDER BY rowid").fetchall()
        return rows, [key for (key,) in held]


def test_a_question_without_room_in_the_policy_is_drawn_in_vain_once(
    policy: Policy, tasks: TaskSet, tmp_path: Path
) -> None:
    (task,) = tasks.tasks
    peer = Peer(group_of(task, LONG), group_of(task, SHORT))
    rows, held = train(policy, tasks, tmp_path, peer)
    assert peer.reasons == ["prompt_too_long"]
    assert held == [(1).to_bytes(32, "big")]
    assert [row["groups_external"] for row in rows] == [1, 0]


def test_one_that_is_in_the_buffer_is_dropped_and_counted(policy: Policy, tasks: TaskSet, tmp_path: Path) -> None:
    (task,) = tasks.tasks
    elsewhere = task.key._replace(config="0" * 16)  # the node ran another task then
    gone = replace(group_of(task, SHORT), task=elsewhere, question="2+2=")
    rows, _ = train(policy, tasks, tmp_path, Peer(), group_of(task, LONG), group_of(task, SHORT), gone)
    assert [(row["groups_external"], row["groups_unusable"]) for row in rows] == [(1, 2), (0, 0)]


def first_round(policy: Policy, tasks: TaskSet, folder: Path, exchange: NoExchange, engine: HfEngine) -> list[Sample]:
    config = node_config()
    with GroupBuffer(folder / "pool.sqlite", config.buffer) as buffer:
        loop = Loop(config, 0, policy, engine, tasks, buffer, exchange, MetricsLog(folder / "metrics.jsonl"))
        return list(next(loop.rounds(0)))


def test_nodes_that_ask_otherwise_train_each_others_answers_each_under_its_own_prompt(
    policy: Policy, tmp_path: Path
) -> None:
    ways: list[dict[str, Any]] = [{}, {"examples": 2, "instruction": "Add."}, {"examples": 1}]
    (bare,), (told,), (shown,) = (load_tasks([TaskConfig(name="builtin/sums", **way)], WHOLE).tasks for way in ways)
    prompts = {id(task): policy.encode_prompt(task.make(3)) for task in (bare, told, shown)}
    assert len(set(map(tuple, prompts.values()))) == 3
    for number, (mine, theirs) in enumerate([(bare, told), (told, bare), (told, shown)]):
        item = theirs.make(3)
        made = tuple(one_turn(text, True, theirs.verify(item, text)) for text in (item.answer, "no"))
        peer = Peer(Group(theirs.key, 3, item.question, made, "peer", 0))
        folder = tmp_path / str(number)
        folder.mkdir()
        samples = first_round(policy, alone(mine), folder, peer, HfEngine(policy))
        external = [sample for sample in samples if sample.external]
        assert [list(group.prompt) for group in external] == [list(prompts[id(mine)])] * 2
        assert list(external[0].completion) == policy.encode_completion(item.answer, finished=True)


def test_a_peers_completion_that_is_too_long_is_left_out_and_counted(
    policy: Policy, tasks: TaskSet, tmp_path: Path
) -> None:
    (task,) = tasks.tasks
    peer = Peer(group_of(task, SHORT, padding="3" * 10_000))
    rows, _ = train(policy, tasks, tmp_path / "trained", peer)
    assert [(row["groups_external"], row["swarm/too_long"]) for row in rows] == [(1, 1), (0, 0)]
    peer = Peer(group_of(task, SHORT, padding="3" * 10_000))
    (short,) = (sample for sample in first_round(policy, tasks, tmp_path, peer, HfEngine(policy)) if sample.external)
    assert list(short.completion) == policy.encode_completion("2", finished=True)
    assert (short.advantage, short.weight) == (0.5, 0.5)  # as in the whole group, and no more of the round for it


@pytest.mark.parametrize(("end", "fits"), [(True, False), (False, True)])
def test_the_end_of_text_counts(policy: Policy, tasks: TaskSet, tmp_path: Path, end: bool, fits: bool) -> None:
    (task,) = tasks.tasks
    one = group_of(task, SHORT)
    text = "3" * LONGEST
    made = (one.completions[0], one_turn(text, end, task.verify(task.make(one.seed), text)))
    peer = Peer(replace(one, completions=made))
    samples = first_round(policy, tasks, tmp_path, peer, HfEngine(policy))
    assert (policy.encode_completion(text, end) in [list(sample.completion) for sample in samples]) == fits


@pytest.mark.parametrize("family", CHAT_MODELS)
@pytest.mark.parametrize("prompt", ["chat", "plain"])
def test_a_peers_answer_ends_in_the_token_that_this_policys_own_turns_end_in(
    tasks: TaskSet, tmp_path: Path, family: str, prompt: str
) -> None:
    end = write_chat_policy(tmp_path / "policy", *CHAT_MODELS[family])
    policy = load_policy(PolicyConfig(model=str(tmp_path / "policy"), device="cpu", prompt=prompt))
    ends = [2, end, end] if prompt == "plain" else [2, 2, end]

    class Scripted(HfEngine):
        """Answers rightly once and wrongly twice; each answer ends in another token of `ends`."""

        def generate(self, *_: Any) -> list[list[Generated]]:
            said = zip(("2", "3", "33"), ends, strict=True)
            return [[Generated((*policy.encode_completion(text, False), last), text, True) for text, last in said]]

    (task,) = tasks.tasks
    samples = first_round(policy, tasks, tmp_path, Peer(group_of(task, SHORT)), Scripted(policy))
    assert [sample.completion[-1] for sample in samples] == [*ends, end, end], "own samples stay as they were sampled"
    assert [sample.external for sample in samples] == [False] * 3 + [True] * 2


def test_own_samples_are_the_tokens_that_were_sampled_with_their_samplers_logprobs(
    policy: Policy, tasks: TaskSet, tmp_path: Path
) -> None:
    made: list[Generated] = []

    class Recorder(HfEngine):
        def generate(self, *args: Any) -> list[list[Generated]]:
            groups = [
                [
                    replace(completion, logprobs=tuple(-0.1 * token for token in completion.token_ids))
                    for completion in group
                ]
                for group in super().generate(*args)
            ]
            made.extend(completion for group in groups for completion in group)
            return groups

    samples = first_round(policy, tasks, tmp_path, NoExchange(), Recorder(policy))
    assert [(sample.completion, sample.logprobs) for sample in samples] == [
        (completion.token_ids, completion.logprobs) for completion in made
    ]
    assert {tuple(sample.prompt) for sample in samples} == {tuple(policy.encode_prompt(Item(SHORT, "2")))}


def test_a_round_says_how_many_groups_it_drew_and_how_many_it_left(tmp_path: Path, policy: Policy) -> None:
    sums = load_tasks([TaskConfig(name="builtin/sums")], WHOLE)
    (task,) = sums.tasks
    made = [(seed, task.make(seed)) for seed in range(6)]
    groups = [
        Group(task.key, seed, item.question, (one_turn(item.answer, True, 1.0), one_turn("no", True, 0.0)), "peer", 0)
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
    with GroupBuffer(tmp_path / "pool.sqlite", config.buffer) as buffer:
        metrics = MetricsLog(tmp_path / "metrics.jsonl")
        loop = Loop(config, 0, policy, Scripted(policy), tasks, buffer, NoExchange(), metrics)
        next(loop.rounds(0))
    assert loop.row["completions/retokenized"] == 0.5


def test_a_question_is_made_once_for_an_own_group_and_once_for_a_peers(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = load_tasks([TaskConfig(name="builtin/sums")], WHOLE)
    (task,) = tasks.tasks
    item = task.make(0)
    answers = (one_turn(item.answer, True, 1.0), one_turn("no", True, 0.0))
    peer = Peer(Group(task.key, 0, item.question, answers, "peer", 0))
    made: list[int] = []
    make = type(task).make
    monkeypatch.setattr(type(task), "make", lambda self, seed: made.append(seed) or make(self, seed))
    samples = first_round(policy, tasks, tmp_path, peer, HfEngine(policy))
    assert [sample.external for sample in samples] == [False, False, True, True]
    assert len(made) == 2 and made[1] == 0


def test_what_is_drawn_is_true_and_what_is_not_is_reported_once_and_makes_room_for_another(
    policy: Policy, tmp_path: Path
) -> None:
    task = Guess()

    def group(peer: str, seed: int, *rewards: float, question: str = "") -> Group:
        texts = ("11", "3" if question else "1")
        made = tuple(one_turn(text, True, reward) for text, reward in zip(texts, rewards, strict=True))
        return Group(task.key, seed, question or task.make(seed).question, made, peer, 0)

    lies = [group("liar", seed, 0.0, 1.0) for seed in range(20)]
    others = [
        group("honest", 7, 1.0, 0.0),
        group("mistaken", 8, 1.0, 0.0, question="7"),
        group("honest", 30, 0.0, 0.0),
    ]
    config = parse_config({"rounds": 3, "sampling": {"local": 1, "external": 1, "completions": 2, **UNBOUNDED}})
    peer = Peer(*lies, *others)
    path = tmp_path / "pool.sqlite"

    def rounds(first: int, exchange: Peer) -> list[dict[str, Any]]:
        with GroupBuffer(path, config.buffer) as buffer:
            buffer.rewind(first)
            metrics = MetricsLog(tmp_path / "metrics.jsonl")
            loop = Loop(config, 0, policy, HfEngine(policy), alone(task), buffer, exchange, metrics)
            return [dict(loop.row) for _ in loop.rounds(first)]

    rows = rounds(0, peer)
    # First a lie, with which the liar's other groups go. Then the true group on a question for which a lie came first.
    assert [row["groups_external"] for row in rows] == [0, 1, 0]
    assert peer.reasons == ["false_reward", "false_question"]
    assert all(row["groups_unusable"] == 0 for row in rows)
    # Neither a liar's groups nor one of equal rewards is left.
    assert peer.drew_and_left == [(0, 0), (1, 0), (0, 0)]
    again = Peer()
    assert [row["groups_external"] for row in rounds(1, again)] == [1, 0] and again.reasons == ["false_question"]


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
    with GroupBuffer(tmp_path / "pool.sqlite", config.buffer) as buffer:
        metrics = MetricsLog(tmp_path / "metrics.jsonl")
        loop = Loop(config, 0, policy, Scripted(policy), tasks, buffer, NoExchange(), metrics)
        next(loop.rounds(0))
    assert loop.spent == (6, 18, 0, 5 + 3 * 3 * 5)  # two tokens and four, of which each update takes all, and a prompt


def replaying(policy: Policy, folder: Path, done: int, most: int) -> list[list[Sample]]:
    """Rounds `done` + 1 to `most` of a node that replays its own groups and does not train."""
    config = parse_config(
        {
            "rounds": most,
            "engine": {"max_completion_length": 6},
            "sampling": {"local": 3, "external": 2, "completions": 4, "source": "self"},
        }
    )
    tasks = alone(Guess())
    with GroupBuffer(folder / "pool.sqlite", config.buffer) as buffer:
        buffer.rewind(done)
        metrics = MetricsLog(folder / "metrics.jsonl")
        loop = Loop(config, 0, policy, HfEngine(policy), tasks, buffer, NoExchange(), metrics)
        return [list(samples) for samples in loop.rounds(done)]


UNITS = ["1", "ab ", "<eos>", "<pad><bos>", "\u00e9", "\u0130", "\U0001f600", "\x00", "\ud7ff", "\n\n", "-" * 997]
texts = st.builds(lambda unit, times: (unit * times)[: 1 << 14], st.sampled_from(UNITS), st.integers(0, 1 << 14))
pairs = st.tuples(texts, texts).map(lambda pair: [text[:100] for text in pair] * 64)
hostile = st.lists(st.tuples(st.lists(texts, min_size=2, max_size=9) | pairs, st.booleans()), max_size=8)


@example([(["1", "11"] * 64, False)] * 3, "sapo")
@settings(max_examples=25, deadline=None)
@given(hostile, st.sampled_from(["sapo", "positive"]))
def test_no_peer_moves_the_bounds_of_a_round(
    hostile_round: HostileRound, groups: list[tuple[list[str], bool]], rule: str
) -> None:
    """Rows: (I + J) x L. Tokens of each: `max_prompt_length` and `max_completion_length`. Weight: I + J x w."""
    task = Guess()
    made = []
    for seed, (found, finished) in enumerate(groups):
        item = task.make(seed)
        completions = tuple(one_turn(text, finished, task.verify(item, text)) for text in found)
        made.append(Group(task.key, seed, item.question, completions, "peer", 2**62))
    samples = hostile_round(rule, made)
    external = [sample for sample in samples if sample.external]
    own = len(samples) - len(external)
    assert own == 3 * 4 if rule == "sapo" else own <= 3 * 4
    assert len(external) <= 2 * 4
    assert all(len(sample.prompt) <= 20 and len(sample.completion) <= 6 for sample in samples)
    by_group = Counter[int]()
    for sample in samples:
        by_group[sample.group] += sample.weight
    assert all(weight <= 1 + 1e-9 for weight in by_group.values())
    assert len({received.group for received in external}) <= 2
    if groups == [(["1", "11"] * 64, False)] * 3:
        assert len(external) == 2 * 4
    weight = configured_weight(SamplingConfig(rule=rule, local=3, external=2, completions=4))
    assert sum(sample.weight for sample in samples) <= weight + 1e-9
    for batch in make_batches(samples, weight, 100, "dapo", 0):
        assert batch["completion_ids"].size(1) <= 6 and len(batch["advantages"]) <= 5 * 4
        assert torch.isfinite(batch["advantages"]).all()


@pytest.fixture(scope="module")
def hostile_round(tmp_path_factory: pytest.TempPathFactory) -> HostileRound:
    """One round of three own groups and up to two of a peer that sends these."""
    policy = tiny_policy(tmp_path_factory.mktemp("policy"))
    tasks = alone(Guess())

    def run(rule: str, groups: list[Group]) -> list[Sample]:
        config = parse_config(
            {
                "rounds": 1,
                "engine": {"max_completion_length": 6, "max_prompt_length": 20},
                "sampling": {"local": 3, "external": 2, "completions": 4, "rule": rule, **UNBOUNDED},
            }
        )
        metrics = MetricsLog(tmp_path_factory.mktemp("node") / "metrics.jsonl")
        with GroupBuffer(Path(":memory:"), config.buffer) as buffer:
            loop = Loop(config, 0, policy, HfEngine(policy), tasks, buffer, Peer(*groups), metrics)
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
    answers = (one_turn("11", True, 1.0), one_turn("1", True, 0.0))
    claims = [0, 2**63 - 1, 1]
    groups = [
        Group(task.key, seed, task.make(seed).question, answers, "peer", claim) for seed, claim in enumerate(claims)
    ]
    tasks = alone(task)
    metrics = MetricsLog(tmp_path / "metrics.jsonl")
    with GroupBuffer(tmp_path / "pool.sqlite", config.buffer) as buffer:
        loop = Loop(config, 0, policy, HfEngine(policy), tasks, buffer, Peer(*groups), metrics)
        rows = [dict(loop.row) for _ in loop.rounds(0)]
    assert [row["swarm/age_rounds"] for row in rows] == [row["swarm/age_rounds_max"] for row in rows] == [0, 1, 2]
    assert all(0 <= row["swarm/age_seconds"] <= row["swarm/age_seconds_max"] < 600 for row in rows)
    lags = {row["swarm/claimed_lag"] for row in rows}
    assert any(lag < -(2**62) for lag in lags) and len(lags) == 3
    assert all(0 < row["swarm/external_share"] <= 1 and row["effective_samples"] >= 2 for row in rows)


def prompts(samples: list[Sample], external: bool) -> set[tuple[int, ...]]:
    return {tuple(sample.prompt) for sample in samples if sample.external == external}


def test_source_self_draws_the_nodes_own_groups_of_earlier_rounds_once_each(policy: Policy, tmp_path: Path) -> None:
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


def test_source_self_draws_the_same_when_rounds_are_done_again(policy: Policy, tmp_path: Path) -> None:
    rounds = replaying(policy, tmp_path, done=0, most=6)
    assert replaying(policy, tmp_path, done=2, most=6) == rounds[2:]


def test_a_prompt_has_the_room_that_the_longest_completion_leaves(policy: Policy) -> None:
    assert node_config().engine.longest_prompt(policy.positions) == POSITIONS - LONGEST
    assert node_config(max_prompt_length=20).engine.longest_prompt(policy.positions) == 20
    with pytest.raises(UserError, match="max_completion_length=128 leaves no room"):
        node_config(max_completion_length=POSITIONS).engine.longest_prompt(policy.positions)


@dataclass(frozen=True)
class LongRows:
    """Rows by their lengths in tokens; a character is one."""

    lengths: Sequence[int]
    key = TaskKey("rows", 1, "c")

    @property
    def size(self) -> int:
        return len(self.lengths)

    def make(self, seed: int) -> Item:
        return Item(f"{seed}".zfill(self.lengths[seed] - 1), "")  # behind the token that begins a text

    def verify(self, item: Item, text: str) -> float:
        return 0.0


def test_rows_that_are_too_long_are_counted_with_the_setting_and_refused_where_they_are_most(
    node_of: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch
) -> None:
    def checked(lengths: Sequence[int], split: Split = WHOLE) -> list[Any]:
        with capture_logs() as logs:
            node_of(
                Swarm(), TaskSet([(LongRows(lengths), 1.0)], split), engine={"max_prompt_length": 20}
            ).texts.check_rows()
        return logs

    (said,) = checked([9, 20, 20])
    assert said == {
        "event": "rows", "task": "rows", "for_training": 3, "held_out_for_evaluation": 0, "log_level": "info"
    }  # fmt: skip
    (said,) = checked([9] * 40, HALF)
    assert said["for_training"] + said["held_out_for_evaluation"] == 40 and said["for_training"] < 30
    _, warned = checked([9, 20, 21, 30])
    line = "task 'rows': the prompts of 2 of 4 rows have more than 20 tokens and are not asked: "
    assert (warned["event"], warned["log_level"]) == (f"{line}set engine.max_prompt_length=30 to ask all", "warning")
    with pytest.raises(UserError, match=r"prompts of 3 of 4 rows .*: the longest has 200, and engine.max_completion_"):
        checked([9, 21, 30, 200])
    monkeypatch.setattr("node.training.texts.ROWS_MEASURED", 3)
    with pytest.raises(UserError, match="prompts of 3 of 3 rows"):
        checked([30] * 9)


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


def sent(seed: int, *texts: str, task: Task = Guess(), peer: str = "peer") -> Group:  # noqa: B008  # it has no state
    """A group of the task with these completions; its maker claims 0 for what is unscorable here."""
    item = task.make(seed)
    made = tuple(one_turn(text, True, task.verify(item, text) or 0.0) for text in texts)
    return Group(task.key, seed, item.question, made, peer, 0)


def drawn_by(
    policy: Policy,
    folder: Path,
    groups: dict[str, list[Group]],
    own: tuple[str, ...] = ("11", "1"),
    task: Task = Guess(),  # noqa: B008  # it has no state
    **sampling: Any,
) -> tuple[dict[str, Any], list[str], list[str]]:
    """One round among these groups of signers: its row, what was drawn of peers, what was said of the rest."""
    settings = {"local": 1, "external": 1, "completions": 2, **UNBOUNDED, **sampling}
    config = parse_config({"rounds": 1, "engine": {"max_completion_length": LONGEST}, "sampling": settings})
    peer = Peer()
    now = time.time()
    with GroupBuffer(folder / "pool.sqlite", config.buffer) as buffer:
        everyone = [(name, group) for name, mine in groups.items() for group in mine]
        buffer.add([share(group, at)._replace(peer=name) for at, (name, group) in enumerate(everyone)], now, 1)
        metrics = MetricsLog(folder / "metrics.jsonl")
        loop = Loop(config, 0, policy, Says(policy, *own), alone(task), buffer, peer, metrics)
        samples = next(loop.rounds(0))
    return loop.row, [policy.decode(sample.completion) for sample in samples if sample.external], peer.reasons


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
        (policy.encode_prompt(Guess().make(at)), Tokens(policy.encode_completion(text, True)))
        for at, text in enumerate(texts)
    ]
    assert rows[0][0] == prompt
    found = surprises(policy, rows)
    bound = min(found) + 1e-3  # one of them is likely enough
    likely = texts[found.index(min(found))]
    groups = {"peer": [sent(at, text, "1") for at, text in enumerate(texts)]}
    row, drawn, said = drawn_by(policy, tmp_path, groups, max_surprise=bound, external=2)
    assert drawn == [likely] and said == ["too_surprising"] * 5
    assert row["swarm/too_surprising"] == 5 and row["tokens_scored"] == 3 * len(texts)


@pytest.mark.parametrize(("surprise", "taken"), [(2.9, ["zz"]), (3.1, [])])
def test_by_default_an_answer_is_left_out_that_this_policy_would_say_once_in_twenty_answers_or_less(
    surprise: float, taken: list[str], policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "surprises", lambda _policy, rows, temperature: [surprise] * len(rows))
    default = SamplingConfig().max_surprise
    row, drawn, _ = drawn_by(policy, tmp_path, {"peer": [sent(1, "zz", "1")]}, max_surprise=default)
    assert (drawn, row["swarm/too_surprising"]) == (taken, int(not taken))


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
    monkeypatch.setattr(loop_module, "surprises", lambda _policy, rows, temperature: [9.0] * len(rows))
    groups = {"peer": [sent(3, text, "1", task=task)]}
    row, drawn, said = drawn_by(policy, tmp_path, groups, own, task, max_surprise=8.9, max_length_ratio=1, external=2)
    assert (drawn, said) == (([text], []) if is_drawn else ([], [why]))
    assert row.get("tokens_scored", 0) == (len(text) + 1 if why == "too_surprising" and not is_drawn else 0)


class Rows(Guess):
    """A task of ten rows, of which row 7 is its test question. It pays any text that ends with the answer."""

    size = 10
    test_ids = frozenset([question_id("guess", "a b c 7")])

    def make(self, seed: int) -> Item:
        return Item(f"a b c {seed % 10}", f"{seed % 10}")

    def verify(self, item: Item, text: str) -> float:
        return float(text.endswith(item.answer))


def test_an_answer_that_quotes_a_held_out_row_with_its_answer_is_given_up_and_another_drawn(
    policy: Policy, tmp_path: Path
) -> None:
    quoting = [sent(seed, f"a b c 7 7 {seed}", "no", task=Rows()) for seed in range(3)]
    groups = {"peer": [*quoting, sent(4, "a b c 7 4", "no", task=Rows())]}
    row, drawn, said = drawn_by(policy, tmp_path, groups, task=Rows(), external=2)
    assert drawn == ["a b c 7 4"]
    assert said == ["quotes_held_out"] * 3 and row["swarm/quotes_held_out"] == 3


def test_where_a_completion_says_nothing_there_is_nothing_to_be_surprised_at(policy: Policy, tmp_path: Path) -> None:
    right = sent(3, "0003", task=Recite())
    silent = replace(right, completions=(*right.completions, one_turn("", False, 0.0)))
    row, drawn, said = drawn_by(policy, tmp_path, {"peer": [silent]}, task=Recite(), rule="sapo", max_surprise=1.2)
    assert (drawn, said, row["tokens_scored"]) == (["0003", ""], [], 0)


def test_a_flood_of_what_is_given_up_is_looked_at_within_a_bound(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "surprises", lambda _policy, rows, temperature: [9.0] * len(rows))
    groups = {"loud": [sent(at, "22", "1") for at in range(60)]}
    row, drawn, said = drawn_by(policy, tmp_path, groups, max_surprise=8.9, external=3)
    assert drawn == [] and row["groups_external"] == 0
    assert len(said) == MAX_DRAWN_PER_SLOT * 3 and row["tokens_scored"] == MAX_DRAWN_PER_SLOT * 3 * 3


def test_a_signer_has_no_more_of_a_draw_than_its_even_share_times_what_is_set(policy: Policy, tmp_path: Path) -> None:
    groups = {"loud": [sent(at, "22", "1") for at in range(40)]}
    groups |= {f"quiet{at}": [sent(100 + at, "4444", "1")] for at in range(3)}
    row, drawn, _ = drawn_by(policy, tmp_path, groups, max_signer_share=1.5, external=4)
    assert len(drawn) == 4 and row["swarm/taught_by"]["loud"] <= 2
    (tmp_path / "alone").mkdir()
    row, drawn, _ = drawn_by(policy, tmp_path / "alone", {"loud": groups["loud"]}, max_signer_share=1.5, external=4)
    assert len(drawn) == 4  # who is alone has all of it


class Swarm(Peer):
    """Hands over different groups in each round, keeps what is published, and has revoked some signers."""

    def __init__(self, *rounds: Sequence[Group]) -> None:
        super().__init__()
        self.rounds = list(rounds)
        self.published: list[Group] = []
        self.out: set[str] = set()
        self.came = 0

    def publish(self, groups: Sequence[Group]) -> int:
        self.published += groups
        return len(groups)

    def receive(self, known: Callable[[bytes], bool]) -> list[ReceivedGroup]:
        groups = self.rounds.pop(0) if self.rounds else ()
        self.came += len(groups)
        return [share(group, self.came - at) for at, group in enumerate(groups)]

    def revoked(self, signers: Collection[str]) -> list[str]:
        return [signer for signer in signers if signer in self.out]


@pytest.fixture
def node_of(policy: Policy, tmp_path: Path) -> Callable[..., Loop]:
    """A node that answers every question with the same texts and does not train."""

    def make(
        swarm: Swarm, tasks: TaskSet, own: Sequence[str] = ("11", "1"), seed: int = 0, rounds: int = 9, **tables: Any
    ) -> Loop:
        sampling = {"local": 1, "external": 1, "completions": len(own), **UNBOUNDED, **tables.pop("sampling", {})}
        engine = {"max_completion_length": LONGEST, **tables.pop("engine", {})}
        config = parse_config({"rounds": rounds, "engine": engine, "sampling": sampling, **tables})
        buffer = GroupBuffer(Path(":memory:"), config.buffer)
        return Loop(config, seed, policy, Says(policy, *own), tasks, buffer, swarm, MetricsLog(tmp_path / "metrics"))

    return make


def peers(policy: Policy, samples: Sequence[Sample]) -> list[str]:
    return [policy.decode(sample.completion) for sample in samples if sample.external]


HALF = Split(0.5)
OF_PART = {
    part: next(seed for seed in range(99) if HALF.holds_out("guess", f"{seed}") == part) for part in (True, False)
}


def asking(is_held_out: bool) -> int:
    """The seed of a node whose first question would be held out, or would not, if training could ask any."""
    return next(
        seed
        for seed in range(99)
        if (asked := alone(Guess()).ask(seed, 0)) is not None
        and HALF.holds_out("guess", asked.item.question) == is_held_out
    )


def test_an_exchange_is_told_of_groups_without_signal_too_and_chooses_itself(node_of: Callable[..., Loop]) -> None:
    """The laboratory's counts what is said in all of them."""
    swarm = Swarm([])
    assert list(next(node_of(swarm, TaskSet([(Guess(), 1.0)]), own=("1", "1")).rounds(0))) == []
    assert [candidate.rewards for candidate in swarm.published] == [(0.0, 0.0)]


@pytest.mark.parametrize("whose", ["own", "peer"])
def test_a_node_ends_rather_than_train_on_what_is_held_out(
    whose: str, node_of: Callable[..., Loop], monkeypatch: pytest.MonkeyPatch
) -> None:
    is_held_out = TaskSet.is_held_out

    def leaks(self: TaskSet, task: Task, question: str) -> bool:
        asked_by = sys._getframe(1).f_code.co_name
        return asked_by == "_check_held_out" and is_held_out(self, task, question)

    tasks = TaskSet([(Guess(), 1.0)], HALF)
    seed = asking(whose == "own")
    swarm = Swarm([sent(OF_PART[whose == "peer"], "22", "2")])
    samples = next(node_of(swarm, tasks, seed=seed).rounds(0))
    assert {sample.external for sample in samples} == ({False} if whose == "peer" else {False, True})
    monkeypatch.setattr(TaskSet, "is_held_out", leaks)
    swarm = Swarm([sent(OF_PART[whose == "peer"], "22", "2")])
    with pytest.raises(AssertionError, match="a held-out question in training"):
        next(node_of(swarm, tasks, seed=seed).rounds(0))
    assert len(swarm.published) == (whose == "peer")


def test_a_group_on_what_is_held_out_that_is_here_already_is_refused_and_is_nobodys_fault(
    node_of: Callable[..., Loop],
) -> None:
    held, asked = (sent(OF_PART[part], "22", "2") for part in (True, False))
    swarm = Swarm([held, asked])
    rounds = node_of(swarm, TaskSet([(Guess(), 1.0)], HALF)).rounds(0)
    assert any(sample.external for sample in next(rounds))  # the signer's other group is drawn in its place
    assert swarm.reasons == ["held_out"] and "held_out" in BLAMELESS
    assert not any(sample.external for sample in next(rounds)) and swarm.reasons == ["held_out"]


class Picky(Guess):
    """The same, where some texts cannot be scored."""

    def verify(self, item: Item, text: str) -> Verdict:
        return None if "?" in text else super().verify(item, text)


def test_own_completions_that_cannot_be_scored_are_neither_trained_on_nor_published(
    policy: Policy, node_of: Callable[..., Loop]
) -> None:
    swarm = Swarm()
    loop = node_of(swarm, alone(Picky()), ("??", "11", "1", "?"), sampling={"rule": "sapo"})
    samples = next(loop.rounds(0))
    assert [(policy.decode(sample.completion), sample.advantage, sample.index) for sample in samples] == [
        ("11", 0.5, 0),
        ("1", -0.5, 1),
    ]
    (group,) = swarm.published
    assert [(completion.text, completion.reward) for completion in group.completions] == [("11", 1.0), ("1", 0.0)]
    assert (loop.row["generated"], loop.row["unscorable"], loop.row["reward"]) == (4, 2, 0.5)


class Impatient(Guess):
    """The same, where texts without a one take too long."""

    def verify(self, item: Item, text: str) -> Verdict:
        return super().verify(item, text) if "1" in text else OutOfTime()


def test_own_completions_that_take_too_long_are_wrong(policy: Policy, node_of: Callable[..., Loop]) -> None:
    loop = node_of(Swarm(), alone(Impatient()), ("22", "11"), sampling={"rule": "sapo"})
    samples = next(loop.rounds(0))
    assert [(policy.decode(sample.completion), sample.advantage) for sample in samples] == [("22", -0.5), ("11", 0.5)]
    assert (loop.row["out_of_time"], loop.row["unscorable"]) == (1, 0)


class Silent(Guess):
    """The same, where no text can be scored until `speaks` is set."""

    speaks = False

    def verify(self, item: Item, text: str) -> Verdict:
        if not self.speaks:
            raise RuntimeError("digits returned nan")
        return super().verify(item, text)


@pytest.mark.parametrize(("rounds", "whole"), [(9, 2), (2, 1), (1, 0)])
def test_a_run_in_which_nothing_can_be_scored_ends_with_a_line_that_says_why(
    rounds: int, whole: int, node_of: Callable[..., Loop]
) -> None:
    going = node_of(Swarm(), alone(Silent()), rounds=rounds).rounds(0)
    assert [list(next(going)) for _ in range(whole)] == [[]] * whole
    with pytest.raises(UserError, match=r"two answers that can be scored \(task 'guess': digits returned nan\)"):
        next(going)


def test_a_node_that_has_scored_once_goes_on_while_nothing_can_be_scored(node_of: Callable[..., Loop]) -> None:
    task = Silent()
    going = node_of(Swarm(), alone(task), rounds=9).rounds(0)
    assert list(next(going)) == []
    task.speaks = True
    assert next(going)
    task.speaks = False
    assert [list(samples) for samples in going] == [[]] * 7


class InParts(Guess):
    """The same, paid by two functions, of which one cannot tell of some texts."""

    def verify(self, item: Item, text: str) -> Verdict:
        return Scored(
            super().verify(item, text) or 0.0, {"brevity": 0.5} if text == "1" else {"brevity": 1.0, "unsure": 2.0}
        )


def test_each_functions_mean_and_spread_are_in_the_metrics_under_its_name_and_groups_carry_the_reward_alone(
    node_of: Callable[..., Loop],
) -> None:
    swarm = Swarm()
    loop = node_of(swarm, alone(InParts()), ("11", "1"))
    next(loop.rounds(0))
    assert {key: value for key, value in loop.row.items() if key.startswith("rewards/")} == {
        "rewards/guess/mean": 0.5,
        "rewards/guess/std": 0.5,
        "rewards/brevity/mean": 0.75,
        "rewards/brevity/std": 0.25,
        "rewards/unsure/mean": 2.0,
        "rewards/unsure/std": 0.0,
    }
    assert decode(encode(swarm.published[0])).rewards == (1.0, 0.0)


def test_of_a_question_with_one_answer_that_can_be_scored_nothing_is_trained_on_or_published(
    node_of: Callable[..., Loop],
) -> None:
    swarm = Swarm()
    loop = node_of(swarm, alone(Picky()), ("??", "11"))
    assert list(next(loop.rounds(0))) == [] and swarm.published == []
    assert (loop.row["generated"], loop.row["unscorable"], loop.row["groups_informative"]) == (2, 2, 0)
    assert "reward" not in loop.row


def test_a_peers_answer_that_cannot_be_scored_costs_nobody_and_its_signers_other_groups_stay(
    policy: Policy, node_of: Callable[..., Loop]
) -> None:
    task = Picky()
    unscorable = replace(sent(1, "??", "1", task=task), completions=(one_turn("??", True, 1.0),) * 2)
    unscorable = replace(unscorable, completions=(unscorable.completions[0], one_turn("1", True, 0.0)))
    swarm = Swarm([unscorable], [sent(2, "22", "2", task=task)])
    loop = node_of(swarm, alone(task))
    rounds = loop.rounds(0)
    assert peers(policy, next(rounds)) == [] and swarm.reasons == ["unscorable"]
    assert loop.row["groups_unusable"] == 1 and "unscorable" in BLAMELESS
    assert peers(policy, next(rounds)) == ["22"] and swarm.reasons == ["unscorable"]


def test_a_liar_loses_its_other_groups_and_nobody_else_does(policy: Policy, node_of: Callable[..., Loop]) -> None:
    lie = sent(0, "22", "2", peer="liar")
    lie = replace(
        lie, completions=tuple(completion._replace(reward=1 - completion.reward) for completion in lie.completions)
    )
    waiting = [sent(seed, "22", "2", peer=peer) for seed, peer in [(1, "liar"), (2, "liar"), (3, "honest")]]
    swarm = Swarm([lie])
    loop = node_of(swarm, alone(Guess()), sampling={"external": 4})
    loop.buffer.add([share(group, 90 + at) for at, group in enumerate(waiting)], time.time(), 2)  # for the next round
    rounds = loop.rounds(0)
    assert peers(policy, next(rounds)) == [] and swarm.reasons == ["false_reward"]
    assert [signer.peer for signer in loop.buffer.of_signers({"liar", "honest"})] == ["honest"]
    assert peers(policy, next(rounds)) == ["22"] and loop.row["swarm/taught_by"] == {"honest": 1}
    assert swarm.reasons == ["false_reward"]  # once for the lie, and not for the groups that nobody verified


def test_of_a_signer_that_was_put_out_nothing_is_drawn_any_more_though_it_lies_here(
    policy: Policy, node_of: Callable[..., Loop]
) -> None:
    swarm = Swarm([sent(seed, "22", "2", peer="out") for seed in range(8)], [], [sent(9, "44", "4", peer="in")])
    loop = node_of(swarm, alone(Guess()), rounds=6)
    rounds = loop.rounds(0)
    assert peers(policy, next(rounds)) == ["22"]
    swarm.out.add("out")
    assert [peers(policy, samples) for samples in rounds] == [[], ["44"], [], [], []]
    assert len(loop.buffer.of_signers({"out"})) == 7 and swarm.reasons == []


def test_however_small_the_buffer_no_group_is_trained_on_twice(node_of: Callable[..., Loop]) -> None:
    """In each of two hundred rounds six of twelve groups come again, from other signers and under other ids."""
    rounds, distinct = 200, 12
    swarm = Swarm(
        *(
            [sent((6 * number + at) % distinct, "22", "2", peer=f"{number} {at}") for at in range(6)]
            for number in range(rounds)
        )
    )
    tables = {"sampling": {"external": 3}, "buffer": {"max_groups": 8}}
    loop = node_of(swarm, alone(Guess()), rounds=rounds, **tables)
    trained = Counter[tuple[int, ...]]()
    for samples in loop.rounds(0):
        trained.update(tuple(sample.prompt) for sample in samples if sample.external)
        assert len(loop.buffer) <= 8
    assert swarm.came == 6 * rounds
    assert set(trained.values()) == {1} and len(trained) == distinct


class Graded(Guess):
    """A task that pays a part for some answers."""

    def verify(self, item: Item, text: str) -> float:
        return {"b": 0.3, "c": 0.7, "d": 1.0}.get(text, 0.0)


class Deep(Guess):
    """A task whose functions pay far outside of 0 to 1."""

    range = (-10.0, 10.0)

    def verify(self, item: Item, text: str) -> Verdict:
        paid = {"11": -1.9, "1": 0.5, "2": 1.0}[text]
        return Scored(paid, {"near_20": -48.0 if paid < 0 else 20 * paid - 10})


OUTSIDE = (
    "task 'guess' pays -48 (near_20 -48), outside of its range -10 to 10: groups with such rewards train this node"
)


def test_rewards_of_any_size_train_a_node_alone_as_they_are(policy: Policy, node_of: Callable[..., Loop]) -> None:
    loop = node_of(NoExchange(), alone(Deep()), ("11", "1"), network={"enabled": False}, sampling={"external": 0})
    with capture_logs() as logs:
        samples = next(loop.rounds(0))
    assert [(policy.decode(sample.completion), sample.advantage) for sample in samples] == [
        ("11", pytest.approx(-1.2)),
        ("1", pytest.approx(1.2)),
    ]
    assert (loop.row["reward"], loop.row["rewards/near_20/mean"]) == (pytest.approx(-0.7), -24.0)
    assert (loop.row["rewards_outside"], logs) == (0, [])


def test_a_reward_outside_of_the_range_of_a_shared_task_is_told_once_and_counted_in_every_round_and_trains_its_maker(
    policy: Policy, node_of: Callable[..., Loop]
) -> None:
    loop = node_of(Swarm(), alone(Deep()), ("11", "1", "11"), sampling={"external": 0, "rule": "sapo"}, rounds=3)
    with capture_logs() as logs:
        found = [([sample.advantage for sample in samples], loop.row["rewards_outside"]) for samples in loop.rounds(0)]
    assert found == [([pytest.approx(-0.8), pytest.approx(1.6), pytest.approx(-0.8)], 2)] * 3
    assert len(logs) == 1 and logs[0]["event"].startswith(OUTSIDE) and logs[0]["log_level"] == "warning"


def test_what_was_told_when_a_task_was_loaded_is_not_told_again(node_of: Callable[..., Loop]) -> None:
    class Tried(Deep):
        outside = "task 'guess' pays -48"

    loop = node_of(Swarm(), alone(Tried()), ("11", "1"), sampling={"external": 0})
    with capture_logs() as logs:
        next(loop.rounds(0))
    assert (loop.row["rewards_outside"], logs) == (1, [])


def test_what_is_within_the_range_is_not_told(node_of: Callable[..., Loop]) -> None:
    loop = node_of(Swarm(), alone(Deep()), ("2", "1"), sampling={"external": 0})
    with capture_logs() as logs:
        next(loop.rounds(0))
    assert (loop.row["rewards_outside"], logs) == (0, [])


@pytest.mark.parametrize(
    ("best", "own", "advantage"),
    [
        ("c", ("b", "a", "a"), (0.7 - 0.1) / 0.9),
        ("b", ("b", "a", "a"), (0.3 - 0.1) / 0.9),
        ("b", ("c", "c", "a"), None),
        ("c", ("c", "c", "a"), (0.7 - 1.4 / 3) / (1 - 1.4 / 3)),
        ("d", ("c", "c", "a"), 1.0),
        ("d", ("d", "d", "a"), 1.0),
    ],
)
def test_a_peers_best_answer_is_taken_where_it_is_above_what_this_node_gets_itself_and_counts_by_how_far(
    best: str, own: tuple[str, ...], advantage: float | None, policy: Policy, node_of: Callable[..., Loop]
) -> None:
    task = Graded()
    swarm = Swarm([sent(1, "a", best, "a", task=task)])
    loop = node_of(swarm, alone(task), own, sampling={"external": 3})
    taken = [sample for sample in next(loop.rounds(0)) if sample.external]
    if advantage is None:
        assert taken == [] and swarm.reasons == [] and len(loop.buffer) == 1
        return
    (one,) = taken
    assert (policy.decode(one.completion), one.advantage, one.weight) == (best, pytest.approx(advantage), 1 / 3)


class Beside(Guess):
    """A task that scores in processes of its own."""

    def submit(self, batch: Sequence[Submission], is_own: bool) -> "list[Future[Verdict]]":
        return [already(self.verify(answer.item, answer.text)) for answer in batch]


def test_what_was_drawn_before_generation_and_makes_way_meanwhile_is_used_all_the_same(
    policy: Policy, node_of: Callable[..., Loop]
) -> None:
    old, lie = sent(1, "22", "2", peer="old", task=Beside()), sent(2, "22", "2", peer="liar", task=Beside())
    lie = replace(
        lie, completions=tuple(completion._replace(reward=1 - completion.reward) for completion in lie.completions)
    )
    flood = [sent(10 + at, "44", "4", peer=f"flood {at}") for at in range(4)]
    swarm = Swarm(flood, [replace(old, policy="again")])
    tables = {"sampling": {"external": 2}, "buffer": {"max_groups": 2}}
    loop = node_of(swarm, alone(Beside()), rounds=3, **tables)
    early = [share(old, 100), share(lie, 101)]
    loop.buffer.add(early, time.time(), 1)
    rounds = loop.rounds(0)
    assert peers(policy, next(rounds)) == ["22", "44"] and swarm.reasons == ["false_reward"]
    assert not any(item.id in loop.buffer for item in early) and len(loop.buffer) == 2
    assert [peers(policy, samples) for samples in rounds] == [["44"], []]


class Drags(Guess):
    """A task scored in processes of its own: a text that begins with 9 takes a minute there, and an own one if told."""

    def __init__(self, own_is_slow: bool = False) -> None:
        self.own_is_slow = own_is_slow
        self.asked: list[str] = []

    def submit(self, batch: Sequence[Submission], is_own: bool) -> "list[Future[Verdict]]":
        return [self._scored(group) for group in batch]

    def _scored(self, one: Submission) -> "Future[Verdict]":
        self.asked.append(one.text)
        is_slow = one.text.startswith("9") or (self.own_is_slow and one.text.startswith("1"))
        if one.quota is not None:
            one.quota.begin(0.0)
            one.quota.end(60.0 if is_slow else 0.01)
        return already(self.verify(one.item, one.text))


@pytest.mark.parametrize("own_is_slow", [False, True])
def test_a_signer_of_slow_texts_is_set_aside_after_two_rounds_unless_own_texts_were_slow_too(
    own_is_slow: bool, policy: Policy, node_of: Callable[..., Loop]
) -> None:
    task = Drags()
    swarm = Swarm(*([sent(at, text * 2, text, peer="one", task=task)] for at, text in enumerate("2222999", 1)))
    loop = node_of(swarm, alone(task), rounds=7, sampling={"external": 1})
    rounds = loop.rounds(0)
    for _ in range(4):
        next(rounds)
    task.own_is_slow = own_is_slow
    for _ in range(2):
        next(rounds)
    assert task.asked.count("99") == 2
    task.asked.clear()
    assert "slow_signer" not in swarm.reasons
    next(rounds)
    assert swarm.reasons.count("slow_signer") == (0 if own_is_slow else 1)
    assert ("99" in task.asked) == own_is_slow

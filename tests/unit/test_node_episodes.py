"""Episodes: played turn by turn within bounds, and peers' played again."""

import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from math import nan
from pathlib import Path

import psutil
import pytest

from examples import calculator
from node.config import TaskConfig, load_config, parse_config
from node.engines import Generated, SamplingParams, episodes
from node.engines.episodes import EpisodeQuestion, Episodes, Played, play
from node.errors import UserError
from node.loop import Loop
from node.policy.load import Policy
from node.rollouts.group import MAX_BEFORE_BYTES, Episode, Group, Tokens, encode
from node.rollouts.group_buffer import GroupBuffer, ReceivedGroup
from node.rollouts.rule import Sample
from node.rollouts.screening import GroupBounds, check
from node.swarm.sharing import GroupReader, NoExchange, published_form
from node.tasks import Item, Task, TaskKey, load_tasks
from node.tasks.builtin.guess import GUESSES, HIGH, LOW, Guess
from node.tasks.environments.episodes import (
    MAX_OBSERVATION_BYTES,
    MAX_TURNS,
    Done,
    Observation,
    play_again,
    step,
)
from node.tasks.questions import Split
from node.tasks.scoring.verdicts import Answer, Submission, score
from node.tasks.task_set import TaskSet
from node.telemetry.metrics_file import MetricsLog
from tests.policies import tiny_policy
from tests.swarms import ROOT, UNBOUNDED
from tests.waiting import wait_until

SAMPLING = SamplingParams(1.0, 1.0, 8)
ECHO = TaskKey("echo", 1, "c")
END = 0  # the token that ends a turn


@dataclass(frozen=True)
class Echo:
    """A game that says what it is told to say, by the turns that it is given: `!0.5` ends it, and all else goes on."""

    replayable: bool = True
    does: Callable[[str], object] = lambda text: Done(float(text[1:])) if text[0] == "!" else Observation(f"<{text}>")
    key: TaskKey = ECHO

    def make(self, seed: int) -> Item:
        return Item(f"game {seed}", "")

    def start(self, item: Item) -> "Echo":
        return self

    def step(self, text: str) -> object:
        return self.does(text)

    def verify(self, item: Item, text: str) -> float:
        raise AssertionError("its environment scores")


@dataclass
class Says:
    """An engine whose policy says texts in the order in which it is asked; `calls` are what it was asked."""

    texts: list[str]
    calls: list[tuple[list[list[int]], int, SamplingParams, int]] = field(default_factory=list)
    logprobs: bool = False

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: SamplingParams, seed: int
    ) -> list[list[Generated]]:
        self.calls.append((list(map(list, prompts)), n, sampling, seed))
        return [[self._said(self.texts.pop(0)) for _ in range(n)] for _ in prompts]

    def _said(self, text: str) -> Generated:
        """A text that ends in ~ is cut."""
        finished = not text.endswith("~")
        ids = [*tokens(text), END] if finished else tokens(text)
        return Generated(tuple(ids), text, finished, tuple(-1.0 for _ in ids) if self.logprobs else None)


def tokens(text: str) -> list[int]:
    return list(map(ord, text))


def asked(task: object, n: int, *seeds: int, longest: int = 1000, seed: int = 7) -> Episodes:
    questions = [EpisodeQuestion(task, task.make(at), tokens(f"q{at}")) for at in seeds]
    return Episodes(questions, n, SAMPLING, seed, longest, tokens)


def test_the_first_turns_are_one_call_as_ever_and_only_those_that_go_on_are_asked_again() -> None:
    engine = Says(["a", "!1", "!0.5", "b", "c", "!0.25", "!0"])
    first, second = play(engine, asked(Echo(), 2, 1, 2))
    assert engine.calls[0] == ([tokens("q1"), tokens("q2")], 2, SAMPLING, 7)
    going_on = [[*tokens("q1a"), END, *tokens("<a>")], [*tokens("q2b"), END, *tokens("<b>")]]
    assert engine.calls[1][:3] == (going_on, 1, SAMPLING) and engine.calls[1][3] != 7
    assert engine.calls[2][0] == [[*going_on[0], *tokens("c"), END, *tokens("<c>")]]
    assert [episode.texts for episode in first] == [("a", "<a>", "c", "<c>", "!0"), ("!1",)]
    assert [episode.texts for episode in second] == [("!0.5",), ("b", "<b>", "!0.25")]
    assert [[episode.reward for episode in group] for group in (first, second)] == [[0.0, 1.0], [0.5, 0.25]]


def test_a_task_without_an_environment_has_one_call_and_no_reward_yet() -> None:
    task = Plain()
    engine = Says(["1", "2"])
    [made] = play(engine, asked(task, 2, 3))
    assert engine.calls == [([tokens("q3")], 2, SAMPLING, 7)]
    assert [(episode.texts, episode.reward, episode.tokens) for episode in made] == [
        (("1",), None, Tokens((ord("1"), END))),
        (("2",), None, Tokens((ord("2"), END))),
    ]


class Plain:
    key = TaskKey("plain", 1, "c")

    def make(self, seed: int) -> Item:
        return Item(f"{seed}", "1")

    def verify(self, item: Item, text: str) -> float:
        return float(text == item.answer)


def test_the_tokens_say_which_are_the_policys() -> None:
    [[one]] = play(Says(["ab", "!1"], logprobs=True), asked(Echo(), 1, 1))
    assert one.tokens.ids == (*tokens("ab"), END, *tokens("<ab>"), *tokens("!1"), END)
    assert one.tokens.given == frozenset(range(3, 7))
    assert one.tokens.sampled == one.sampled == 6
    assert [logprob == -1.0 for logprob in one.tokens.logprobs] == [at not in range(3, 7) for at in range(10)]
    [[other]] = play(Says(["ab", "!1"]), asked(Echo(), 1, 1))
    assert other.tokens.logprobs is None
    for played in (one, other):
        assert Played.from_list(played.as_list()) == played


def ended(texts: list[str], task: object = Echo(), **bounds: int) -> Played:
    [[one]] = play(Says(texts), asked(task, 1, 1, **bounds))
    return one


def test_an_episode_that_is_stopped_earns_nothing() -> None:
    endless = ended(["a"] * 100)
    assert (len(endless.turns), endless.reward) == (MAX_TURNS, 0.0)
    cut = ended(["a", "b~"])
    assert (cut.texts, cut.finished, cut.reward) == (("a", "<a>", "b~"), False, 0.0)
    room = len("q1") + len("a") + 1 + len("<a>")
    assert ended(["a", "!1"], longest=room).reward == 1.0
    assert ended(["a", "!1"], longest=room - 1) == ended(["a"], longest=0)
    long = "x" * (MAX_BEFORE_BYTES // 4)
    assert len(ended([long] * 9, longest=10**9).turns) < 5


def test_a_cut_turn_may_still_end_the_game() -> None:
    assert ended(["!1~"], Echo(does=lambda text: Done(1.0))).reward == 1.0


def test_what_an_environment_says_is_cut_to_a_length_that_peers_cut_it_to_as_well() -> None:
    talks = Echo(does=lambda text: Done(1.0) if text == "!" else Observation("é" * MAX_OBSERVATION_BYTES))
    one = ended(["a", "!"], talks, longest=10**9)
    assert one.texts[1] == "é" * (MAX_OBSERVATION_BYTES // 2)
    assert play_again(talks.start, Item("", ""), one.texts) == 1.0


@pytest.mark.parametrize(
    "answer", [None, "text", Observation("\ud800"), Observation(3), Done(1e16), Done(nan), Done("1"), Done(None)]
)
def test_an_environment_that_answers_nonsense_or_raises_is_unscorable(answer: object) -> None:
    broken = Echo(does=lambda text: answer)
    with pytest.raises(ValueError, match="step returned"):
        step(broken, "a")
    assert ended(["a"], broken).reward is None
    assert score([Answer(broken, broken.make(1), "a")]) == [None]


def test_one_that_raises_takes_no_other_episode_with_it() -> None:
    [made] = play(Says(["x", "!1"]), asked(Echo(does=lambda text: Done(1 / (text != "x"))), 2, 1))
    assert [episode.reward for episode in made] == [None, 1.0]
    [made] = play(Says(["x", "!1"]), asked(Echo(does=lambda text: Done(1.0) if text != "x" else sys.exit(3)), 2, 1))
    assert [episode.reward for episode in made] == [None, 1.0], "nor the node"


@dataclass(frozen=True)
class Elsewhere(Echo):
    """Somebody else's: its answers come on threads."""

    def submit(self, batch: Sequence[Submission], is_own: bool) -> "list[Future[float]]":
        raise AssertionError("it is not asked to verify")


def test_a_slow_environment_holds_up_its_own_episode_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(episodes, "GRACE_S", 1e-3)
    goes = threading.Event()

    def does(text: str) -> object:
        if text == "slow":
            assert goes.wait(20)
        if text == "go":
            goes.set()
        return Done(1.0) if text in ("go", "!") else Observation("on")

    engine = Says(["slow", "fast", "go", "!"])
    [made] = play(engine, asked(Elsewhere(does=does), 2, 1))
    assert [episode.texts for episode in made] == [("slow", "on", "!"), ("fast", "on", "go")]


def test_an_environment_has_only_so_much_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(episodes, "SCORE_S", 0.05)
    never = threading.Event()
    waits = Elsewhere(does=lambda text: Done(float(text != "slow" or never.wait(20))))
    [made] = play(Says(["slow", "!1"]), asked(waits, 2, 1))
    never.set()
    assert [episode.reward for episode in made] == [None, 1.0]


def test_a_peers_episode_is_played_again_and_another_observation_is_nobodys_fault() -> None:
    game = Echo()
    verdicts = {
        ("!0.5",): 0.5,
        ("a", "<a>", "!1"): 1.0,
        ("a", "<a>", "b"): 0.0,  # it does not end
        ("a", "<b>", "!1"): None,
        ("!1", "<a>", "!1"): None,  # it ends before
    }
    for texts, verdict in verdicts.items():
        assert play_again(game.start, game.make(1), texts) == verdict
        *before, text = texts
        assert score([Answer(game, game.make(1), text, tuple(before))]) == [verdict]


def group(task: object, *made: Episode, seed: int = 1) -> bytes:
    return encode(Group(task.key, seed, task.make(seed).question, made, "p", 0))


def training_seed(tasks: TaskSet) -> int:
    [task] = tasks.tasks
    return next(seed for seed in range(99) if not tasks.is_held_out(task, task.make(seed).question))


def test_what_a_peer_forges_is_found_out_by_play() -> None:
    task = Echo()
    tasks = TaskSet([(task, 1.0)])
    seed = training_seed(tasks)
    true = Episode(("a", "<a>", "!1"), True, 1.0), Episode(("!0",), True, 0.0)
    assert check(group(task, *true, seed=seed), tasks, 8).reason == ""
    forged = {
        "false_reward": Episode(("a", "<a>", "!0"), True, 1.0),
        "unscorable": Episode(("a", "<you have won>", "!1"), True, 1.0),
    }
    for reason, lie in forged.items():
        assert check(group(task, true[1], lie, seed=seed), tasks, 8).reason == reason


def test_groups_that_nobody_can_check_are_not_taken() -> None:
    secret, plain = Echo(replayable=False), Plain()
    made = Episode(("!1",), True, 1.0), Episode(("!0",), True, 0.0)
    assert check(group(secret, *made), TaskSet([(secret, 1.0)]), 8).reason == "unknown_task"
    talks = Episode(("1", "?", "1"), True, 1.0), Episode(("0",), True, 0.0)
    assert check(group(plain, *talks), TaskSet([(plain, 1.0)]), 8).reason == "turns"


def test_the_guessing_game_is_won_by_heeding_what_it_says_and_not_by_a_plan() -> None:
    task = Guess()
    items = [task.make(seed) for seed in range(700)]
    found = {
        "heeding": [binary_search(task, item) for item in items],
        "plan": [any(str(guess) == item.answer for guess in (11, 13, 15)) for item in items],
    }
    assert all(found["heeding"])
    assert 0.3 < sum(found["plan"]) / len(items) < 0.55
    assert len({item.question for item in items}) > 650


def binary_search(task: Guess, item: Item) -> bool:
    game, low, high = task.start(item), LOW, HIGH
    for _ in range(GUESSES):
        guess = (low + high) // 2
        answer = game.step(str(guess))
        if isinstance(answer, Done):
            return answer.reward == 1.0
        low, high = (guess + 1, high) if answer.text == "higher=" else (low, guess - 1)
    raise AssertionError("it does not end")


NO_NUMBERS = ["", "1 2", "13\n14", "1e1", "13.0", "+13", "١٣", "²", "9" * 7, "9" * 10**6, "13;14", "13\x00", "{secret}"]


@pytest.mark.parametrize("text", NO_NUMBERS)
def test_a_turn_that_is_no_number_wins_nothing_in_the_guessing_game(text: str) -> None:
    task = Guess()
    for seed in range(50):
        item = task.make(seed)
        game = task.start(item)
        assert [game.step(text) for _ in range(GUESSES)] == [Observation("?=")] * (GUESSES - 1) + [Done(0.0)]


def test_a_calculator_gives_the_product_and_the_answer_wins() -> None:
    item = calculator.make(5)
    a, b = (int(word.strip("?")) for word in item.question.split() if word.strip("?").isdigit())
    exercise = calculator.start(item)
    assert exercise.step(f"I ask: calc({a} * {b}) now") == Observation(item.answer)
    assert exercise.step(f"It is {a * b:,}.") == Done(1.0)
    assert calculator.start(item).step("It is 1.") == Done(0.0)
    asks = calculator.start(item)
    told = [asks.step("calc(1+2)") for _ in range(calculator.TURNS)]
    assert told == [Observation("3"), Observation("3"), Done(0.0)], "whoever only asks has no answer"


ESCAPES = [
    "__import__('os').system('id')",
    "1**9999",
    "99999*1",
    "1+1+1",
    "-1*2",
    "1e3*2",
    "٣*2",
    "²*2",
    "(1)*2",
    "1,2",
    "{secret}*1",
    "1*" + "9" * 10**6,
    "calc(1*2",
    "\x001*2",
    "",
]


@pytest.mark.parametrize("text", ESCAPES)
def test_a_turn_that_tries_to_escape_the_calculators_grammar_is_told_how_to_write(text: str) -> None:
    item = calculator.make(5)
    assert calculator.start(item).step(f"calc({text})") == Observation("Write calc(A*B), with two numbers.")


def test_the_calculator_is_shown_before_the_question() -> None:
    [task] = load_tasks(load_config(ROOT / "examples" / "calculator.toml").tasks).tasks
    assert task.replayable
    for seed in range(20):
        assert task.make(seed).examples == (("What is 21 * 43?", "calc(21*43)"), ("903", "903"))


def test_two_games_of_one_question_are_the_same_game() -> None:
    task = Guess()
    secrets: dict[str, set[str]] = {}
    for seed in range(3000):
        item = task.make(seed)
        secrets.setdefault(item.question, set()).add(item.answer)
    assert len(secrets) < 3000 and all(len(found) == 1 for found in secrets.values())


@dataclass
class Speaks:
    """An engine of a policy that says these texts in turn, a call at a time, whatever it is asked."""

    policy: Policy
    calls: list[list[str]]

    def generate(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: SamplingParams, seed: int
    ) -> list[list[Generated]]:
        texts = iter(self.calls.pop(0))
        return [[self._said(next(texts)) for _ in range(n)] for _ in prompts]

    def _said(self, text: str) -> Generated:
        return Generated(tuple(self.policy.encode_completion(text, True)), text, True)

    def load(self, version: int) -> None:
        pass

    def rest(self) -> None:
        pass


class Peer(NoExchange):
    """Hands over these groups, and keeps what is published and what is said of those that were of no use."""

    def __init__(self, *groups: Group) -> None:
        self.groups = groups
        self.reasons: list[str] = []
        self.published: list[Group] = []

    def publish(self, groups: Sequence[Group]) -> int:
        self.published += groups
        return len(groups)

    def receive(self, known: Callable[[bytes], bool]) -> list[ReceivedGroup]:
        now = time.time()
        return [
            ReceivedGroup(bytes([at]) * 32, f"peer {at}", now, group, encode(group))
            for at, group in enumerate(self.groups)
        ]

    def refuse(self, group_id: bytes, reason: str) -> None:
        self.reasons.append(reason)


def one_round(folder: Path, task: Echo, peer: Peer, **engine: int) -> tuple[Loop, list[Sample]]:
    """Play a round of one question in two episodes: one of two turns that earns 1, one of one turn that earns 0."""
    policy = tiny_policy(folder / "policy")
    config = parse_config(
        {
            "rounds": 1,
            "engine": {"max_completion_length": 16, **engine},
            "sampling": {"local": 1, "external": 4, "completions": 2, "rule": "sapo", **UNBOUNDED},
        }
    )
    asked = Speaks(policy, [["go on", "!0"], ["!1"]])
    tasks = TaskSet([(task, 1.0)], Split(0.0))
    with GroupBuffer(folder / "pool.sqlite", config.buffer) as buffer:
        loop = Loop(config, 0, policy, asked, tasks, buffer, peer, MetricsLog(folder / "metrics.jsonl"))
        return loop, list(next(loop.rounds(0)))


def said_by(*made: Episode, seed: int = 5) -> Group:
    return Group(ECHO, seed, Echo().make(seed).question, made, "p", 0)


def test_a_round_trains_on_the_policys_turns_and_on_peers_that_it_has_played_again(tmp_path: Path) -> None:
    true = Episode(("a", "<a>", "bc", "<bc>", "!1"), True, 1.0)
    lost, lie, other = Episode(("!0",), True, 0.0), Episode(("a", "<a>", "!0"), True, 1.0), ("a", "[a]", "!1")
    peer = Peer(said_by(true, lost), said_by(lie, lost, seed=6), said_by(Episode(other, True, 1.0), lost, seed=7))
    loop, samples = one_round(tmp_path, Echo(), peer)
    (own, _), (theirs, _) = (
        [sample for sample in samples if sample.external == external] for external in (False, True)
    )
    text = loop.policy.tokenizer.decode
    assert text(own.completion) == "go on<eos><go on>!1<eos>"
    assert text(theirs.completion) == "a<eos><a>bc<eos><bc>!1<eos>"
    assert text([own.completion[at] for at in sorted(own.given)]) == "<go on>"
    assert text([theirs.completion[at] for at in sorted(theirs.given)]) == "<a><bc>"
    assert sorted(peer.reasons) == ["false_reward", "unscorable"]
    assert [completion.texts for completion in peer.published[0].completions] == [("go on", "<go on>", "!1"), ("!0",)]
    assert loop.row["tokens_generated"] == len("go on") + len("!1") + len("!0") + 3
    assert loop.row["tokens_trained"] == loop.row["tokens_generated"] + len("abc!1!0") + 4
    assert (loop.row["completions/turns"], loop.row["completions/retokenized"]) == (1.5, 0.0)


def test_a_peers_episode_with_longer_turns_or_more_before_them_than_an_own_one_may_have_is_left_out(
    tmp_path: Path,
) -> None:
    lost = Episode(("!0",), True, 0.0)
    fits, longer = (Episode(("a" * long, f"<{'a' * long}>", "!1"), True, 1.0) for long in (9, 16))
    before = 1 + len("game 5") + 9 + 1 + len(fits.texts[1])
    for number, (episode, most) in enumerate([(fits, before), (fits, before - 1), (longer, 100)]):
        (tmp_path / f"{number}").mkdir()
        loop, _ = one_round(tmp_path / f"{number}", Echo(), Peer(said_by(episode, lost)), max_prompt_length=most)
        assert loop.row["swarm/too_long"] == (number > 0)


def test_a_task_whose_episodes_nobody_can_play_again_trains_its_own_node_and_is_not_shared(tmp_path: Path) -> None:
    secret = Echo(replayable=False)
    peer = Peer()
    loop, samples = one_round(tmp_path, secret, peer)
    assert len(samples) == 2 and not any(published_form(group, loop.tasks) for group in peer.published)
    assert GroupReader(loop.tasks, GroupBounds(8, 1000)).topics == frozenset()
    assert GroupReader(TaskSet([(Echo(), 1.0)]), GroupBounds(8, 1000)).topics


GAME = """
from node.tasks import Item
from node.tasks.environments.episodes import Done, Observation

def make(seed):
    return Item(f"game {seed % 1000}", "")

class Game:
    def step(self, text):
        return Done(float(text[1:])) if text[:1] == "!" else Observation(f"<{text}>")

def start(item):
    return Game()
"""


APART = """
import os, random, signal, socket, subprocess, sys, time
from pathlib import Path

from node.tasks import Item
from node.tasks.environments.episodes import Done, Observation

replayable = True


def make(seed):
    return Item(f"game {seed % 1000}", "")


class Game:
    def __init__(self):
        self.heard = []

    def step(self, text):
        self.heard.append(text)
        if text == "end":
            return Done(1.0)
        if text == "hang":
            time.sleep(600)
        if text == "hang on":
            signal.alarm(0)  # as whoever has a timeout of their own does at its end
            time.sleep(600)
        if text == "eat":
            self.eaten = bytearray(1 << 34)
        if text == "die":
            os._exit(3)
        if text == "exit":
            sys.exit(3)
        if text == "raise":
            raise KeyError("no")
        if text == "dial":
            socket.socket()
        if text == "write":
            Path(__file__).with_name("written").write_text("")
        if text == "run":
            return Observation(str(subprocess.Popen(["sleep", "600"], start_new_session=True).pid))
        if text == "draw":
            return Observation(str(random.random()))
        return Observation(f"{os.getpid()} {' '.join(self.heard)}")


def start(item):
    return Game()
"""


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """A task of a file, whose episodes are played in processes of their own."""
    path = tmp_path_factory.mktemp("apart") / "apart.py"
    path.write_text(APART)
    [task] = load_tasks([TaskConfig(name="file/apart", options={"path": str(path)})]).tasks
    return task


@pytest.mark.slow
def test_each_episode_of_a_file_has_a_process_of_its_own_which_ends_with_it(apart: Task) -> None:
    one, other = apart.start(apart.make(1)), apart.start(apart.make(1))
    told = [step(game, text).text.split() for game, text in [(one, "a"), (other, "b"), (one, "c")]]
    assert [heard for _, *heard in told] == [["a"], ["b"], ["a", "c"]]
    pids = [int(pid) for pid, *_ in told]
    assert pids[0] == pids[2] and len({*pids, os.getpid()}) == 3
    assert step(one, "draw") != step(other, "draw")
    assert step(one, "end") == Done(1.0)
    del other
    wait_until(lambda: not any(map(psutil.pid_exists, pids)), 20, "the end of the processes")


@pytest.mark.slow
def test_what_goes_wrong_in_a_game_costs_its_own_episode(apart: Task) -> None:
    wrong = {
        "eat": "out of memory",
        "die": "its environment took too long, or too much memory",
        "exit": "3",
        "raise": "'no'",
        "dial": "Permission",
        "write": "Permission",
    }
    games = [apart.start(apart.make(1)) for _ in wrong]
    beside = apart.start(apart.make(1))
    before = step(beside, "a")
    for game, (text, why) in zip(games, wrong.items(), strict=True):
        with pytest.raises(UserError, match=why):
            step(game, text)
        with pytest.raises(UserError, match="the process of an episode ended"):
            step(game, "end")
    assert step(beside, "a") == Observation(f"{before.text} a") and step(beside, "end") == Done(1.0)


@pytest.mark.slow
def test_a_game_that_hangs_is_ended_and_holds_up_no_other(apart: Task) -> None:
    hurried = replace(apart, begin=replace(apart.begin, limit=0.2))
    with pytest.raises(UserError, match="took too long"):
        step(hurried.start(apart.make(1)), "hang")
    game = hurried.start(apart.make(1))
    pid = int(step(game, "a").text.split()[0])
    with pytest.raises(UserError, match="took too long"):
        step(game, "hang on")
    wait_until(lambda: not psutil.pid_exists(pid), 20, "the end of the process")
    [made] = play(Says(["hang", "end"]), asked(hurried, 2, 1))
    assert made[0].reward is None
    [made] = play(Says(["die", "a", "end"]), asked(apart, 2, 1))
    assert [episode.reward for episode in made] == [None, 1.0]


@pytest.mark.slow
def test_a_file_may_say_that_its_episodes_need_the_network_or_write_files(tmp_path: Path) -> None:
    (tmp_path / "free.py").write_text(f"{APART}\njudge = True\n")
    [task] = load_tasks([TaskConfig(name="file/free", options={"path": str(tmp_path / "free.py")})]).tasks
    assert isinstance(step(task.start(task.make(1)), "write"), Observation)
    assert (tmp_path / "written").exists()
    wrote = Answer(task, task.make(1), "end", ("dial", "another process says so"))
    assert score([wrote]) == [None]


@pytest.mark.slow
def test_a_peers_episode_is_played_again_without_network_or_files_and_may_eat_only_its_own_memory(
    apart: Task,
) -> None:
    asked = [Answer(apart, apart.make(1), text) for text in ("write", "end", "eat", "die", "end")]
    assert score(asked) == [None, 1.0, None, None, 1.0]


@pytest.mark.slow
def test_where_no_more_files_may_be_open_no_episode_begins_and_those_that_run_go_on(apart: Task) -> None:
    game = apart.start(apart.make(1))
    before = step(game, "a")
    with Path(os.devnull).open() as next_one:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (next_one.fileno() + 1, limits[1]))
        try:
            with pytest.raises(UserError, match="too many files open"):
                apart.start(apart.make(1))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert step(game, "b") == Observation(f"{before.text} b")
    assert step(apart.start(apart.make(1)), "end") == Done(1.0)


@pytest.mark.slow
def test_what_an_episode_has_left_behind_ends_when_the_next_one_begins(apart: Task) -> None:
    over, other = apart.start(apart.make(1)), apart.start(apart.make(1))
    left, kept = (int(step(game, "run").text) for game in (over, other))
    pid = int(step(over, "a").text.split()[0])
    assert step(over, "end") == Done(1.0)
    wait_until(lambda: not psutil.pid_exists(pid), 20, "the end of the episode's process")
    assert psutil.pid_exists(left)
    assert step(apart.start(apart.make(1)), "end") == Done(1.0)
    assert not psutil.pid_exists(left) and psutil.pid_exists(kept)
    assert step(other, "end") == Done(1.0)


HANGS = """
import os, socket, time
from node.processes.worker_process import Requests, receive
from node.tasks.scoring import fork_server

fork_server.BEGIN_S = 0.1
os.register_at_fork(after_in_child=lambda: time.sleep(600))  # as a lock that another thread held
channel, node = socket.socketpair()
fork_server.fork_episode(Requests(channel), lambda: None, confined=False)
print(receive(node)["error"])
try:
    os.wait()
except ChildProcessError:
    print("no child is left")
"""


@pytest.mark.slow
def test_a_process_that_hangs_as_it_is_forked_is_ended_and_told() -> None:
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=60, check=True)
    hung, left = done.stdout.splitlines()
    assert hung.startswith("the process of an episode hung as it began") and left == "no child is left"


@pytest.mark.slow
def test_a_fork_server_that_died_is_replaced(apart: Task) -> None:
    game = apart.start(apart.make(1))
    server = psutil.Process(int(step(game, "a").text.split()[0])).parent()
    server.kill()
    with pytest.raises(UserError, match="killed by SIGKILL"):
        apart.start(apart.make(1))
    assert step(apart.start(apart.make(1)), "end") == Done(1.0)

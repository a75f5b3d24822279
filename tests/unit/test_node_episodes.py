"""Episodes: played turn by turn within bounds, and peers' played again."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from math import nan

import pytest

from node.engines import Generated, SamplingParams, episodes
from node.engines.episodes import Asked, Episodes, Played, play
from node.rollouts.group import MAX_BEFORE_BYTES, Episode, Group, Tokens, encode
from node.rollouts.screening import check
from node.tasks import Item, TaskKey
from node.tasks.environments import (
    MAX_OBSERVATION_BYTES,
    MAX_TURNS,
    Done,
    Observation,
    play_again,
    step,
)
from node.tasks.guess import GUESSES, HIGH, LOW, Guess
from node.tasks.task_set import TaskSet
from node.tasks.verdicts import Answer, score

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
    questions = [Asked(task, task.make(at), tokens(f"q{at}")) for at in seeds]
    return Episodes(questions, n, SAMPLING, seed, longest, tokens)


def test_the_first_turns_are_one_call_as_ever_and_only_those_that_go_on_are_asked_again() -> None:
    engine = Says(["a", "!1", "!0.5", "b", "c", "!0.25", "!0"])
    first, second = play(engine, asked(Echo(), 2, 1, 2))
    assert engine.calls[0] == ([tokens("q1"), tokens("q2")], 2, SAMPLING, 7)
    going_on = [[*tokens("q1a"), END, *tokens("<a>")], [*tokens("q2b"), END, *tokens("<b>")]]
    assert engine.calls[1][:3] == (going_on, 1, SAMPLING) and engine.calls[1][3] != 7
    assert engine.calls[2][0] == [[*going_on[0], *tokens("c"), END, *tokens("<c>")]]
    assert [one.texts for one in first] == [("a", "<a>", "c", "<c>", "!0"), ("!1",)]
    assert [one.texts for one in second] == [("!0.5",), ("b", "<b>", "!0.25")]
    assert [[one.reward for one in group] for group in (first, second)] == [[0.0, 1.0], [0.5, 0.25]]


def test_a_task_without_an_environment_has_one_call_and_no_reward_yet() -> None:
    task = Plain()
    engine = Says(["1", "2"])
    [made] = play(engine, asked(task, 2, 3))
    assert engine.calls == [([tokens("q3")], 2, SAMPLING, 7)]
    assert [(one.texts, one.reward, one.tokens) for one in made] == [
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
    assert one.tokens.drawn == one.drawn == 6
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
    "answer", [None, "text", Observation("\ud800"), Observation(3), Done(1.5), Done(nan), Done("1"), Done(None)]
)
def test_an_environment_that_answers_nonsense_or_raises_is_unscorable(answer: object) -> None:
    broken = Echo(does=lambda text: answer)
    with pytest.raises(ValueError, match="step returned"):
        step(broken, "a")
    assert ended(["a"], broken).reward is None
    assert score([Answer(broken, broken.make(1), "a")]) == [None]


def test_one_that_raises_takes_no_other_episode_with_it() -> None:
    [made] = play(Says(["x", "!1"]), asked(Echo(does=lambda text: Done(1 / (text != "x"))), 2, 1))
    assert [one.reward for one in made] == [None, 1.0]


@dataclass(frozen=True)
class Elsewhere(Echo):
    """Somebody else's: its answers come on threads."""

    def submit(self, item: Item, text: str, is_own: bool) -> "Future[float]":
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
    assert [one.texts for one in made] == [("slow", "on", "!"), ("fast", "on", "go")]


def test_an_environment_has_only_so_much_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(episodes, "SCORE_S", 0.05)
    never = threading.Event()
    waits = Elsewhere(does=lambda text: Done(float(text != "slow" or never.wait(20))))
    [made] = play(Says(["slow", "!1"]), asked(waits, 2, 1))
    never.set()
    assert [one.reward for one in made] == [None, 1.0]


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


def test_two_games_of_one_question_are_the_same_game() -> None:
    task = Guess()
    secrets: dict[str, set[str]] = {}
    for seed in range(3000):
        item = task.make(seed)
        secrets.setdefault(item.question, set()).add(item.answer)
    assert len(secrets) < 3000 and all(len(found) == 1 for found in secrets.values())

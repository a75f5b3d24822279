"""Episodes, played turn by turn on any engine: from questions to what the policy and its environments said.

The first turns of all episodes are one call of `generate`, and so are the next turns of all that go on. A task without
an environment has one turn, whose text is scored elsewhere (`node.tasks.scoring.verdicts`). Tokens stay as they were
sampled: the prompt of a turn is the question's, then all that was said so far.

Bounds: `engine.max_prompt_length` tokens for the prompt of a turn, `engine.max_completion_length` for a turn,
`MAX_TURNS` turns, `MAX_OBSERVATION_BYTES` for what an environment says at once, and `SCORE_S` seconds for all that it
does in an episode. An episode that is stopped by one of the first three, or by a turn that was cut, earns 0. If its
environment takes too long or raises, it is unscorable.

Our own environments answer at once, so that an episode depends on the seed alone. Other people's answer on threads:
those that take longer than `GRACE_S` play on in a later call, and hold up no other episode.
"""

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future
from concurrent.futures import wait as wait_for
from dataclasses import astuple, dataclass
from itertools import chain, zip_longest
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from node.engines import Generated, RolloutEngine, SamplingParams
from node.errors import one_line
from node.processes.threads import on_daemon, settle
from node.rollouts.group import MAX_BEFORE_BYTES, Tokens
from node.tasks import Item, Task, derive_seed
from node.tasks.environments.episodes import MAX_TURNS, Done, Environment, Observation, start_of, step
from node.tasks.scoring.verdicts import SCORE_S, Verdict, submit_of, warn_unscorable

GRACE_S = 0.1  # what environments on threads may take before the others play on without them: most take far less

T = TypeVar("T")


class Observed(NamedTuple):
    """An environment's text, and its tokens as they stand between two turns."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Played:
    """An episode that was played: turns of the policy, and what was observed between them.

    `reward` is the environment's; None where a text is to be scored, or nothing can be said.
    """

    turns: tuple[Generated, ...]
    observed: tuple[Observed, ...] = ()
    reward: Verdict = None

    @property
    def texts(self) -> tuple[str, ...]:
        """All texts in turn, the policy's first and last."""
        return tuple(in_turn([turn.text for turn in self.turns], [seen.text for seen in self.observed]))

    @property
    def text(self) -> str:
        """The policy's last text."""
        return self.turns[-1].text

    @property
    def finished(self) -> bool:
        """Whether the last turn ended by itself."""
        return self.turns[-1].finished

    @property
    def tokens(self) -> Tokens:
        """All tokens after the question's."""
        observed = [seen.token_ids for seen in self.observed]
        logprobs = [turn.logprobs for turn in self.turns if turn.logprobs is not None]
        known = None
        if len(logprobs) == len(self.turns):
            known = tuple(chain(*in_turn(logprobs, [(math.nan,) * len(ids) for ids in observed])))
        return Tokens.of(in_turn([turn.token_ids for turn in self.turns], observed), known)

    @property
    def sampled(self) -> int:
        """How many tokens the policy sampled."""
        return sum(len(turn.token_ids) for turn in self.turns)

    @property
    def observed_tokens(self) -> int:
        """How many tokens of observations the policy read."""
        return sum(len(seen.token_ids) for seen in self.observed)

    def as_list(self) -> list[Any]:
        """Return it as the list that `from_list` takes, for a file."""
        return [[turn.as_list() for turn in self.turns], list(map(list, self.observed)), self.reward]

    @classmethod
    def from_list(cls, values: Sequence[Any]) -> "Played":
        """Return the episode that `as_list` made a list of."""
        turns, observed, reward = values
        seen = tuple(Observed(text, tuple(ids)) for text, ids in observed)
        return cls(tuple(map(Generated.from_list, turns)), seen, reward)


def in_turn(said: Sequence[T], observed: Sequence[T]) -> list[T]:
    """Return what the policy said with what was observed between it."""
    return [turn for pair in zip_longest(said, observed) for turn in pair][: len(said) + len(observed)]


Groups = list[list[Played]]
EncodeObservation = Callable[[str], Sequence[int]]
"""Returns the tokens of what an environment said, up to where the policy's next turn begins."""


class EpisodeQuestion(NamedTuple):
    """The item of an episode, and the tokens that ask it."""

    task: Task
    item: Item
    prompt: Sequence[int]


@dataclass(frozen=True, slots=True)
class Episodes:
    """Episodes to be played: `n` on each question, drawn by `sampling` and `seed`.

    `longest` bounds the tokens of a turn's prompt; `encode` is the policy's.
    """

    asked: Sequence[EpisodeQuestion]
    n: int
    sampling: SamplingParams
    seed: int
    longest: int
    encode: EncodeObservation

    def request(self) -> list[Any]:
        """Return what is asked for as JSON gives it back."""
        keys = [list(episode.task.key) for episode in self.asked]
        return [keys, [list(episode.prompt) for episode in self.asked], self.n, list(astuple(self.sampling)), self.seed]


@runtime_checkable
class Player(Protocol):
    """An engine that has a way of its own to play episodes."""

    def play(self, episodes: Episodes) -> Groups:
        """Return what `play` does."""
        ...


def play(engine: RolloutEngine, episodes: Episodes) -> Groups:
    """Return the episodes of each question, in the questions' order."""
    if isinstance(engine, Player):
        return engine.play(episodes)
    n, sampling, seed = episodes.n, episodes.sampling, episodes.seed
    made = engine.generate([episode.prompt for episode in episodes.asked], n, sampling, seed)
    groups = [[_OngoingEpisode(one, turn) for turn in turns] for one, turns in zip(episodes.asked, made, strict=True)]
    in_environments = [episode for group in groups for episode in group if episode.start is not None]
    for episode in in_environments:
        episode.ask()
    call = 0
    while waiting := [episode for episode in in_environments if episode.answer is not None]:
        going_on = [episode for episode in _answered(waiting) if episode.goes_on(episodes)]
        if not going_on:
            continue
        call += 1
        prompts = [episode.so_far for episode in going_on]
        turns = engine.generate(prompts, 1, sampling, derive_seed(seed, "turn", call))
        for episode, (turn,) in zip(going_on, turns, strict=True):
            episode.take(turn)
            episode.ask()
    return [[episode.played() for episode in group] for group in groups]


def _answered(waiting: Sequence["_OngoingEpisode"]) -> list["_OngoingEpisode"]:
    """Wait until an environment has answered or its time is up; return the episodes that can go on or end."""
    answers = [episode.answer for episode in waiting if episode.answer is not None]
    if not wait_for(answers, GRACE_S).done:
        wait_for(answers, max(0.0, min(episode.deadline for episode in waiting) - time.monotonic()), FIRST_COMPLETED)
    now = time.monotonic()
    return [episode for episode in waiting if episode.answer is None or episode.answer.done() or now > episode.deadline]


class _OngoingEpisode:
    """An episode in progress; `answer` is there while it is the environment's turn."""

    def __init__(self, asked: EpisodeQuestion, turn: Generated) -> None:
        self.start = start_of(asked.task)
        self.so_far = [*asked.prompt, *turn.token_ids]
        self.answer: Future[Observation | Done] | None = None
        self.deadline = 0.0
        self._asked = asked
        self._turns = [turn]
        self._observed: list[Observed] = []
        self._reward: Verdict = None
        self._bytes = 0  # of all texts
        self._began = 0.0
        self._left: float = getattr(self.start, "seconds", SCORE_S)  # for the environment
        self._environment: Environment | None = None

    def ask(self) -> None:
        """Give the policy's last turn to the environment."""
        self._began = time.monotonic()
        self.deadline = self._began + self._left
        if submit_of(self._asked.task) is None:
            self.answer = Future()
            settle(self.answer, self._step)
        else:
            self.answer = on_daemon(self._step, "environment")

    def _step(self) -> Observation | Done:
        if self._environment is None:
            assert self.start is not None
            self._environment = self.start(self._asked.item)
        return step(self._environment, self._turns[-1].text)

    def goes_on(self, episodes: Episodes) -> bool:
        """Take the environment's answer, if there is one; tell whether the policy has another turn."""
        answer, self.answer = self.answer, None
        self._left -= time.monotonic() - self._began
        if answer is None or not answer.done():
            return self._failed("its environment took too long")
        try:
            said = answer.result()
        except (Exception, SystemExit) as error:  # noqa: BLE001  # it may raise anything, and exit
            return self._failed(one_line(error) or type(error).__name__)
        if isinstance(said, Done):
            self._reward = said.reward
            return False
        last, tokens = self._turns[-1], tuple(episodes.encode(said.text))
        self._bytes += len(last.text.encode()) + len(said.text.encode())
        has_room = self._bytes <= MAX_BEFORE_BYTES and len(self.so_far) + len(tokens) <= episodes.longest
        if not last.finished or not has_room or len(self._turns) == MAX_TURNS:
            self._reward = 0.0
            return False
        self._observed.append(Observed(said.text, tokens))
        self.so_far += tokens
        return True

    def _failed(self, reason: str) -> bool:
        warn_unscorable(self._asked.task.key.name, reason)
        return False

    def take(self, turn: Generated) -> None:
        """Add a turn of the policy."""
        self._turns.append(turn)
        self.so_far += turn.token_ids

    def played(self) -> Played:
        """Return the episode."""
        return Played(tuple(self._turns), tuple(self._observed), self._reward)

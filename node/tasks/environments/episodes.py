"""Environments: tasks on which the policy speaks in several turns, and peers' episodes played again.

A task may have, beside what every task has,

    start(item) -> Environment     a fresh instance for one episode
    replayable                     true if a peer may play an episode again; without it, episodes are not shared

The policy is asked the item's question. Each text that it says goes to `step`, which returns what it is told next
(`Observation`), or ends the episode with a reward (`Done`). An episode without such an end earns 0: a turn was cut, or
the next one had no room, or there were `MAX_TURNS`.

**A peer's episode is played again** (`play_again`). The policy's texts go to an instance of the receiver's own:

    another observation here, or an end at another turn     unscorable: another version of something, nobody's fault
    the same observations                                   the reward is the one found here

An environment may call itself replayable if it holds to this list:
- `start` and `step` depend on the item and on the texts alone: not on time, chance, files, the network, or the version
  of a package that the task's configuration hash does not cover.
- Nothing that a policy writes becomes code, a file's name, a pattern or a request. It is read by a grammar of the
  environment's own, of bounded length.
- A step takes little time and memory, whatever the text.
- The question's text names the game: two games with the same question are the same game.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from node.tasks import Item, Task, is_reward, is_text

MAX_TURNS = 32  # of the policy in an episode
MAX_TEXTS = 2 * MAX_TURNS - 1
MAX_OBSERVATION_BYTES = 8 << 10  # of UTF-8; what is longer is cut


class Observation(NamedTuple):
    """A text for the policy before its next turn."""

    text: str


class Done(NamedTuple):
    """The end of an episode, and its reward."""

    reward: float


class Environment(Protocol):
    """One episode in progress."""

    def step(self, text: str) -> Observation | Done:
        """Take a turn of the policy. Anybody may have written `text`: it is never executed."""
        ...


StartEpisode = Callable[[Item], Environment]


def start_of(task: Task) -> StartEpisode | None:
    """Return what begins an episode of `task`; None if it is one text that `verify` scores."""
    return getattr(task, "start", None)


def step(environment: Environment, text: str) -> Observation | Done:
    """Return what the environment answers to `text`, within the bounds.

    Raises:
        ValueError: it answers neither an observation of text nor a finite reward.
    """
    answer: Any = environment.step(text)
    if isinstance(answer, Observation) and is_text(answer.text):
        return Observation(answer.text.encode()[:MAX_OBSERVATION_BYTES].decode(errors="ignore"))
    if isinstance(answer, Done) and is_reward(answer.reward):
        return Done(float(answer.reward))
    raise ValueError(f"step returned {answer!r:.60}: return an Observation of text, or Done with a number")


def play_again(start: StartEpisode, item: Item, texts: Sequence[str]) -> float | None:
    """Return what an episode earns; None if the environment here answers otherwise than the episode says.

    Args:
        start: of the task.
        item: that the episode is on.
        texts: the policy's and the environment's in turn, the policy's first and last.

    Raises:
        ValueError: as `step`.
    """
    environment = start(item)
    for text, observed in zip(texts[0:-1:2], texts[1::2], strict=True):
        if step(environment, text) != Observation(observed):
            return None
    end = step(environment, texts[-1])
    return end.reward if isinstance(end, Done) else 0.0

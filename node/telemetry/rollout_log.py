"""The rollout log: a few rollouts of each round, in `rollouts.jsonl`, one object a completion.

    {"round": ..., "whose": "own" or the peer that sent it, "age": seconds since it came,
     "policy": ..., "policy_version": ..., "task": ..., "seed": ...,
     "question": ..., "text": ..., "reward": ..., "finished": ...}

The text is the policy's last one. An episode of several turns has "texts" beside it: all of them, policy's and
environment's in turn.

The best and the worst completion of a group are kept, or one if all are alike. Texts may be a peer's and mean anything:
they are cut to a length, the file holds nothing outside ASCII, and who shows them quotes them (`quoted`) or escapes
them for the page that they go into.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from node.rollouts.draw import Draw
from node.rollouts.group import Group
from node.telemetry.metrics_file import Row

ROLLOUTS_FILE = "rollouts.jsonl"
OWN = "own"
MAX_TEXT = 2000  # characters of a question or a completion that are kept: what a person looks at


LOGGED_OWN, LOGGED_EXTERNAL = 2, 1  # groups of a round: enough to see what the policy says


class LoggedGroup(NamedTuple):
    """A peer's group that a round trains on: who sent it, and seconds since it came."""

    peer: str
    age: float
    group: Group


def rows_of_round(number: int, own: Sequence[Group], draw: Draw) -> list[Row]:
    """Return the rows that are kept of round `number`: of its `own` groups, and of what it drew from peers."""
    drawn = [
        LoggedGroup(candidate.peer, draw.taken_at - candidate.received, draw.usable[candidate.id].group)
        for candidate in draw.used[:LOGGED_EXTERNAL]
    ]
    return own_rows(number, own[:LOGGED_OWN]) + external_rows(number, drawn)


def own_rows(number: int, groups: Sequence[Group]) -> list[Row]:
    """Return the rows of some of round `number`'s own groups."""
    return [row for group in groups for row in _rows(number, OWN, 0.0, group)]


def external_rows(number: int, drawn: Iterable[LoggedGroup]) -> list[Row]:
    """Return the rows of some of the peers' groups that round `number` trains on."""
    return [row for peers in drawn for row in _rows(number, peers.peer, peers.age, peers.group)]


def quoted(text: str) -> str:
    """Return a text with every character outside printable ASCII escaped: nothing in it acts on a terminal."""
    return ascii(text)[1:-1]


def texts_of(row: Row) -> list[str]:
    """Return the texts of a row's episode."""
    return list(map(str, row.get("texts") or [row.get("text")]))


def in_one_line(texts: Sequence[str]) -> str:
    """Return an episode's texts, quoted, with an arrow before each turn: ← of the environment, → of the policy.

    No arrow is in a quoted text.
    """
    arrows = ("→", "←")
    return " ".join(f"{arrows[at % 2]} {quoted(text)}" for at, text in enumerate(texts)).removeprefix("→ ")


def _rows(number: int, whose: str, age: float, group: Group) -> list[Row]:
    ranked = sorted(group.completions, key=lambda completion: -completion.reward)
    kept = ranked[:1] if ranked[0].reward == ranked[-1].reward else [ranked[0], ranked[-1]]
    return [
        {
            "round": number,
            "whose": whose,
            "age": age,
            "policy": group.policy,
            "policy_version": group.policy_version,
            "task": group.task.name,
            "seed": group.seed,
            "question": _cut(group.question),
            "text": _cut(completion.text),
            **({"texts": list(map(_cut, completion.texts))} if len(completion.texts) > 1 else {}),
            "reward": completion.reward,
            "finished": completion.finished,
        }
        for completion in kept
    ]


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}…"

"""A rollout: one question, a whole group of episodes on it, and their rewards.

An episode is what was said to the question: texts of the policy and of an environment
(`node.tasks.environments.episodes`) in turn, of which the policy has the first and the last. Most episodes have one
text.

Groups travel as text, because peers may run other models, and carry the seed of
their question rather than its answer: the receiver rebuilds both. The wire form is
a MessagePack array with a fixed layout:

    [3, task name, task version, task config hash, seed, question,
     [[[text, ...], finished, reward in [0, 1]], ...], policy name, policy version, kept]

`kept` is false if no archive may keep the group (`node.archive`).

A last field follows if the seed alone does not say what the verifier goes by: its hash (`Item.content`).
`decode` bounds every size before it looks at a value and raises `GroupError` with a
reason fit for a counter. The swarm's manifest bounds a group's size. The protocol compresses groups.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import NamedTuple

import msgpack

from node.tasks import MAX_QUESTION_BYTES, Item, Task, TaskKey
from node.tasks.environments.episodes import MAX_TEXTS
from protocol.value import value
from protocol.wire.encoding import at_most

FORMAT = 3
MAX_GROUP_BYTES = 16 << 20  # where no manifest says another number: 32 completions of 16 thousand tokens have 2 MiB
MAX_COMPLETIONS = 128
MAX_TEXT_BYTES = 128 << 10  # of a turn: 16 thousand tokens of eight bytes
MAX_BEFORE_BYTES = 128 << 10  # of all texts of an episode before the last one
MAX_NAME_BYTES = 256


class GroupError(ValueError):
    """A group that cannot be used; `reason` is a short counter name."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


class Episode(NamedTuple):
    """The turns of one answer: texts of policy and environment in turn, the policy's first and last.

    `finished` tells whether the last text ended by itself; those before it did.
    """

    texts: tuple[str, ...]
    finished: bool
    reward: float

    @property
    def text(self) -> str:
        """The policy's last text."""
        return self.texts[-1]


def one_turn(text: str, finished: bool, reward: float) -> Episode:
    """Return an episode of one text."""
    return Episode((text,), finished, reward)


@value
class Group:
    """Episodes on one question, the group's completions, as made by one policy version."""

    task: TaskKey
    seed: int
    question: str
    completions: tuple[Episode, ...]
    policy: str
    policy_version: int
    content: str = ""
    kept: bool = True  # false: no archive may keep it
    rewards: tuple[float, ...] = field(init=False, compare=False, repr=False)  # in the completions' order

    def __post_init__(self) -> None:
        object.__setattr__(self, "rewards", tuple([completion.reward for completion in self.completions]))


class Question(NamedTuple):
    """One question as the local policy is asked it: `item` is `task.make(seed)`, `prompt` its tokens."""

    task: Task
    seed: int
    item: Item
    prompt: Sequence[int]


class Tokens(NamedTuple):
    """An episode's tokens after those of its question, end-of-text included after each turn that finished.

    Those at the places in `given` are the environment's, the others the policy's. `logprobs` are the sampler's, where
    the engine gives them: nats of each token, NaN where it is given.
    """

    ids: Sequence[int]
    given: frozenset[int] = frozenset()
    logprobs: Sequence[float] | None = None

    @classmethod
    def of(cls, turns: Sequence[Sequence[int]], logprobs: Sequence[float] | None = None) -> "Tokens":
        """Return an episode's tokens from those of its texts, policy's and environment's in turn."""
        ids: list[int] = []
        given: list[int] = []
        for at, turn in enumerate(turns):
            if at % 2:
                given += range(len(ids), len(ids) + len(turn))
            ids += turn
        return cls(tuple(ids), frozenset(given), logprobs)

    @property
    def sampled(self) -> int:
        """How many of them are the policy's."""
        return len(self.ids) - len(self.given)


@value
class EncodedGroup:
    """A group under the local policy's tokenizer, whoever made it. Tokens never leave the node.

    `question` is what this node makes of the group's seed. `completions` holds, by their place in the group, the tokens
    of those completions that may be trained on: those that were sampled, or a peer's texts encoded. `id` is the group's
    content id, where it has been asked for.
    """

    group: Group
    question: Question
    completions: Mapping[int, Tokens]
    id: bytes = b""

    @property
    def prompt(self) -> Sequence[int]:
        """The tokens that ask the question."""
        return self.question.prompt


def encode(group: Group) -> bytes:
    """Return the wire form of `group`; equal groups give equal bytes."""
    completions = [[list(c.texts), c.finished, float(c.reward)] for c in group.completions]
    made_by = [group.policy, group.policy_version, group.kept]
    fields = [FORMAT, *group.task, group.seed, group.question, completions, *made_by]
    return msgpack.packb([*fields, group.content] if group.content else fields)


def content_id(body: bytes) -> bytes:
    """Return the id of the group in `body`, 32 bytes: the one that it travels by."""
    return hashlib.sha256(body).digest()


def decode(data: bytes, max_bytes: int = MAX_GROUP_BYTES) -> Group:
    """Return the group in `data`; raise `GroupError` for anything else, or for more than `max_bytes`."""
    if len(data) > max_bytes:
        raise GroupError("oversized", f"{len(data)} bytes")
    # A few kilobytes unpack to a body that holds an array in every byte, and each of them would take 56. So no more
    # arrays are taken than the layout has.
    try:
        fields = msgpack.unpackb(
            data,
            list_hook=at_most(2 * MAX_COMPLETIONS + 2),
            max_str_len=MAX_TEXT_BYTES,
            max_array_len=max(MAX_COMPLETIONS, MAX_TEXTS),
            max_map_len=0,
            max_bin_len=0,
            max_ext_len=0,
            strict_map_key=True,
        )
    except (ValueError, msgpack.UnpackException) as error:
        raise GroupError("malformed", type(error).__name__) from None
    return _group(fields)


def _group(fields: object) -> Group:
    _check(isinstance(fields, list) and len(fields) in (10, 11) and fields[0] == FORMAT, "layout")
    assert isinstance(fields, list)
    name, version, config, seed, question, completions, policy, policy_version, kept, *content = fields[1:]
    _check(_is_name(name) and _is_name(config), "names")
    _check(isinstance(question, str) and len(question.encode(errors="replace")) <= MAX_QUESTION_BYTES, "question")
    _check(isinstance(completions, list) and 0 < len(completions) <= MAX_COMPLETIONS, "completions")
    episodes = tuple(map(_episode, completions))
    _check(_is_name(policy) and all(map(_is_name, content)), "names")
    _check(_is_count(version) and _is_count(seed) and _is_count(policy_version), "integers")
    _check(isinstance(kept, bool), "kept")
    return Group(
        TaskKey(name, version, config), seed, question, episodes, policy, policy_version, "".join(content), kept
    )


def _episode(fields: object) -> Episode:
    match fields:
        # Rules draw by rewards before these are verified: their sums and squares must be numbers.
        case [list() as texts, bool() as finished, float() as reward] if 0 <= reward <= 1:
            _check(len(texts) % 2 == 1 and len(texts) <= MAX_TEXTS, "turns")
            _check(all(isinstance(text, str) for text in texts), "texts")
            _check(sum(len(text.encode(errors="replace")) for text in texts[:-1]) <= MAX_BEFORE_BYTES, "texts")
            return Episode(tuple(texts), finished, reward)
    raise GroupError("malformed", "completion")


def _is_name(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value.encode(errors="replace")) <= MAX_NAME_BYTES


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _check(condition: bool, what: str) -> None:
    if not condition:
        raise GroupError("malformed", what)

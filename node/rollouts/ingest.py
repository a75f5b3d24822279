"""What a peer's group must pass before it enters the pool.

Ground truth is regenerated, never received: the seed gives the question and the
answer, and the text is scored here. A claimed question or reward that differs is a
lie and costs its signer; a task that this node does not run is nobody's fault, nor is
a question that its policy has no room for.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from node.rollouts.group import MAX_GROUP_BYTES, Group, GroupError, decode
from node.tasks import Item, TaskSet

REWARD_TOLERANCE = 1e-6

# Reasons that an honest peer can give: its groups are set aside at no cost to it.
BLAMELESS = frozenset({"unknown_task", "unverifiable", "prompt_too_long", "other_content"})

EncodePrompt = Callable[[Item], Sequence[int] | None]
"""Returns the tokens that ask an item, or None where the local policy has no room for them."""


class Seen(NamedTuple):
    """An item from a peer as it was judged: when it was looked at (Unix seconds); no reason where it was taken."""

    id: bytes
    sender: str
    topic: bytes
    body: bytes
    time: float
    reason: str


class Limits(NamedTuple):
    """What a peer's group may have at most."""

    completions: int
    bytes: int


class Verified(NamedTuple):
    """Either a usable group, or why there is none."""

    group: Group | None
    reason: str


def check(
    body: bytes,
    tasks: TaskSet,
    max_completions: int,
    max_bytes: int = MAX_GROUP_BYTES,
    encode_prompt: EncodePrompt = lambda item: (),
) -> Verified:
    """Decode and verify one group from a peer. Never raises: one bad item is one reason."""
    try:
        group = decode(body, max_bytes)
        _verify(group, tasks, max_completions, encode_prompt)
    except GroupError as error:
        return Verified(None, error.reason)
    return Verified(group, "")


def _verify(group: Group, tasks: TaskSet, max_completions: int, encode_prompt: EncodePrompt) -> None:
    task = tasks.get(group.task)
    if task is None:
        raise GroupError("unknown_task", group.task.name)
    if not 2 <= len(group.completions) <= max_completions:
        raise GroupError("group_size", str(len(group.completions)))
    try:
        item = task.make(group.seed)
        rewards = [task.verify(item, completion.text) for completion in group.completions]
        prompt = encode_prompt(item)
    except Exception as error:  # a third party's task may raise anything; its failure is not the round's
        raise GroupError("unverifiable", type(error).__name__) from error
    if item.content != group.content:  # another edition of the same task set: nobody's fault
        raise GroupError("other_content", group.task.name)
    if item.question != group.question:
        raise GroupError("false_question")
    if any(abs(own - claimed) > REWARD_TOLERANCE for own, claimed in zip(rewards, group.rewards, strict=True)):
        raise GroupError("false_reward")
    if prompt is None:
        raise GroupError("prompt_too_long")

"""What a peer's group must pass: to be read into the pool, and, once a sampler drew it, to be trained on.

Most of what comes is never drawn. So what enters the pool is only read: its layout, its bounds, whether its task is
ours. Whether it is true is found out when a round draws it.

Ground truth is regenerated, never received: the seed gives the question and the
answer, and the text is scored here. A claimed question or reward that differs is a
lie and costs its signer; a task that this node does not run is nobody's fault, nor is
a question that its policy has no room for.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from node.errors import UserError
from node.rollouts.group import MAX_GROUP_BYTES, Completion, Group, GroupError, Question, decode
from node.rollouts.sampling import RIGHT
from node.tasks import Item, TaskSet
from node.tasks.prompting import takes_more

REWARD_TOLERANCE = 1e-6

# Reasons that an honest peer can give: its groups are set aside at no cost to it.
BLAMELESS = frozenset(
    {"unknown_task", "unverifiable", "prompt_too_long", "other_content", "too_long", "over_long", "too_surprising"}
)

EncodePrompt = Callable[[Item], Sequence[int] | None]
"""Returns the tokens that ask an item, or None where the local policy has no room for them."""


class Seen(NamedTuple):
    """An item from a peer as it was read: when it was looked at (Unix seconds); no reason where it was taken."""

    id: bytes
    sender: str
    topic: bytes
    body: bytes
    time: float
    reason: str


class Refused(NamedTuple):
    """A group that a round drew, whose it is, and why it was of no use."""

    id: bytes
    sender: str
    reason: str


class Limits(NamedTuple):
    """What a peer's group may have at most."""

    completions: int
    bytes: int


class Verified(NamedTuple):
    """Either a usable group, or why there is none."""

    group: Group | None
    reason: str


def read(body: bytes, tasks: TaskSet, max_completions: int, max_bytes: int = MAX_GROUP_BYTES) -> Group:
    """Return the group that a peer sent, of which nothing is verified yet.

    Raises:
        GroupError: it is none, or too large, or of a task that is not ours.
    """
    group = decode(body, max_bytes)
    if tasks.get(group.task) is None:
        raise GroupError("unknown_task", group.task.name)
    if not 2 <= len(group.completions) <= max_completions:
        raise GroupError("group_size", str(len(group.completions)))
    return group


def verify(group: Group, tasks: TaskSet, encode_prompt: EncodePrompt) -> Question:
    """Make the group's question again and score its completions; return it as the local policy is asked it.

    Raises:
        GroupError: what it claims is not so, or it is of no use here.
    """
    task = tasks.get(group.task)
    if task is None:
        raise GroupError("unknown_task", group.task.name)
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
    return Question(task, group.seed, item, prompt)


def says_nothing_else(question: Question, made: Completion) -> bool:
    """Tell whether a completion is the bare right answer to a task that takes no other: it has room for nothing."""
    if made.reward < RIGHT or made.text != question.item.answer:
        return False
    try:
        return not takes_more(question.task, question.item)
    except UserError:  # a third party's task may fail at any text: then nobody knows
        return False


def check(
    body: bytes,
    tasks: TaskSet,
    max_completions: int,
    max_bytes: int = MAX_GROUP_BYTES,
    encode_prompt: EncodePrompt = lambda item: (),
) -> Verified:
    """Read and verify one group at once. Never raises: one bad item is one reason."""
    try:
        group = read(body, tasks, max_completions, max_bytes)
        verify(group, tasks, encode_prompt)
    except GroupError as error:
        return Verified(None, error.reason)
    return Verified(group, "")

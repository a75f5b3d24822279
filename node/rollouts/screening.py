"""Screening: what a peer's group must pass, and who is at fault if it does not.

A group is read before it enters the group buffer (`read`): its layout, its bounds, whether its task is ours, and that
its question is not held out. Whether it is true is checked when a round draws it (`node.rollouts.draw`), since most
groups that arrive are never drawn.

Ground truth is regenerated, never received. The seed gives the question and the answer (`rebuild`), and the answers
are scored here; those of several turns are played again (`node.tasks.environments.episodes`). A claimed question or
reward that differs is a lie (`compare`). It costs its signer, and the signer's other groups are not drawn any more.
Nobody is at fault for a task that this node does not run or cannot check, a question that its policy has no room for,
or an episode that cannot be scored here (`node.tasks.scoring.verdicts`). Nor is anybody at fault for a held-out
question: nodes of an earlier release, or with fewer test questions, do not hold it out.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from node.errors import UserError
from node.rollouts.group import MAX_GROUP_BYTES, Episode, Group, GroupError, Question, decode
from node.rollouts.rule import is_right
from node.tasks import Item
from node.tasks.environments.episodes import start_of
from node.tasks.prompting import takes_more
from node.tasks.scoring.verdicts import Answer, Verdict, score, submit_of
from node.tasks.task_set import TaskSet

REWARD_TOLERANCE = 1e-6

# Reasons that cost the signer no points: the group is set aside.
BLAMELESS = frozenset(
    {
        "unknown_task",
        "held_out",
        "unverifiable",
        "unscorable",
        "prompt_too_long",
        "other_content",
        "too_long",
        "over_long",
        "too_surprising",
        "quotes_held_out",
        "early_report",
        "slow_signer",
    }
)

EncodePrompt = Callable[[Item], Sequence[int] | None]
"""Returns the tokens that ask an item, or None where the local policy has no room for them."""


class RefusedGroup(NamedTuple):
    """A group that a round drew and refused, its signer, and why."""

    id: bytes
    sender: str
    reason: str


class GroupBounds(NamedTuple):
    """The bounds of a peer's group."""

    completions: int
    bytes: int
    life: float = 0.0  # seconds from when it is signed to when it can come no more


class ReadResult(NamedTuple):
    """Either a group, or why it is refused."""

    group: Group | None
    reason: str


def read(body: bytes, tasks: TaskSet, max_completions: int, max_bytes: int = MAX_GROUP_BYTES) -> Group:
    """Return the group that a peer sent; nothing in it is verified yet.

    Raises:
        GroupError: it is malformed or too large, has too many completions or turns, its task is not ours, or
            its question is held out. A task whose groups are not shared counts as not ours.
    """
    group = decode(body, max_bytes)
    task = tasks.shared(group.task)
    if task is None:
        raise GroupError("unknown_task", group.task.name)
    if len(group.completions) > max_completions:
        raise GroupError("group_size", str(len(group.completions)))
    if start_of(task) is None and any(len(completion.texts) > 1 for completion in group.completions):
        raise GroupError("turns", group.task.name)
    if tasks.is_held_out(task, group.question):
        raise GroupError("held_out", group.task.name)
    return group


def rebuild(group: Group, tasks: TaskSet, encode_prompt: EncodePrompt) -> Question:
    """Make the group's question again; return it with the prompt that asks the local policy.

    Raises:
        GroupError: its question is not the one that it claims, or is of no use here.
    """
    task = tasks.shared(group.task)
    if task is None:
        raise GroupError("unknown_task", group.task.name)
    try:
        item = task.make(group.seed)
        prompt = encode_prompt(item)
    except Exception as error:  # a third party's task may raise anything; its failure is not the round's
        raise GroupError("unverifiable", type(error).__name__) from error
    if item.content != group.content:  # another edition of the same task set: nobody's fault
        raise GroupError("other_content", group.task.name)
    if item.question != group.question:
        raise GroupError("false_question")
    if tasks.is_held_out(task, item.question):
        raise GroupError("held_out", group.task.name)
    if prompt is None:
        raise GroupError("prompt_too_long")
    return Question(task, group.seed, item, prompt)


def compare(group: Group, verdicts: Iterable[tuple[int, Verdict]]) -> str:
    """Compare the rewards that a group claims with verdicts, each with the place of its completion.

    Returns what is wrong, "" if nothing is.
    """
    reason = ""
    for place, verdict in verdicts:
        if verdict is None:
            reason = "unscorable"
        elif abs(verdict - group.rewards[place]) > REWARD_TOLERANCE:
            return "false_reward"
    return reason


def check(
    body: bytes,
    tasks: TaskSet,
    max_completions: int,
    max_bytes: int = MAX_GROUP_BYTES,
    encode_prompt: EncodePrompt = lambda item: (),
) -> ReadResult:
    """Read one group and score all of its completions. Never raises: a bad group is a reason."""
    try:
        group = read(body, tasks, max_completions, max_bytes)
        question = rebuild(group, tasks, encode_prompt)
    except GroupError as error:
        return ReadResult(None, error.reason)
    verdicts = score([answer_of(question, completion) for completion in group.completions])
    reason = compare(group, enumerate(verdicts))
    return ReadResult(None, reason) if reason else ReadResult(group, "")


def answer_of(question: Question, episode: Episode) -> Answer:
    """Return an episode on a question as what is scored."""
    return Answer(question.task, question.item, episode.text, episode.texts[:-1])


def says_nothing_else(question: Question, episode: Episode) -> bool:
    """Tell whether a completion is the bare right answer to a task that pays no other text: nothing can hide in it.

    Of an episode with an environment nobody knows.
    """
    if start_of(question.task) is not None or not is_right(episode.reward) or episode.text != question.item.answer:
        return False
    if submit_of(question.task) is not None:  # `takes_more` would score again, in another process
        return False
    try:
        return not takes_more(question.task, question.item)
    except UserError:  # a third party's task may fail at any text: then nobody knows
        return False

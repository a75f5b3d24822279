"""What a peer's group must pass: every lie and every malformed item has its reason, and none raises."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.config import TaskConfig
from node.rollouts.group import MAX_GROUP_BYTES, Completion, Group, encode
from node.rollouts.screening import BLAMELESS, check
from node.tasks import Item, TaskKey, TaskSet, load_tasks

TASKS = load_tasks([TaskConfig(name="builtin")])


def honest(seed: int = 7, texts: tuple[str, ...] = ("no", "x")) -> Group:
    task = TASKS.tasks[0]
    item = task.make(seed)
    made = tuple(Completion(text, True, task.verify(item, text)) for text in (item.answer, *texts))
    return Group(task.key, seed, item.question, made, "p", 3)


@given(st.integers(0, 2**63 - 1), st.lists(st.text(max_size=30), min_size=1, max_size=7).map(tuple))
def test_an_honest_group_passes_unchanged(seed: int, texts: tuple[str, ...]) -> None:
    group = honest(seed, texts)
    assert check(encode(group), TASKS, 8) == (group, "")


def lie(group: Group, index: int, reward: float) -> Group:
    made = list(group.completions)
    made[index] = made[index]._replace(reward=reward)
    return replace(group, completions=tuple(made))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (encode(lie(honest(), 1, 1.0)), "false_reward"),
        (encode(lie(honest(), 0, 0.0)), "false_reward"),
        (encode(lie(honest(), 1, 1e300)), "malformed"),
        (encode(replace(honest(), question="1+1=")), "false_question"),
        (encode(replace(honest(), seed=8)), "false_question"),
        (encode(replace(honest(), task=TaskKey("builtin/none", 1, "c"))), "unknown_task"),
        (encode(replace(honest(), task=honest().task._replace(version=99))), "unknown_task"),
        (encode(replace(honest(), task=honest().task._replace(config="0" * 16))), "unknown_task"),
        (encode(replace(honest(), completions=honest().completions[:1])), "group_size"),
        (encode(honest(texts=("a",) * 8)), "group_size"),
        (encode(honest())[:-1], "malformed"),
        (b"", "malformed"),
        (b"\xc1" * 40, "malformed"),
        (b"\x00" * (MAX_GROUP_BYTES + 1), "oversized"),
    ],
)
def test_each_bad_item_has_its_reason(body: bytes, reason: str) -> None:
    assert check(body, TASKS, 8) == (None, reason)


def test_a_group_of_who_asks_otherwise_passes_and_one_of_who_reads_otherwise_is_of_another_task() -> None:
    group = honest()
    name = group.task.name
    otherwise = load_tasks([TaskConfig(name=name, examples=3, instruction="Think.")])
    assert check(encode(group), otherwise, 8) == (group, "")
    assert check(encode(group), load_tasks([TaskConfig(name=name, answer="whole")]), 8) == (None, "unknown_task")


class Raising:
    """A third party's task whose scorer fails."""

    key = TaskKey("raising", 1, "c")

    def make(self, seed: int) -> Item:
        return Item("q", "a")

    def verify(self, item: Item, text: str) -> float:
        raise ZeroDivisionError(text)


def test_a_scorer_that_raises_costs_one_item() -> None:
    group = Group(Raising.key, 1, "q", (Completion("a", True, 0.0), Completion("b", True, 0.0)), "p", 0)
    assert check(encode(group), TaskSet([(Raising(), 1.0)]), 8) == (None, "unverifiable")


def test_a_question_that_the_policy_has_no_room_for_is_nobodys_fault_and_no_cover_for_a_lie() -> None:
    assert check(encode(honest()), TASKS, 8, encode_prompt=lambda _: None) == (None, "prompt_too_long")
    assert check(encode(lie(honest(), 1, 1.0)), TASKS, 8, encode_prompt=lambda _: None) == (None, "false_reward")
    assert "prompt_too_long" in BLAMELESS


def test_a_question_that_cannot_be_encoded_costs_one_item() -> None:
    def fails(item: Item) -> list[int]:
        raise ValueError(item.question)

    assert check(encode(honest()), TASKS, 8, encode_prompt=fails) == (None, "unverifiable")

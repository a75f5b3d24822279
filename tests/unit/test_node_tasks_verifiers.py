"""Task sets of verifiers: questions by row, rewards from a process of their own, and what is refused at load."""

import dataclasses
import json
import textwrap
from pathlib import Path

import psutil
import pytest

from node.config import TaskConfig
from node.errors import UserError
from node.rollouts.group import Group, encode, one_turn
from node.rollouts.screening import BLAMELESS, check
from node.swarm.founding import adopt_tasks
from node.tasks.prompting import prompted
from node.tasks.task_set import TaskSet
from node.tasks.verifiers import RefusedError, VerifiersTask, load_rows, load_verifiers
from protocol.credentials.manifest import ManifestTask, Policy, make_manifest
from protocol.identity import Identity

HEAD = """
import verifiers.v1 as vf

class Data(vf.TaskData):
    answer: str = ""

class Config(vf.TasksetConfig):
    rows: int = 40

class Sum(vf.Task[Data]):
    @vf.reward
    async def right(self, task, trace) -> float:
        {reward}

    {more}

class Sums(vf.Taskset[Sum, Config]):
    {taskset}
    def load(self):
        for n in range(self.config.rows):
            yield Sum(Data(prompt={prompt}, system_prompt="Add.", answer=str(2 * n){data}), self.config.task)

__all__ = ["Sums"]
"""
RIGHT = "return 2.0 * (trace.last_reply.strip() == task.answer)"


def write(folder: Path, name: str, **parts: str) -> None:
    filled = {"reward": RIGHT, "more": "pass", "taskset": "", "prompt": 'f"{n}+{n}="', "data": ""} | parts
    (folder / f"{name}.py").write_text(textwrap.dedent(HEAD).format(**filled))


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("packages")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield folder


@pytest.fixture(scope="module")
def sums(packages: Path) -> VerifiersTask:
    hostile = "text = trace.last_reply\n" + textwrap.indent(
        "if text == 'boom': raise ValueError('no')\n"
        "if text == 'nan': return float('nan')\n"
        "if text == 'net':\n"
        "    import socket\n"
        "    socket.create_connection(('127.0.0.1', 9))\n" + RIGHT,
        " " * 8,
    )
    write(packages, "good_sums", reward=hostile)
    return load_verifiers("good-sums", {"rows": 30, "high": 2.0, "config": {"rows": 35}})


def test_rewards_are_the_task_sets_own_scaled_to_one(sums: VerifiersTask) -> None:
    items = [sums.make(seed) for seed in range(300)]
    assert items == [sums.make(seed) for seed in range(300)]
    assert {item.question for item in items} == {f"{n}+{n}=" for n in range(30)}
    for item in items[:10]:
        right = str(2 * int(item.question.split("+")[0]))
        assert item.system == "Add." and len(item.content) == 64
        assert [sums.verify(item, text) for text in (right, f" {right}", f"{right}0", "")] == [1.0, 1.0, 0.0, 0.0]


def test_a_reward_that_fails_is_unscorable_and_gets_no_network(sums: VerifiersTask) -> None:
    item = sums.make(1)
    assert [sums.verify(item, text) for text in ("boom", "nan", "net", "x" * 10**6)] == [None, None, None, 0.0]
    assert sums.verify(item, str(2 * int(item.question.split("+")[0]))) == 1.0


def test_a_process_that_died_is_replaced(sums: VerifiersTask) -> None:
    item = sums.make(1)
    right = str(2 * int(item.question.split("+")[0]))
    (worker,) = [one for one in psutil.Process().children() if "node.tasks.verifiers" in one.cmdline()]
    worker.kill()
    worker.wait()
    assert sums.verify(item, right) is None
    assert sums.verify(item, right) == 1.0


def test_a_group_carries_its_rows_hash_and_another_row_is_nobodys_fault(sums: VerifiersTask) -> None:
    item = sums.make(5)
    made = tuple(one_turn(text, True, sums.verify(item, text)) for text in ("0", "1"))
    group = Group(sums.key, 5, item.question, made, "p", 0, item.content)
    tasks = TaskSet([(sums, 1.0)])
    assert check(encode(group), tasks, 8).group == group
    for other in ("0" * 64, ""):
        verdict = check(encode(dataclasses.replace(group, content=other)), tasks, 8)
        assert verdict.reason == "other_content" and verdict.reason in BLAMELESS


def test_a_joiner_runs_a_task_set_only_if_it_says_so_itself(sums: VerifiersTask) -> None:
    own = TaskConfig(name="verifiers/good-sums", options={"rows": 30, "high": 2.0, "config": {"rows": 35}})
    described = ManifestTask(*sums.key, json.dumps(own.options))
    swarm = make_manifest(Identity(bytes(32)), "s", 1, Policy.OPEN, [described])
    with pytest.raises(UserError, match="runs code of a package: if you trust it, list the task"):
        adopt_tasks(swarm, [])
    (adopted,) = adopt_tasks(swarm, [TaskConfig(name="verifiers/good-sums")])
    assert adopted.options == json.loads(described.options)


def test_examples_need_answers_that_can_be_shown(sums: VerifiersTask) -> None:
    with pytest.raises(UserError, match="shows no answers"):
        prompted(sums, TaskConfig(name="verifiers/good-sums", examples=1))


@pytest.mark.parametrize(
    ("name", "parts", "complaint"),
    [
        ("boxed_in", {"more": "NEEDS_CONTAINER = True"}, "needs a container"),
        ("pictured", {"data": ', image="python:3.11"'}, "needs a container"),
        ("prepared", {"more": "async def setup(self, trace, runtime): pass"}, "prepares a machine"),
        ("finished", {"more": "async def finalize(self, trace, runtime): pass"}, "prepares a machine"),
        ("tooled", {"more": "@classmethod\n    def toolsets(cls, config): return [1]"}, "needs tools"),
        ("shared_tools", {"taskset": "@classmethod\n    def toolsets(cls, config): return [1]"}, "needs tools"),
        (
            "running",
            {"more": "@vf.reward\n    async def ran(self, task, runtime): return 1.0"},
            "'ran' needs a container",
        ),
        ("unrewarded", {"reward": "return 0.0", "more": "right = None"}, "no rewards"),
        ("silent", {"prompt": "None"}, "otherwise than by one text"),
        ("blank", {"prompt": "''"}, "a question of 0 characters"),
        ("talking", {"prompt": "[vf.UserMessage(content='a'), vf.AssistantMessage(content='b')]"}, "otherwise than by"),
        ("empty", {"taskset": "def __iter__(self): return iter(())"}, "no tasks"),
    ],
)
def test_what_needs_more_than_a_text_is_refused(
    packages: Path, name: str, parts: dict[str, str], complaint: str
) -> None:
    write(packages, name, **parts)
    with pytest.raises(RefusedError, match=complaint):
        load_rows(name, {}, 5)


def test_a_prompt_of_messages_is_a_question_with_its_instruction(packages: Path) -> None:
    from node.tasks.verifiers import asked

    write(packages, "messages", prompt="[vf.SystemMessage(content='Be brief.'), vf.UserMessage(content=f'{n}?')]")
    tasks, versions = load_rows("messages", {}, 5)
    assert [asked(task.data) for task in tasks] == [(f"{n}?", "Be brief.\n\nAdd.") for n in range(5)]
    assert set(versions) == {"verifiers"}


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("no-such-set", {}, "cannot be used: .*ModuleNotFoundError"),
        ("../up", {}, "no name of a task set"),
        ("good-sums", {"rows": 0}, "option 'rows'"),
        ("good-sums", {"low": 1.0}, "low must be less than high"),
    ],
)
def test_a_bad_name_or_option_is_one_clear_line(
    sums: VerifiersTask, name: str, options: dict[str, object], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        load_verifiers(name, options)
    assert "\n" not in str(caught.value)

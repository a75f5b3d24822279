"""Task sets of verifiers: questions by row, rewards from a process of their own, and what is refused at load."""

import dataclasses
import json
import re
import textwrap
from pathlib import Path

import psutil
import pytest
from structlog.testing import capture_logs

from node.config import TaskConfig
from node.errors import UserError
from node.processes.cage import lacking
from node.rollouts.group import Group, encode, one_turn
from node.rollouts.screening import BLAMELESS, check
from node.swarm.agreed_tasks import adopt_tasks, describe_tasks
from node.tasks.environments.episodes import Done, Observation, step
from node.tasks.environments.tool_calls import plain_form
from node.tasks.prompting import prompted
from node.tasks.scoring.verdicts import Answer, Scoring
from node.tasks.task_set import TaskSet, unshared
from node.tasks.verifiers import task_sets
from node.tasks.verifiers.task_sets import RefusedError, VerifiersTask, load_rows, load_verifiers
from protocol.credentials.manifest import JoinPolicy, ManifestTask, make_manifest
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
TOOLS = "@classmethod\n    def toolsets(cls, config): return [vf.Toolset({})]"
RIGHT = "return 2.0 * (trace.last_reply.strip() == task.answer)"

pytestmark = pytest.mark.slow  # a process that imports verifiers takes seconds


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
        "    socket.create_connection(('127.0.0.1', 9))\n"
        "if text == 'program':\n"
        "    import subprocess, sys\n"
        "    subprocess.run([sys.executable, '-S', '-c', 'import socket; socket.socket()'], check=True)\n"
        "if text.startswith('write '): open(text[6:], 'w')\n"
        "if text.startswith('run '):\n"
        "    exec(text[4:])\n"
        "    vars(vf).setdefault('ran', []).append(text)\n"
        "    return 1.0 / len(vf.ran)\n" + RIGHT,
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


def test_a_reward_writes_no_file_and_what_it_starts_gets_no_network(sums: VerifiersTask, tmp_path: Path) -> None:
    item = sums.make(1)
    assert [sums.verify(item, text) for text in ("program", f"write {tmp_path / 'file'}")] == [None, None]
    assert not (tmp_path / "file").exists()
    assert sums.verify(item, str(2 * int(item.question.split("+")[0]))) == 1.0


@pytest.mark.skipif(bool(lacking()), reason=lacking())
def test_a_peers_text_to_a_task_set_is_scored_in_a_cage(sums: VerifiersTask, tmp_path: Path) -> None:
    item = sums.make(1)
    right = str(2 * int(item.question.split("+")[0]))
    (key := tmp_path / "identity.key").write_text("secret")
    key.chmod(0o644)
    texts = ["run pass", f"run open({str(key)!r}).read()", "boom", "run pass", right, "0"]
    assert unshared(sums) == ""
    with capture_logs() as logs:
        found = Scoring([Answer(sums, item, text) for text in texts], is_own=False).wait(60)
    assert found == [0.5, None, None, 0.5, 1.0, 0.0], "each is the first"
    assert "PermissionError" in logs[0]["reason"]
    assert all('say isolate = "none"' in log["reason"] for log in logs)


def test_where_a_task_set_has_no_cage_it_is_shared_only_if_its_rewards_run_no_text(
    packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(packages, "plain_sums")
    monkeypatch.setattr(task_sets, "lacking", lambda: "no Landlock")
    keys = set()
    for isolate, reason in (
        (None, """cannot be caged here (no Landlock): isolate = "none" shares it if its rewards run no text"""),
        ("text", "a stranger's text cannot be caged here (no Landlock)"),
        ("none", ""),
    ):
        task = load_verifiers("plain-sums", {"rows": 3, "high": 2.0, **({"isolate": isolate} if isolate else {})})
        assert unshared(task).endswith(reason) and bool(unshared(task)) == bool(reason)
        keys.add(task.key)
    assert len(keys) == 1, "nodes that isolate otherwise agree on rewards"


@pytest.mark.skipif(bool(lacking()), reason=lacking())
def test_rewards_that_fail_in_a_cage_keep_a_task_set_at_home(packages: Path) -> None:
    (packages / "words.txt").write_text("words")
    reads = (
        "from pathlib import Path; return float(trace.last_reply in Path(__file__).with_name('words.txt').read_text())"
    )
    write(packages, "reading_sums", reward=reads)
    task = load_verifiers("reading-sums", {"rows": 3})
    assert "its rewards fail in a cage" in task.unshared and 'say isolate = "none"' in task.unshared
    assert task.verify(task.make(1), "words") == 1.0


def test_a_process_that_died_is_replaced(sums: VerifiersTask) -> None:
    item = sums.make(1)
    right = str(2 * int(item.question.split("+")[0]))
    workers = [child for child in psutil.Process().children() if "node.tasks.verifiers.task_sets" in child.cmdline()]
    worker = min(workers, key=psutil.Process.create_time)  # the other one has cages
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
    described = ManifestTask(*sums.key, json.dumps(own.options | {"isolate": "none"}))
    swarm = make_manifest(Identity(bytes(32)), "s", 1, JoinPolicy.OPEN, [described])
    with pytest.raises(UserError, match=r"runs code of an installed package .* --allow-task verifiers/good-sums"):
        adopt_tasks(swarm, [])
    (adopted,) = adopt_tasks(swarm, [TaskConfig(name="verifiers/good-sums")])
    assert adopted.options == own.options, "its founder does not say whether texts are caged here"
    mine = TaskConfig(name="verifiers/good-sums", options={"isolate": "text"})
    assert adopt_tasks(swarm, [mine])[0].options == own.options | {"isolate": "text"}


def test_what_a_founder_isolates_is_in_no_manifest(sums: VerifiersTask) -> None:
    options = {"rows": 30, "high": 2.0, "config": {"rows": 35}}
    [described] = describe_tasks([TaskConfig(name="verifiers/good-sums", options=options | {"isolate": "none"})])
    assert json.loads(described.options) == options and described.config == sums.key.config


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
        ("boxed_tools", {"more": TOOLS.format("vf.ToolsetConfig(runtime=vf.DockerConfig())")}, "need a container"),
        ("shared_tools", {"taskset": TOOLS.format("vf.ToolsetConfig(url='http://a')")}, "are elsewhere"),
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
    from node.tasks.verifiers.task_sets import asked

    write(packages, "messages", prompt="[vf.SystemMessage(content='Be brief.'), vf.UserMessage(content=f'{n}?')]")
    loaded = load_rows("messages", {}, 5)
    assert loaded.env is None
    assert [asked(task.data) for task in loaded.tasks] == [(f"{n}?", "Be brief.\n\nAdd.") for n in range(5)]
    assert set(loaded.versions) == {"verifiers"}


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        pytest.param("no-such-set", {}, "cannot be used: .*ModuleNotFoundError", marks=pytest.mark.slow),
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


# The tool set that `vf-init --add-tool` writes, with the two functions filled in that it leaves to be written.
LOAD = "return [EchoingTask(EchoingData(prompt=f'Echo {n}.'), self.config.task) for n in range(self.config.num_tasks)]"
REWARD = (
    "return float(trace.last_reply == 'yes') * sum(m.content == trace.task.data.prompt for m in trace.tool_messages)"
)


@pytest.fixture(scope="module")
def echoing(packages: Path) -> VerifiersTask:
    from verifiers.v1.cli.init import scaffold
    from verifiers.v1.configs.cli.init import InitConfig

    folder = scaffold(InitConfig(name="echoing", path=str(packages / "written"), add_tool=True))
    file = folder / "echoing" / "taskset.py"
    written = file.read_text().replace(
        'raise NotImplementedError("Score the rollout and return a float (e.g. in [0, 1]).")', REWARD
    )
    file.write_text(re.sub(r"raise NotImplementedError\(.*?\n        \)", LOAD, written, flags=re.DOTALL))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        return load_verifiers("echoing", {"rows": 4, "high": 2.0})


def told(task: VerifiersTask, row: int, *texts: str) -> list[Observation | Done]:
    game = task.start(task.make(row))
    return [step(game, text) for text in texts]


def test_a_tool_set_as_verifiers_itself_writes_one_is_played_in_turns(echoing: VerifiersTask) -> None:
    item = echoing.make(1)
    assert (item.question, echoing.size) == ("Echo 1.", 4)
    [tool] = json.loads(item.tools)
    assert tool["function"]["name"] == "echoing_echo" and list(tool["function"]["parameters"]["properties"]) == ["text"]
    assert "echoing_echo(text: string)" in plain_form(item.tools)
    right = 'echoing_echo(text="Echo 1.")'
    assert told(echoing, 1, right, "yes") == [Observation("Echo 1."), Done(0.5)]
    assert told(echoing, 1, f"{right}\n{right}", "yes") == [Observation("Echo 1.\nEcho 1."), Done(1.0)]
    assert told(echoing, 1, right, "no") == [Observation("Echo 1."), Done(0.0)]
    assert told(echoing, 2, right, "yes") == [Observation("Echo 1."), Done(0.0)]
    call = '<tool_call>{"name": "echoing_echo", "arguments": {"text": "Echo 1."}}</tool_call>'
    assert told(echoing, 1, f"I call.{call}", "yes") == [
        Observation("<tool_response>\nEcho 1.\n</tool_response>"),
        Done(0.5),
    ]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("echoing_echo()", "error: echoing_echo takes text"),
        ("echoing_echo(text=3)", "of another type"),
        ("_serve()", "there is no such tool"),
        ("echoing_setup()", "there is no such tool"),
        ("echoing_echo(text=__import__)", "a value is a JSON value"),
    ],
)
def test_a_call_that_is_none_of_its_tools_is_an_error_that_the_policy_is_told(
    echoing: VerifiersTask, text: str, error: str
) -> None:
    observed, end = told(echoing, 1, text, "yes")
    assert isinstance(observed, Observation) and error in observed.text and end == Done(0.0)


GAME = """
import os
import socket
import verifiers.v1 as vf

class Data(vf.TaskData):
    number: int

class Counted(vf.State):
    asked: int = 0

class Hint(vf.Toolset[vf.ToolsetConfig, Counted]):
    TOOL_PREFIX = None

    async def setup_task(self, task):
        self.number = task.number

    @vf.tool
    async def parity(self) -> str:
        \"\"\"Tell whether the number is even.\"\"\"
        self.state.asked += 1
        if self.state.asked == 9:
            raise ValueError("too often")
        return "odd" if self.number % 2 else "even"

class Guess(vf.Task[Data, Counted]):
    @classmethod
    def toolsets(cls, config):
        return [Hint(vf.ToolsetConfig())]

    @vf.reward(weight=0.5)
    async def frugal(self, trace) -> float:
        return float(trace.state.asked <= 1)

    @vf.stop
    async def rude(self, trace: vf.Trace) -> bool:
        return "!" in trace.last_reply

class GameConfig(vf.EnvConfig):
    player: vf.AgentConfig = vf.AgentConfig(max_turns=6)

class Game(vf.Env[GameConfig]):
    async def run(self, task, agents):
        async with agents.player.interaction(task) as interaction:
            said = await interaction.turn("Guess a number from 0 to 9.")
            while not said.terminated:
                if said.last_reply == "hang":
                    while True:
                        pass
                if said.last_reply == "dial":
                    socket.create_connection(("127.0.0.1", 9))
                if said.last_reply == str(task.data.number):
                    interaction.trace.record_reward("found", 0.5)
                    break
                said = await interaction.turn("No.")
        interaction.trace.info["turns"] = interaction.trace.num_turns

    async def finalize(self, task, episode):
        [trace] = episode.traces
        assert trace.agent.name == "player" and trace.info["turns"] == trace.num_turns

class Guesses(vf.Taskset[Guess]):
    def load(self):
        for n in range(10):
            yield Guess(Data(prompt=None, number=n, system_prompt="Play."), self.config.task)

__all__ = ["Guesses", "Game"]
"""


@pytest.fixture(scope="module")
def guesses(packages: Path) -> VerifiersTask:
    (packages / "guesses.py").write_text(GAME)
    return load_verifiers("guesses", {})


def test_an_environment_with_turns_of_its_own_asks_answers_and_pays(guesses: VerifiersTask) -> None:
    item = guesses.make(3)
    assert (item.question, item.system) == ("Guess a number from 0 to 9.", "Play.")
    assert told(guesses, 3, "5", "3") == [Observation("No."), Done(1.0)]
    assert told(guesses, 3, "parity()", "3") == [Observation("odd"), Done(1.0)]
    assert told(guesses, 3, "parity()", "parity()", "3") == [Observation("odd")] * 2 + [Done(0.5)]
    assert told(guesses, 3, *"111111") == [Observation("No.")] * 5 + [Done(0.5)], "by the agent's limit"
    assert told(guesses, 3, "No!") == [Done(0.5)], "by the task's stop"


def test_a_game_of_verifiers_that_hangs_or_dials_costs_its_own_episode(guesses: VerifiersTask) -> None:
    hurried = dataclasses.replace(guesses, start=dataclasses.replace(guesses.start, limit=0.3))
    for task, text, why in [(hurried, "hang", "took too long"), (guesses, "dial", "no network here")]:
        game = task.start(task.make(3))
        with pytest.raises(UserError, match=why):
            step(game, text)
    assert told(guesses, 3, "3") == [Done(1.0)]


def test_episodes_of_verifiers_train_their_maker_and_are_not_shared(guesses: VerifiersTask) -> None:
    assert "no peer can play the episodes" in unshared(guesses)
    assert TaskSet([(guesses, 1.0)]).shared(guesses.key) is None


MULTI = """
import verifiers.v1 as vf

class Config(vf.EnvConfig):
    one: vf.AgentConfig = vf.AgentConfig()
    {more}

class Own(vf.Env[Config]):
    async def run(self, task, agents):
        {run}

    {hooks}

class One(vf.Task):
    {task}

class Tasks(vf.Taskset[One]):
    def load(self):
        yield One(vf.TaskData(prompt="Go."), self.config.task)

__all__ = ["Tasks", "Own"]
"""


@pytest.mark.parametrize(
    ("name", "parts", "complaint"),
    [
        ("judged_by_two", {"more": "other: vf.AgentConfig = vf.AgentConfig()"}, "it has several agents"),
        ("started", {"hooks": "async def start(self): pass"}, "starts something that all episodes share"),
        (
            "rewritten",
            {"task": "@vf.intercept\n    async def see(self, one: vf.Request): pass"},
            "a model server's requests",
        ),
    ],
)
def test_an_environment_that_needs_more_than_one_agent_is_refused(
    packages: Path, name: str, parts: dict[str, str], complaint: str
) -> None:
    write_own(packages, name, **parts)
    with pytest.raises(RefusedError, match=complaint):
        load_rows(name, {}, 5)


def write_own(folder: Path, name: str, **parts: str) -> None:
    filled = {"more": "", "run": "await agents.one.run(task)", "hooks": "", "task": "pass"} | parts
    (folder / f"{name}.py").write_text(MULTI.format(**filled))


@pytest.mark.parametrize(
    ("name", "run", "complaint"),
    [
        ("twice", "await agents.one.run(task); await agents.one.run(task)", "held 2 conversations"),
        ("broken", "1 / 0", "division by zero"),
        ("other_turn", "async with agents.one.interaction(task) as one: await one.turn('Go!')", "a turn has a message"),
    ],
)
def test_an_environment_that_does_something_else_in_an_episode_raises(
    packages: Path, name: str, run: str, complaint: str
) -> None:
    from node.tasks.verifiers.episodes import TaskSetGame

    write_own(packages, name, run=run)
    loaded = load_rows(name, {}, 5)
    with pytest.raises((ValueError, ZeroDivisionError), match=complaint):
        game = TaskSetGame(loaded.env, loaded.tasks[0], float)
        while True:
            game.step("Gone.")

"""Reward functions in TRL's form: called as TRL calls them, tried when they are loaded, and kept from doing harm."""

import asyncio
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pyarrow
import pyarrow.parquet
import pytest
from structlog.testing import capture_logs

from node.cli.app import run
from node.config import NodeConfig, TaskConfig, load_config
from node.errors import UserError
from node.operations.given import check_tasks, tasks_given
from node.processes.confinement import ConfinementError
from node.rollouts.group import Group, encode, one_turn
from node.rollouts.screening import check
from node.swarm.agreed_tasks import adopt_tasks, describe_tasks
from node.tasks import Item, TaskKey, load_tasks
from node.tasks.check import Finding
from node.tasks.check import check as tried
from node.tasks.prompting import prompted
from node.tasks.questions import Split
from node.tasks.rewards import functions
from node.tasks.rewards.functions import (
    Answered,
    Function,
    Functions,
    RewardError,
    Spec,
    load_function,
    parse_spec,
    tokens_of,
    trial_texts,
)
from node.tasks.rewards.judge import JudgeError, paid_by
from node.tasks.rewards.rows import RewardsTask, load_rewards
from node.tasks.scoring.time_quota import TimeQuota
from node.tasks.scoring.verdicts import Answer, OutOfTime, Scored, Scoring, score
from protocol.credentials.manifest import JoinPolicy, make_manifest
from protocol.identity import Identity
from tests.waiting import wait_until

WHOLE = Split(0.0)  # nothing is held out
FUNCTIONS = '''
import os, random, resource, socket, subprocess, tempfile, time
from pathlib import Path

def accuracy(completions, answer, **kwargs):
    return [float(text.strip() == str(one)) for text, one in zip(completions, answer)]

async def brevity(completions, **kwargs):
    return [1 / (1 + len(text)) for text in completions]

def unsure(completions, **kwargs):
    return [None if "?" in text else 1.0 for text in completions]

def hashed(completions, **kwargs):
    return [hash(text + "x") % 2**60 / 2**60 for text in completions]

def harmful(completions, answer, **kwargs):
    """Pays for each thing that it should not be able to do."""
    done = 0.0
    for harm in (
        lambda: socket.create_connection(("127.0.0.1", 9)),
        lambda: socket.socket(socket.AF_UNIX),
        lambda: Path(answer[0]).write_text("harm"),
        lambda: os.truncate(__file__, 0),
        lambda: os.chmod(__file__, 0o777),
        lambda: os.unlink(__file__),
        lambda: os.mkdir(answer[0]),
        lambda: os.kill(os.getppid(), 0),
        lambda: resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (64, 64)),
        lambda: os.sched_setscheduler(os.getppid(), os.SCHED_IDLE, os.sched_param(0)),
        lambda: os.setpriority(os.PRIO_PROCESS, os.getppid(), 19),
    ):
        try:
            harm()
        except ConnectionRefusedError:
            done += 1
        except PermissionError:
            pass
        else:
            done += 1
    return [done / 11 if text == "harm" else 0.0 for text in completions]

def slow(completions, **kwargs):
    if "slow" in completions:
        time.sleep(600)
    if "huge" in completions:
        return [float(len(bytearray(9 << 30)) > 0)]
    return [0.5 for _ in completions]

def stuck(completions, **kwargs):
    time.sleep(600)

def temporary(completions, **kwargs):
    return [float(tempfile.gettempdir() != "") for _ in completions]  # torch asks for it when it is imported

def writing(completions, **kwargs):
    with tempfile.NamedTemporaryFile():
        return [1.0 for _ in completions]

def patient(completions, **kwargs):
    return [float(Path("/proc/self/oom_score_adj").read_text()) / 1000 for _ in completions]

def long(completions, **kwargs):
    return [-float(len(text)) for text in completions]

def running(completions, answer, **kwargs):
    said = []
    for text in completions:
        scope = {}
        try:
            exec(text, scope)
        except (SyntaxError, NameError):
            pass
        said.append(scope.get("answer"))
    return [float(one == right) for one, right in zip(said, answer)]

def starting(completions, answer, **kwargs):
    if "slow" in completions:
        subprocess.run(["sleep", answer[0]], start_new_session=True)
    return [0.5 for _ in completions]
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "rewards.py").write_text(FUNCTIONS)
    write(folder / "rows.jsonl", [{"prompt": f"{n}+{n}=", "answer": 2 * n} for n in range(20)])
    return folder


def write(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def options(folder: Path, *functions: str, **more: object) -> dict[str, object]:
    named = [f"{folder / 'rewards.py'}:{function}" if ":" not in function else function for function in functions]
    return {"path": folder / "rows.jsonl", "functions": named, **more}


def function(call: Any, name: str = "one") -> Function:
    return Function(name, call, "")


def pay(call: Any, *answers: Answered) -> list[float | None]:
    return function(call).pay(answers, tokens_of(""))


ONE = Answered("1+1=", {"answer": 2, "source": None}, "2")
CHAT = Answered([{"role": "user", "content": "1+1="}], {"answer": 2}, "2")


def test_a_function_gets_what_trl_hands_over() -> None:
    seen: list[dict[str, Any]] = []

    def take(**given: Any) -> list[float]:
        seen.append(given)
        given["log_extra"]("column", ["a"])
        given["log_metric"]("metric", 1.0)
        return [0.0]

    pay(take, ONE)
    pay(take, CHAT)
    plain, chat = ({key: value for key, value in request.items() if "log" not in key} for request in seen)
    with pytest.raises(AttributeError, match=r"trainer_state\.global_step"):
        _ = plain.pop("trainer_state").global_step
    assert plain == {
        "prompts": ["1+1="],
        "completions": ["2"],
        "completion_ids": [[ord("2")]],
        "answer": [2],
        "source": [None],
    }
    assert (chat["prompts"], chat["completions"]) == ([CHAT.prompt], [[{"role": "assistant", "content": "2"}]])


def test_an_async_function_is_awaited_in_a_notebook_too_whose_loop_runs() -> None:
    async def take(**_: Any) -> list[float]:
        await asyncio.sleep(0)
        return [0.5]

    async def cell() -> list[float | None]:
        return pay(take, ONE)

    assert pay(take, ONE) == asyncio.run(cell()) == [0.5]


@pytest.mark.parametrize(
    ("paid", "complaint"),
    [
        ([], "returned 0 rewards for 1 completions"),
        ([1.0, 0.0], "returned 2 rewards for 1 completions"),
        ([float("inf")], "returned inf as a reward: a reward is a finite number or None"),
        (["good"], "returned 'good' as a reward: a reward is a finite number or None"),
        (["1.0"], "returned '1.0' as a reward"),
        ([[1.0]], r"returned \[1.0\] as a reward"),
        (None, "returned None: a reward function returns a list of rewards"),
        (0.5, "returned 0.5: a reward function returns a list of rewards"),
        ("good", "returned 'good': a reward function returns a list of rewards"),
        ("y" * 99, r"returned 'y{59}\.\.\. \(a str\): a reward"),
    ],
)
def test_what_is_no_list_of_rewards_names_the_function(paid: object, complaint: str) -> None:
    with pytest.raises(RewardError, match=f"^one .*{complaint}"):
        pay(lambda **_: paid, ONE)


def test_none_and_nan_are_left_out_of_the_weighted_sum_as_trl_leaves_them_out() -> None:
    made = [
        function(lambda *, it=reward, **_: [it], f"f{at}") for at, reward in enumerate((0.5, None, float("nan"), -1))
    ]
    functions = Functions(made, [2.0, 1.0, 1.0, 0.5], -1.0, 3.0, tokens_of(""))
    assert functions.score([ONE]) == [{"reward": (1.0 - 0.5 + 1.0) / 4.0, "parts": {"f0": 0.5, "f3": -1.0}}]
    with pytest.raises(RewardError, match=r"^f1 returned None, f2 returned nan$"):
        Functions(made[1:3], [1.0, 1.0], 0.0, 2.0, tokens_of("")).score([ONE])


@pytest.mark.parametrize(("paid", "reward"), [(-5.0, -1.0), (-1.0, 0.0), (0.0, 0.25), (3.0, 1.0), (9.0, 2.5)])
def test_a_range_says_which_sums_are_rewards_of_0_and_1_and_clips_nothing(paid: float, reward: float) -> None:
    assert (
        Functions([function(lambda **_: [paid])], [1.0], -1.0, 3.0, tokens_of("")).score([ONE])[0]["reward"] == reward
    )


@pytest.mark.slow
def test_without_a_range_the_sum_is_the_reward_as_in_trl(folder: Path) -> None:
    task = load_rewards("rewards", options(folder, "accuracy", "long", weights=[1.0, 0.5]))
    assert [task.verify(task.make(1), text) for text in ("2", "333")] == [0.5, -1.5]


def test_a_sum_that_rounding_puts_beyond_the_range_is_within_it() -> None:
    tenth = function(lambda **_: [0.1])
    assert sum([0.1] * 3) > 0.3
    assert Functions([tenth] * 3, [1.0] * 3, 0.0, 0.3, tokens_of("")).score([ONE])[0]["reward"] == 1.0


def test_a_sum_that_is_too_large_is_told() -> None:
    made = [function(lambda **_: [1e15])]
    with pytest.raises(RewardError, match=r"the weighted sum 1e\+20 is no reward"):
        Functions(made, [1e5], 0.0, 1.0, tokens_of("")).score([ONE])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("functions", "more", "line"),
    [
        (["long"], {}, "task 'rewards' pays -36 (long -36), outside of its range 0 to 1: groups with such rewards"),
        (["accuracy", "long"], {"range": [-20, 1]}, "pays -36 (accuracy 0, long -36), outside of its range -20 to 1:"),
        (["accuracy", "long"], {"range": [-50, 1]}, ""),
        (["accuracy"], {}, ""),
    ],
)
def test_what_a_task_pays_outside_of_its_range_is_a_line_when_it_is_loaded(
    folder: Path, functions: list[str], more: dict[str, object], line: str
) -> None:
    given = options(folder, *functions, **more)
    task = load_rewards("rewards", given)
    assert line in task.outside and bool(line) == bool(task.outside)
    config = NodeConfig.model_validate({"tasks": [{"name": "rewards", "options": given}]})
    assert check_tasks(config) == ([task.outside] if line else [])
    alone = config.model_copy(update={"network": config.network.model_copy(update={"enabled": False})})
    assert check_tasks(alone) == []


# Writes frames to the socket that a worker shares with its node, then answers as it should.
FORGER = """
import json, os, stat, struct
for descriptor in range(3, 64):
    try:
        if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            data = json.dumps({}).encode()
            os.write(descriptor, (struct.pack(">I", len(data)) + data) * 3)
    except OSError:
        pass
answer = 2
"""


@pytest.mark.slow
def test_a_text_that_writes_forged_replies_shifts_no_later_reward_and_they_are_counted(folder: Path) -> None:
    task = load_rewards("rewards", options(folder, "running"))
    item = task.make(1)
    texts = ("answer = 2", "answer = 3", FORGER.format('{"reward": 1.0, "parts": {}}'), "answer = 3", "answer = 2", "")
    with capture_logs() as logs:
        assert [task.verify(item, text) for text in texts] == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    assert [(log["event"], log["task"], log["now"], log["all"]) for log in logs] == [
        ("replies to no request are dropped", "rewards", 3, 3)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("said", ['{"reward": 1.0, "parts": 5}', '{"reward": True}', '{"reward": {}}', "[]", "5"])
def test_a_worker_that_a_text_has_changed_says_what_is_no_reward_and_ends_nothing(folder: Path, said: str) -> None:
    task = load_rewards("rewards", options(folder, "running"))
    item = task.make(1)
    with capture_logs() as logs:
        assert task.verify(item, f"import __main__; __main__.Functions.score = lambda *_: {said}") == 0.0
        assert task.verify(item, "answer = 2") is None
    assert [log["event"] for log in logs] == ["unscorable"]


def test_functions_of_one_name_are_numbered() -> None:
    made = [function(print, name) for name in ("a", "b", "a", "a")]
    assert Functions(made, [], 0, 1, tokens_of("")).names == ["a", "b", "a_2", "a_3"]


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("./a b/rewards.py:accuracy", Spec("./a b/rewards.py", "accuracy")),
        ("trl:think_format_reward", Spec("trl.rewards", "think_format_reward")),
        ("some.package:make(limit=3, name='a:b')", Spec("some.package", "make", {"limit": 3, "name": "a:b"})),
        ("judge:http://127.0.0.1:1/v1", Spec("judge", "http://127.0.0.1:1/v1")),
    ],
)
def test_a_function_is_named_by_where_it_is(text: str, spec: Spec) -> None:
    assert parse_spec(text) == spec


@pytest.mark.parametrize(
    "text", ["./rewards.py", "rewards", "trl:", ":a", "a:b(1)", "a:b(c=print())", "a:b(c=1", "a:b-c"]
)
def test_what_names_no_function_is_one_clear_line(text: str) -> None:
    with pytest.raises(UserError, match="reward function"):
        parse_spec(text)


def test_a_function_that_pays_a_text_by_those_beside_it_is_refused_and_one_that_pays_otherwise_again_is_found() -> None:
    best = function(lambda completions, **_: [float(text == max(completions)) for text in completions], "best")
    counts = iter(range(100))
    counting = function(lambda completions, **_: [next(counts) for _ in completions], "counting")
    steady = function(lambda completions, **_: [len(text) for text in completions], "steady")
    answers = [ONE, ONE._replace(text="333")]
    with pytest.raises(RewardError, match="best pays a completion by those beside it"):
        Functions([steady, best], [1, 1], 0, 1, tokens_of("")).trial(answers)
    rewards, unlike, seconds = Functions([steady, counting], [1, 1], 0, 1, tokens_of("")).trial(answers)
    assert (rewards[0], unlike) == ([1.0, 3.0], "counting")
    assert len(seconds) == 2 and min(seconds) > 0


def test_three_functions_of_trl_run_as_they_are() -> None:
    specs = (
        "trl:accuracy_reward",
        "trl:think_format_reward",
        "trl:get_soft_overlong_punishment(max_completion_len=60, soft_punish_cache=20)",
    )
    made = [load_function("rewards", parse_spec(spec), {}) for spec in specs]
    functions = Functions(made, [1.0, 1.0, 1.0], -1.0, 2.0, tokens_of(""))
    row = CHAT._replace(columns={"solution": r"$\frac{1}{3}$"})
    *wrong, right = functions.score([row._replace(text=text) for text in trial_texts(*row[:2])])
    assert right["parts"] == {
        "accuracy_reward": 1.0,
        "think_format_reward": 1.0,
        "soft_overlong_punishment_reward": pytest.approx(-0.4),  # of 48 characters
    }
    assert {row["parts"]["accuracy_reward"] for row in wrong} == {0.0}
    assert functions.score([row._replace(columns={"solution": "no formula"})])[0]["parts"].keys() == {
        "think_format_reward",
        "soft_overlong_punishment_reward",
    }


@pytest.mark.slow
def test_rows_become_questions_scored_in_a_worker_and_their_functions_code_is_in_the_key(folder: Path) -> None:
    given = options(folder, "accuracy", "brevity", weights=[1.0, 0.5])
    task = load_rewards("rewards/sums", given)
    assert (task.size, task.names, task.unshared) == (20, ("accuracy", "brevity"), "")
    item = task.make(4)
    assert item.question == "4+4="
    right, wrong = (task.verify(item, text) for text in ("8", "7"))
    assert isinstance(right, Scored) and isinstance(wrong, Scored)
    assert (right, wrong) == (1.25, 0.25)
    assert right.parts == {"accuracy": 1.0, "brevity": 0.5}
    same = load_rewards("rewards/sums", {**given, "isolate": "none"})
    assert (same.key, same.unshared) == (task.key, "")
    ranged = load_rewards("rewards/sums", {**given, "judge": True, "range": [0.0, 1.5]})
    assert ranged.unshared.startswith("its functions may use the network")
    (folder / "copy").mkdir()
    (folder / "copy" / "rewards.py").write_text(FUNCTIONS + "\n")
    changed = {**options(folder / "copy", "accuracy", "brevity", weights=[1.0, 0.5]), "path": given["path"]}
    assert len({task.key, ranged.key, load_rewards("rewards/sums", changed).key}) == 3


@pytest.mark.slow
def test_own_texts_of_a_round_are_one_call_as_in_trl_and_peers_texts_are_a_call_each(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "rewards.py").write_text(
        "def counted(completions, **kwargs):\n"
        "    if 'raise' in completions:\n"
        "        raise ValueError('not this one')\n"
        "    return [1 / len(completions) for _ in completions]\n"
    )
    given = {**options(tmp_path, "counted"), "path": folder / "rows.jsonl"}
    with pytest.raises(UserError, match="pays a completion by those beside it"):
        load_rewards("rewards/counted", given)
    (tmp_path / "rewards.py").write_text(
        (tmp_path / "rewards.py").read_text().replace("1 / len(completions)", "1 / max(len(completions) - 16, 1)")
    )
    task = load_rewards("rewards/counted", given)
    texts = [Answer(task, task.make(at), str(at)) for at in range(20)]
    assert Scoring(texts, is_own=True).wait(60) == [0.25] * 20
    assert Scoring(texts, is_own=False).wait(60) == [1.0] * 20
    texts[7] = texts[7]._replace(text="raise")
    with capture_logs() as logs:
        assert Scoring(texts, is_own=True).wait(60) == [*[1.0] * 7, None, *[1.0] * 12], "alone, each says what it is"
    assert [log["reason"] for log in logs] == ["counted raised ValueError: not this one (rewards.py, line 3)"]
    functions = {"here:counted": lambda completions, **_: [1 / max(len(completions) - 16, 1) for _ in completions]}
    here = load_rewards("rewards", {**given, "functions": ["here:counted"]}, functions)
    assert score([text._replace(task=here) for text in texts]) == [0.25] * 20
    read = prompted(here, TaskConfig(name="rewards", answer="boxed"))
    boxed = [text._replace(task=read, text=f"\\boxed{{{at}}}") for at, text in enumerate(texts)]
    assert score([*boxed, boxed[0]._replace(text="none")]) == [*[0.25] * 20, 0.0]


@pytest.mark.slow
def test_a_program_that_a_function_has_started_ends_with_its_time(folder: Path, tmp_path: Path) -> None:
    words = ["sleep", f"600.{os.getpid()}"]
    rows = write(tmp_path / "rows.jsonl", [{"prompt": "a?", "answer": words[1]}])
    task = load_rewards("rewards", {**options(folder, "starting", seconds=1.0), "path": rows})
    assert task.verify(task.make(0), "slow") is None
    left = [process for process in psutil.process_iter(["cmdline", "status"]) if process.info["cmdline"] == words]
    _, alive = psutil.wait_procs(left, timeout=10)
    assert (task.verify(task.make(0), "quick"), alive) == (0.5, [])


@pytest.mark.slow
def test_a_function_may_import_torch_and_one_that_writes_is_told_why_it_cannot(folder: Path) -> None:
    task = load_rewards("rewards", options(folder, "temporary"))
    assert task.verify(task.make(0), "") == 1.0
    with pytest.raises(UserError, match=r"writing raised PermissionError.*, unless the option judge is true"):
        load_rewards("rewards", options(folder, "writing"))


@pytest.mark.slow
def test_where_memory_runs_out_the_functions_end_before_the_node(folder: Path) -> None:
    task = load_rewards("rewards", options(folder, "patient"))
    assert task.verify(task.make(0), "") == 1.0


@pytest.mark.slow
def test_a_function_that_does_harm_finds_no_network_and_changes_no_file(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "harm"
    rows = write(tmp_path / "rows.jsonl", [{"prompt": "a?", "answer": str(target)}])
    (tmp_path / "rewards.py").write_text(FUNCTIONS)
    task = load_rewards("rewards", {**options(tmp_path, "harmful"), "path": rows})
    assert (task.unshared, task.verify(task.make(0), "harm")) == ("", 0.0)
    assert not target.exists()
    assert (tmp_path / "rewards.py").read_text() == FUNCTIONS


def test_where_a_machine_cannot_confine_the_functions_run_and_nothing_is_shared(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot() -> None:
        raise ConfinementError("no Landlock")

    monkeypatch.setattr(functions, "confine", cannot)
    request = {
        "task": "rewards",
        "functions": [f"{folder / 'rewards.py'}:accuracy"],
        "weights": [1.0],
        "range": [0.0, 1.0],
        "tokenizer": "",
        "confine": True,
    }
    _, said = functions.begin(request)
    assert said["unconfined"] == "no Landlock"
    with pytest.raises(UserError, match="no Landlock"):  # one that was confined when the node began
        functions.begin({**request, "code": said["code"]})


@pytest.mark.slow
def test_what_pays_otherwise_in_another_process_trains_its_maker_alone(folder: Path) -> None:
    config = TaskConfig(name="rewards/luck", options=options(folder, "accuracy", "hashed"))
    tasks = load_tasks([config], WHOLE)
    (task,) = tasks.tasks
    assert task.unshared == "the function hashed does not pay the same text the same again"
    assert tasks.shared(task.key) is None
    assert task.verify(task.make(1), "2") is not None
    item = task.make(1)
    group = Group(task.key, 1, item.question, (one_turn("2", True, 1.0), one_turn("3", True, 0.0)), "peer", 0)
    assert check(encode(group), tasks, 8).reason == "unknown_task"


@pytest.mark.slow
def test_a_text_that_takes_too_long_earns_0_and_one_of_too_much_memory_or_that_no_function_can_tell_is_unscorable(
    folder: Path,
) -> None:
    task = load_rewards("rewards", options(folder, "slow", "unsure", seconds=0.3))
    item = task.make(1)
    assert [task.verify(item, text) for text in ("2", "?", "slow", "huge", "2")] == [1.5, 0.5, 0.0, None, 1.5]
    assert isinstance(task.verify(item, "slow"), OutOfTime)
    alone = load_rewards("rewards", options(folder, "unsure"))
    with capture_logs() as logs:
        assert [alone.verify(item, text) for text in ("2", "?")] == [1.0, None]
    assert [(log["event"], log["reason"]) for log in logs] == [("unscorable", "unsure returned None")]


@pytest.mark.slow
def test_a_function_that_hangs_is_told_when_it_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.tasks.rewards.rows.FIRST_CALLS_S", 0.2)
    with pytest.raises(UserError, match=r"did not pay 8 texts, each a few times, in 0.28 s: .*option seconds"):
        load_rewards("rewards", options(folder, "stuck", seconds=0.01))


@pytest.mark.slow
def test_hostile_formulas_end_with_their_process_and_cost_nobody(folder: Path, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", [{"prompt": [{"role": "user", "content": "1/3?"}], "solution": "$1/3$"}])
    task = load_rewards("rewards", {"path": rows, "functions": ["trl:accuracy_reward"], "seconds": 1.0})
    item = task.make(0)
    before = {child.pid for child in psutil.Process().children()}
    assert task.verify(item, r"\boxed{\frac{1}{3}}") == 1.0
    assert isinstance(task.verify(item, r"\boxed{9^{9^{9^{9}}}}"), OutOfTime)
    assert task.verify(item, r"\boxed{\frac{1}{3}}") == 1.0
    assert before - {child.pid for child in psutil.Process().children()}


@pytest.mark.slow
def test_messages_become_an_instruction_examples_and_a_question(folder: Path, tmp_path: Path) -> None:
    roles = ("system", "user", "assistant", "user")
    prompt = [{"role": role, "content": text} for role, text in zip(roles, ("Add.", "1+1=", "2", "2+2="), strict=True)]
    rows = [{"prompt": prompt, "level": 3}, {"prompt": prompt[1:2], "source": "b"}]
    functions = [f"{folder / 'rewards.py'}:unsure"]
    task = load_rewards("rewards", {"path": write(tmp_path / "rows.jsonl", rows), "functions": functions})
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"source": None, **rows[0]}, rows[1]]), tmp_path / "r.parquet"
    )
    assert load_rewards("rewards", {"path": tmp_path / "r.parquet", "functions": functions}).key == task.key
    item, other = task.make(0), task.make(1)
    assert (item.system, item.examples, item.question) == ("Add.", (("1+1=", "2"),), "2+2=")
    assert (other.system, other.examples, other.question) == ("", (), "1+1=")
    asked = prompted(task, TaskConfig(name="rewards", instruction="Think.")).make(0)
    assert (asked.system, asked.examples) == ("Think.", item.examples)
    assert task.rows[item.content].columns == {"level": 3, "source": None}
    assert task.rows[item.content].prompt == prompt
    assert task.verify(item, "4") == 1.0


@pytest.mark.parametrize(
    ("rows", "more", "complaint"),
    [
        ([{"question": "a?"}], {}, "its columns are question: the option prompt names another"),
        ([{"prompt": [{"role": "assistant", "content": "a"}]}], {}, "neither a text nor messages"),
        ([{"prompt": " "}], {}, "a question has 1 to 64 KiB"),
        ([], {}, "holds no rows"),
        ([{"prompt": "a?"}], {"weights": [1, 2]}, "weights has 2 numbers for 1 functions"),
        ([{"prompt": "a?"}], {"range": [1, 1]}, "range goes from 1 to 1"),
        ([{"prompt": "a?"}], {"functions": []}, "at least 1 item"),
        ([{"prompt": "a?"}], {"functions": ["judge:ftp://a"], "model": "m"}, "judge:http://"),
        ([{"prompt": "a?"}], {"functions": ["judge:http://a"]}, "name the judge's model"),
        ([{"prompt": "a?"}], {"judge": True, "isolate": "none"}, "what a judge pays is not shared"),
        ([{"prompt": "a?"}], {"functions": ["./rewards.py"]}, "named as ./rewards.py:NAME"),
        ([{"prompt": "a?"}], {"tokenizer": "none.json"}, "cannot read none.json"),
    ],
)
def test_a_bad_row_or_option_is_one_clear_line(
    tmp_path: Path, rows: list[object], more: dict[str, object], complaint: str
) -> None:
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=complaint):
        load_rewards("rewards", {"path": path, "functions": ["trl:think_format_reward"], **more})


@pytest.mark.parametrize("name", ["nothing", "os"])
def test_a_function_that_is_not_there_is_one_clear_line(folder: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"has no reward function '{name}'"):
        load_function("rewards", parse_spec(f"{folder / 'rewards.py'}:{name}"), {})


@pytest.mark.slow
def test_paths_of_functions_begin_at_the_file_that_says_them_and_stay_at_home(folder: Path) -> None:
    config = folder / "swarm.toml"
    config.write_text(
        '[[tasks]]\nname = "rewards/sums"\noptions = { path = "rows.jsonl", functions = ["rewards.py:accuracy"] }\n'
    )
    (listed,) = load_config(config).tasks
    assert listed.options["functions"] == [f"{folder / 'rewards.py'}:accuracy"]
    (described,) = describe_tasks([listed])
    assert described.options == "{}"
    manifest = make_manifest(Identity(bytes(32)), "s", 1, JoinPolicy.OPEN, [described])
    assert adopt_tasks(manifest, [listed]) == [listed]
    with pytest.raises(UserError, match="needs rows and reward functions of yours"):
        adopt_tasks(manifest, [])
    harm = folder / "harm"
    hostile = json.dumps({"functions": [f"pathlib:Path(path='{harm}')"], "path": str(harm), "judge": True})
    manifest = make_manifest(Identity(bytes(32)), "s", 1, JoinPolicy.OPEN, [described._replace(options=hostile)])
    assert adopt_tasks(manifest, [listed]) == [listed]  # a founder's functions are never looked at


class Judging(BaseHTTPRequestHandler):
    """Pays by the answer that stands in what it is asked."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)  # type: ignore[attr-defined]
        answer = asked["messages"][1]["content"].partition("Answer:\n")[2].partition("\n")[0]
        replies = {"8": "<think>8 is 0.1?</think> 0.75", "?": "I cannot say"}
        body = json.dumps({"choices": [{"message": {"content": replies.get(answer, "0")}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def judge() -> Iterator[HTTPServer]:
    with HTTPServer(("127.0.0.1", 0), Judging) as server:
        server.asked = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_a_judge_pays_own_groups_and_is_never_shared(folder: Path, judge: HTTPServer) -> None:
    url = f"judge:http://127.0.0.1:{judge.server_port}/v1"
    task = load_rewards("rewards", options(folder, "accuracy", url, model="m", rubric="Be strict."))
    assert isinstance(task, RewardsTask)
    assert task.unshared == "nobody else can check what a judge pays"
    item = task.make(4)
    assert [task.verify(item, text) for text in ("8", "7", "?")] == [1.75, 0.0, None]
    asked = judge.asked[-3]  # type: ignore[attr-defined]
    assert (asked["model"], asked["messages"][0]["content"]) == ("m", "Be strict.")
    assert asked["messages"][1]["content"].startswith("Question:\n4+4=\n\nAnswer:\n8\n")


@pytest.mark.parametrize(
    ("reply", "paid"), [("0.7", 0.7), ("Grade: 1.", 1.0), ("1.0", 1.0), ("<think>0.2</think>\n0", 0.0), (".5", 0.5)]
)
def test_a_judges_number_is_read(reply: str, paid: float) -> None:
    assert paid_by(reply) == paid


@pytest.mark.parametrize("reply", ["", "good", "7", "-1", "10", "1.5"])
def test_a_judge_that_says_no_number_from_0_to_1_pays_nothing(reply: str) -> None:
    with pytest.raises(JudgeError):
        paid_by(reply)


@pytest.mark.slow
def test_a_judge_that_does_not_answer_is_one_clear_line_at_the_start(folder: Path) -> None:
    with pytest.raises(UserError, match=r"the judge at http://127.0.0.1:9/v1 does not answer"):
        load_rewards("rewards", options(folder, "judge:http://127.0.0.1:9/v1", model="m"))


@pytest.mark.slow
def test_functions_and_rows_are_given_on_the_command_line(folder: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    asked = ["node", "--reward", "./rewards.py:accuracy", "--reward", "rewards.py:brevity", "--data", "rows.jsonl"]
    assert run([*asked, "--dry-run"], debug=False) == 0
    shown = capsys.readouterr().out
    assert 'name = "rewards/rows"' in shown and f'path = "{folder / "rows.jsonl"}"' in shown
    assert f'functions = ["{folder}/rewards.py:accuracy", "{folder}/rewards.py:brevity"]' in shown
    assert run([*asked[:3], "--dry-run"], debug=False) == 2
    assert "--reward and --data go together" in capsys.readouterr().err
    weighted = ["--reward", "./rewards.py:accuracy=2", "--reward", "./rewards.py:brevity", "--data", "rows.jsonl"]
    assert run(["node", *weighted, "--dry-run"], debug=False) == 0
    shown = capsys.readouterr().out
    assert f'functions = ["{folder}/rewards.py:accuracy", "{folder}/rewards.py:brevity"]' in shown
    assert "weights = [2.0, 1.0]" in shown


@pytest.mark.parametrize(
    ("given", "function", "weight"),
    [
        ("/a.py:f", "/a.py:f", None),
        ("/a=1.py:f=0.5", "/a=1.py:f", 0.5),
        ("/a=1.py:f", "/a=1.py:f", None),
        ("trl:get_soft(limit=3)", "trl:get_soft(limit=3)", None),
        ("trl:get_soft(limit=3)=1e-1", "trl:get_soft(limit=3)", 0.1),
        ("judge:http://a:1/v1?q=1", "judge:http://a:1/v1?q=1", None),
        ("m:f=-1", "m:f", -1.0),
    ],
)
def test_a_weight_follows_a_functions_name(given: str, function: str, weight: float | None) -> None:
    (table,) = tasks_given(None, [given], "OWNER/NAME")
    assert table["options"]["functions"] == [function]
    assert table["options"].get("weights") == (None if weight is None else [weight])


def test_a_weight_that_is_none_is_one_clear_line() -> None:
    for weight in ("two", "nan", "inf"):
        with pytest.raises(UserError, match=rf"--reward wants a number after NAME=, got {weight!r}"):
            tasks_given(None, [f"a.py:f={weight}"], "OWNER/NAME")


def test_the_check_says_what_cannot_be_scored_or_is_not_paid_or_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("digest", "digest_elsewhere"):
        monkeypatch.setattr(f"node.tasks.check.{name}", lambda *_: "")

    def found(verify: Any) -> list[Finding]:
        task = SimpleNamespace(
            key=TaskKey("rewards/sums", 1, ""),
            make=lambda seed: Item(f"{seed}?", str(seed % 2)),
            verify=verify,
            outside="it pays 2",
        )
        findings = list(tried(TaskConfig(name="rewards/sums"), task))  # type: ignore[arg-type]
        assert Finding(True, "it pays 2") in findings
        return [finding for finding in findings if "bare answers" in finding.line]

    assert found(lambda *_: None) == [(False, "none of the rows' bare answers can be scored")]
    ((holds, line),) = found(lambda item, text: None if item.answer == "1" else float(text == item.answer))
    assert holds and re.fullmatch(r"the rows' bare answers earn 1 to 1, but \d\d of 64 cannot be scored", line)
    ((holds, line),) = found(lambda *_: 0.0)
    assert holds and line.endswith("earn 0 to 0: the right answer is not paid, unless it comes in another form")


@pytest.mark.slow
def test_the_check_shows_what_a_policy_says_and_earns_and_what_fools_the_functions(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    functions = ["--reward", "rewards.py:accuracy=0.5", "--reward", "rewards.py:brevity=0.5", "--data", "rows.jsonl"]
    assert run(["tasks", "check", *functions, "--model", "builtin", "--fuzz"], debug=False) == 1
    said = capsys.readouterr().out
    assert said.count("  said  ") == said.count("  earns  ") == 10
    assert said.count("  accuracy ") == said.count("  brevity ") == 10
    fooled = re.search(r"FAILS  fuzz, an empty text: earns 0\.5 at most, where a wrong answer earns ([0-9.]+):", said)
    assert fooled and float(fooled[1]) in (0.167, 0.25), said  # (1 / (1 + letters)) / 2; the task draws the questions
    assert said.count("FAILS") == 1 and said.count("  ok  fuzz, ") == 5


@pytest.mark.slow
def test_a_formula_that_math_verify_does_not_finish_delays_no_own_text_and_changes_no_later_reward(
    tmp_path: Path,
) -> None:
    rows = write(tmp_path / "rows.jsonl", [{"prompt": [{"role": "user", "content": "2+2="}], "solution": "4"}])
    task = load_rewards("rewards", {"path": rows, "functions": ["trl:accuracy_reward"], "seconds": 60.0})
    item, quota = task.make(0), TimeQuota(4.0)
    usual = [Answer(task, item, f"\\boxed{{{text}}}") for text in ("4", "5", "x=4")]
    before = [Scoring(usual, is_own=is_own).wait(60) for is_own in (True, False)]
    assert before == [[1.0, 0.0, 1.0]] * 2
    slow = Scoring([Answer(task, item, "\\boxed{(((9!)!)!)!}", quota=quota)], is_own=False)
    wait_until(lambda: quota.spent(time.monotonic()) > 0.2, timeout=60)
    assert Scoring(usual, is_own=True).wait(60) == before[0]
    assert not quota.is_spent(time.monotonic()), "the formula is still looked at"
    assert slow.wait(60) == [None]
    assert Scoring(usual, is_own=False).wait(60) == before[1]

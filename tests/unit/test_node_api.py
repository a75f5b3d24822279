"""The Python interface: `from gossamer import Node`, which is `node.api` and nothing else."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gossamer
import pytest
from trl.rewards import think_format_reward

import node.api
import node.policy.load
import node.run
from node.api import Node, Swarm, UserError, spec_of
from node.errors import for_shell
from node.tasks.rewards.rows import LocalRewards, load_rewards
from node.tasks.scoring.verdicts import Scored

ROOT = Path(__file__).parents[2]
ROWS = [{"prompt": f"{n}+{n}=", "answer": str(2 * n)} for n in range(20)]


def accuracy(completions, answer, **kwargs):
    return [float(text.strip() == right) for text, right in zip(completions, answer, strict=True)]


@pytest.mark.slow
def test_gossamer_is_another_name_of_the_interface_and_loads_nothing_twice() -> None:
    assert gossamer.Node is node.api.Node and gossamer.Swarm is node.api.Swarm
    program = (
        "import sys, gossamer, node.api, node.config\n"
        "names = [n for n in list(sys.modules) if n.split('.')[0] in ('gossamer', 'node', 'protocol', 'collectives')]\n"
        "ours = [f for n in names if (f := getattr(sys.modules[n], '__file__', None))]\n"
        "assert len(ours) == len(set(ours)) > 10, ours\n"
        "assert 'torch' not in sys.modules\n"
        "assert gossamer.UserError is node.config.UserError"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "node" / "public")])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=60)


def test_the_version_is_that_of_what_is_installed() -> None:
    assert gossamer.__version__ == importlib.metadata.version("gossamer")


@pytest.mark.slow
@pytest.mark.parametrize("hiding", ["node.py", "protocol.py", "collectives/__init__.py"])
def test_a_file_beside_a_script_that_hides_a_package_of_ours_is_named(hiding: str, tmp_path: Path) -> None:
    (tmp_path / hiding).parent.mkdir(exist_ok=True)
    (tmp_path / hiding).write_text("x = 1\n")
    (tmp_path / "train.py").write_text("from gossamer import Node\n")
    path = os.pathsep.join([str(ROOT), str(ROOT / "node" / "public")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "train.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    name = hiding.partition("/")[0].removesuffix(".py")
    said = f"ImportError: {tmp_path / hiding} hides Gossamer's package '{name}': rename that file or folder"
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, said)


@pytest.mark.slow
@pytest.mark.parametrize("code", ["from node.cli import main; main(['--version'])", "from gossamer import Node"])
def test_a_package_of_others_that_overwrote_files_of_ours_is_named(code: str, tmp_path: Path) -> None:
    installed = tmp_path / "site"
    for name in ("node", "collectives", "protocol"):
        shutil.copytree(ROOT / name, installed / name, ignore=shutil.ignore_patterns("__pycache__", "builtin"))
    (installed / "protocol" / "__init__.py").write_text("import what_protocol_of_pypi_needs\n")
    about = installed / "protocol-0.37.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: protocol\nVersion: 0.37\n")
    (about / "top_level.txt").write_text("protocol\n")
    path = os.pathsep.join([str(installed), str(installed / "node" / "public")])
    command, environment = [sys.executable, "-P", "-c", code], {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "rror: another package writes into the same folders: protocol. Give" in done.stderr.splitlines()[-1]
    assert "pip uninstall protocol, and install gossamer anew" in done.stderr.splitlines()[-1]


def test_a_function_of_a_package_or_a_file_is_named_and_one_of_this_process_is_not() -> None:
    assert spec_of(think_format_reward) == "trl.rewards.format_rewards:think_format_reward"
    assert spec_of(lambda **_: [1.0]) is None
    assert spec_of(for_shell) in (f"{ROOT / 'node' / 'errors.py'}:for_shell", "node.errors:for_shell")

    def inside(**_: object) -> list[float]:
        return [1.0]

    assert spec_of(inside) is None


@pytest.mark.slow
def test_functions_of_this_process_are_paid_here_and_never_shared(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    given = {"here:accuracy": accuracy}
    task = load_rewards("rewards/rows", {"path": rows, "functions": list(given)}, given)
    assert isinstance(task, LocalRewards)
    right, wrong = (task.verify(task.make(3), text) for text in ("6", "7"))
    assert isinstance(right, Scored)
    assert (right, right.parts, wrong) == (1.0, {"accuracy": 1.0}, 0.0)
    assert "of this process alone" in task.unshared
    with pytest.raises(UserError, match="given in Python: start the node there"):
        load_rewards("rewards/rows", {"path": rows, "functions": list(given)})


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"rewards": [accuracy]}, "rewards and data go together"),
        ({"data": ROWS}, "rewards and data go together"),
        ({"sampling": {"locale": 4}}, "unknown configuration key 'sampling.locale'"),
        ({"rewards": [lambda **_: [1.0]], "data": ROWS, "swarm": "gossamer://a"}, "in a swarm, import it from a file"),
        ({"rewards": [lambda **_: [1.0], lambda **_: [0.0]], "data": ROWS}, "two functions are called '<lambda>'"),
    ],
)
def test_what_is_of_no_use_is_one_clear_line(tmp_path: Path, given: dict[str, object], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        Node("builtin", folder=tmp_path / "n", **given)
    assert not (tmp_path / "n").exists()


def test_a_swarm_takes_functions_that_its_processes_can_import_alone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the function <lambda> is of this process alone"):
        Swarm(2, "builtin", rewards=[lambda **_: [1.0]], data=ROWS, out=tmp_path / "s")


def test_a_node_loads_its_model_once_for_all_that_it_is_asked_until_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[object] = []
    load = node.policy.load.load_policy
    monkeypatch.setattr("node.policy.load.load_policy", lambda *args: loaded.append(args) or load(*args))
    one = Node("builtin", tasks=["builtin/sums"], folder=tmp_path / "n")
    one.generate(["1+2="], max_tokens=2)
    one.evaluate(count=2)
    assert one.policy is one.policy and len(loaded) == 1
    monkeypatch.setattr("node.run.run_node", lambda *_, **__: None)
    one.train(rounds=1)
    one.generate(["1+2="], max_tokens=2)
    assert len(loaded) == 2


@pytest.mark.slow
def test_a_node_trains_in_a_notebook_answers_is_scored_and_exported(tmp_path: Path) -> None:
    def inside(completions, answer, **kwargs):
        return accuracy(completions, answer)

    alone = {"network": {"enabled": False}, "sampling": {"completions": 2}}
    rows: list[dict] = []
    one = Node("builtin", rewards=[inside], data=iter(ROWS), folder=tmp_path / "n", **alone)
    assert one.metrics == [] and one.round == 0
    assert len(one.train(rounds=2, callbacks=[rows.append])) == 2
    assert [row["round"] for row in rows] == [1, 2] and "rewards/inside/mean" in rows[0]
    assert [row["round"] for row in one.train(rounds=9, callbacks=[lambda row: row["round"] == 3])] == [3]
    assert one.metrics[:2] == rows
    answers = one.generate(["1+2=", "2+2="], n=2)
    assert [len(group) for group in answers] == [2, 2]
    assert one.generate(["1+2=", "2+2="], n=2) == answers
    assert one.evaluate(count=5)["greedy"]["overall"]["questions"] <= 5
    assert (one.export(tmp_path / "out") / "model.safetensors").exists()
    assert Node(folder=tmp_path / "n").round == 3
    with (tmp_path / "n" / "metrics.jsonl").open("a") as file:
        file.write('{"round":4}\n')  # as by a node that was killed before it saved
    rows.clear()
    one.train(rounds=1, callbacks=[rows.append])
    assert [row["round"] for row in rows] == [4, 5]


LOGS_ITSELF = """
import logging, sys, torch
from gossamer import Node
logging.basicConfig(filename=sys.argv[1], level=logging.INFO)
handlers = list(logging.getLogger().handlers)
torch.set_num_threads(2)
logging.getLogger("mine").info("before")
alone = {"network": {"enabled": False}, "sampling": {"external": 0}, "threads": 1}
Node("builtin", tasks=["builtin/sums"], folder=sys.argv[2], **alone).train(1)
logging.getLogger("mine").info("after")
assert logging.getLogger().handlers == handlers and torch.get_num_threads() == 2
"""


@pytest.mark.slow
def test_a_program_keeps_its_own_logs_and_threads(tmp_path: Path) -> None:
    mine, folder = tmp_path / "mine.log", tmp_path / "n"
    command = [sys.executable, "-c", LOGS_ITSELF, str(mine), str(folder)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, mine.read_text().splitlines()) == (0, ["INFO:mine:before", "INFO:mine:after"]), done.stderr
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "finished" and "finished" in done.stderr
    assert "mine" not in {event["logger"] for event in events}


@pytest.mark.slow
def test_a_swarm_of_processes_shares_what_can_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "digit_rewards.py").write_text(
        "def digits(completions, **kwargs):\n    return [float(len(text.strip()) == 2) for text in completions]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    from digit_rewards import digits  # type: ignore[import-not-found]

    seen: list[tuple[str, int]] = []
    swarm = Swarm(2, "builtin", rewards=[digits], data=ROWS, out=tmp_path / "s")
    nodes = swarm.train(rounds=3, callbacks=[lambda name, row: seen.append((name, row["round"]))])
    assert sorted(seen) == [(f"n{at}", number) for at in range(2) for number in (1, 2, 3)]
    assert [len(node.metrics) for node in nodes] == [3, 3]
    seen.clear()
    swarm.train(rounds=4, callbacks=[lambda name, row: seen.append((name, row["round"]))])
    assert sorted(seen) == [("n0", 4), ("n1", 4)]
    assert "rewards/digits/mean" in nodes[0].metrics[0]
    with pytest.raises(UserError, match="holds a run with other settings"):
        Swarm(3, "builtin", rewards=[digits], data=ROWS, out=tmp_path / "s").train(rounds=3)

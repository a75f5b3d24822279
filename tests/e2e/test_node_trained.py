"""What came of a node is scored and exported from its folder, adapters too, by the command line."""

import json
import re
from io import StringIO
from pathlib import Path

import pytest

from node.cli.app import run
from node.operations.given import task_config
from tests.commands import start_node
from tests.swarms import small_config

ALONE = {"network": {"enabled": False}, "sampling": {"local": 4, "external": 0, "completions": 32}}
ASK = ["--count", "12", "--greedy", "--json"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A node that trained adapters for some rounds, at a rate that makes itself felt."""
    folder = tmp_path_factory.mktemp("trained") / "node"
    rows = [{"question": f"{number}+1=", "answer": "1"} for number in range(100)]  # 1 is what it says now and then
    (folder.parent / "ones.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = small_config(
        6,
        **ALONE,
        policy={"lora": {"r": 4}},
        trainer={"learning_rate": 0.05, "trl": {"scale_rewards": "group"}},
        tasks=[task_config(str(folder.parent / "ones.jsonl"))],
        eval={"every": "ends", "count": 12},
    )
    child = start_node(config, folder)
    child.join(60)
    assert child.exitcode == 0
    return folder


def questions_of(trained: Path) -> list[str]:
    """What a model without a node's folder has to be told to be asked the same."""
    return ["--task", str(trained.parent / "ones.jsonl")]


def evaluated(capfd: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    assert run(["eval", *arguments, *ASK], debug=False) == 0
    return json.loads(capfd.readouterr().out)["greedy"]


def test_eval_of_a_nodes_folder_gives_what_the_node_measured_itself(
    trained: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    report = evaluated(capfd, str(trained))
    last = json.loads((trained / "evaluations.jsonl").read_text().splitlines()[-1])
    assert last["round"] == 6
    assert report["overall"]["accuracy"] == last["accuracy"] and report["overall"]["low"] == last["accuracy_low"]
    assert report["overall"]["mean_length"] == last["mean_length"]
    before = evaluated(capfd, "builtin", *questions_of(trained))
    assert before["overall"]["mean_length"] != last["mean_length"], "the adapters did nothing: the test shows nothing"


def test_an_export_answers_as_the_node_and_its_card_tells_of_it(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(["export", str(trained), str(out)], debug=False) == 0
    capfd.readouterr()
    of_node = evaluated(capfd, str(trained))
    assert evaluated(capfd, str(out), *questions_of(trained)) == of_node
    card = (out / "README.md").read_text()
    assert "6 rounds" in card and "LoRA of rank 4, merged" in card and "greedy accuracy" in card
    for path in out.iterdir():
        assert path.suffix == ".safetensors" or str(Path.home()) not in path.read_text()
        assert path.suffix == ".safetensors" or str(trained.parent) not in path.read_text()
    assert run(["export", str(trained), str(out)], debug=False) == 2
    assert "exists already: choose another folder" in capfd.readouterr().err


def test_questions_and_answers_are_shown(trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    checkpoint = str(trained / "checkpoints" / "checkpoint-6")
    assert run(["eval", checkpoint, "--count", "3", "--completions", "2", "--show", "2"], debug=False) == 0
    printed = capfd.readouterr()
    assert printed.err.startswith(f"loading builtin with the adapters in {checkpoint} ...\n")
    lines = printed.out.splitlines()
    assert lines[0].startswith("dataset/ones  ") and lines[1].startswith("  right answer  ")
    assert sum(line.startswith("  right answer  ") for line in lines) == 2
    assert sum(line.startswith("  reward ") for line in lines) == 2 * (1 + 2)
    assert "pass@2" in lines[-3]
    assert lines[-1] == "3 different held-out questions; intervals count questions."


def test_damaged_adapters_are_one_line(trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "adapter_config.json").write_text("{")
    assert run(["eval", str(tmp_path)], debug=False) == 2
    assert "cannot read" in capfd.readouterr().err
    checkpoint = trained / "checkpoints" / "checkpoint-6"
    (tmp_path / "adapter_config.json").write_bytes((checkpoint / "adapter_config.json").read_bytes())
    assert run(["eval", str(tmp_path)], debug=False) == 2
    assert "cannot load the adapters in" in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("policy", ["node", "builtin"])
def test_a_person_asks_as_the_node_was_asked_and_gets_what_it_answers(
    policy: str, trained: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ones = ["--task", str(trained.parent / "ones.jsonl")]
    model = [str(trained)] if policy == "node" else ["builtin", *ones]
    assert run(["eval", *model, "--count", "12", "--greedy", "--show", "12"], debug=False) == 0
    asked_and_said = r"dataset/ones  (\S+)$.*?reward \S+  (?:finished|cut off )  (.*?)$"
    shown = re.findall(asked_and_said, capfd.readouterr().out, re.MULTILINE | re.DOTALL)
    assert len(shown) == 12 and (policy == "node" or len({said for _, said in shown}) > 3)
    monkeypatch.setattr("sys.stdin", StringIO("".join(f"{question}\n\n" for question, _ in shown)))
    assert run(["chat", *model], debug=False) == 0
    printed = capfd.readouterr()
    assert printed.out.splitlines() == [said for _, said in shown]
    adapters = f" with the adapters in {trained}/checkpoints/checkpoint-"
    assert printed.err.startswith(f"loading builtin{adapters if policy == 'node' else ' ...'}")


def test_a_task_with_an_environment_is_played_where_no_question_is_asked(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["chat", "builtin", "--task", "builtin/guess", "-n", "3", "--seed", "1"], debug=False) == 0
    question, *lines = capfd.readouterr().out.splitlines()
    assert re.fullmatch(r"#\d{5}: 10-16=", question)
    episodes = "\n".join(lines).split("\n\n")
    assert len(episodes) == 3
    for episode in episodes:
        assert re.fullmatch(r"→ .*(\n← (higher=|lower=|\?=)\n→ .*){0,2}\n\(reward [01]\)", episode), episode
    assert run(["chat", "builtin", "#00001: 10-16=", "--task", "builtin/guess"], debug=False) == 0
    assert "←" not in capfd.readouterr().out, "a question is asked"


def test_answers_are_drawn_and_bounded(trained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def chat(*arguments: str) -> list[str]:
        assert run(["chat", "builtin", *arguments], debug=False) == 0
        return capfd.readouterr().out.splitlines()

    drawn = chat("3+1=", "-n", "8")
    assert len(drawn) == 8 and len(set(drawn)) > 1 and drawn == chat("3+1=", "-n", "8")
    assert drawn != chat("3+1=", "-n", "8", "--seed", "1")
    assert {len(answer) for answer in chat("3+1=", "-n", "8", "--max-tokens", "1")} <= {0, 1}
    assert run(["chat", str(trained), "1" * 500], debug=False) == 2
    assert "this has 50" in capfd.readouterr().err

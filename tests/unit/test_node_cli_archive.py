"""`gossamer archive`, as a person types it: a real swarm, a process of its own, a peer that attacks, TRL's trainers."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from gossamer import Exchange

from node.archive.store import Archive, open_group, open_writer
from node.cli.app import run
from node.config import parse_config
from node.rollouts.group import Group, encode, one_turn
from node.swarm.founding import found
from node.swarm.inviting import make_invite
from node.swarm.joining import join
from node.swarm.peering import open_network
from node.swarm.sharing import topic_of_group
from node.swarm.swarm_folder import load_manifest
from node.tasks import Item, TaskKey, load_tasks
from node.tasks.questions import Split
from node.telemetry.status_server import ask
from protocol.credentials.invite import Invite
from protocol.credentials.manifest import JoinPolicy
from protocol.credentials.records import Address
from protocol.identity import Identity
from protocol.wire.compression import pack_content
from protocol.wire.envelope import Kind, seal
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("own_log_setup")
ROOT = Path(__file__).parents[2]
SUMS: dict[str, Any] = {"tasks": [{"name": "builtin/sums"}]}
SPLIT = Split(0.2, 7)
PROGRAM = """
import sys
from node.cli.app import run
status = run(sys.argv[1:], debug=False)
assert not {"torch", "transformers", "trl", "numpy", "matplotlib"} & set(sys.modules)
sys.exit(status)
"""


@pytest.fixture
def founder(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Exchange]:
    """The first member of a swarm; it allows archives unless a test says otherwise. The invite is in a file."""
    allows = getattr(request, "param", True)
    found(parse_config(SUMS), tmp_path / "first", "club", JoinPolicy.OPEN, [], SPLIT, archive=allows)
    with Exchange(tmp_path / "first", policy="a model") as member:
        invite = make_invite(tmp_path / "first", [], own=[Address.parse(member.address or "")])
        (tmp_path / "invite").write_text(str(invite))
        yield member


@contextmanager
def started(folder: Path, *options: str) -> Iterator[None]:
    """Run `gossamer archive` in a folder, with the state in its k0, until the end of the block."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, "archive", *options]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            wait_until((folder / "k0" / "observe.json").exists, 60, "the archive to run")
            yield
            process.send_signal(signal.SIGTERM)
            _, complaints = process.communicate(timeout=60)
            assert process.returncode == 0, complaints
        finally:
            process.kill()


def group_on(key: TaskKey, seed: int, item: Item) -> Group:
    made = (one_turn(item.answer, True, 1.0), one_turn("no", True, 0.0))
    return Group(key, seed, item.question, made, "hostile", 0, item.content)


def attack(folder: Path) -> None:
    """Publish, as a member that does not keep to the rules, a group on a held-out question and one on a false one."""
    invite = Invite.parse((folder / "invite").read_text())
    config = join(invite, parse_config(SUMS), folder / "liar")
    (task,) = load_tasks(config.tasks, SPLIT).tasks
    questions = {task.make(seed).question: seed for seed in range(100)}
    held = [seed for text, seed in questions.items() if SPLIT.holds_out(task.key.name, text)]
    asked = [seed for text, seed in questions.items() if not SPLIT.holds_out(task.key.name, text)]
    hidden = task.make(held[1])
    groups = [
        group_on(task.key, held[0], task.make(held[0])),
        group_on(task.key, held[1], Item(task.make(asked[0]).question, hidden.answer)),
    ]
    with open_network(config, folder / "liar") as network:
        wait_until(lambda: network.host.counters().peers, 30, "the liar to be linked")
        for group in groups:
            network.host.publish(encode(group), topic_of_group(group))
        reasons = {"held_out", "false_question"}
        wait_until(lambda: reasons <= set(ask(folder / "k0")["rejected"]), 30, "what was refused")


@pytest.mark.slow
def test_it_keeps_what_may_be_kept_of_a_real_swarm_and_needs_nothing_that_trains(
    founder: Exchange, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name = tmp_path / "club"
    with started(tmp_path, "run", f"@{tmp_path / 'invite'}", "--out", "club", "--state", "k0"):
        wait_until(lambda: founder.statistics()["swarm/peers"], 60, "the archive to be linked")
        attack(tmp_path)
        questions = founder.ask(3)
        for question in questions:
            assert founder.publish(question, [question.item.answer, "no"], [True, False])
        (marked,) = founder.ask(1)
        assert founder.publish(marked, [marked.item.answer, "no"], [True, True], kept=False)
        wait_until(lambda: len([*name.glob("groups/*/[!.]*")]) == 3, 30, "three groups")
    with started(tmp_path, "run", "--out", "club", "--state", "k0"):  # without the invite: the folder remembers
        (last,) = founder.ask(1)
        assert founder.publish(last, [last.item.answer, "no"], [True, True])
        wait_until(lambda: len([*name.glob("groups/*/[!.]*")]) == 4, 60, "four groups")
    kept = [group.group for group in Archive(name).groups(lambda *why: pytest.fail(str(why)))]
    assert {group.question for group in kept} == {question.text for question in [*questions, last]}
    assert marked.text not in {group.question for group in kept}
    rows_file = tmp_path / "rows" / "rows.jsonl"
    capfd.readouterr()  # what the members in this process have logged
    for words, line in (
        (["verify", str(name)], "swarm club: 4 groups, 8 answers, 1 signers; 0 damaged\n"),
        (["export", str(name), "--out", str(rows_file)], "8 rows of 4 groups, 1 signers\n"),
    ):
        assert run(["archive", *words], debug=False) == 0
        assert capfd.readouterr().out == line
    rows = [json.loads(text) for text in rows_file.read_text().splitlines()]
    assert {row["signer"] for row in rows} == {founder.node} and {row["base"] for row in rows} == {"a model"}


@pytest.mark.slow
@pytest.mark.parametrize("founder", [False], indirect=True)
def test_a_swarm_that_allows_no_archives_is_not_kept(
    founder: Exchange, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["archive", "run", f"@{tmp_path / 'invite'}", "--out", str(tmp_path / "c"), "--state", str(tmp_path / "k")]
    assert run(words, debug=False) == 2
    assert "swarm 'club' allows no archives: its founder has to say so" in capfd.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "c").exists() and not (tmp_path / "k").exists()


def test_a_key_never_lies_in_what_may_be_published(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "club")
    (tmp_path / "club").mkdir()
    for out, state in (
        ("club", "club/k"),
        ("club", "link/k"),
        ("club", "club"),
        ("k/club", "k"),
        ("club", "club/../club"),
    ):
        words = ["archive", "run", "no invite", "--out", str(tmp_path / out), "--state", str(tmp_path / state)]
        assert run(words, debug=False) == 2
        assert "choose --state and --out apart" in capfd.readouterr().err
    assert not [*(tmp_path / "club").iterdir()] and not (tmp_path / "k").exists()


@pytest.mark.slow
def test_who_joins_is_told_that_what_is_shared_is_public_and_lasting(
    founder: Exchange, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told = "what is shared in swarm 'club' is public and lasting"
    words = ["join", f"@{tmp_path / 'invite'}", "--state", str(tmp_path / "n"), "--model", "builtin", "--no-start"]
    assert run(words, debug=False) == 0
    assert told in capfd.readouterr().err
    with Exchange(tmp_path / "n"):  # and at each start
        pass
    assert told in capfd.readouterr().err
    words = ["found", "open", "--task", "builtin/sums", "--archive", "--state", str(tmp_path / "f"), "--no-start"]
    assert run(words, debug=False) == 0
    assert "public and lasting" in capfd.readouterr().err
    words = ["found", "shut", "--task", "builtin/sums", "--state", str(tmp_path / "g"), "--no-start"]
    assert run(words, debug=False) == 0
    assert "lasting" not in capfd.readouterr().err


def policy_in(folder: Path) -> Path:
    """The built-in policy as an ordinary model folder."""
    from node.policy.export import export_model
    from node.policy.load import load_policy

    export_model(load_policy(parse_config({}).policy), folder, "float32", "")
    return folder


@pytest.mark.slow
def test_trls_trainers_train_on_the_rows(founder: Exchange, tmp_path: Path) -> None:
    from datasets import load_dataset
    from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

    manifest = load_manifest(tmp_path / "first")
    assert manifest is not None
    with open_writer(tmp_path / "club", manifest, 10**9) as writer:
        identity = Identity.load(tmp_path / "first" / "identity.key")
        for question in founder.ask(8):
            group = group_on(question.task, question.seed, question.item)
            content = pack_content(encode(group), topic_of_group(group))
            writer.keep(open_group(seal(identity, writer.manifest.swarm, Kind.ITEM, 1, 1, content), writer.manifest))
    words = ["archive", "export", str(tmp_path / "club"), "--plain", "--out", str(tmp_path / "rows" / "rows.jsonl")]
    assert run(words, debug=False) == 0
    rows = load_dataset(str(tmp_path / "rows"), split="train", cache_dir=str(tmp_path / "cache"))  # by its card
    assert rows.num_rows == 16 and {"prompt", "completion", "reward", "task", "signer", "base"} <= set(
        rows.column_names
    )
    right = rows.filter(lambda row: row["reward"] == 1.0 and row["finished"])
    assert right.num_rows == 8
    model = str(policy_in(tmp_path / "model"))
    common: dict[str, Any] = {"max_steps": 2, "report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no"}
    sft = SFTTrainer(model, args=SFTConfig(str(tmp_path / "sft"), learning_rate=1e-3, **common), train_dataset=right)
    assert sft.train().training_loss > 0

    asked: list[str] = []

    def reward(completions: list[str], task: list[str], prompts: list[str], **_: Any) -> list[float]:
        asked.extend(prompts)
        return [float(len(text)) for text in completions]

    args = GRPOConfig(
        str(tmp_path / "grpo"),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=4,
        **common,
    )
    grpo = GRPOTrainer(model, reward_funcs=reward, args=args, train_dataset=rows)
    grpo.train()
    assert set(asked) <= set(rows["prompt"]) and grpo.state.global_step == 2

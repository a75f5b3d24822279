"""TRL's arguments for a node: each field of `GRPOConfig` is mapped, has no effect, or is refused in one line."""

import dataclasses
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import trl
from gossamer import GRPOTrainer
from peft import LoraConfig
from trl import GRPOConfig

from node.config import is_key, parse_config
from node.errors import UserError
from node.grpo_trainer import COUNTED, MAPPED, WITHOUT_EFFECT, check_config, rounds_of, settings_of

ROOT = Path(__file__).parents[2]
ROWS = [{"prompt": f"{n}+{n}=", "solution": str(2 * n)} for n in range(20)]


def accuracy(completions, solution, **kwargs):
    return [float(text.strip() == right) for text, right in zip(completions, solution, strict=True)]


def config(**fields: Any) -> GRPOConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return GRPOConfig(output_dir="out", bf16=False, **fields)


def test_every_field_that_is_named_is_one_of_trls_and_every_setting_one_of_ours() -> None:
    fields = {field.name for field in dataclasses.fields(GRPOConfig)}
    named = [*MAPPED, *COUNTED, *WITHOUT_EFFECT]
    assert set(named) <= fields and len(named) == len(set(named))
    assert all(map(is_key, MAPPED.values()))


def test_a_default_config_is_taken_and_what_it_says_becomes_settings() -> None:
    check_config(config())
    given = config(
        learning_rate=1e-4,
        num_generations=4,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        max_completion_length=16,
        epsilon=0.1,
        scale_rewards=False,
        report_to="none",
        chat_template_kwargs={"enable_thinking": False},
        max_steps=7,
    )
    check_config(given)
    settings = settings_of(given, None)
    parse_config({**settings, "rounds": 7})
    assert settings["sampling"] == {"completions": 4, "local": 4, "external": 0, "rule": "sapo"}
    assert settings["engine"] == {"max_completion_length": 16, "temperature": 1.0, "top_p": 1.0}
    trainer = settings["trainer"]
    trl = trainer["trl"]
    assert (trainer["learning_rate"], trl["epsilon"], trl["epsilon_high"]) == (1e-4, 0.1, 0.1)
    assert (trl["scale_rewards"], trl["lr_scheduler_type"], trl["report_to"]) == ("none", "linear", [])
    weighted = (trl["vllm_importance_sampling_mode"], trl["vllm_importance_sampling_clip_max"])
    assert weighted == ("sequence_mask", 3.0), "TRL's defaults are not the node's"
    assert (settings["network"], settings["seed"]) == ({"enabled": False}, 42)
    assert settings["policy"] == {"template": {"enable_thinking": False}}
    joined = settings_of(given, "swarm:invite")
    assert joined["sampling"] == {"completions": 4, "local": 4} and "network" not in joined
    assert rounds_of(given, ROWS) == 7
    assert rounds_of(config(num_train_epochs=2, num_generations=4, per_device_train_batch_size=8), ROWS) == 20


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"beta": 0.04}, "GRPOConfig: beta=0.04 has no counterpart in a node: leave it at 0.0"),
        ({"top_k": 50}, "top_k=50 has no counterpart"),
        ({"delta": 1.5}, "delta=1.5 has no counterpart"),
        ({"adam_beta1": 0.8}, "adam_beta1=0.8 has no counterpart in a node: leave it at 0.9"),
        ({"optim": "adafactor"}, "a node has AdamW"),
        ({"scale_rewards": "batch"}, "set 'group' or 'none'"),
        ({"use_vllm": True, "vllm_mode": "server"}, "vllm_mode='server' has no counterpart"),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 8}, "a node generates for each step"),
        ({"entropy_coef": 0.1}, "entropy_coef=0.1 has no counterpart"),
    ],
)
def test_what_has_no_counterpart_is_refused_in_one_line(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        check_config(config(**fields))


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ({"reward_funcs": "some/reward-model"}, "a reward model, which is not taken"),
        ({"reward_funcs": None}, "reward_funcs: give functions"),
        ({"model": object()}, "give its folder or its id"),
        ({"train_dataset": None}, "give rows with a prompt"),
        ({"tools": [print]}, "tools of TRL's GRPOTrainer is not taken"),
        ({"eval_dataset": {"a": ROWS}}, "give one set of rows"),
        ({"peft_config": LoraConfig(r=4, use_dora=True)}, "use_dora=True has no counterpart"),
        ({"peft_config": LoraConfig(r=4, target_modules=["q_proj"])}, "target_modules: give one text"),
    ],
)
def test_an_argument_that_cannot_be_mapped_is_one_clear_line(
    tmp_path: Path, more: dict[str, Any], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"model": "builtin", "reward_funcs": accuracy, "train_dataset": ROWS, **more}
    with pytest.raises(UserError, match=complaint):
        GRPOTrainer(**given)
    assert list(tmp_path.iterdir()) == []


# The form of TRL's documentation (quickstart and the page of GRPOTrainer), but for the import, the model and the rows.
SCRIPT = """
from datasets import load_dataset
from gossamer import GRPOTrainer
from trl import GRPOConfig
from trl.rewards import accuracy_reward, think_format_reward, get_soft_overlong_punishment

dataset = load_dataset("json", data_files="rows.jsonl", split="train")

def brevity(completions, **kwargs):
    return [1 / (1 + len(completion[0]["content"])) for completion in completions]

training_args = GRPOConfig(
    output_dir="builtin-GRPO",
    bf16=False,
    learning_rate=5e-4,
    max_steps=3,
    num_generations=4,
    per_device_train_batch_size=8,
    max_completion_length=12,
    logging_steps=1,
    reward_weights=[1.0, 1.0, 1.0, 0.5],
)
trainer = GRPOTrainer(
    model="builtin",
    reward_funcs=[accuracy_reward, think_format_reward, get_soft_overlong_punishment(12, 4), brevity],
    args=training_args,
    train_dataset=dataset,
)
trainer.train()
trainer.save_model("out")
"""


@pytest.mark.slow
def test_a_script_of_trls_form_trains_a_node_with_its_import_changed(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    rows = "".join(
        f'{{"prompt": [{{"role": "user", "content": "{n}+1="}}], "solution": "${n + 1}$"}}\n' for n in range(20)
    )
    (tmp_path / "rows.jsonl").write_text(rows)
    path = os.pathsep.join([str(ROOT), str(ROOT / "node" / "public")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "model.safetensors").exists()
    from node.telemetry.metrics import read_metrics

    found = read_metrics(tmp_path / "builtin-GRPO" / "metrics.jsonl")
    assert [row["round"] for row in found] == [1, 2, 3]
    names = ("accuracy_reward", "think_format_reward", "soft_overlong_punishment_reward", "brevity")
    assert all(f"rewards/{name}/mean" in found[0] for name in names)
    assert found[0]["rewards/brevity/mean"] > 0 and found[0]["trained"] == 8 == found[0]["generated"]
    assert found[0]["learning_rate"] > found[2]["learning_rate"] > 0


@pytest.mark.slow
def test_trls_own_script_trains_a_node_with_its_import_changed(tmp_path: Path) -> None:
    script = (Path(trl.__file__).parent / "scripts" / "grpo.py").read_text()
    changed = script.replace(
        "    from trl import GRPOTrainer, get_dataset,",
        "    from gossamer import GRPOTrainer\n    from trl import get_dataset,",
    )
    assert changed != script
    (tmp_path / "grpo.py").write_text(changed)
    (tmp_path / "rewards.py").write_text(
        "def short(completions, **kwargs):\n    return [float(len(c) < 9) for c in completions]\n"
    )
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text("".join(f'{{"prompt": "{n}+1="}}\n' for n in range(20)))
    path = os.pathsep.join([str(ROOT), str(ROOT / "node" / "public")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    words = {
        "model_name_or_path": "builtin", "dataset_name": "rows", "reward_funcs": "rewards.short", "output_dir": "out",
        "max_steps": 2, "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 8,
        "bf16": False, "use_cpu": True, "report_to": "none",
    }  # fmt: skip
    command = [sys.executable, "grpo.py", *(word for key, value in words.items() for word in (f"--{key}", str(value)))]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Training completed" in done.stdout
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()


# TRL's quick start, but for the import and the rows; its reward is in a file, as a peer could have it.
QUICKSTART = """
import sys
from gossamer import GRPOTrainer
from trl import GRPOConfig
import paid

args = GRPOConfig(
    output_dir="out", max_steps=16, learning_rate=5e-4, max_completion_length=12, bf16=False, use_cpu=True
)
rows = [{"prompt": f"{a}+{b}="} for a in range(20) for b in range(20)]
trainer = GRPOTrainer(model="builtin", reward_funcs=getattr(paid, sys.argv[1]), args=args, train_dataset=rows)
trainer.train()
"""
PAID = """
def near_20(completions, **kwargs):
    return [-abs(20 - len(one)) for one in completions]

def up_to_10(completions, **kwargs):
    return [float(min(len(one), 10)) for one in completions]
"""


@pytest.mark.slow
@pytest.mark.parametrize(("function", "lowest", "highest"), [("near_20", -20, 0), ("up_to_10", 0, 10)])
def test_trls_quick_start_learns_alone_from_rewards_outside_of_0_to_1(
    tmp_path: Path, function: str, lowest: float, highest: float
) -> None:
    from node.telemetry.metrics import read_metrics

    (tmp_path / "script.py").write_text(QUICKSTART)
    (tmp_path / "paid.py").write_text(PAID)
    path = os.pathsep.join([str(ROOT), str(ROOT / "node" / "public")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "script.py", function],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert "outside of its range" not in done.stderr, "alone, a reward has no range"
    rows = read_metrics(tmp_path / "out" / "metrics.jsonl")
    rewards = [row["reward"] for row in rows]
    assert rewards == [row[f"rewards/{function}/mean"] for row in rows], "the function's own, as in TRL"
    assert all(lowest <= one <= highest for one in rewards) and min(map(abs, rewards)) > 1
    assert sum(row["trained"] for row in rows) > 64
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 1.5


OPEN = """
from gossamer import Node
import paid

rows = [{"prompt": f"{a}+{b}="} for a in range(20) for b in range(20)]
node = Node("builtin", rewards=[paid.near_20], data=rows, folder="out", observe={"enabled": False})
node.train(rounds=3)
"""


@pytest.mark.slow
def test_a_program_whose_node_may_have_peers_is_told_on_its_screen_which_rewards_are_not_shared(tmp_path: Path) -> None:
    from node.telemetry.metrics import read_metrics

    (tmp_path / "script.py").write_text(OPEN)
    (tmp_path / "paid.py").write_text(PAID)
    path = os.pathsep.join([str(ROOT), str(ROOT / "node" / "public")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
        check=True,
    )
    assert done.stderr.count("outside of its range 0 to 1") == 1
    assert "task 'rewards/rows' pays -20 (near_20 -20), outside" in done.stderr
    rows = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert all(row["rewards_outside"] == row["generated"] for row in rows) and sum(row["trained"] for row in rows) > 0

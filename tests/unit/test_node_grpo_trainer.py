"""TRL's arguments for a node: each field of `GRPOConfig` is mapped, has no effect, or is refused in one line."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import warnings
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import trl
from gossamer import GRPOTrainer
from peft import LoraConfig, PeftModel, PromptTuningConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, EarlyStoppingCallback, TrainerCallback
from trl import GRPOConfig

from node.config import PASSED, PolicyConfig, flatten, is_key, parse_config
from node.engines import Generated
from node.engines.episodes import Played
from node.errors import UserError
from node.grpo_config import (
    MAPPED,
    READ,
    REFUSED,
    WITHOUT_EFFECT,
    complaints_about,
    evaluates,
    model_said,
    settings_of,
)
from node.grpo_metrics import advantages, loss
from node.grpo_trainer import _tokenizer, rounds_of
from node.policy.load import load_policy

ROOT = Path(__file__).parents[2]
ROWS = [{"prompt": f"{n}+{n}=", "solution": str(2 * n)} for n in range(20)]


def accuracy(completions, solution, **kwargs):
    return [float(text.strip() == right) for text, right in zip(completions, solution, strict=True)]


def config(**fields: Any) -> GRPOConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return GRPOConfig(output_dir="out", bf16=False, **fields)


FIELDS = [field.name for field in dataclasses.fields(GRPOConfig)]


@pytest.mark.parametrize("name", FIELDS)
def test_each_field_of_the_installed_config_is_mapped_passed_read_without_effect_or_refused(name: str) -> None:
    assert sum(name in table for table in (MAPPED, PASSED, READ, WITHOUT_EFFECT, REFUSED)) == 1


def test_every_field_that_is_named_is_one_of_trls_and_every_setting_one_of_ours() -> None:
    named = {*MAPPED, *PASSED, *READ, *WITHOUT_EFFECT, *REFUSED}
    assert named <= set(FIELDS)
    assert all(map(is_key, MAPPED.values())) and all(is_key(f"trainer.trl.{name}") for name in PASSED)


def test_a_field_of_another_trl_is_refused_by_its_name_unless_it_has_its_default() -> None:
    newer = dataclasses.make_dataclass("Newer", [("brand_new", int, 0)], bases=(GRPOConfig,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert list(complaints_about(newer(output_dir="out", bf16=False))) == []
        (line,) = complaints_about(newer(output_dir="out", bf16=False, brand_new=1))
    assert line == "GRPOConfig: brand_new=1: this release does not know the field; leave it at 0"


def test_a_default_config_is_taken_and_what_it_says_becomes_settings() -> None:
    assert list(complaints_about(config())) == []
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
    assert list(complaints_about(given)) == []
    settings = settings_of(given, 7)
    parse_config({**settings, "rounds": 7})
    assert settings["sampling"] == {"completions": 4, "local": 4}
    assert settings["engine"] == {"max_completion_length": 16, "temperature": 1.0, "top_p": 1.0}
    trainer = settings["trainer"]
    trl = trainer["trl"]
    assert (trainer["learning_rate"], trl["epsilon"], trl["epsilon_high"]) == (1e-4, 0.1, 0.1)
    assert (trl["scale_rewards"], trl["lr_scheduler_type"], trl["report_to"]) == ("none", "linear", [])
    weighted = (trl["vllm_importance_sampling_mode"], trl["vllm_importance_sampling_clip_max"])
    assert weighted == ("sequence_mask", 3.0), "TRL's defaults are not the node's"
    assert settings["policy"] == {"template": {"enable_thinking": False}} and settings["seed"] == 42
    assert settings["eval"] == {"every": 0} and "network" not in settings
    assert rounds_of(given, ROWS) == 7
    assert rounds_of(config(num_train_epochs=2, num_generations=4, per_device_train_batch_size=8), ROWS) == 20


@pytest.mark.parametrize(
    ("fields", "rounds", "expected"),
    [
        ({"warmup_steps": 0.1}, 20, {"trainer.trl.warmup_steps": 2}),
        ({"warmup_steps": 5}, 20, {"trainer.trl.warmup_steps": 5}),
        ({"num_iterations": 2, "max_steps": 9, "save_steps": 4, "warmup_steps": 4}, 5,
         {"trainer.num_iterations": 2, "trainer.save_steps": 2, "trainer.trl.warmup_steps": 2}),
        ({"save_steps": 0.25}, 40, {"trainer.save_steps": 10}),
        ({"optim": "adamw_8bit"}, 1, {"trainer.trl.optim": "adamw_8bit"}),
        ({"optim": "paged_adamw_8bit"}, 1, {"trainer.trl.optim": "adamw_8bit"}),
        ({"delta": 1.5, "adam_beta1": 0.8}, 1, {"trainer.trl.delta": 1.5, "trainer.trl.adam_beta1": 0.8}),
        ({"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-7}}, 9,
         {"trainer.trl.lr_scheduler_kwargs": {"min_lr": 1e-7}}),
        ({"vllm_max_model_length": 1024, "max_completion_length": 24}, 1, {"engine.max_prompt_length": 1000}),
        ({"eval_strategy": "steps", "eval_steps": 5, "num_generations_eval": 2}, 9,
         {"eval.every": 5, "eval.completions": 2, "eval.count": 20}),
        ({"eval_strategy": "steps", "logging_steps": 7}, 9, {"eval.every": 7, "eval.completions": 8}),
        ({"eval_strategy": "epoch", "num_train_epochs": 3}, 60, {"eval.every": 20}),
    ],
)  # fmt: skip
def test_a_field_becomes_a_setting(fields: dict[str, Any], rounds: int, expected: dict[str, Any]) -> None:
    given = config(**fields)
    assert list(complaints_about(given)) == []
    assert rounds_of(given, []) in (1, rounds)
    settings = flatten(settings_of(given, rounds, tests=20))
    trl = settings.pop("trainer.trl")
    settings |= {f"trainer.trl.{name}": value for name, value in trl.items()}
    assert {name: settings.get(name) for name in expected} == expected
    parse_config({**settings_of(given, rounds, tests=20), "rounds": rounds})


@pytest.mark.parametrize(
    ("fields", "due"),
    [
        ({"eval_strategy": "steps", "eval_steps": 4}, [4, 8, 9]),
        ({"eval_strategy": "steps", "eval_steps": 4, "eval_on_start": True}, [0, 4, 8, 9]),
        ({"eval_strategy": "steps", "eval_steps": 2, "eval_delay": 5}, [6, 8, 9]),
        ({"eval_strategy": "epoch", "num_train_epochs": 3}, [3, 6, 9]),
        ({"eval_strategy": "epoch", "num_train_epochs": 3, "eval_delay": 2}, [6, 9]),
    ],
)
def test_a_node_evaluates_when_trls_trainer_would(fields: dict[str, Any], due: list[int]) -> None:
    assert [done for done in range(10) if evaluates(config(**fields), 9)(done)] == due


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"beta": 0.04}, "GRPOConfig: beta=0.04: no reference model is kept; leave it at 0.0"),
        ({"top_k": 50}, "top_k=50: it changes the distribution"),
        ({"fp16": True}, "fp16=True: a node computes in float32 or bfloat16"),
        ({"optim": "adafactor"}, "a node has AdamW: adamw_torch, "),
        ({"scale_rewards": "batch"}, "set 'group' or 'none'"),
        ({"use_vllm": True, "vllm_mode": "server"}, "vllm_mode='server': a node's vLLM servers are set by engine="),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 8}, "a node generates for each step"),
        ({"entropy_coef": 0.1}, "entropy_coef=0.1: it pulls at completions"),
    ],
)
def test_what_has_no_counterpart_is_refused_in_one_line(fields: dict[str, Any], complaint: str) -> None:
    (line,) = complaints_about(config(**fields))
    assert complaint in line


def test_all_that_is_refused_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        GRPOTrainer(
            "builtin",
            "some/reward-model",
            config(beta=0.1, top_k=5, model_init_kwargs={"dtype": "float64"}),
            ROWS,
            peft_config={"r": 8, "rank": 4},
            tools=[print],
            tool=None,
        )
    first, *lines = str(caught.value).split("\n- ")
    assert first == "7 things that GRPOTrainer was given are not taken:"
    begins = (
        *("reward_funcs: ", "GRPOTrainer has no argument 'tool'", "tools of TRL's GRPOTrainer is not taken: an env"),
        *("GRPOConfig: top_k", "GRPOConfig: beta", "peft_config: ", "model_init_kwargs: dtype=float64: "),
    )
    assert all(line.startswith(begin) for line, begin in zip(lines, begins, strict=True)), lines
    assert "'rank'" in lines[5]


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ({"reward_funcs": "some/reward-model"}, "a reward model, which is not taken"),
        ({"reward_funcs": None}, "reward_funcs: give functions"),
        ({"model": object()}, "give its folder or its id"),
        ({"train_dataset": None}, "give rows with a prompt"),
        ({"train_dataset": "rows.jsonl", "args": config()}, "train_dataset is a file: set max_steps"),
        ({"tools": [print]}, "tools of TRL's GRPOTrainer is not taken"),
        ({"eval_dataset": {"a": ROWS}}, "give one set of rows"),
        ({"train_dataset": {"train": ROWS, "test": ROWS}}, r"'train'\], not several by name \(train, test\)"),
        ({"callbacks": [EarlyStoppingCallback(2)]}, "should_training_stop in on_evaluate of a callback of yours"),
        ({"callbacks": [print, TrainerCallback, "wandb"]}, "^callbacks: 'wandb' cannot be called$"),
        ({"peft_config": LoraConfig(r=4, use_dora=True)}, "use_dora=True has no counterpart"),
        ({"peft_config": PromptTuningConfig(num_virtual_tokens=4)}, "a PromptTuningConfig is not taken"),
        ({"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}, "bnb_4bit_quant_type='nf4' alone"),
        ({"engine": {"max_prompt": 5}}, "unknown configuration key 'engine.max_prompt'"),
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


NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


@pytest.mark.parametrize(
    ("lora", "init", "packed", "policy", "notes"),
    [
        ({"r": 4, "target_modules": ["v_proj", "q_proj"]}, {}, None,
         {"lora": {"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]}}, []),
        ({"r": 4, "lora_alpha": 9, "target_modules": "all-linear", "lora_dropout": 0.05}, {}, None,
         {"lora": {"r": 4, "alpha": 9, "target_modules": "all-linear"}}, ["lora_dropout=0.05 is not applied"]),
        ({}, {"dtype": "bfloat16"}, None,
         {"lora": {"r": 8, "alpha": 8, "target_modules": []}, "dtype": "bfloat16"}, []),
        ({}, {}, NF4, {"lora": {"r": 8, "alpha": 8, "target_modules": []}, "dtype": "nf4"}, []),
        (None, {"torch_dtype": torch.bfloat16, "revision": None}, None, {}, ["are float32 here, and not bfloat16"]),
        (None, {"attn_implementation": "flash_attention_2", "device_map": "auto"}, None, {},
         ["attention is sdpa here", "device_map='auto' has no effect"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("as_dict", [True, False])
def test_what_is_said_of_the_model_is_taken(
    lora: Any, init: dict[str, Any], packed: Any, policy: dict[str, Any], notes: list[str], as_dict: bool
) -> None:
    given = lora if as_dict or lora is None else LoraConfig(**lora)
    said = model_said(config(model_init_kwargs=init), given, packed)
    assert (said.policy, said.complaints) == (policy, [])
    assert len(said.notes) == len(notes) and all(part in note for part, note in zip(notes, said.notes, strict=True))
    parse_config({"policy": said.policy})


class TrlsLoss(SimpleNamespace):
    """What TRL's loss reads of its trainer in an evaluation."""

    top_entropy_quantile, off_policy_mask_threshold, beta, use_vllm = 1.0, None, 0.0, False
    aux_loss_enabled, _entropy_bonus_enabled, vllm_importance_sampling_correction = False, False, False
    accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)
    model = SimpleNamespace(training=False)
    get_gamma_weights = staticmethod(trl.GRPOTrainer.get_gamma_weights)

    def __init__(self, args: GRPOConfig, logps: torch.Tensor) -> None:
        super().__init__(args=args, loss_type=args.loss_type, epsilon_low=args.epsilon, _metrics={"eval": {}})
        self.epsilon_high = args.epsilon_high or args.epsilon
        self.importance_sampling_level = args.importance_sampling_level
        self.max_completion_length = args.max_completion_length
        self._metrics = {"eval": defaultdict(list)}
        self._logps = logps

    def _get_per_token_logps_and_entropies(self, *_: Any, **__: Any) -> Any:
        return self._logps, torch.zeros_like(self._logps), None


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"])
def test_the_loss_of_an_evaluation_is_trls(kind: str, level: str, cut: bool) -> None:
    args = config(loss_type=kind, importance_sampling_level=level, mask_truncated_completions=cut, epsilon_high=0.3)
    counts, ended = [3, 1, 5, 2], [True, True, False, True]
    logps = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).abs().neg()
    played = [Played((Generated((0,) * count, "", end),)) for count, end in zip(counts, ended, strict=True)]
    advantage = advantages(torch.tensor([[0.0, 1.0], [0.25, 2.0]]), "group").flatten()
    whole = torch.arange(5) < torch.tensor(counts)[:, None]
    mask = whole & torch.tensor(ended)[:, None] if cut else whole
    ids = torch.zeros(4, 5, dtype=torch.long)
    batch = {"prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": mask.long()}
    batch |= {"advantages": advantage, "num_items_in_batch": mask.sum()}
    expected = trl.GRPOTrainer._compute_loss(TrlsLoss(args, logps), None, batch)
    found = loss(advantage, [row[:count] for row, count in zip(logps, counts, strict=True)], played, args)
    assert found == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)


def here(function: Any) -> Any:
    """A function of this process, which no worker has to import with all of this file."""

    @functools.wraps(function)
    def inside(*args: Any, **columns: Any) -> Any:
        return function(*args, **columns)

    inside.__qualname__ = "here.inside"
    return inside


class Watching(TrainerCallback):
    """Notes the steps that are logged, and the metrics of evaluations."""

    steps: ClassVar[list[int]] = []
    evaluated: ClassVar[list[tuple[int, dict[str, float]]]] = []

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps.append(state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        self.evaluated.append((state.global_step, metrics))


# Of TRL's own script with the same arguments, but for `num_tokens` and `model_preparation_time`.
EVALUATED = {
    *("loss", "reward", "reward_std", "frac_reward_zero_std", "rewards/accuracy/mean", "rewards/accuracy/std"),
    *("completions/mean_length", "completions/min_length", "completions/max_length", "completions/clipped_ratio"),
    *("completions/mean_terminated_length", "completions/min_terminated_length", "completions/max_terminated_length"),
    *("entropy", "clip_ratio/low_mean", "clip_ratio/low_min", "clip_ratio/high_mean", "clip_ratio/high_max"),
    "clip_ratio/region_mean",
}
TESTS = [{"prompt": f"{n}*{n}=", "solution": str(n * n)} for n in range(4)]


def test_a_script_may_give_its_rewards_the_network_and_more_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    more = {"judge": True, "seconds": 40}
    trainer = GRPOTrainer("builtin", here(accuracy), config(max_steps=1), ROWS, reward_options=more)
    (task,) = trainer.node._named["tasks"]
    assert more.items() <= task["options"].items()


@pytest.mark.slow
def test_a_script_runs_twice_and_finds_after_training_what_trls_scripts_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fields = {"use_cpu": True, "max_completion_length": 8, "eval_strategy": "steps", "eval_steps": 2}

    def trainer(steps: int) -> GRPOTrainer:
        args = config(max_steps=steps, **fields)
        return GRPOTrainer("builtin", here(accuracy), args, ROWS, TESTS, callbacks=[Watching])

    for steps, lines in (
        (3, ["loading tasks", "evaluating", "held_out_for_evaluation=4"]),
        (3, ["all 3 rounds are done"]),
    ):
        one = trainer(steps)
        made = one.train(resume_from_checkpoint=True)
        said = capfd.readouterr().err
        assert all(line in said for line in lines), said
        assert (made.global_step, one.state.global_step, one.state.max_steps) == (3, 3, 3)
    evaluated = [json.loads(line)["round"] for line in Path("out/evaluations.jsonl").read_text().splitlines()]
    assert evaluated == [2, 3], "not before the first step, as transformers does"
    assert Watching.steps[:3] == [1, 2, 3] and one.state.epoch == 3 / len(ROWS)
    history = one.state.log_history
    assert [row["step"] for row in history] == [1, 2, 2, 3, 3]
    evaluations = [{key: row[key] for key in row.keys() - {"step", "epoch"}} for row in (history[2], history[4])]
    assert Watching.evaluated == [(2, evaluations[0]), (3, evaluations[1])]
    assert evaluations[0].keys() == {f"eval_{name}" for name in EVALUATED}
    one.log_metrics("train", made.metrics)
    one.save_metrics("train", made.metrics)
    one.save_state()
    assert json.loads(Path("out/trainer_state.json").read_text())["global_step"] == 3
    assert "train_runtime" in json.loads(Path("out/train_results.json").read_text())
    found = one.evaluate()
    speed = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
    assert found.keys() == {*(f"eval_{name}" for name in EVALUATED), *speed, "epoch"}
    assert {key: found[key] for key in evaluations[1]} == pytest.approx(evaluations[1]), "as after the last round"
    assert one.model is one.model and one.node.generate(["1+1="])
    with pytest.raises(UserError, match="goes on from its newest checkpoint"):
        trainer(5).train(resume_from_checkpoint="out/checkpoints/checkpoint-1")
    more = trainer(4)
    more.add_callback(Watching)
    assert more.train().global_step == 4 and "goes on after round 3 of 4" in capfd.readouterr().err
    Path("saved").mkdir()
    Path("saved/notes").write_text("mine")
    Path("saved/model-00001-of-00002.safetensors").write_text("of an earlier export")
    for _ in range(2):
        more.save_model("saved")
    loaded = AutoModelForCausalLM.from_pretrained("saved")
    assert torch.equal(loaded.get_input_embeddings().weight, more.model.get_input_embeddings().weight)
    assert Path("saved/notes").exists() and not list(Path("saved").glob("model-*"))


class Stopping(TrainerCallback):
    """Asks for the end of the training after an update, as transformers' callbacks do: without asking for a save."""

    def __init__(self, event: str, step: int) -> None:
        setattr(self, event, self._stop)
        self._step = step

    def _stop(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == self._step


@pytest.mark.parametrize(
    ("event", "step", "iterations", "ends"),
    [("on_step_end", 2, 1, 2), ("on_log", 2, 1, 2), ("on_evaluate", 2, 1, 2), ("on_step_end", 3, 2, 4)],
)
def test_a_callback_that_stops_the_training_leaves_a_checkpoint_of_the_rounds_whole_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, event: str, step: int, iterations: int, ends: int
) -> None:
    monkeypatch.chdir(tmp_path)
    fields = {"use_cpu": True, "max_completion_length": 8, "eval_strategy": "steps", "eval_steps": 1}
    args = config(max_steps=8, num_iterations=iterations, **fields)
    trainer = GRPOTrainer("builtin", here(accuracy), args, ROWS, TESTS, callbacks=[Stopping(event, step)])
    made = trainer.train()
    assert (made.global_step, trainer.state.global_step) == (ends, ends)
    assert trainer.node.checkpoint[1] == len(trainer.node.metrics) == 2, "save_model has what was trained"


@pytest.mark.slow
def test_adapters_are_saved_as_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    args = config(max_steps=1, use_cpu=True, max_completion_length=8)
    one = GRPOTrainer("builtin", here(accuracy), args, ROWS, peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    one.train()
    assert isinstance(one.model, PeftModel)
    for _ in range(2):
        one.save_model("adapters")
    saved = LoraConfig.from_pretrained("adapters")
    assert (saved.r, list(saved.target_modules)) == (2, ["q_proj"]) and not Path("adapters/model.safetensors").exists()
    again = PeftModel.from_pretrained(load_policy(PolicyConfig()).model, "adapters")
    assert {name for name, _ in again.named_parameters() if "lora" in name}


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
    from node.telemetry.metrics_file import read_metrics

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


def run_script(folder: Path, text: str, *arguments: str, timeout: float) -> "subprocess.CompletedProcess[str]":
    """Run a script in `folder`, beside the reward functions of paid.py, to its good end."""
    (folder / "script.py").write_text(text)
    (folder / "paid.py").write_text(PAID)
    path = os.pathsep.join([str(ROOT), str(ROOT / "node" / "public")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "script.py", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout, check=True
    )


@pytest.mark.slow
@pytest.mark.parametrize(("function", "lowest", "highest"), [("near_20", -20, 0), ("up_to_10", 0, 10)])
def test_trls_quick_start_learns_alone_from_rewards_outside_of_0_to_1(
    tmp_path: Path, function: str, lowest: float, highest: float
) -> None:
    from node.telemetry.metrics_file import read_metrics

    done = run_script(tmp_path, QUICKSTART, function, timeout=300)
    assert "outside of its range" not in done.stderr, "alone, a reward has no range"
    rows = read_metrics(tmp_path / "out" / "metrics.jsonl")
    rewards = [row["reward"] for row in rows]
    assert rewards == [row[f"rewards/{function}/mean"] for row in rows], "the function's own, as in TRL"
    assert all(lowest <= reward <= highest for reward in rewards) and min(map(abs, rewards)) > 1
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
    from node.telemetry.metrics_file import read_metrics

    done = run_script(tmp_path, OPEN, timeout=110)
    assert done.stderr.count("outside of its range 0 to 1") == 1
    assert "task 'rewards/rows' pays -20 (near_20 -20), outside" in done.stderr
    rows = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert all(row["rewards_outside"] == row["generated"] for row in rows) and sum(row["trained"] for row in rows) > 0


def test_functions_count_tokens_of_a_model_that_is_named_by_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cached(model: str, name: str) -> str:
        if model != "Qwen/Qwen3-0.6B":
            raise OSError("not there")
        return f"hub/{name}"

    monkeypatch.setattr("transformers.utils.cached_file", cached)
    names = ("builtin", "Qwen/Qwen3-0.6B", "nobody/none", str(tmp_path))
    assert [_tokenizer(name) for name in names] == [None, "hub/tokenizer.json", None, None]
    (tmp_path / "tokenizer.json").touch()
    assert _tokenizer(str(tmp_path)) == str(tmp_path / "tokenizer.json")
